"""Where an array lies in the world, and the way from image frame to network frame and back.

Image frame: axes (I, J, K) as stored, with an affine to RAS+ mm. Canonical axes: the image's own
axes, permuted and reversed so that they point as closely as they can to right, anterior, superior.
Network frame: canonical axes in the order of the plans, cropped, then resampled.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.errors import GeometryError

Axes = tuple[int, int, int]
Flips = tuple[bool, bool, bool]
Box = tuple[tuple[int, int], ...]
Affine = NDArray[np.float64]
A = TypeVar("A", bound=np.generic)

TIE_TOLERANCE = 1e-3
"""Direction cosines closer than this are equal: above the rounding of a 32-bit quaternion."""


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Shape plus affine: where an array lies in the world."""

    shape: tuple[int, int, int]
    """Voxels along I, J, K."""
    affine: Affine
    """(4, 4) float64, voxel index to RAS+ mm; read-only."""

    def __post_init__(self) -> None:
        shape = tuple(int(length) for length in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise GeometryError(f"shape is {shape}; expected three lengths of at least one voxel")
        affine = np.array(self.affine, dtype=np.float64)
        problem = _affine_problem(affine)
        if problem is not None:
            raise GeometryError(f"{problem}; expected an invertible voxel-to-world matrix in mm")
        affine.flags.writeable = False
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along I, J, K."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return i, j, k

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel."""
        return abs(float(np.linalg.det(self.affine[:3, :3])))

    def disagreement(self, other: Grid, tolerance: float = 0.05) -> str | None:
        """Say how another grid differs, or return None where the two agree.

        Args:
            other: The grid to compare with.
            tolerance: Largest distance between equal indices, in voxels of this grid.

        Returns:
            Words such as "its shape is (5, 6, 8), expected (5, 6, 7)", the expected values being
            those of this grid.
        """
        if self.shape != other.shape:
            return f"its shape is {other.shape}, expected {self.shape}"
        corners = self._corners()
        moved = np.linalg.solve(self.affine, other.affine @ corners)
        distance = np.linalg.norm((moved - corners)[:3], axis=0)
        worst = int(np.argmax(distance))
        if distance[worst] <= tolerance:
            return None
        index = tuple(int(value) for value in corners[:3, worst])
        here, there = (_words((grid.affine @ corners[:, worst])[:3]) for grid in (self, other))
        return (
            f"its voxel {index} lies at {there} mm, expected {here} mm "
            f"({distance[worst]:.3g} voxels away, allowed {tolerance:g}); "
            f"its spacing is {_words(other.spacing)} mm, expected {_words(self.spacing)} mm"
        )

    def _corners(self) -> NDArray[np.float64]:
        """Return the (4, 8) homogeneous indices of the corner voxels."""
        ends = [(0.0, length - 1.0) for length in self.shape]
        return np.array([(*corner, 1.0) for corner in itertools.product(*ends)]).T


def _affine_problem(affine: Affine) -> str | None:
    if affine.shape != (4, 4):
        return f"affine has shape {affine.shape}"
    if not np.isfinite(affine).all():
        return "affine holds values that are not finite"
    if not np.array_equal(affine[3], (0, 0, 0, 1)):
        return f"last row of the affine is {affine[3].tolist()}"
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if lengths.min() == 0 or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        return f"axes of the affine are {affine[:3, :3].T.tolist()} mm and do not span the space"
    return None


def _words(values: Sequence[float] | NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{float(value):.6g}" for value in values) + ")"


def canonical_axes(affine: ArrayLike) -> tuple[Axes, Flips]:
    """Return the axes, and their directions, closest to right, anterior, superior.

    All 48 ways of storing one image (6 orders of the axes times 8 choices of direction) lead to the
    same canonical image. Ties, as at 45 degrees, are decided by the canonical directions alone.

    Args:
        affine: (4, 4) voxel index to RAS+ mm.

    Returns:
        axes: Canonical axis d is image axis `axes[d]`.
        flips: Whether canonical axis d runs against that image axis.

    Examples:
        >>> canonical_axes(np.diag([-1.0, -1.0, 3.0, 1.0]))
        ((0, 1, 2), (True, True, False))
    """
    columns = np.asarray(affine, dtype=np.float64)[:3, :3]
    return _canonical_axes(columns.tobytes())


@lru_cache(maxsize=4096)
def _canonical_axes(columns_bytes: bytes) -> tuple[Axes, Flips]:
    columns = np.frombuffer(columns_bytes, dtype=np.float64).reshape(3, 3)
    directions = columns / np.linalg.norm(columns, axis=0)
    best = list(_candidates(directions))
    traces = [float(np.trace(matrix)) for _, _, matrix in best]
    best = _largest(best, traces)
    for row, column in itertools.product(range(3), range(3)):
        best = _largest(best, [float(matrix[row, column]) for _, _, matrix in best])
    axes, flips, _ = max(best, key=lambda candidate: tuple(candidate[2].ravel()))
    return axes, flips


_Candidate = tuple[Axes, Flips, NDArray[np.float64]]


def _candidates(directions: NDArray[np.float64]) -> Iterator[_Candidate]:
    """Yield every order and direction of the axes, with the (3, 3) direction cosines it gives."""
    for i, j, k in itertools.permutations(range(3)):
        for flip_i, flip_j, flip_k in itertools.product((False, True), repeat=3):
            signs = np.where((flip_i, flip_j, flip_k), -1.0, 1.0)
            yield (i, j, k), (flip_i, flip_j, flip_k), directions[:, (i, j, k)] * signs


def _largest(candidates: list[_Candidate], scores: list[float]) -> list[_Candidate]:
    limit = max(scores) - TIE_TOLERANCE
    return [item for item, score in zip(candidates, scores, strict=True) if score >= limit]


def orient(
    affine: ArrayLike, network_axes: Sequence[int], *, is_stored: bool = False
) -> tuple[Axes, Flips]:
    """Return `canonical_axes` in the order of the plans.

    Args:
        affine: (4, 4) voxel index to RAS+ mm.
        network_axes: Network axis d is canonical axis `network_axes[d]`.
        is_stored: Whether the image's own axes I, J, K take the place of canonical ones.

    Returns:
        axes: Network axis d is image axis `axes[d]`.
        flips: Whether network axis d runs against that image axis.

    Examples:
        >>> orient(np.diag([-1.0, 2.0, 3.0, 1.0]), (2, 1, 0))
        ((2, 1, 0), (False, False, True))
    """
    if sorted(network_axes) != [0, 1, 2]:
        raise ValueError(f"network_axes is {tuple(network_axes)}; expected an order of 0, 1, 2")
    plain: tuple[Axes, Flips] = ((0, 1, 2), (False, False, False))
    axes, flips = plain if is_stored else canonical_axes(affine)
    a, b, c = network_axes
    return (axes[a], axes[b], axes[c]), (flips[a], flips[b], flips[c])


def reorient(grid: Grid, axes: Axes, flips: Flips) -> Grid:
    """Return the grid of an image whose axis d is axis `axes[d]` of `grid`, reversed by `flips[d]`.

    Examples:
        >>> flipped = reorient(Grid((4, 2, 2), np.eye(4)), (1, 0, 2), (False, True, False))
        >>> flipped.shape, flipped.affine[:, 3].tolist()
        ((2, 4, 2), [3.0, 0.0, 0.0, 1.0])
    """
    affine = np.eye(4)
    affine[:, 3] = grid.affine[:, 3]
    for d, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        column = grid.affine[:, axis]
        affine[:, d] = -column if flip else column
        if flip:
            affine[:, 3] += column * (grid.shape[axis] - 1)
    a, b, c = axes
    return Grid((grid.shape[a], grid.shape[b], grid.shape[c]), affine)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpatialRecord:
    """How one case came from the image frame into the network frame, and the way back."""

    shape_image: tuple[int, int, int]
    """Voxels of the image along I, J, K."""
    affine_image: tuple[tuple[float, ...], ...]
    """(4, 4) voxel index of the image to RAS+ mm."""
    axes: Axes
    """Network axis d is image axis `axes[d]`."""
    flips: Flips
    """Whether network axis d runs against that image axis."""
    box: Box
    """(first, one past the last) voxel kept of each network axis, at full resolution."""
    spacing_cropped: tuple[float, ...]
    """Voxel size in mm before resampling, network order."""
    shape_network: tuple[int, ...]
    """Voxels after resampling, network order."""
    spacing_network: tuple[float, ...]
    """Voxel size in mm after resampling, network order."""

    def __post_init__(self) -> None:
        if sorted(self.axes) != [0, 1, 2]:
            raise ValueError(f"axes is {self.axes}; expected an order of 0, 1, 2")
        for (low, high), length in zip(self.box, self.shape_oriented, strict=True):
            if not 0 <= low < high <= length:
                raise ValueError(f"box is {self.box}; expected it inside {self.shape_oriented}")

    @property
    def shape_oriented(self) -> tuple[int, int, int]:
        """Voxels of the whole image in network order."""
        a, b, c = self.axes
        return self.shape_image[a], self.shape_image[b], self.shape_image[c]

    @property
    def crop(self) -> tuple[slice, slice, slice]:
        """The box along the image's own axes I, J, K: `image[record.crop]` is what was kept."""
        kept = [self.box[self.axes.index(axis)] for axis in range(3)]
        turned = [self.flips[self.axes.index(axis)] for axis in range(3)]
        i, j, k = (
            slice(length - high, length - low) if flip else slice(low, high)
            for (low, high), flip, length in zip(kept, turned, self.shape_image, strict=True)
        )
        return i, j, k

    @property
    def shape_cropped(self) -> tuple[int, int, int]:
        """Voxels of the box in network order, at full resolution."""
        a, b, c = (high - low for low, high in self.box)
        return a, b, c

    def to_network_axes(self, array: NDArray[A]) -> NDArray[A]:
        """Return a view with the image's axes in network order and direction.

        Args:
            array: (..., I, J, K).

        Returns:
            (..., *shape_oriented).
        """
        self._check(array, self.shape_image)
        lead = array.ndim - 3
        order = (*range(lead), *(lead + axis for axis in self.axes))
        view: NDArray[A] = array.transpose(order)[self._steps()]
        return view

    def to_image_axes(self, array: NDArray[A]) -> NDArray[A]:
        """Return a view with the axes in the image's order and direction.

        Args:
            array: (..., *shape_oriented).

        Returns:
            (..., I, J, K).
        """
        self._check(array, self.shape_oriented)
        lead = array.ndim - 3
        order = (*range(lead), *(lead + self.axes.index(axis) for axis in range(3)))
        view: NDArray[A] = array[self._steps()].transpose(order)
        return view

    def uncrop(self, array: NDArray[A], fill: float = 0) -> NDArray[A]:
        """Put the box back into the whole image; where the box is the whole image, return `array`.

        Args:
            array: (..., *shape_cropped).
            fill: Value outside the box.

        Returns:
            (..., *shape_oriented), of the same type.
        """
        self._check(array, self.shape_cropped)
        if self.shape_cropped == self.shape_oriented:
            return array
        whole = np.full((*array.shape[:-3], *self.shape_oriented), fill, dtype=array.dtype)
        inside: Any = (..., *(slice(low, high) for low, high in self.box))
        whole[inside] = array
        return whole

    def restore(self, array: NDArray[A], fill: float = 0) -> NDArray[A]:
        """Bring an array on the cropped grid back onto the image's own grid.

        Args:
            array: (..., *shape_cropped).
            fill: Value outside the box.

        Returns:
            (..., I, J, K), of the same type.
        """
        return self.to_image_axes(self.uncrop(array, fill))

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` makes an equal record of them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SpatialRecord:
        """Return the record that `to_json` described, also after a way through a JSON file."""
        return cls(**{field.name: _tuples(values[field.name]) for field in fields(cls)})

    def _steps(self) -> tuple[Any, ...]:
        return (..., *(slice(None, None, -1 if flip else 1) for flip in self.flips))

    def _check(self, array: NDArray[Any], shape: tuple[int, ...]) -> None:
        if array.shape[-3:] != shape:
            raise ValueError(f"array has shape {array.shape}; expected its last axes to be {shape}")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
