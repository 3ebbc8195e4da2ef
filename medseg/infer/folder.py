"""Predict folders: which files make up which case, all problems first, one bad case at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from medseg.data.dataset import group_channels
from medseg.errors import DatasetError, MedsegError
from medseg.infer.model import Model
from medseg.infer.result import CaseError, Result, Tta
from medseg.io.image import PICTURE_ENDINGS, TIFF_ENDINGS
from medseg.io.read import read_channels, split_ending
from medseg.io.write import output_ending
from medseg.schema.base import FORMAT_VERSION, Schema, write

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
_MAX_LISTED = 20
_SIDECARS = (".json", ".txt", ".csv", ".tsv", ".md", ".bval", ".bvec", ".yaml", ".yml", ".log")
_DATA_OF = {".raw": (".mhd", ".nhdr"), ".zraw": (".mhd",), ".raw.gz": (".nhdr",)}


class PredictionRow(Schema):
    """What became of one case."""

    case: str
    """Name of the case."""
    status: Literal["done", "failed"]
    """Whether there is an output."""
    file: str | None = None
    """Output file, relative to the output folder."""
    message: str = ""
    """Why it failed."""
    volumes_ml: dict[str, float] = Field(default_factory=dict)
    """Structure -> volume."""
    flags: tuple[str, ...] = ()
    """What a person should look at."""
    seconds: float = 0.0
    """Time since the previous case was finished."""


class PredictionSummary(Schema):
    """`summary.json` of an output folder."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    model: str
    """The bundle used."""
    folds: tuple[str, ...]
    """Folds averaged."""
    tta: str
    """Test-time augmentation asked for."""
    step: float
    """Largest shift between tiles, as a fraction of the tile."""
    cases: tuple[PredictionRow, ...]
    """One row per case, in the order predicted."""


Progress = Callable[[PredictionRow, int], None]


def collect_cases(
    inputs: Sequence[str | Path], channels: Sequence[str]
) -> dict[str, tuple[Path, ...]]:
    """Return the cases that folders and files hold.

    Images are opened only where one file has to hold several channels (as colours, or along a
    fourth axis).

    Args:
        inputs: Folders (their own files, not those of sub-folders) and image files. A case is
            CASE_NNNN.ending (exactly four digits) per channel; no suffix means one channel, or all
            of them in one file. Endings may differ, also within a case.
        channels: Names of the channels every case must have.

    Returns:
        Case -> one file per channel, sorted by case.

    Raises:
        DatasetError: With every problem of every case.
    """
    problems: list[str] = []
    files = [path for entry in inputs for path in _files(Path(entry), problems)]
    cases = {}
    for case, found in group_channels(list(dict.fromkeys(files))).items():
        problem = _case_problem(case, found, channels)
        if problem is None:
            cases[case] = tuple(path for _, path in found)
        else:
            problems.append(problem)
    if problems or not cases:
        raise _refusal(problems or ["no input was given; expected a folder or image files"])
    return cases


def predict_folder(
    model: Model,
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tta: Tta = "auto",
    step: float = 0.5,
    progress: Progress | None = None,
) -> tuple[PredictionRow, ...]:
    """Predict every case of folders and files into a folder.

    Each segmentation is written whole, as CASE with its image's ending (PNG for JPEG), on its
    image's grid; `summary.json` beside them has one row per case, also when the run is interrupted.

    Args:
        model: A loaded model.
        inputs: Folders and image files, see `collect_cases`.
        output: Folder for the results; made if missing.
        tta: As in `Model.predict`.
        step: As in `Model.predict`.
        progress: Called with (row, number of all cases) after every case.

    Returns:
        One row per case; a case that fails does not stop the others.

    Raises:
        DatasetError: Before anything is predicted, with every problem of every input.
        ConfigError: If an option is out of range.
    """
    cases = collect_cases(inputs, model.bundle.spec.channels)
    output = Path(output)
    targets = _targets(cases, output)
    results = model.predict_many([list(paths) for paths in cases.values()], tta=tta, step=step)
    output.mkdir(parents=True, exist_ok=True)
    rows: list[PredictionRow] = []
    started = time.perf_counter()
    try:
        for case, result in zip(cases, results, strict=True):
            row = _save(case, result, targets[case], started)
            started = time.perf_counter()
            rows.append(row)
            if progress is not None:
                progress(row, len(cases))
    finally:
        summary = PredictionSummary(
            model=str(model.bundle.folder), folds=model.folds, tta=tta, step=step, cases=tuple(rows)
        )
        write(output / SUMMARY, summary)
    return tuple(rows)


def _save(case: str, result: Result | CaseError, target: Path, started: float) -> PredictionRow:
    """Write one result; what goes wrong becomes the row's message."""
    message = result.message if isinstance(result, CaseError) else ""
    if isinstance(result, Result):
        try:
            result.save(target)
            return PredictionRow(
                case=case,
                status="done",
                file=target.name,
                volumes_ml=result.volumes_ml,
                flags=result.flags,
                seconds=time.perf_counter() - started,
            )
        except (MedsegError, OSError) as error:
            message = f"{target}: not written: {error}"
    logger.warning("case %s failed: %s", case, message)
    seconds = time.perf_counter() - started
    return PredictionRow(case=case, status="failed", message=message, seconds=seconds)


def _files(entry: Path, problems: list[str]) -> list[Path]:
    """Return the image files of one input; what is no image is added to the problems."""
    if not entry.exists():
        problems.append(f"{entry}: no such file or folder")
        return []
    if entry.is_file():
        return _images([entry], problems)
    files = sorted(path for path in entry.iterdir() if path.is_file() and path.name[0] != ".")
    before = len(problems)
    images = _images(_without_companions(files), problems)
    if not images and len(problems) == before:
        subfolders = sum(path.is_dir() for path in entry.iterdir())
        problems.append(
            f"{entry}: holds no image ({len(files)} other files, {subfolders} folders); expected "
            "CASE_0000.nii.gz, CASE_0001.nii.gz ... or CASE.nii.gz"
        )
    return images


def _without_companions(files: list[Path]) -> list[Path]:
    """Drop notes beside images, and data files that belong to a header file."""
    names = {path.name.lower() for path in files}
    kept = []
    for path in files:
        name = path.name.lower()
        headers = {
            name.removesuffix(data) + header
            for data, endings in {**_DATA_OF, ".img": (".hdr",), ".img.gz": (".hdr",)}.items()
            for header in endings
            if name.endswith(data)
        }
        if not name.endswith(_SIDECARS) and not headers & names:
            kept.append(path)
    return kept


def _images(files: list[Path], problems: list[str]) -> list[Path]:
    images = []
    for path in files:
        try:
            split_ending(path.name)
        except DatasetError as error:
            problems.append(f"{path}: {error}")
        else:
            images.append(path)
    return images


def _case_problem(case: str, found: list[tuple[int, Path]], channels: Sequence[str]) -> str | None:
    numbers = [number for number, _ in found]
    if numbers == list(range(len(channels))) or _holds_all(case, found, channels):
        return None
    expected = ", ".join(f"{number:04d} ({name})" for number, name in enumerate(channels))
    got = ", ".join(f"{number:04d} ({path.name})" for number, path in found)
    if len(set(numbers)) < len(numbers):
        files = ", ".join(str(path) for _, path in found)
        return f"case {case!r}: several files claim one channel: {files}; keep one per channel"
    return f"case {case!r}: got channels {got}; expected {expected}"


def _holds_all(case: str, found: list[tuple[int, Path]], channels: Sequence[str]) -> bool:
    """Return whether fewer files than channels hold them all, as colours or along a fourth axis.

    That may be a single file without channel number, or pictures with or without.
    """
    paths = [path for _, path in found]
    stem, ending = split_ending(paths[0].name)
    is_picture = ending in PICTURE_ENDINGS or ending in TIFF_ENDINGS
    in_order = [number for number, _ in found] == list(range(len(found)))
    if not in_order or len(found) >= len(channels) or not (is_picture or stem == case):
        return False
    try:
        return len(read_channels(paths).array) == len(channels)
    except DatasetError:
        return True  # damaged: its own error is reported when its turn comes


def _targets(cases: dict[str, tuple[Path, ...]], output: Path) -> dict[str, Path]:
    """Return the output file of each case; refuse to overwrite an input."""
    if output.exists() and not output.is_dir():
        raise DatasetError(f"{output}: is a file; expected a folder for the results.")
    targets = {
        case: output / (case + output_ending(split_ending(paths[0].name)[1]))
        for case, paths in cases.items()
    }
    inputs = {path.resolve() for paths in cases.values() for path in paths}
    clashes = [
        f"case {case!r}: the result would overwrite the image {target}"
        for case, target in targets.items()
        if target.resolve() in inputs
    ]
    if clashes:
        raise _refusal([*clashes, f"{output}: choose another output folder"])
    return targets


def _refusal(problems: list[str]) -> DatasetError:
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} with the input"
    shown = [f"  {problem}" for problem in problems[:_MAX_LISTED]]
    if len(problems) > _MAX_LISTED:
        shown.append(f"  ... and {len(problems) - _MAX_LISTED} more")
    return DatasetError("\n".join([f"{count}; nothing was predicted:", *shown]))
