"""Predict folders: every case into files, one bad case at a time."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from medseg.errors import ConfigError, DatasetError
from medseg.infer.bundle import MANIFEST
from medseg.infer.inputs import Cases, collect_cases, part_of, refusal
from medseg.infer.jobs import Job, Prepared
from medseg.infer.model import Model, error_words
from medseg.infer.outputs import (
    SUMMARY,
    Kind,
    label_reports,
    map_names,
    output_path,
    report_path,
    write_report,
    write_summary,
)
from medseg.infer.result import Result, Tta
from medseg.io.image import Header, split_ending
from medseg.io.maps import MapWriter
from medseg.io.read import ENDINGS
from medseg.io.size import stored_bytes
from medseg.io.space import full_disk_named
from medseg.io.write import as_shares, write_shares
from medseg.schema.base import read_json
from medseg.schema.prediction import CaseReport, PredictionRow, PredictionSummary, Provenance

logger = logging.getLogger(__name__)

Progress = Callable[[PredictionRow, int], None]
TileProgress = Callable[[str, int, int], None]

_OF_ANOTHER = "has an output of another model"
_COPIES = 8
"""What reading and preprocessing take, as a multiple of the stored image (16 bits a voxel)."""


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
    options = model.options(save, tta=tta, step=step, postprocess=postprocess, in_files=True)
    cases = part_of(collect_cases(inputs, model.bundle.spec.channels), parts)
    output = Path(output)
    outputs = _outputs(model, cases, output, options.maps)
    stages = _previous(model, cases, previous_stage)
    skipped = {} if overwrite else {
        case: row for case, made in outputs.items() if (row := made.existing(model)) is not None
    }  # fmt: skip
    jobs = (
        Job(
            name=case,
            case=list(paths),
            previous_stage=stages.get(case),
            maps_of=outputs[case].open_maps,
            size_bytes=_COPIES * sum(map(stored_bytes, paths)),
            progress=_of_case(case, on_tile),
        )
        for case, paths in cases.items()
        if case not in skipped
    )
    begun = [made for case, made in outputs.items() if case not in skipped]
    _open(output, begun)
    _tell_of_others(skipped)
    clock = _Clock()
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


def _open(output: Path, outputs: Sequence[_Output]) -> None:
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


def _close(output: Path, outputs: Sequence[_Output]) -> None:
    """Take away what has no name yet, also where a thread still writes and cannot be stopped."""
    for made in outputs:
        made.discard()
    _clear(output, outputs)


def _clear(output: Path, outputs: Sequence[_Output]) -> None:
    """Remove half-written files: `.NAME.xxxx.part`, of each name that is to be written."""
    names = {path.name for made in outputs for path in made.targets}
    for path in output.glob(".*.part"):
        if path.name[1:].removesuffix(".part").rpartition(".")[0] not in names:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _tell_of_others(skipped: dict[str, PredictionRow]) -> None:
    count = sum(_OF_ANOTHER in row.message for row in skipped.values())
    if count:
        logger.warning(
            "outputs of another model: %d; they stay as they are, --overwrite replaces them", count
        )


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


class _Clock:
    """Tells how long ago the case before was finished."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last call."""
        now = time.perf_counter()
        before, self._last = self._last, now
        return now - before


class FileMaps:
    """Maps of one case on their way to files: probabilities part by part, the others at the end."""

    def __init__(
        self, files: dict[Kind, Path], names: Sequence[str], header: Header, *, background: bool
    ) -> None:
        """Open the files.

        Args:
            files: Kind -> file.
            names: Of the probability maps.
            header: Of the image.
            background: Whether the first map is 1 where nothing is written.
        """
        self.kinds: frozenset[str] = frozenset(files)
        self._files, self._header = files, header
        self._others: dict[Kind, NDArray[np.uint16]] = {
            kind: np.zeros(header.grid.shape, np.uint16)
            for kind in files
            if kind != "probabilities"
        }
        self._writer: MapWriter | None = None
        if "probabilities" in files:
            initial = [float(background), *[0.0] * (len(names) - 1)]
            self._writer = MapWriter(files["probabilities"], header, names, initial=initial)
            self._writer.__enter__()

    def put(self, kind: str, index: tuple[slice, slice, slice], values: NDArray[Any]) -> None:
        """Take a slab."""
        if kind != "probabilities":
            self._others[kind][index] = as_shares(values)  # type: ignore[index]
        elif self._writer is not None:
            self._writer.write(index, np.moveaxis(values, 0, -1))

    def commit(self) -> None:
        """Write what is left, and give every file its name."""
        for kind, values in self._others.items():
            write_shares(self._files[kind], values, self._header)
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.__exit__(None, None, None)

    def discard(self) -> None:
        """Leave nothing of what has no name yet."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.__exit__(KeyboardInterrupt, None, None)


@dataclass(slots=True, eq=False, kw_only=True)
class _Output:
    """The files of one case."""

    case: str
    inputs: tuple[Path, ...]
    folder: Path
    files: dict[Kind, Path]
    map_names: tuple[str, ...]
    background: bool
    maps: FileMaps | None = None
    unsure: tuple[Path, ...] = ()
    """Files that were not there before, while others of the case are still to be written."""
    lock: threading.Lock

    @property
    def targets(self) -> tuple[Path, ...]:
        """Every file of the case, the report last."""
        return *self.files.values(), report_path(self.folder, self.case)

    def existing(self, model: Model) -> PredictionRow | None:
        """Return the row of a case that has an output; None where it is to be predicted."""
        if not self.files["segmentation"].is_file():
            return None
        report = self._report()
        row = PredictionRow(
            case=self.case,
            status="skipped",
            file=self.files["segmentation"].name,
            message="has an output without a report; --overwrite replaces it",
        )
        if report is None:
            return row
        lacking = [kind for kind in self.files if kind not in report.files]
        message = "has an output"
        made_by = report.provenance
        found = (made_by.bundle_sha256, made_by.folds, made_by.checkpoint)
        if found != (bundle_sha256(model), model.folds, model.checkpoint):
            message = f"{_OF_ANOTHER}; --overwrite replaces it"
        elif lacking:
            message = f"has an output without {', '.join(lacking)}; --overwrite replaces it"
        told = {"message": message, "volumes_ml": report.volumes_ml, "flags": report.flags}
        return row.model_copy(update=told)

    def _report(self) -> CaseReport | None:
        path = report_path(self.folder, self.case)
        try:
            return CaseReport.model_validate(read_json(path)) if path.exists() else None
        except (ValidationError, ValueError):
            return None

    def open_maps(self, prepared: Prepared) -> FileMaps:
        """Return what takes the maps of the case."""
        wanted: dict[Kind, Path] = {
            kind: path for kind, path in self.files.items() if kind != "segmentation"
        }
        maps = FileMaps(wanted, self.map_names, prepared.header, background=self.background)
        with self.lock:
            self.maps = maps
        return maps

    def write(self, model: Model, result: Result, step: float, clock: _Clock) -> PredictionRow:
        """Write all files of a case: maps, segmentation, report.

        A case counts as done once it has a segmentation, so that comes after the maps.

        Raises:
            DatasetError: If a file cannot be written; then no new one of the case is left.
        """
        target = self.files["segmentation"]
        started = time.perf_counter()
        with self.lock:
            self.unsure = tuple(path for path in self.targets if not path.exists())
        try:
            if self.maps is not None:
                self.maps.commit()
            result.save(target)
            seconds = {**result.seconds, "write": time.perf_counter() - started}
            write_report(self.folder, self._reported(model, result, step, seconds))
        except OSError as error:
            raise DatasetError(f"{target}: not written: {error}") from error
        with self.lock:
            self.unsure, self.maps = (), None  # the maps of a whole folder would fill the memory
        return PredictionRow(
            case=self.case,
            status="done",
            file=target.name,
            volumes_ml=result.volumes_ml,
            flags=result.flags,
            seconds=clock.lap(),
        )

    def failed(self, error: Exception, clock: _Clock) -> PredictionRow:
        """Return the row of a case that went wrong."""
        self.discard()
        message = error_words(error)
        logger.warning("case %s failed: %s", self.case, message)
        return PredictionRow(case=self.case, status="failed", message=message, seconds=clock.lap())

    def discard(self) -> None:
        """Remove what was begun and is not finished."""
        with self.lock:
            unsure, self.unsure = self.unsure, ()
            maps, self.maps = self.maps, None
            if maps is not None:
                maps.discard()
            for path in unsure:
                if path.is_file():
                    path.unlink()

    def _reported(
        self, model: Model, result: Result, step: float, seconds: dict[str, float]
    ) -> CaseReport:
        return CaseReport(
            case=self.case,
            inputs=tuple(path.name for path in self.inputs),
            files={kind: path.name for kind, path in self.files.items()},
            labels=label_reports(model.labels),
            volumes_ml=result.volumes_ml,
            flags=result.flags,
            provenance=Provenance(
                model=model.bundle.spec.name,
                bundle=model.bundle.folder.resolve().name,
                bundle_sha256=bundle_sha256(model),
                folds=model.folds,
                checkpoint=model.checkpoint,
                tta="flips" if result.is_mirrored else "none",
                step=step,
                precision=model.precision,
                device=str(model.device),
                medseg_version=metadata.version("medseg"),
                is_postprocessed=result.is_postprocessed,
            ),
            seconds=seconds,
        )


def bundle_sha256(model: Model) -> str:
    """Return a checksum of everything the model is made of: of its `bundle.json` files."""
    manifests = [(member.bundle.folder / MANIFEST).read_bytes() for member in model.members]
    if len(manifests) == 1:
        return hashlib.sha256(manifests[0]).hexdigest()
    parts = [hashlib.sha256(manifest).digest() for manifest in manifests]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _outputs(model: Model, cases: Cases, output: Path, maps: frozenset[str]) -> dict[str, _Output]:
    """Return the output files of each case; refuse to overwrite an input."""
    if output.exists() and not output.is_dir():
        raise DatasetError(f"{output}: is a file; expected a folder for the results.")
    kinds: list[Kind] = ["segmentation", *sorted(maps)]  # type: ignore[list-item]
    outputs = {}
    for case, paths in cases.items():
        ending = ".nii.gz" if paths[0].is_dir() else split_ending(paths[0].name)[1]
        outputs[case] = _Output(
            case=case,
            inputs=paths,
            folder=output,
            files={kind: output_path(output, case, kind, ending) for kind in kinds},
            map_names=map_names(model.labels),
            background=not model.labels.has_regions,
            lock=threading.Lock(),
        )
    taken = {path.resolve() for paths in cases.values() for path in paths}
    clashes = [
        f"case {case!r}: the result would overwrite the image {path}"
        for case, made in outputs.items()
        for path in made.files.values()
        if path.resolve() in taken
    ]
    if clashes:
        raise refusal([*clashes, f"{output}: choose another output folder"])
    return outputs


def _previous(model: Model, cases: Cases, folder: str | Path | None) -> dict[str, Path]:
    """Return the label map of the stage before of every case.

    Raises:
        DatasetError: With every case that has none.
        ConfigError: If the model has no stage before.
    """
    if folder is None:
        return {}
    for member in model.members:
        if member.previous is None:
            raise ConfigError(
                f"previous_stage is given, but {member.bundle.configuration_name!r} has no stage "
                "before it; leave it out."
            )
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
