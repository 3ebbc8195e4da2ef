"""The channels of one case: read, measured, and compared with each other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.check.files import Opened, check_storage, open_file, report_no_spacing
from medseg.check.findings import Findings
from medseg.check.grids import Difference, differences
from medseg.check.intensities import Measured, convert, picture_hash
from medseg.errors import DatasetError
from medseg.geometry import Grid
from medseg.io.colour import in_colours
from medseg.io.image import Header, Stored
from medseg.io.read import empty
from medseg.schema.check import ChannelFacts, FileFacts

_CT_LOWEST, _CT_HIGHEST = -3100.0, 32767.0
_CT_SPAN = 100.0
"""Hounsfield units of a body reach further than this; rescaled ones do not."""


@dataclass(slots=True, kw_only=True, eq=False)
class ImageSide:
    """What the channel files of a case hold."""

    files: list[FileFacts] = field(default_factory=list)
    channels: list[ChannelFacts] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    """Hash of the image in each channel."""
    num_volumes: dict[str, int] = field(default_factory=dict)
    """File -> channels it holds."""
    first: str = ""
    """Name of the file that gives the grid: the first that can be read."""
    grid: Grid | None = None
    header: Header | None = None
    array: NDArray[np.float32] | None = None
    """(C, I, J, K)."""


def inspect_image(
    root: Path, names: Sequence[str], channels: Sequence[str], found: Findings
) -> ImageSide:
    """Read and check every channel file of a case.

    Args:
        root: The dataset's folder.
        names: Files in the order of the channels.
        channels: Names of the dataset's channels.
        found: Takes the problems.
    """
    side = ImageSide()
    is_complete = True
    for number, name in enumerate(names):
        known = channels[number] if number < len(channels) else "not a channel of the dataset"
        opened = open_file(root, name, f"channel {number}, {known}", found)
        if opened is not None:
            side.files.append(opened.facts)
            check_storage(opened, found)
        if opened is None or not _in_colours(opened, found):
            is_complete = False
            continue
        is_alone = len(names) == len(channels) > 1
        if is_alone and opened.stored is not None and opened.stored.array.ndim == 4:
            _report_series(name, opened.stored, found)
            is_complete = False
            continue
        _add_file(side, opened, number if is_alone else len(side.channels), channels, found)
    if is_complete:
        _check_count(side, names, channels, found)
    _check_repeats(side, channels, found)
    return side


def _in_colours(opened: Opened, found: Findings) -> bool:
    """Give a picture with a palette its colours; return whether the file can be used."""
    if opened.stored is None or opened.grid is None:
        return False
    try:
        opened.stored = in_colours(opened.stored, opened.facts.path)
    except DatasetError as error:
        found.error("unreadable", str(error), file=opened.facts.path)
        return False
    return True


def _add_file(
    side: ImageSide, opened: Opened, place: int, channels: Sequence[str], found: Findings
) -> None:
    """Take over the volumes of one file that could be read.

    Args:
        side: What the files before held.
        opened: The file.
        place: Channel of its first volume.
        channels: Names of the dataset's channels.
        found: Takes the problems.
    """
    stored, grid, name = opened.stored, opened.grid, opened.facts.path
    if stored is None or grid is None:
        return
    if side.grid is None:
        side.grid, side.header, side.first = grid, stored.header, name
        side.array = empty(grid.shape, len(channels))
    else:
        for difference in differences(side.grid, grid):
            if difference.code == "spacing" and opened.has_no_spacing:
                report_no_spacing(name, side.first, difference.words, found)
            else:
                _report_grid(side, name, difference, found)
    _check_scaling(name, stored, found)
    pictures = []
    for number, volume in enumerate(volumes(stored), start=place):
        fits = side.array is not None and number < len(channels) and grid.shape == side.grid.shape
        out = side.array[number] if fits and side.array is not None else empty(grid.shape)
        measured = convert(volume, out, slope=stored.slope, inter=stored.inter)
        label = channels[number] if number < len(channels) else f"channel {number}"
        _check_values(name, label, measured, out.size, found)
        side.channels.append(measured.facts)
        pictures.append(picture_hash(out, grid.affine, measured.checksum))
    side.pictures += pictures
    side.num_volumes[name] = len(pictures)
    joined = pictures[0] if len(pictures) == 1 else _joined(pictures)
    side.files[-1] = side.files[-1].model_copy(update={"picture": joined})
    opened.stored = None


def volumes(stored: Stored) -> list[NDArray[Any]]:
    """Return the volumes (I, J, K) of a file, one for each of its channels."""
    if stored.array.ndim == 3:
        return [stored.array]
    return [stored.array[..., number] for number in range(stored.array.shape[3])]


def _joined(pictures: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(pictures).encode()).hexdigest()


def _report_grid(side: ImageSide, name: str, difference: Difference, found: Findings) -> None:
    if difference.is_error:
        found.error(
            difference.code,
            f"{name} does not lie on the grid of {side.first}: {difference.words}. "
            "All channels of a case must share one grid: resample this channel to the first.",
            file=name,
        )
        return
    found.warning(
        difference.code,
        f"{name} lies a little off the grid of {side.first}: {difference.words}. medseg takes "
        "them as equal; other tools may refuse them.",
        file=name,
        fix=f"copies the header of {side.first}",
    )


def _report_series(name: str, stored: Stored, found: Findings) -> None:
    found.error(
        "not-3d",
        f"{name}: holds {_held(stored)}, shape {stored.array.shape}; expected one volume (I, J, "
        "K). Save one volume per file.",
        file=name,
    )


def _held(stored: Stored) -> str:
    number = stored.array.shape[3]
    if stored.fourth == "series":
        return f"a series of {number} volumes (4D)"
    return f"{number} {'colours' if stored.fourth == 'colours' else 'values'} per voxel"


def _check_count(
    side: ImageSide, names: Sequence[str], channels: Sequence[str], found: Findings
) -> None:
    """Compare the number of channels; every file could be read."""
    count = len(side.channels)
    if count == len(channels):
        return
    expected = f"expected {len(channels)} ({', '.join(channels)})"
    if len(names) == len(channels):
        name, held = next((n, num) for n, num in side.num_volumes.items() if num > 1)
        found.error(
            "not-3d",
            f"{name}: holds {held} volumes (4D, or colours); {expected}. "
            "Save one volume per file, or name every channel in the dataset's description.",
            file=name,
        )
        return
    files = f"{len(names)} file{'s' if len(names) != 1 else ''}"
    found.error(
        "channel-count",
        f"{', '.join(names) or 'no image file'}: {count} channel{'s' if count != 1 else ''} in "
        f"{files}; {expected}. Export every channel.",
        file=names[0] if names else None,
    )


def _check_repeats(side: ImageSide, channels: Sequence[str], found: Findings) -> None:
    first_with: dict[str, int] = {}
    for number, picture in enumerate(side.pictures):
        earlier = first_with.setdefault(picture, number)
        if earlier != number and number < len(channels):
            found.warning(
                "same-channels",
                f"channels {channels[earlier]} and {channels[number]} hold the same image; "
                "expected two different ones. Was a file copied under the wrong name?",
                file=side.files[min(number, len(side.files) - 1)].path,
            )


def _check_values(name: str, channel: str, measured: Measured, size: int, found: Findings) -> None:
    """Report voxels without a value, a constant image, and CT that is not in HU."""
    advice = "expected finite intensities. Replace them, for instance by 0."
    if measured.num_nan:
        found.error("nan", f"{name}: {measured.num_nan} of {size} voxels are NaN; {advice}",
                    file=name)  # fmt: skip
    if measured.num_infinite:
        found.error(
            "infinite",
            f"{name}: {measured.num_infinite} of {size} voxels are infinite as 32-bit floats; "
            f"{advice}",
            file=name,
        )
    facts = measured.facts
    if facts.min == facts.max:
        found.warning(
            "constant",
            f"{name}: every voxel is {facts.min:g}; expected an image. Export it again.",
            file=name,
        )
    elif channel.upper() == "CT":
        _check_hounsfield(name, facts, found)


def _check_hounsfield(name: str, facts: ChannelFacts, found: Findings) -> None:
    reason = _not_hounsfield(facts)
    if reason:
        found.warning(
            "ct-range",
            f"{name}: intensities reach from {facts.min:g} to {facts.max:g}; expected Hounsfield "
            f"units (air -1000, water 0, bone up to 3000): {reason}",
            file=name,
        )


def _not_hounsfield(facts: ChannelFacts) -> str:
    if facts.max - facts.min < _CT_SPAN:
        return "they look rescaled, for instance to 0..1. Export the original values."
    if facts.min >= 0 and facts.max <= 255:
        return "they look windowed to 8 bits. Export the original values."
    if facts.min >= 0:
        return "they look unsigned, most often HU + 1024. Subtract the offset in every case."
    if facts.min < _CT_LOWEST:
        return "the lowest are below any padding in use. Check the rescale intercept."
    if facts.max > _CT_HIGHEST:
        return "the highest are above any metal. Check the rescale slope."
    return ""


def _check_scaling(name: str, stored: Stored, found: Findings) -> None:
    if stored.slope < 0:
        found.warning(
            "odd-scaling",
            f"{name}: scl_slope is {stored.slope:g}; expected a positive factor: a negative one "
            "turns bright into dark. Check the file that wrote it.",
            file=name,
        )
