"""Patch size and batch size of one configuration, as large as the memory allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medseg.errors import PlanError
from medseg.plan.memory import feature_map_voxels
from medseg.plan.operations import step_operations
from medseg.plan.presets import INITIAL_EDGE, MIN_BATCH, REFERENCE_BATCH, Preset
from medseg.plan.topology import Topology, network_topology
from medseg.schema.plans import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a plan may cost and what it is for; the same for all configurations of one plan."""

    preset: Preset
    """Kind and constants of the planner."""
    memory_gb: float
    """GPU memory to fill."""
    num_logits: int
    """Output channels the estimate reckons with."""
    num_cases: int
    """Training cases."""
    num_inputs: int = 1
    """Input channels."""

    def allowed_voxels(self, dimension: int) -> float:
        """Return how many feature map values of the reference batch fit, per sample."""
        reference = self.preset.reference_voxels[dimension]
        return reference * (self.memory_gb / self.preset.memory_gb)

    def patches_to_fit(self, dimension: int) -> int:
        """Return how many patches must fit; a patch is cut until that many do."""
        return MIN_BATCH if self.preset.large_2d_patch else REFERENCE_BATCH[dimension]

    @property
    def is_timed(self) -> bool:
        """Return whether the time of a step is limited, as it is without a GPU."""
        return math.isfinite(self.preset.max_operations)

    @property
    def words(self) -> str:
        """Return what a batch has to fit."""
        if self.is_timed:
            return f"{self.preset.max_operations / 1e9:g} billion operations a step"
        return f"{self.memory_gb:g} GB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """The patch, network and batch of one configuration, and what decided them."""

    spacing: tuple[float, ...]
    """Target voxel size in mm."""
    median_shape: tuple[float, ...]
    """Median image shape at that voxel size, in voxels."""
    topology: Topology
    """The network, and the patch it takes."""
    batch_size: int
    """Patches per optimiser step."""
    first_patch: tuple[int, ...]
    """Patch before it was reduced to fit the memory."""
    batch_by_cost: int
    """Batch size the memory (or the time of a step) alone allows."""
    batch_by_dataset: int
    """Batch size at which a step sees the largest allowed share of the data set."""

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Return the patch in voxels."""
        return self.topology.patch_size

    @property
    def coverage(self) -> float:
        """Return voxels of the patch per voxel of the median image."""
        return math.prod(self.patch_size) / math.prod(self.median_shape)


def size_configuration(
    spacing: Sequence[float],
    median_shape: Sequence[float],
    *,
    budget: Budget,
    num_voxels_case: float,
) -> Sizing:
    """Return the largest patch and batch within the budget.

    The patch starts with the content of a 256-cube (a 2048-square in 2D) of cubic aspect in mm,
    at most as large as the median image. While a batch does not fit (of two; of twelve in 2D with
    the residual presets), the axis that is the largest relative to the median image is shortened
    by one step. Memory left over goes into the batch, up to a share of the data set.

    Args:
        spacing: Target voxel size in mm; two entries for 2D.
        median_shape: Median image shape at that voxel size, in voxels.
        budget: What the configuration may cost.
        num_voxels_case: Voxels of a median case, all slices included.

    Raises:
        PlanError: If no patch fits.

    Source:
        Behaviour of nnU-Net 2.8.1 `get_plans_for_configuration`, default and ResEnc planners. Of
        axes that are equally large relative to the median image, the last one is shortened.
    """
    topology = first = network_topology(spacing, _first_patch(spacing, median_shape))
    while not _fits(topology, budget):
        topology = _shortened(topology, spacing, median_shape)
    by_cost = _largest_batch(topology, budget)
    share = num_voxels_case * budget.num_cases * budget.preset.max_dataset_share
    by_dataset = round(share / math.prod(topology.patch_size))
    return Sizing(
        spacing=tuple(float(v) for v in spacing),
        median_shape=tuple(float(v) for v in median_shape),
        topology=topology,
        batch_size=max(min(by_cost, by_dataset), MIN_BATCH),
        first_patch=first.patch_size,
        batch_by_cost=by_cost,
        batch_by_dataset=by_dataset,
    )


def architecture(topology: Topology, preset: Preset) -> Architecture:
    """Return the network of a preset on a topology."""
    num_stages = len(topology.strides)
    blocks_encoder, blocks_decoder = preset.blocks(num_stages)
    return Architecture(
        kind=preset.kind,
        features=preset.features(num_stages, len(topology.patch_size)),
        kernel_sizes=topology.kernel_sizes,
        strides=topology.strides,
        blocks_encoder=blocks_encoder,
        blocks_decoder=blocks_decoder,
    )


def _first_patch(spacing: Sequence[float], median_shape: Sequence[float]) -> list[float]:
    dimension = len(spacing)
    inverse = 1 / np.array(spacing, dtype=np.float64)
    content = float(INITIAL_EDGE[dimension] ** dimension)
    cube = inverse * (content / np.prod(inverse)) ** (1 / dimension)
    return [min(round(float(v)), m) for v, m in zip(cube, median_shape, strict=True)]


def _fits(topology: Topology, budget: Budget) -> bool:
    """Return whether as many patches as have to fit a step do."""
    dimension = len(topology.patch_size)
    patches = budget.patches_to_fit(dimension)
    room = REFERENCE_BATCH[dimension] / patches
    if _needed_voxels(topology, budget) / room > budget.allowed_voxels(dimension):
        return False
    return _operations(topology, budget) * patches <= budget.preset.max_operations


def _largest_batch(topology: Topology, budget: Budget) -> int:
    """Return the batch that memory and time of a step allow."""
    dimension = len(topology.patch_size)
    allowed, needed = budget.allowed_voxels(dimension), _needed_voxels(topology, budget)
    by_memory = round(allowed / needed * REFERENCE_BATCH[dimension])
    if not budget.is_timed:
        return by_memory
    return min(by_memory, int(budget.preset.max_operations // _operations(topology, budget)))


def _operations(topology: Topology, budget: Budget) -> float:
    """Return the operations of a step for one patch; 0 where they are not limited."""
    if not budget.is_timed:
        return 0
    return step_operations(
        architecture(topology, budget.preset),
        topology.patch_size,
        num_inputs=budget.num_inputs,
        num_logits=budget.num_logits,
    )


def _needed_voxels(topology: Topology, budget: Budget) -> int:
    """Return the feature map values of one sample."""
    network = architecture(topology, budget.preset)
    return feature_map_voxels(
        network.kind,
        topology.patch_size,
        features=network.features,
        strides=network.strides,
        blocks_encoder=network.blocks_encoder,
        blocks_decoder=network.blocks_decoder,
        num_logits=budget.num_logits,
    )


def _shortened(
    topology: Topology, spacing: Sequence[float], median_shape: Sequence[float]
) -> Topology:
    """Return the network for the next smaller patch.

    The step is the divisor of the patch that is one of the present steps smaller, which may be
    finer: 256 with divisor 64 becomes 224, not 192.
    """
    patch = topology.patch_size
    ratios = [length / whole for length, whole in zip(patch, median_shape, strict=True)]
    axis = max(range(len(patch)), key=lambda d: (ratios[d], d))
    step = network_topology(spacing, _reduced(patch, axis, topology.divisor[axis])).divisor[axis]
    if patch[axis] <= step:
        raise PlanError(
            f"no patch fits the memory: the smallest tried is {' x '.join(map(str, patch))} voxels "
            f"at a voxel size of {' x '.join(f'{v:.4g}' for v in spacing)} mm. "
            "Allow more GPU memory."
        )
    return network_topology(spacing, _reduced(patch, axis, step))


def _reduced(patch: tuple[int, ...], axis: int, step: int) -> list[int]:
    return [length - step if d == axis else length for d, length in enumerate(patch)]
