"""Look at one case: every problem of every file, and the case itself where it can be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medseg.check.files import open_file
from medseg.check.findings import Findings
from medseg.check.grids import direction_letters
from medseg.check.image import ImageSide, inspect_image
from medseg.check.labelmap import LabelSide, inspect_segmentation
from medseg.data.case import Case
from medseg.io.image import ENDINGS
from medseg.labels import LabelScheme
from medseg.schema.check import CaseFacts
from medseg.schema.dataset import DatasetSpec

CHECK_VERSION = 1
"""Raised whenever the checks find something else in the same files."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inspection:
    """What came of looking at one case."""

    facts: CaseFacts
    case: Case | None
    """The loaded case, as `load_case` returns it; None where it has an error."""


def inspect_case(spec: DatasetSpec, case_id: str) -> Inspection:
    """Read and check one case; a bad case is no exception but facts with problems.

    Each file is read once. Channels and segmentation are looked at even where others failed.

    Args:
        spec: The dataset.
        case_id: Id of the case.

    Raises:
        ConfigError: If the labels of the dataset make no sense.
    """
    found, entry, root = Findings(case_id), spec.cases[case_id], Path(spec.source)
    scheme = LabelScheme.from_spec(spec)
    image = inspect_image(root, entry.channels, spec.channels, found)
    labels = LabelSide()
    if entry.segmentation is None:
        _report_missing(root, case_id, found)
    else:
        labels = inspect_segmentation(
            root,
            entry.segmentation,
            scheme=scheme,
            annotated=entry.annotated_labels,
            image=None if image.grid is None else (image.first, image.grid),
            found=found,
        )
    facts = CaseFacts(
        files=(*image.files, *labels.files),
        shape=None if image.grid is None else image.grid.shape,
        spacing=None if image.grid is None else image.grid.spacing,
        orientation="" if image.grid is None else direction_letters(image.grid),
        channels=tuple(image.channels),
        labels=labels.counts,
        annotated_labels=entry.annotated_labels,
        problems=tuple(found.problems),
    )
    if found.has_errors:
        return Inspection(facts=facts, case=None)
    return Inspection(facts=facts, case=_case(case_id, image, labels, scheme))


def _report_missing(root: Path, case_id: str, found: Findings) -> None:
    """Report that there is no segmentation; a folder may have taken its place."""
    for ending in ENDINGS:
        path = root / "labelsTr" / f"{case_id}{ending}"
        if path.is_dir():
            open_file(root, path.relative_to(root).as_posix(), "segmentation", found)
            return
    found.error(
        "missing-segmentation",
        "no segmentation; expected one for each training case. Add the file, or remove the case "
        "from the dataset.",
    )


def _case(case_id: str, image: ImageSide, labels: LabelSide, scheme: LabelScheme) -> Case | None:
    if image.array is None or image.grid is None or image.header is None or labels.array is None:
        return None
    return Case(
        case_id=case_id,
        channels=image.array,
        segmentation=scheme.to_indices(labels.array, case_id),
        grid=image.grid,
        header=image.header,
    )
