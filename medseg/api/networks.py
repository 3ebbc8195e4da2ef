"""The network a recipe asks for, on the topology that was planned."""

from __future__ import annotations

import math
from typing import Any

from medseg.errors import ConfigError
from medseg.models.mednext import SIZES, WIDEST
from medseg.schema.plans import Architecture, Configuration, kind_problem
from medseg.schema.recipe import NetworkRecipe

_RESIDUAL_BLOCKS = (1, 3, 4, 6)


def apply_network(configuration: Configuration, changes: NetworkRecipe) -> Configuration:
    """Return the configuration with a recipe's changes to its network.

    Strides and the number of stages stay the planned ones. Another kind brings its usual number
    of blocks, MedNeXt also its kernels (1 stays 1) and features up to 16 times those at full
    resolution.

    Raises:
        ConfigError: With every change that does not fit.
    """
    planned = configuration.architecture
    kind = changes.kind or planned.kind
    if problems := _problems(kind, changes):
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise ConfigError("\n".join([f"{count} in the recipe:", *(f"  {p}" for p in problems)]))
    updates: dict[str, Any] = {"kind": kind, "features": _features(planned, kind, changes)}
    if kind != planned.kind:
        updates |= _blocks(kind, len(planned.features))
    if kind in SIZES and (kind != planned.kind or changes.kernel_size is not None):
        updates["kernel_sizes"] = _kernels(planned, changes.kernel_size or 3)
    if changes.options or kind != planned.kind:
        updates["options"] = dict(changes.options)
    architecture = planned.model_copy(update=updates)
    return configuration.model_copy(update={"architecture": architecture})


def scaled_patch(configuration: Configuration, fraction: float) -> tuple[int, ...]:
    """Return the planned patch times `fraction`, in voxels.

    Each axis is rounded to a multiple of the product of the network's strides along it.
    """
    divisors = [math.prod(axis) for axis in zip(*configuration.architecture.strides, strict=True)]
    return tuple(
        min(size, max(1, round(size * fraction / divisor)) * divisor)
        for size, divisor in zip(configuration.patch_size, divisors, strict=True)
    )


def _problems(kind: str, changes: NetworkRecipe) -> list[str]:
    problems = []
    if (problem := kind_problem(kind)) is not None:
        problems.append(f"network.kind: got {kind!r}; {problem}")
    if changes.kernel_size is not None and kind not in SIZES:
        problems.append(
            f"network.kernel_size: got {changes.kernel_size}, but only MedNeXt has such kernels; "
            f"{kind!r} keeps the planned ones. Leave it out."
        )
    if changes.options and ":" not in kind and kind not in SIZES:
        names = ", ".join(changes.options)
        problems.append(f"network.options: got {names}; {kind!r} takes none. Leave them out.")
    return problems


def _features(planned: Architecture, kind: str, changes: NetworkRecipe) -> tuple[int, ...]:
    """Return the features of each stage: doubled from one to the next up to a limit."""
    base = changes.base_features or planned.features[0]
    limit = changes.max_features or max(planned.features)
    becomes_mednext = kind in SIZES and kind != planned.kind
    if becomes_mednext and changes.max_features is None:
        limit = WIDEST * base
    if not (changes.base_features or changes.max_features or becomes_mednext):
        return planned.features
    return tuple(min(base * 2**stage, limit) for stage in range(len(planned.features)))


def _kernels(planned: Architecture, size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(1 if planned_size == 1 else size for planned_size in kernel)
        for kernel in planned.kernel_sizes
    )


def _blocks(kind: str, num_stages: int) -> dict[str, tuple[int, ...]]:
    """Return the usual number of blocks of each stage of encoder and decoder.

    Source:
        Default and residual-encoder planners of nnU-Net v2; Roy et al. 2023 for MedNeXt.
    """
    if kind in SIZES:
        blocks = SIZES[kind].blocks_of(num_stages)
        return {"blocks_encoder": blocks, "blocks_decoder": blocks[:-1]}
    if kind == "residual_unet":
        deeper = (_RESIDUAL_BLOCKS[-1],) * num_stages
        blocks = (_RESIDUAL_BLOCKS + deeper)[:num_stages]
        return {"blocks_encoder": blocks, "blocks_decoder": (1,) * (num_stages - 1)}
    return {"blocks_encoder": (2,) * num_stages, "blocks_decoder": (2,) * (num_stages - 1)}
