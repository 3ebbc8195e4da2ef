"""From voxel size and patch size to strides and kernels of a U-Net."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from medseg.plan.presets import MIN_EDGE

SIMILAR = 2.0
"""Axes whose voxel sizes differ by less than this factor are treated alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Strides and kernels of a U-Net, and the patch that passes through it without remainder."""

    patch_size: tuple[int, ...]
    """Patch in voxels, every axis divisible by its entry of `divisor`."""
    strides: tuple[tuple[int, ...], ...]
    """Stride of each stage and axis; the first entry is all ones."""
    kernel_sizes: tuple[tuple[int, ...], ...]
    """Kernel size of each stage and axis."""
    divisor: tuple[int, ...]
    """Product of the strides of each axis."""


def network_topology(spacing: Sequence[float], patch_size: Sequence[float]) -> Topology:
    """Return the deepest network that voxel size and patch size allow.

    Each stage halves the axes that are still long enough (8 voxels; 12 if it is the only axis) and
    whose voxels, as large as the halving before made them, are less than twice the smallest among
    the long enough. An axis has kernel size 1 until its voxels are less than twice the smallest of
    all axes, then 3; the last stage has 3 everywhere. At the end the patch grows to the next
    multiple of the strides.

    Args:
        spacing: Voxel size in mm, one entry per axis.
        patch_size: Wanted patch in voxels, one entry per axis; a half voxel (a median) is allowed.

    Source:
        Behaviour of nnU-Net 2.8.1 `get_pool_and_conv_props`, without a limit on the halvings.

    Examples:
        >>> network_topology((5.0, 1.0, 1.0), (14.5, 40, 33)).strides
        ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2))
    """
    return _topology(tuple(float(v) for v in spacing), tuple(float(v) for v in patch_size))


@lru_cache(maxsize=8192)
def _topology(spacing: tuple[float, ...], patch_size: tuple[float, ...]) -> Topology:
    voxels, size = list(spacing), list(patch_size)
    kernel = [1] * len(size)
    strides, kernels = [(1,) * len(size)], []
    while axes := _axes_to_halve(voxels, size):
        kernel = [
            3 if v / min(voxels) < SIMILAR else k for k, v in zip(kernel, voxels, strict=True)
        ]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in axes else 1 for axis in range(len(size))))
        for axis in axes:
            voxels[axis] *= 2
            size[axis] = math.ceil(size[axis] / 2)
    kernels.append((3,) * len(size))
    divisor = tuple(math.prod(column) for column in zip(*strides, strict=True))
    return Topology(
        patch_size=tuple(math.ceil(v / d) * d for v, d in zip(patch_size, divisor, strict=True)),
        strides=tuple(strides),
        kernel_sizes=tuple(kernels),
        divisor=divisor,
    )


def _axes_to_halve(spacing: list[float], size: list[float]) -> list[int]:
    """Return the axes the next stage halves; empty where the network ends."""
    long_enough = [axis for axis, length in enumerate(size) if length >= 2 * MIN_EDGE]
    if not long_enough:
        return []
    smallest = min(spacing[axis] for axis in long_enough)
    axes = [axis for axis in long_enough if spacing[axis] / smallest < SIMILAR]
    if len(axes) == 1 and size[axes[0]] < 3 * MIN_EDGE:
        return []
    return axes
