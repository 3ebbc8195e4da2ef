"""How one grid differs from another, each difference by its own name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medseg.geometry import Axes, Flips, Grid, canonical_axes, reorient

TOLERANCE = 0.05
"""Largest distance between equal indices that counts as the same place, in voxels."""
_SILENT = 1e-4
"""Largest distance nobody is told about, in voxels; above it comes what 32-bit floats round."""
_AXES = "IJK"
_DIRECTIONS = ("LR", "PA", "IS")
_IN_PLACE = (0, 1, 2)

Turn = tuple[Axes, Flips]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One way in which a grid is not the one it should be."""

    code: Literal["shape", "axes-swapped", "orientation", "spacing", "origin", "direction"]
    words: str
    """Such as "its shape is (5, 6, 8), expected (5, 6, 7)"."""
    is_error: bool
    """False: within the tolerance."""
    turn: Turn | None = None
    """With code `orientation`: axes and flips that bring the array onto the expected grid."""


def differences(expected: Grid, found: Grid) -> list[Difference]:
    """Return how a grid differs from the one it should be; empty where nothing is worth saying.

    Rounding of 32-bit headers is passed over. What stays within `TOLERANCE` is no error.

    Args:
        expected: The image's grid.
        found: The grid of the other file.
    """
    if found.shape == expected.shape and np.array_equal(found.affine, expected.affine):
        return []
    if found.shape != expected.shape or expected.disagreement(found, TOLERANCE) is not None:
        turn = turn_onto(expected, found)
        if turn is not None:
            words = (
                f"it is the same grid stored in another way: its axes point to "
                f"{direction_letters(found)}, expected {direction_letters(expected)}"
            )
            return [Difference(code="orientation", words=words, is_error=True, turn=turn)]
    if found.shape != expected.shape:
        shape = _shape_difference(expected, found)
        return [shape, *(_placements(expected, found, worst=True) if shape.code == "shape" else ())]
    return _placements(expected, found, worst=expected.disagreement(found, TOLERANCE) is not None)


def turn_onto(expected: Grid, found: Grid) -> Turn | None:
    """Return the axes and flips that make a grid the expected one; None if none does.

    The other way of `reorient`: `reorient(found, *turn)` agrees with `expected`.
    """
    for axes, flips in _ways():
        if tuple(found.shape[axis] for axis in axes) != expected.shape:
            continue
        if expected.disagreement(reorient(found, axes, flips), TOLERANCE) is None:
            return axes, flips
    return None


def direction_letters(grid: Grid) -> str:
    """Return the closest anatomical directions of the axes.

    Examples:
        >>> direction_letters(Grid((4, 5, 6), np.diag([-1.0, -1.0, 3.0, 1.0])))
        'LPS'
    """
    axes, flips = canonical_axes(grid.affine)
    letters = {axis: _DIRECTIONS[d][not flips[d]] for d, axis in enumerate(axes)}
    return "".join(letters[axis] for axis in range(3))


def _ways() -> Iterator[Turn]:
    """Yield all 48 ways of storing an image, the most ordinary first."""
    for i, j, k in itertools.permutations(range(3)):
        for flip_i, flip_j, flip_k in itertools.product((False, True), repeat=3):
            yield (i, j, k), (flip_i, flip_j, flip_k)


def _shape_difference(expected: Grid, found: Grid) -> Difference:
    words = f"its shape is {found.shape}, expected {expected.shape}"
    orders = sorted(itertools.permutations(range(3)), key=_num_moved)
    fitting = [o for o in orders if tuple(found.shape[axis] for axis in o) == expected.shape]
    if not fitting:
        return Difference(code="shape", words=words, is_error=True)
    moved = [_AXES[d] for d in range(3) if fitting[0][d] != d]
    if len(moved) == 2:
        hint = f"transposing {moved[0]} and {moved[1]} would fit"
    else:
        hint = f"its axes in the order {', '.join(_AXES[d] for d in fitting[0])} would fit"
    return Difference(code="axes-swapped", words=f"{words}: axes swapped: {hint}", is_error=True)


def _num_moved(order: Sequence[int]) -> int:
    return sum(axis != d for d, axis in enumerate(order))


def _placements(expected: Grid, found: Grid, *, worst: bool) -> list[Difference]:
    """Compare spacing, direction and origin.

    Args:
        expected: The image's grid.
        found: The grid of the other file.
        worst: Whether the grids as a whole are further apart than the tolerance.
    """
    silent = _SILENT + _rounding(expected, found)
    moved = {
        "spacing": _spacing_shift(expected, found),
        "direction": _direction_shift(expected, found),
        "origin": _origin_shift(expected, found),
    }
    limit = TOLERANCE if worst else silent
    named = [code for code, shift in moved.items() if shift > limit]
    if worst and not named and found.shape == expected.shape:
        named = [max(moved, key=lambda code: moved[code])]
    words = {"spacing": _spacing_words, "direction": _direction_words, "origin": _origin_words}
    return [
        Difference(
            code=code,  # type: ignore[arg-type]
            words=f"{words[code](expected, found)} ({_voxels(moved[code])})",
            is_error=worst,
        )
        for code in named
    ]


def _rounding(*grids: Grid) -> float:
    """Return how far 32-bit floats may move the corners of grids, in voxels."""
    largest = max(
        float(np.abs(grid.affine[:3, 3]).max() + max(_extents(grid.shape, grid.spacing)))
        for grid in grids
    )
    return 2 * float(np.finfo(np.float32).eps) * largest / min(min(g.spacing) for g in grids)


def _extents(shape: Sequence[int], spacing: Sequence[float]) -> list[float]:
    return [length * step for length, step in zip(shape, spacing, strict=True)]


def _reach(grid: Grid) -> NDArray[np.float64]:
    """Return the index of the last voxel along each axis, at least 1."""
    return np.maximum(np.array(grid.shape) - 1.0, 1.0)


def _spacing_shift(expected: Grid, found: Grid) -> float:
    """Return how far different spacings move the last voxel, in voxels."""
    ratio = np.array(found.spacing) / np.array(expected.spacing)
    return float(np.abs((ratio - 1) * _reach(expected)).max())


def _direction_shift(expected: Grid, found: Grid) -> float:
    ours, theirs = _cosines(expected), _cosines(found)
    columns = np.linalg.solve(expected.affine[:3, :3], (theirs - ours) * np.array(expected.spacing))
    return float((np.linalg.norm(columns, axis=0) * _reach(expected)).max())


def _origin_shift(expected: Grid, found: Grid) -> float:
    gap = found.affine[:3, 3] - expected.affine[:3, 3]
    return float(np.linalg.norm(np.linalg.solve(expected.affine[:3, :3], gap)))


def _cosines(grid: Grid) -> NDArray[np.float64]:
    """Return the (3, 3) direction cosines, one column per axis."""
    matrix: NDArray[np.float64] = grid.affine[:3, :3] / np.array(grid.spacing)
    return matrix


def _spacing_words(expected: Grid, found: Grid) -> str:
    return f"its spacing is {_mm(found.spacing)}, expected {_mm(expected.spacing)}"


def _origin_words(expected: Grid, found: Grid) -> str:
    gap = float(np.linalg.norm(found.affine[:3, 3] - expected.affine[:3, 3]))
    return (
        f"its origin is {_mm(found.affine[:3, 3])}, expected {_mm(expected.affine[:3, 3])}, "
        f"{gap:.2g} mm apart"
    )


def _direction_words(expected: Grid, found: Grid) -> str:
    relative = np.eye(4)
    relative[:3, :3] = np.linalg.solve(_cosines(expected), _cosines(found))
    axes, flips = canonical_axes(relative)
    pointing = (
        f"its axes point to {direction_letters(found)}, expected {direction_letters(expected)}"
    )
    if axes != _IN_PLACE:
        return f"its direction has axes swapped: {pointing}"
    if any(flips):
        flipped = [_AXES[d] for d in range(3) if flips[d]]
        plural = len(flipped) > 1
        return (
            f"its direction is flipped along {' and '.join(flipped)} "
            f"({'axes that run' if plural else 'an axis that runs'} the other way): {pointing}"
        )
    cosines = np.sum(_cosines(expected) * _cosines(found), axis=0).clip(-1, 1)
    angle = float(np.rad2deg(np.arccos(cosines.min())))
    return f"its direction is tilted by {angle:.3g} degrees against the expected one"


def _mm(values: Sequence[float] | NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{float(value):.6g}" for value in values) + ") mm"


def _voxels(shift: float) -> str:
    return f"moves voxels by {shift:.2g} voxels, allowed {TOLERANCE:g}"
