"""Which predicted label map belongs to which reference."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from medseg.errors import DatasetError
from medseg.io.read import ENDINGS, split_ending

MAPS = (".probabilities", ".entropy", ".disagreement")
"""Ends of the stems of the files that `predict` writes beside a segmentation."""
_MAX_LISTED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The two files of one case."""

    prediction: Path
    reference: Path


def pair_files(
    prediction: Path, reference: Path, *, cases: Collection[str] | None = None
) -> dict[str, Pair]:
    """Pair label maps by case: the file name without its ending.

    Args:
        prediction: A folder, or one file.
        reference: A folder, or one file; two files make a pair whatever their names.
        cases: Case ids to pair; others are passed over. None: all there are.

    Returns:
        Case id (of the reference) -> files, sorted.

    Raises:
        DatasetError: If a file has no partner; all of them are listed at once.
    """
    if prediction.is_file() and reference.is_file():
        case = split_ending(reference.name)[0]
        return {case: Pair(prediction=prediction, reference=reference)}
    predictions, references = list_segmentations(prediction), list_segmentations(reference)
    wanted = set(cases) if cases is not None else set(predictions) | set(references)
    problems = [
        *_missing(sorted(wanted - set(predictions)), "prediction", prediction),
        *_missing(sorted(wanted - set(references)), "reference", reference),
    ]
    if problems:
        raise DatasetError(
            "\n".join(
                [
                    f"{prediction} and {reference} do not hold the same cases:",
                    *problems,
                    "Files are paired by name without the ending. Predict the missing cases, or "
                    "give folders that hold the cases to compare and no others.",
                ]
            )
        )
    return {
        case: Pair(prediction=predictions[case], reference=references[case])
        for case in sorted(wanted)
    }


def _missing(cases: list[str], what: str, where: Path) -> list[str]:
    if not cases:
        return []
    shown = ", ".join(cases[:_MAX_LISTED])
    more = f" ... and {len(cases) - _MAX_LISTED} more" if len(cases) > _MAX_LISTED else ""
    return [f"  no {what} in {where} for {len(cases)}: {shown}{more}"]


def list_segmentations(path: Path) -> dict[str, Path]:
    """Return case id -> file of the label maps in a folder (or of the one file), sorted.

    Hidden files, files that are no images and the maps written beside segmentations are passed
    over.

    Raises:
        DatasetError: If there is none, or two files have one case id.
    """
    if path.is_file():
        return {split_ending(path.name)[0]: path}
    if not path.is_dir():
        raise DatasetError(f"{path}: no such file or folder. Give label maps to compare.")
    found: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        if _is_image(file):
            stem = split_ending(file.name)[0]
            if not stem.endswith(MAPS):
                found.setdefault(stem, []).append(file)
    if not found:
        raise DatasetError(
            f"{path}: no label map there{_hint(path)}. Expected files that end in one of "
            f"{', '.join(ENDINGS)}."
        )
    twice = [
        f"  {case}: {', '.join(f.name for f in files)}"
        for case, files in found.items()
        if not _is_one_image(files)
    ]
    if twice:
        raise DatasetError(
            "\n".join([f"{path}: several files of one case; keep one of each:", *twice])
        )
    return {case: files[0] for case, files in found.items()}


def _is_image(file: Path) -> bool:
    known = file.name.lower().endswith(tuple(ENDINGS))
    return file.is_file() and not file.name.startswith(".") and known


def _is_one_image(files: list[Path]) -> bool:
    """Return whether the files are one image: a single file, or a header with its data."""
    return len(files) == 1 or sorted(file.suffix for file in files) == [".hdr", ".img"]


def _hint(path: Path) -> str:
    return " (it has a folder labelsTr: give that)" if (path / "labelsTr").is_dir() else ""
