"""Predict folders: every case into files, one bad case at a time."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from medseg.errors import DatasetError
from medseg.infer.case_files import CaseFiles, Clock, case_files
from medseg.infer.inputs import Cases, collect_cases, part_of, refusal
from medseg.infer.jobs import Job
from medseg.infer.model import Model
from medseg.infer.outputs import (
    SUMMARY,
    write_summary,
)
from medseg.infer.result import Tta
from medseg.infer.source import bytes_in_memory
from medseg.io.read import ENDINGS
from medseg.io.space import full_disk_named
from medseg.schema.prediction import PredictionRow, PredictionSummary

logger = logging.getLogger(__name__)

Progress = Callable[[PredictionRow, int], None]
TileProgress = Callable[[str, int, int], None]


def predict_folder(  # noqa: PLR0913 - all but three by keyword
    model: Model,
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tta: Tta = "auto",
    step: float = 0.5,
    save: Collection[str] = (),
    previous_stage: str | Path | None = None,
    parts: str | None = None,
    overwrite: bool = False,
    postprocess: bool = True,
    progress: Progress | None = None,
    on_tile: TileProgress | None = None,
) -> tuple[PredictionRow, ...]:
    """Predict every case of folders and files into a folder.

    Each segmentation is written whole, as CASE with its image's ending (PNG for JPEG, `.nii.gz` for
    DICOM), on its image's grid, and CASE.json beside it; `summary.json` and `summary.csv` have one
    row per case, also when the run is interrupted.

    Args:
        model: A loaded model.
        inputs: Folders, image files, DICOM series and lists, see `collect_cases`.
        output: Folder for the results; made if missing.
        tta: As in `Model.predict`.
        step: As in `Model.predict`.
        save: Maps to write too: "probabilities", "entropy", "disagreement".
        previous_stage: In a cascade, a folder with a label map CASE.* for every case, which take
            the place of what the first stage finds.
        parts: "i/n": every n-th case from the i-th on; the summary then has this in its name.
        overwrite: Predict cases again that have an output.
        postprocess: As in `Model.predict`.
        progress: Called with (row, number of all cases) after every case.
        on_tile: Called with (case, tiles done, tiles in total).

    Returns:
        One row per case; a case that fails does not stop the others.

    Raises:
        DatasetError: Before anything is predicted, with every problem of every input.
        ConfigError: If an option is out of range.
    """
    options = model.options(save, tta=tta, step=step, postprocess=postprocess, folder=Path(output))
    cases = part_of(collect_cases(inputs, model.bundle.spec.channels), parts)
    output = Path(output)
    outputs = case_files(model, cases, output, options.maps)
    stages = _previous(model, cases, previous_stage)
    known = {case: made.existing(model, options) for case, made in outputs.items()}
    skipped = {case: row for case, row in known.items() if row is not None and not overwrite}
    jobs = (
        Job(
            name=case,
            case=list(paths),
            previous_stage=stages.get(case),
            maps_of=outputs[case].open_maps,
            size_bytes=bytes_in_memory(paths),
            progress=_of_case(case, on_tile),
        )
        for case, paths in cases.items()
        if case not in skipped
    )
    begun = [made for case, made in outputs.items() if case not in skipped]
    _open(output, begun)
    clock = Clock()
    predicted = model.run(
        jobs,
        options,
        finish=lambda job, result: outputs[job.name].write(model, result, options.step, clock),
        fail=lambda job, error: outputs[job.name].failed(error, clock),
    )
    rows: list[PredictionRow] = []
    try:
        for row in _in_order(cases, skipped, predicted):
            rows.append(row)
            if progress is not None:
                progress(row, len(cases))
    finally:
        try:
            predicted.close()  # type: ignore[attr-defined]
        finally:
            _close(output, begun)
            summary = PredictionSummary(
                model=str(model.bundle.folder), folds=model.folds, tta=tta, step=step,
                cases=tuple(rows),
            )  # fmt: skip
            _summarise(output, summary, list(model.labels.structures), parts)
    return tuple(rows)


def _open(output: Path, outputs: Sequence[CaseFiles]) -> None:
    """Make the output folder, and take away what a killed process left of files to be written.

    Raises:
        DatasetError: If nothing can be written there.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise DatasetError(
            f"{output}: cannot be written to ({error.strerror}). Choose another output folder, or "
            "change its access rights."
        ) from None
    _clear(output, outputs)


def _close(output: Path, outputs: Sequence[CaseFiles]) -> None:
    """Take away what has no name yet, also where a thread still writes and cannot be stopped."""
    for made in outputs:
        made.discard()
    _clear(output, outputs)


def _clear(output: Path, outputs: Sequence[CaseFiles]) -> None:
    """Remove half-written files: `.NAME.xxxx.part`, of each name that is to be written."""
    names = {path.name for made in outputs for path in made.targets}
    for path in output.glob(".*.part"):
        if path.name[1:].removesuffix(".part").rpartition(".")[0] not in names:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _summarise(
    output: Path, summary: PredictionSummary, structures: Sequence[str], parts: str | None
) -> None:
    """Write the summary; where that fails the rows are not lost with it."""
    try:
        with full_disk_named(output / SUMMARY):
            write_summary(output, summary, structures, part=parts)
    except (DatasetError, OSError) as error:
        logger.error("%s", error)


def _in_order(
    cases: Cases, skipped: dict[str, PredictionRow], predicted: Iterator[PredictionRow]
) -> Iterator[PredictionRow]:
    for case in cases:
        yield skipped[case] if case in skipped else next(predicted)


def _of_case(case: str, on_tile: TileProgress | None) -> Callable[[int, int], None] | None:
    return None if on_tile is None else lambda done, total: on_tile(case, done, total)


def _previous(model: Model, cases: Cases, folder: str | Path | None) -> dict[str, Path]:
    """Return the label map of the stage before of every case.

    Raises:
        DatasetError: With every case that has none.
        ConfigError: If the model has no stage before.
    """
    if folder is None:
        return {}
    for member in model.members:
        member.require_stage_before()
    known = {
        case: [path for ending in ENDINGS if (path := Path(folder) / f"{case}{ending}").is_file()]
        for case in cases
    }
    lacking = [
        f"case {case!r}: no label map of the previous stage {Path(folder) / case}.*"
        for case, found in known.items()
        if not found
    ]
    if lacking:
        raise refusal(lacking)
    return {case: found[0] for case, found in known.items()}
