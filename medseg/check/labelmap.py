"""The segmentation of one case: values, and its place on the image."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from medseg.check.files import Opened, check_storage, open_file, report_no_spacing
from medseg.check.findings import Findings
from medseg.check.grids import Difference, differences
from medseg.errors import DatasetError
from medseg.geometry import Grid
from medseg.io.colour import one_channel
from medseg.io.image import Stored
from medseg.io.integers import Integers, NotIntegers, as_integers
from medseg.labels import LabelScheme
from medseg.schema.check import FileFacts
from medseg.values import value_counts

_IMAGE_LIKE = 300
"""A label map with more unexpected values than this is most often an image."""
_MAX_COUNTED = 6


@dataclass(slots=True, kw_only=True, eq=False)
class LabelSide:
    """What the segmentation file of a case holds."""

    files: list[FileFacts] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    """Value -> number of voxels."""
    array: Integers | None = None
    """(I, J, K) values as in the file; None where they are no labels."""


def inspect_segmentation(
    root: Path,
    name: str,
    *,
    scheme: LabelScheme,
    annotated: tuple[str, ...] | None,
    image: tuple[str, Grid] | None,
    found: Findings,
) -> LabelSide:
    """Read and check the segmentation file of a case.

    Args:
        root: The dataset's folder.
        name: The file.
        scheme: The dataset's labels.
        annotated: Labels drawn in this case; None: all.
        image: Name and grid of the file it belongs to; None where that could not be read.
        found: Takes the problems.
    """
    side = LabelSide()
    opened = open_file(root, name, "segmentation", found)
    if opened is None:
        return side
    side.files.append(opened.facts)
    check_storage(opened, found)
    if image is not None and opened.grid is not None:
        for difference in differences(image[1], opened.grid):
            if difference.code == "spacing" and opened.has_no_spacing:
                report_no_spacing(name, image[0], difference.words, found)
            else:
                _report_grid(name, image[0], difference, found)
    volume = _single_volume(opened, found)
    if volume is not None:
        side.array = _labels(name, volume, found)
    if side.array is not None:
        values, counts = value_counts(side.array)
        side.counts = dict(zip(values.tolist(), counts.tolist(), strict=True))
        _check_values(name, side.counts, scheme, annotated, found)
    return side


def _single_volume(opened: Opened, found: Findings) -> Stored | None:
    """Return the label map of a file that should hold one value per voxel."""
    stored, name = opened.stored, opened.facts.path
    if stored is None or stored.array.ndim == 3:
        return stored
    held, shape = stored.array.shape[3], stored.array.shape
    volume = one_channel(stored)
    if stored.fourth == "series":
        code, words = "not-3d", f"a series of {held} volumes (4D)"
    elif stored.fourth == "colours":
        code, words = "rgb-label", f"an RGB picture ({held} colour channels)"
    else:
        code, words = "not-3d", f"{held} values per voxel"
    if volume is not None:
        equal, advice, fix = "all equal", "Keep one of them.", "keeps one of the equal channels"
    else:
        equal, fix = "which differ", ""
        advice = "Save one integer per voxel: grey, or a palette whose indices are labels."
    found.error(
        code,
        f"{name}: the segmentation is {words}, shape {shape}, {equal}; expected one label per "
        f"voxel (I, J, K). {advice}",
        file=name,
        fix=fix,
    )
    return volume


def _labels(name: str, stored: Stored, found: Findings) -> Integers | None:
    if stored.is_lossy:
        found.error(
            "lossy-label",
            f"{name}: the segmentation is a JPEG file, which changes values at edges; expected a "
            "label map as it was drawn. Export it again as PNG.",
            file=name,
        )
    values = as_integers(stored)
    if isinstance(values, NotIntegers):
        _report_not_integers(name, values, stored.array.size, found)
        return None
    kind = stored.array.dtype
    if (stored.slope, stored.inter) != (1.0, 0.0):
        found.warning(
            "scaled-segmentation",
            f"{name}: the segmentation is scaled (scl_slope {stored.slope:g}, scl_inter "
            f"{stored.inter:g}); expected label values as they are (1, 0). medseg scales them; "
            "tools that do not will see other labels.",
            file=name,
            fix="stores the scaled labels, without scaling",
        )
    elif kind.kind == "f":
        found.warning(
            "float-label",
            f"{name}: the segmentation is stored as {kind.name}, all values being integers; "
            "expected an integer type. Fine for medseg, other tools may refuse it.",
            file=name,
            fix="stores the labels as the smallest integer type",
        )
    return values


def _report_not_integers(name: str, wrong: NotIntegers, size: int, found: Findings) -> None:
    if wrong.num_nan:
        found.error(
            "nan",
            f"{name}: {wrong.num_nan} of {size} voxels of the segmentation are NaN; expected "
            "label values. Replace them, for instance by the background's value.",
            file=name,
        )
    if wrong.num_infinite:
        found.error(
            "infinite",
            f"{name}: {wrong.num_infinite} of {size} voxels of the segmentation are infinite; "
            "expected label values. Replace them, for instance by the background's value.",
            file=name,
        )
    if wrong.num_fractions:
        found.error(
            "not-integer",
            f"{name}: {wrong.num_fractions} of {size} voxels are no integers (for example "
            f"{wrong.example:.6g}); expected label values. Is this the image, or was the "
            "segmentation interpolated? Export it again with nearest-neighbour interpolation.",
            file=name,
        )
    if wrong.num_beyond:
        found.error(
            "not-integer",
            f"{name}: {wrong.num_beyond} of {size} voxels hold values beyond 32 bits (they reach "
            f"from {wrong.low} to {wrong.high}); expected label values. Is this the image?",
            file=name,
        )


def _check_values(
    name: str,
    counts: dict[int, int],
    scheme: LabelScheme,
    annotated: tuple[str, ...] | None,
    found: Findings,
) -> None:
    """Report labels the dataset does not have, and a segmentation without any."""
    try:
        scheme.check(counts, name, annotated)
    except DatasetError as error:
        found.error("unexpected-label", f"{error}{_hint(counts, scheme)}", file=name)
        return
    known = {scheme.background, scheme.ignore_label}
    if not set(counts) - known:
        found.warning(
            "empty-segmentation",
            f"{name}: the segmentation is empty: all {sum(counts.values())} voxels are "
            f"{' or '.join(str(value) for value in counts)}; expected some label. Right if "
            "nothing is to be seen in this case; otherwise export it again.",
            file=name,
        )


def _hint(counts: dict[int, int], scheme: LabelScheme) -> str:
    """Return how often unexpected values occur, and what they may mean."""
    unexpected = {v: n for v, n in counts.items() if v not in scheme.valid_values}
    if not unexpected:
        return ""
    listed = [
        f"{value} in {number} voxel{'s' if number != 1 else ''}"
        for value, number in list(unexpected.items())[:_MAX_COUNTED]
    ]
    more = ", ..." if len(unexpected) > _MAX_COUNTED else ""
    text = f" Found {', '.join(listed)}{more}."
    if set(counts) == {0, 255}:
        text += " 0 and 255 are how pictures store a mask: give the label the value 255."
    if len(unexpected) > _IMAGE_LIKE:
        text += " So many values: is this the image?"
    return text


def _report_grid(name: str, image: str, difference: Difference, found: Findings) -> None:
    if difference.turn is not None:
        found.error(
            difference.code,
            f"{name} does not lie on the grid of {image}: {difference.words}. Re-export the "
            "segmentation on the image's grid.",
            file=name,
            fix=f"turns the segmentation into the orientation of {image}, exactly",
        )
    elif difference.is_error:
        found.error(
            difference.code,
            f"{name} does not lie on the grid of {image}: {difference.words}. Re-export the "
            "segmentation on the image's grid.",
            file=name,
        )
    else:
        found.warning(
            difference.code,
            f"{name} lies a little off the grid of {image}: {difference.words}. medseg takes "
            "them as equal; other tools may refuse them.",
            file=name,
            fix=f"copies the header of {image}",
        )
