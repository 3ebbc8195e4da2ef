"""Stored postprocessing: which pieces of a segmentation stay, which holes are filled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.crop import Box, bounding_box, crop, nonzero_mask
from medseg.errors import BundleError, near_names
from medseg.schema.postprocessing import (
    FillHoles,
    KeepLargest,
    Postprocessing,
    RemoveSmall,
    Step,
)
from medseg.values import distinct_values

Segmentation = NDArray[np.integer[Any]]
Mask = NDArray[np.bool_]
Structures = Mapping[str, tuple[int, ...]]

_MM3_PER_ML = 1000.0
_LARGEST_IN_TABLE = 2**16
_PART_VOXELS = 2**21
"""Voxels looked up at a time."""


def apply(
    segmentation: Segmentation,
    postprocessing: Postprocessing,
    structures: Structures,
    background: int,
    voxel_mm3: float,
) -> Segmentation:
    """Return a segmentation after the steps of a stored postprocessing, in their order.

    Each step works inside the box of its structure and takes six bytes for each voxel of it; all
    together take a copy of the segmentation where anything changes. A single slice is flat.

    Args:
        segmentation: (I, J, K) label map with the values of files; it is left as it is.
        postprocessing: The steps.
        structures: Name -> its values, as `LabelScheme.structures` has them.
        background: Value that what is removed gets.
        voxel_mm3: Volume of a voxel.

    Returns:
        A new array, or the given one where nothing changes.

    Raises:
        BundleError: If a step names a structure that is not there.
    """
    check(postprocessing, structures)
    start = _without_thin_axes(segmentation)
    result, boxes = start, _boxes(start, background)
    for step in postprocessing.steps:
        change = _CHANGES[step.kind]
        for values in _masks(step, structures):
            box = _enclosing([boxes[value] for value in values if value in boxes])
            if box is None:
                continue
            changed = change(step, crop(result, box), values, background, voxel_mm3)
            if changed is None or not changed.any():
                continue
            if result is start:
                result = start.copy(order="K")
            if step.kind == "fill_holes":
                crop(result, box)[changed] = values[0]
                boxes[values[0]] = box
            else:
                crop(result, box)[changed] = background
    return segmentation if result is start else result.reshape(segmentation.shape)


def check(postprocessing: Postprocessing, structures: Structures) -> None:
    """Check that every step names structures of the model, or values of its files.

    Raises:
        BundleError: With one line per entry that it does not.
    """
    known = {value for values in structures.values() for value in values}
    names = list(structures)
    problems = [
        f"  steps.{number} ({step.kind}) names {entry!r}; expected one of: {', '.join(names)}, or "
        f"one of their values.{near_names(str(entry), names)}"
        for number, step in enumerate(postprocessing.steps)
        for entry in step.structures
        if entry not in (known if isinstance(entry, int) else structures)
    ]
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise BundleError("\n".join([f"{count} in the stored postprocessing:", *problems]))


def _without_thin_axes(segmentation: Segmentation) -> Segmentation:
    """Return a view without axes of one voxel, across which every hole would be open."""
    thin = [axis for axis, length in enumerate(segmentation.shape) if length == 1]
    view: Segmentation = segmentation.squeeze(tuple(thin[: segmentation.ndim - 1]))
    return view


def _masks(step: Step, structures: Structures) -> list[tuple[int, ...]]:
    """Return the values of each mask a step works on, one after the other."""
    entries = [
        (entry,) if isinstance(entry, int) else structures[entry] for entry in step.structures
    ]
    if step.kind == "fill_holes" or not step.together:
        return [tuple(dict.fromkeys(values)) for values in entries]
    return [tuple(dict.fromkeys(value for values in entries for value in values))]


def _boxes(segmentation: Segmentation, background: int) -> dict[int, Box]:
    """Return the box of every value but the background, found in one pass where values allow it."""
    from scipy import ndimage  # takes a while to import

    values = [value for value in distinct_values(segmentation).tolist() if value != background]
    is_table = bool(values) and min(values) >= 0 and max(values) <= _LARGEST_IN_TABLE
    found = ndimage.find_objects(segmentation, max(values)) if is_table else []
    boxes = {
        value: tuple((part.start, part.stop) for part in place)
        for value, place in enumerate(found, 1)
        if place is not None and value != background
    }
    others = [value for value in values if value not in boxes]
    return boxes | {value: bounding_box(segmentation == value) for value in others}


def _enclosing(boxes: list[Box]) -> Box | None:
    """Return the smallest box around some boxes; None for none."""
    if not boxes:
        return None
    return tuple(
        (min(s for s, _ in axis), max(s for _, s in axis)) for axis in zip(*boxes, strict=True)
    )


def _mask(part: Segmentation, values: tuple[int, ...]) -> Mask:
    mask: Mask = part == values[0]
    for value in values[1:]:
        mask |= part == value
    return mask


def _smaller(
    step: KeepLargest, part: Segmentation, values: tuple[int, ...], _: int, voxel_mm3: float
) -> Mask | None:
    """Return the pieces that are not the largest."""
    pieces, sizes = _pieces(_mask(part, values), step.connectivity)
    removed = sizes < sizes.max(initial=0)
    if step.below_mm3 is not None:
        removed &= sizes * voxel_mm3 < step.below_mm3
    return _selected(pieces, removed)


def _small(
    step: RemoveSmall, part: Segmentation, values: tuple[int, ...], _: int, voxel_mm3: float
) -> Mask | None:
    """Return the pieces that are too small."""
    pieces, sizes = _pieces(_mask(part, values), step.connectivity)
    return _selected(pieces, sizes * voxel_mm3 < step.min_ml * _MM3_PER_ML)


def _enclosed(
    step: FillHoles, part: Segmentation, values: tuple[int, ...], background: int, voxel_mm3: float
) -> Mask | None:
    """Return the background that the structure encloses."""
    mask = _mask(part, values)
    holes = nonzero_mask(mask[np.newaxis]) & ~mask
    if step.max_ml is not None:
        pieces, sizes = _pieces(holes, 1)
        chosen = _selected(pieces, sizes * voxel_mm3 <= step.max_ml * _MM3_PER_ML)
        if chosen is None:
            return None
        holes = chosen
    holes &= part == background
    return holes


def _pieces(mask: Mask, connectivity: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the number of the piece each voxel belongs to, from 1, and the size of each piece."""
    from scipy import ndimage

    neighbours = ndimage.generate_binary_structure(mask.ndim, connectivity)
    pieces, count = ndimage.label(mask, neighbours)
    sizes = np.zeros(count + 1, dtype=np.int64)
    for rows in _parts(pieces):
        sizes += np.bincount(pieces[rows].ravel(), minlength=count + 1)
    return pieces, sizes[1:]


def _selected(pieces: NDArray[np.int32], chosen: NDArray[np.bool_]) -> Mask | None:
    """Return the voxels of the chosen pieces; None where there are none."""
    if not chosen.any():
        return None
    table = np.append(False, chosen)
    mask = np.empty(pieces.shape, dtype=np.bool_)
    for rows in _parts(pieces):
        mask[rows] = table[pieces[rows]]
    return mask


def _parts(array: NDArray[Any]) -> Iterator[slice]:
    """Yield rows along the first axis: looking up takes eight bytes for each voxel of them."""
    step = max(1, _PART_VOXELS // max(1, math.prod(array.shape[1:])))
    for start in range(0, len(array), step):
        yield slice(start, start + step)


_CHANGES: dict[str, Callable[..., Mask | None]] = {
    "keep_largest": _smaller,
    "remove_small": _small,
    "fill_holes": _enclosed,
}
"""Kind of step -> function (step, part, values, background, voxel_mm3) of what changes."""
