"""Voxel sizes of formats that have no place for them: a JSON file beside the image."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import DatasetError, GeometryError
from medseg.io.image import Header, plain, split_channel, split_ending

Spacing = tuple[float, float, float]

_PLACE_TOLERANCE = 1e-3


def read_spacing(path: Path) -> Spacing | None:
    """Return the voxel size (I, J, K) that the file beside an image gives, in mm.

    The file is NAME.json, or for NAME_NNNN.tif also NAME.json without the number of the channel:
    an object with "spacing": [pages, rows, columns], or [rows, columns] for a flat picture.
    Objects without that entry are passed over.

    Raises:
        DatasetError: If it is no JSON, or "spacing" is not two or three positive numbers.

    Source:
        Name and order of the file: behaviour of nnU-Net 2.8.1 `Tiff3DIO`.
    """
    stem = split_ending(path.name)[0]
    for name in dict.fromkeys((stem, split_channel(stem)[0])):
        file = path.with_name(f"{name}.json")
        content = _read_object(file)
        if content is not None and "spacing" in content:
            return _spacing(file, content["spacing"])
    return None


def _read_object(file: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None where there is no file or something else in it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DatasetError(
            f'{file}: is no valid JSON ({error}); expected {{"spacing": [...]}} in mm, or no file '
            "of this name beside the image."
        ) from None
    return content if isinstance(content, dict) else None


def _spacing(file: Path, value: Any) -> Spacing:
    numbers = [_positive(entry) for entry in value] if isinstance(value, list) else []
    if len(numbers) not in (2, 3) or None in numbers:
        raise DatasetError(
            f"{file}: spacing is {value!r}; expected positive numbers in mm: [pages, rows, "
            "columns], or [rows, columns] for a flat picture."
        )
    *pages, rows, columns = [number or 0.0 for number in numbers]
    return columns, rows, pages[0] if pages else thickness(columns, rows)


def _positive(entry: Any) -> float | None:
    is_number = isinstance(entry, int | float) and not isinstance(entry, bool)
    return float(entry) if is_number and entry > 0 and math.isfinite(entry) else None


def thickness(columns: float, rows: float) -> float:
    """Return the thickness of a flat picture: never less than a pixel is wide.

    A thinner slice would make another axis than K the coarsest one.
    """
    return max(columns, rows)


def header_of(path: Path, shape: Sequence[int], spacing: Spacing | None) -> Header:
    """Return the header of a picture or stack.

    Args:
        path: The image file; a file beside it that gives a voxel size takes precedence.
        shape: (I, J), or (I, J, K) for a stack.
        spacing: Voxel size (I, J, K) in mm that the image file itself gives.

    Raises:
        DatasetError: If the file beside the image cannot be used.
    """
    known = read_spacing(path) or spacing
    return Header(
        shape=tuple(shape),
        affine=plain(np.diag([*(known or (1.0, 1.0, 1.0)), 1.0])),
        ending=split_ending(path.name)[1],
        has_spacing=known is not None,
    )


def check_place(name: str, header: Header) -> None:
    """Check that a voxel size alone says where an image lies.

    Args:
        name: Name of the file to write.
        header: Header of the image.

    Raises:
        GeometryError: If it is turned or moved.
    """
    expected = header.grid
    alone = Header(shape=header.shape, affine=plain(np.diag([*expected.spacing, 1.0])))
    difference = expected.disagreement(alone.grid, _PLACE_TOLERANCE)
    if difference is not None:
        raise GeometryError(
            f"{name}: this format holds a voxel size but no position or direction: {difference}. "
            "Write .nii.gz instead."
        )


def side_file(target: Path, header: Header) -> str | None:
    """Return the content of the file beside an image that is to be written, or None for no file.

    A stack always has one; a flat picture has one where its pixels are not 1 mm wide, or where a
    file that is there would say otherwise. Other entries of a file that is there are kept.

    Args:
        target: Where the image will lie.
        header: Header of the image.

    Raises:
        DatasetError: If a file of that name is there that is no JSON object.
    """
    file = target.with_name(split_ending(target.name)[0] + ".json")
    grid = header.grid
    columns, rows, pages = grid.spacing
    is_flat = grid.shape[2] == 1 and pages == thickness(columns, rows)
    before = _read_object(file)
    if is_flat and (columns, rows) == (1.0, 1.0) and "spacing" not in (before or {}):
        return None
    if before is None and file.exists():
        raise DatasetError(
            f"{file}: is no JSON object; expected to write the voxel size of {target.name} there. "
            "Move it away."
        )
    spacing = [rows, columns] if is_flat else [pages, rows, columns]
    return json.dumps({**(before or {}), "spacing": spacing}, indent=1) + "\n"
