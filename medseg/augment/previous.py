"""What the stage before found, as input channels of the next stage, and its corruption.

The next stage must not trust what it is given: in training, structures grow, shrink and lose parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.augment.morphology import OPERATORS, ball, operate, remove_part
from medseg.augment.streams import between

BALL_SIZE = (1.0, 8.0)
"""Radius of the ball that a structure is grown or shrunk by, voxels."""
STRUCTURE_PROBABILITY = 0.5
"""Chance of each structure to take part in a corruption."""
LARGEST_REMOVED = 0.15
"""A part that is taken away has less than this share of the patch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviousSettings:
    """The stage before, and the chance of each corruption."""

    num_previous: int
    """Structures, labels 1 to this, each a channel; 0: no such stage."""
    operator: float
    """Dilation, erosion, closing or opening of structures."""
    removal: float
    """Removal of a connected part of structures."""


@dataclass(frozen=True, slots=True)
class OperatorDraw:
    """What one structure is changed by."""

    structure: int
    """Channel, from 0."""
    operator: int
    """Place in `morphology.OPERATORS`."""
    size: float
    """Radius of the ball, voxels."""


@dataclass(frozen=True, slots=True)
class RemovalDraw:
    """Which part of one structure is taken away."""

    structure: int
    """Channel, from 0."""
    choice: float
    """Uniform draw from [0, 1) that chooses among its parts."""


@dataclass(frozen=True, slots=True)
class PreviousDraw:
    """What happens to the structures of one sample, in this order."""

    operators: tuple[OperatorDraw, ...] = ()
    """One after another: each sees what those before it left."""
    removals: tuple[RemovalDraw, ...] = ()
    """After all operators."""


def one_hot(previous: Tensor, num_previous: int) -> Tensor:
    """Return one channel for each structure.

    Args:
        previous: Labels (B, *spatial) of any integer type, 0 to `num_previous`.
        num_previous: Structures.

    Returns:
        (B, num_previous, *spatial), float32: 1 where the structure is, else 0.
    """
    return _masks(previous, num_previous).movedim(0, 1).to(torch.float32)


def _masks(previous: Tensor, num_previous: int) -> Tensor:
    """Return where each structure is, boolean (num_previous, *previous)."""
    labels = torch.arange(1, num_previous + 1, dtype=torch.int32, device=previous.device)
    return previous.to(torch.int32) == labels.reshape(-1, *[1] * previous.ndim)


def draw_previous(settings: PreviousSettings, rng: np.random.Generator) -> PreviousDraw:
    """Draw one sample's corruptions; all numbers are drawn whether they are used or not.

    Source:
        Parameter distributions of nnU-Net v2 (2.8.1): structures in random order.
    """
    operates, removes = (rng.random(2) < (settings.operator, settings.removal)).tolist()
    uniforms = rng.random((settings.num_previous, 7))
    changed = _takers(uniforms[:, 0], uniforms[:, 1]) if operates else []
    reduced = _takers(uniforms[:, 2], uniforms[:, 3]) if removes else []
    kinds, sizes, choices = uniforms[:, 4:].T.tolist()
    return PreviousDraw(
        tuple(
            OperatorDraw(k, int(kinds[k] * len(OPERATORS)), between(sizes[k], BALL_SIZE))
            for k in changed
        ),
        tuple(RemovalDraw(k, choices[k]) for k in reduced),
    )


def _takers(places: NDArray[np.float64], chances: NDArray[np.float64]) -> list[int]:
    """Return the structures that take part, in random order, from two uniform draws for each."""
    order = np.argsort(places)
    return [int(k) for k in order if chances[k] < STRUCTURE_PROBABILITY]


def corrupted(previous: Tensor, num_previous: int, draw: PreviousDraw) -> Tensor:
    """Return the channels of one sample with its corruptions.

    Args:
        previous: Labels (*spatial) of any integer type, 0 to `num_previous`.
        num_previous: Structures.
        draw: What happens to them.

    Returns:
        (num_previous, *spatial), boolean. A structure that grows takes voxels from the others.

    Source:
        Behaviour of nnU-Net v2 (2.8.1) with batchgeneratorsv2's ApplyRandomBinaryOperatorTransform
        and RemoveRandomConnectedComponentFromOneHotEncodingTransform.
    """
    masks = _masks(previous, num_previous)
    for change in draw.operators:
        before = masks[change.structure].clone()
        after = operate(before, change.operator, ball(change.size, before.ndim))
        masks &= ~(after & ~before)
        masks[change.structure] = after
    for removal in draw.removals:
        masks[removal.structure] = remove_part(
            masks[removal.structure], removal.choice, largest_share=LARGEST_REMOVED
        )
    return masks
