"""Binary shapes on any device: balls that grow and shrink them, and their connected parts.

Nothing here asks an accelerator for a number, so nothing waits for it. On the CPU, where asking is
free, only the box around a shape is worked on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_COST_STEPS = 64
"""Squared distances are whole multiples of 1 / 64 voxel, which int16 holds."""
_ROUNDS = 12
_JUMPS = 10


@dataclass(frozen=True, slots=True)
class Ball:
    """The voxels around one that a ball or disk covers."""

    positions: tuple[float, ...]
    """Where the voxels `first`, `first + 1`, ... along an axis lie from the ball's centre."""
    first: int
    """Lowest offset of a voxel, at most 0."""
    radius: float
    """Voxels; a voxel at this distance belongs to the ball."""

    @property
    def reach(self) -> int:
        """Return the largest absolute offset along an axis."""
        return max(-self.first, self.first + len(self.positions) - 1)


def ball(size: float, num_axes: int) -> Ball:
    """Return the structuring element that nnU-Net uses for a drawn size, at least 1.

    Source:
        nnU-Net v2 (2.8.1) asks scikit-image for a disk or ball of a size that is no whole number.
        A ball then has a whole or half radius, a disk keeps its size, but its centre lies up to
        half a voxel off.

    Examples:
        >>> ball(2.3, 3) == ball(2.0, 3), ball(2.7, 3).radius, ball(2.0, 2).positions
        (True, 2.5, (-2.0, -1.0, 0.0, 1.0, 2.0))
    """
    if num_axes == 3:
        count = int(2 * size + 1)
        radius = (count - 1) / 2
        positions = tuple(k - radius for k in range(count))
    else:
        count, radius = math.ceil(2 * size + 1), size
        positions = tuple(k - size for k in range(count))
    return Ball(positions, -((count - 1) // 2), radius)


def dilate(shape: Tensor, element: Ball) -> Tensor:
    """Return the voxels from which a ball's offsets lead into `shape` (*spatial), boolean.

    Squared distances to the shape are built up axis by axis.
    """
    limit = round(element.radius**2 * _COST_STEPS)
    costs = [round(position**2 * _COST_STEPS) for position in element.positions]
    far = limit + 1
    distances = torch.where(shape, 0, far).to(torch.int16)
    for axis in range(shape.ndim):
        nearest = torch.full_like(distances, far)
        for offset, cost in enumerate(costs, start=element.first):
            count = distances.shape[axis] - abs(offset)
            if cost > limit or count <= 0:
                continue
            target = nearest.narrow(axis, max(-offset, 0), count)
            source = distances.narrow(axis, max(offset, 0), count)
            torch.minimum(target, source + cost, out=target)
        distances = nearest
    return distances <= limit


def erode(shape: Tensor, element: Ball) -> Tensor:
    """Return the voxels from which all offsets lead into `shape` or beyond the array."""
    return ~dilate(~shape, element)


def opening(shape: Tensor, element: Ball) -> Tensor:
    """Return `shape` eroded and dilated."""
    return dilate(erode(shape, element), element)


def closing(shape: Tensor, element: Ball) -> Tensor:
    """Return `shape` dilated and eroded."""
    return erode(dilate(shape, element), element)


OPERATORS = (dilate, erode, closing, opening)


def operate(shape: Tensor, operator: int, element: Ball) -> Tensor:
    """Apply one of `OPERATORS` to a shape (*spatial), boolean; returns a new array."""
    result = torch.zeros_like(shape)
    box = _box(shape, 2 * element.reach) if shape.device.type == "cpu" else (slice(None),)
    if box is not None:
        result[box] = OPERATORS[operator](shape[box], element)
    return result


def _box(shape: Tensor, margin: int) -> tuple[slice, ...] | None:
    """Return the box around a shape, with a margin; None if it is empty."""
    box = []
    for axis in range(shape.ndim):
        others = tuple(other for other in range(shape.ndim) if other != axis)
        places = shape.any(others).nonzero() if others else shape.nonzero()
        if not len(places):
            return None
        first, last = int(places[0]), int(places[-1])
        box.append(slice(max(0, first - margin), last + margin + 1))
    return tuple(box)


def remove_part(shape: Tensor, choice: float, *, largest_share: float) -> Tensor:
    """Take away one connected part, chosen evenly among those that are small enough.

    Args:
        shape: Boolean (*spatial); voxels that touch at a corner are connected.
        choice: Uniform draw from [0, 1); parts are ordered by their first voxel.
        largest_share: A part must have less than this share of all voxels.

    Returns:
        A new array.
    """
    labels = connected_parts(shape) if shape.is_cuda else _parts_on_host(shape)
    sizes = torch.zeros(shape.numel() + 1, dtype=torch.int32, device=shape.device)
    flat = labels.reshape(-1)
    sizes.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    allowed = (sizes > 0) & (sizes < largest_share * shape.numel())
    allowed[0] = False
    ranks = allowed.cumsum(0)
    wanted = ((ranks[-1] * choice).floor() + 1).clamp(max=ranks[-1])
    chosen = allowed & (ranks == wanted)
    return shape & ~chosen[flat].reshape(shape.shape)


def _parts_on_host(shape: Tensor) -> Tensor:
    """Number the connected parts 1, 2, ... by their first voxels; 0 elsewhere."""
    from scipy import ndimage

    labels, _ = ndimage.label(shape.cpu().numpy(), np.ones((3,) * shape.ndim))
    return torch.from_numpy(labels).to(shape.device, torch.int64)


def connected_parts(shape: Tensor, *, num_rounds: int = _ROUNDS) -> Tensor:
    """Label each connected part by its first voxel's flat index plus 1; 0 elsewhere.

    In each round the smallest label around a part becomes its own, and chains of such replacements
    are followed to their ends. The number of rounds is fixed, so that nothing waits for the device;
    a part that would need more stays in pieces.

    Args:
        shape: Boolean (*spatial); voxels that touch at a corner are connected.
        num_rounds: Rounds; each at least halves the pieces along a line.
    """
    count = shape.numel()
    beyond = count + 1
    own = torch.arange(1, beyond, device=shape.device).reshape(shape.shape)
    labels = torch.where(shape, own, beyond)
    for _ in range(num_rounds):
        around = torch.where(shape, _smallest_around(labels), beyond).reshape(-1)
        parents = torch.arange(beyond + 1, device=shape.device)
        parents.scatter_reduce_(0, labels.reshape(-1), around, "amin")
        for _ in range(_JUMPS):
            parents = parents[parents]
        labels = parents[labels]
    return torch.where(shape, labels, 0)


def _smallest_around(labels: Tensor) -> Tensor:
    """Return the smallest of each voxel's label and those of the voxels that touch it."""
    for axis in range(labels.ndim):
        count = labels.shape[axis] - 1
        smallest = labels.clone()
        for here, there in ((0, 1), (1, 0)):
            target = smallest.narrow(axis, here, count)
            torch.minimum(target, labels.narrow(axis, there, count), out=target)
        labels = smallest
    return labels
