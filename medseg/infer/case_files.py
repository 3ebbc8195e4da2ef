"""The files of one predicted case: maps, segmentation, report; all whole, or none left."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from medseg.bundles.bundle import MANIFEST
from medseg.errors import ConfigError, DatasetError
from medseg.infer.inputs import Cases, refusal
from medseg.infer.jobs import Prepared
from medseg.infer.model import Model, error_words
from medseg.infer.outputs import (
    SUMMARY,
    TABLE,
    Kind,
    label_reports,
    map_names,
    output_path,
    report_path,
    write_report,
)
from medseg.infer.result import Options, Result
from medseg.io.image import Header, split_ending
from medseg.io.maps import MapWriter
from medseg.io.write import as_shares, write_shares
from medseg.schema.base import read_json
from medseg.schema.prediction import CaseReport, PredictionRow, Provenance

logger = logging.getLogger(__name__)

HAS_OUTPUT = "has an output"


class Clock:
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
class CaseFiles:
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

    def existing(self, model: Model, options: Options) -> PredictionRow | None:
        """Return the row of a case that has an output; None where it is to be predicted."""
        target = self.files["segmentation"]
        if not target.is_file():
            return None
        row = PredictionRow(case=self.case, status="skipped", file=target.name, message=HAS_OUTPUT)
        report = self._report()
        differences = ["without a report"] if report is None else [
            *_other_settings(report.provenance, model, options),
            *(f"without {kind}" for kind in self.files if kind not in report.files),
        ]  # fmt: skip
        if report is not None and report.file_bytes not in (None, target.stat().st_size):
            differences.append("that was changed since")
        told: dict[str, Any] = {}
        if differences:
            told["message"] = f"{HAS_OUTPUT} {', '.join(differences)}; --overwrite replaces it"
        if report is not None:
            told |= {"volumes_ml": report.volumes_ml, "flags": report.flags}
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

    def write(self, model: Model, result: Result, step: float, clock: Clock) -> PredictionRow:
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
            report_path(self.folder, self.case).unlink(missing_ok=True)  # one of before is no more
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

    def failed(self, error: Exception, clock: Clock) -> PredictionRow:
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
                bundles=_bundle_names(model),
                weights=_weights(model),
                bundle_sha256=model.sha256,
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
            file_bytes=self.files["segmentation"].stat().st_size,
        )


def _other_settings(made_with: Provenance, model: Model, options: Options) -> list[str]:
    """Return in words what an output was made with and would not be now."""
    now = {
        "model": (made_with.bundle_sha256, model.sha256),
        "weights": (made_with.weights, _weights(model)),
        "folds": (made_with.folds, model.folds),
        "checkpoint": (made_with.checkpoint, model.checkpoint),
        "precision": (made_with.precision, model.precision),
        "step": (made_with.step, options.step),
        "tta": (made_with.tta, _expected_tta(made_with, model, options)),
        "postprocessing": (
            made_with.is_postprocessed,
            options.postprocess and model.bundle.postprocessing is not None,
        ),
    }
    differing = [name for name, (before, after) in now.items() if before != after]
    return [f"of another {' and '.join(differing)}"] if differing else []


def _expected_tta(made_with: Provenance, model: Model, options: Options) -> str:
    """Return the mirroring that would be used now, as far as it can be told without the image."""
    if options.tta == "auto":
        return made_with.tta
    has_axes = bool(model.members[0].bundle.manifest.semantics.mirror_axes)
    return "flips" if options.tta == "flips" and has_axes else "none"


def _bundle_names(model: Model) -> tuple[str, ...]:
    """Return the names of several bundles; a run's bundle is called as the run."""
    folders = [member.bundle.folder.resolve() for member in model.members]
    names = [folder.parent.name if folder.name == "bundle" else folder.name for folder in folders]
    return tuple(names) if len(names) > 1 else ()


def _weights(model: Model) -> tuple[float, ...]:
    """Return the share of each of several bundles."""
    return model.shares if len(model.members) > 1 else ()


def case_files(
    model: Model, cases: Cases, output: Path, maps: frozenset[str]
) -> dict[str, CaseFiles]:
    """Return the output files of each case; refuse to overwrite an input."""
    if output.exists() and not output.is_dir():
        raise DatasetError(f"{output}: is a file; expected a folder for the results.")
    kinds: list[Kind] = ["segmentation", *sorted(maps)]  # type: ignore[list-item]
    outputs = {}
    for case, paths in cases.items():
        ending = ".nii.gz" if paths[0].is_dir() else split_ending(paths[0].name)[1]
        outputs[case] = CaseFiles(
            case=case,
            inputs=paths,
            folder=output,
            files={kind: output_path(output, case, kind, ending) for kind in kinds},
            map_names=map_names(model.labels),
            background=not model.labels.has_regions,
            lock=threading.Lock(),
        )
    if (output / MANIFEST).is_file():
        raise DatasetError(f"{output}: is a bundle; choose another folder for the results.")
    clashes = [*_clashes(cases, outputs), *_foreign_files(outputs.values(), output)]
    if clashes:
        raise refusal([*clashes, f"{output}: choose another output folder"])
    return outputs


def _foreign_files(outputs: Iterable[CaseFiles], output: Path) -> list[str]:
    """Return which reports and summaries would take the place of files that are none."""
    paths = [report_path(output, made.case) for made in outputs]
    found = [path for path in (*paths, output / SUMMARY) if path.is_file() and not _is_ours(path)]
    table = output / TABLE
    if table.is_file() and not table.read_bytes()[:64].startswith(b"case,status,"):
        found.append(table)
    return [f"{path} would be replaced, and medseg has not written it" for path in found]


def _is_ours(path: Path) -> bool:
    """Return whether a JSON file is a report, a summary, or the voxel size beside a picture."""
    try:
        values = read_json(path)
    except ConfigError:
        return False
    return isinstance(values, dict) and ("format_version" in values or set(values) == {"spacing"})


def _clashes(cases: Cases, outputs: dict[str, CaseFiles]) -> list[str]:
    """Return which results would take the place of an image, of each other, or be taken for one."""
    images = {path.resolve() for paths in cases.values() for path in paths}
    folders = {path.parent for path in images}
    owners: dict[Path, str] = {}
    clashes = []
    for case, made in outputs.items():
        for path in made.files.values():
            place = path.resolve()
            if place in images:
                clashes.append(f"case {case!r}: the result would overwrite the image {path}")
            elif place.parent in folders:
                clashes.append(
                    f"case {case!r}: the result {path} would lie among the images, and be taken "
                    "for one the next time"
                )
            elif owners.setdefault(place, case) != case:
                clashes.append(
                    f"cases {owners[place]!r} and {case!r} would both write {path}; rename one"
                )
    return clashes
