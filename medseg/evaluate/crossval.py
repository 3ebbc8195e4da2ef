"""Pool the validation results of all folds of a run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from medseg.data.splits import NUM_FOLDS, SPLIT_FILE, Split, read_splits
from medseg.errors import ConfigError, DatasetError
from medseg.evaluate.pairs import list_segmentations
from medseg.metrics.case import summarize
from medseg.schema.base import read, write
from medseg.schema.metrics import CaseMetrics, Metrics


def crossval(run_dir: Path) -> Metrics:
    """Pool the validation of every fold into `crossval/`, replacing what was there.

    There are as many folds as in the dataset's `splits.json`, or 5 where that is not found; each
    is judged on the cases it was started with.
    Each case counts once, with the prediction of the network that did not learn from it.

    Args:
        run_dir: Folder of one run, holding `fold_0`, `fold_1` ...

    Returns:
        What was written to `crossval/metrics.json`.

    Raises:
        DatasetError: If folds, cases or predictions are missing; all are listed at once.
        ConfigError: If the folds do not evaluate the same structures.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DatasetError(f"{run_dir}: no such run. Train it, or check the names given.")
    splits = _splits(run_dir)
    folds = _read_folds(run_dir, len(splits) if splits else NUM_FOLDS)
    _check_cases(run_dir, folds, [_own(run_dir, n, splits) for n in range(len(folds))])
    _check_agreement(run_dir, folds)
    predictions = {
        case: file
        for name, metrics in folds.items()
        for case, file in _predictions(run_dir / name, metrics).items()
    }
    first = next(iter(folds.values()))
    pooled = summarize(
        {
            case: _moved(one, run_dir / "crossval" / predictions[case].name)
            for metrics in folds.values()
            for case, one in metrics.cases.items()
        },
        structures=first.structures,
        ignore_label=first.ignore_label,
        nsd_tolerance_mm=first.nsd_tolerance_mm,
        failed={case: text for one in folds.values() for case, text in one.failed.items()},
        notes=sorted({note for metrics in folds.values() for note in metrics.notes}),
    )
    _replace(run_dir / "crossval", list(predictions.values()), pooled)
    return pooled


def _splits(run_dir: Path) -> list[Split] | None:
    path = run_dir.resolve().parent.parent / "splits.json"
    return read_splits(path) if path.is_file() else None


def _own(run_dir: Path, number: int, splits: list[Split] | None) -> Split | None:
    """Return the split a fold was started with, or else that of the dataset."""
    path = run_dir / f"fold_{number}" / SPLIT_FILE
    if path.is_file():
        return read(Split, path)
    return splits[number] if splits else None


def _read_folds(run_dir: Path, num_folds: int) -> dict[str, Metrics]:
    names = [f"fold_{number}" for number in range(num_folds)]
    paths = {name: run_dir / name / "validation" / "metrics.json" for name in names}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        untrained = [name for name in missing if not (run_dir / name).is_dir()]
        unfinished = [name for name in missing if name not in untrained]
        lines = [
            f"  {what}: {', '.join(which)}"
            for what, which in (("not trained", untrained), ("without validation", unfinished))
            if which
        ]
        raise DatasetError(
            "\n".join(
                [
                    f"{run_dir}: {len(missing)} of {num_folds} folds are missing:",
                    *lines,
                    "Train these folds to the end (the same command again continues a fold).",
                ]
            )
        )
    return {name: read(Metrics, path) for name, path in paths.items()}


def _check_cases(
    run_dir: Path, folds: Mapping[str, Metrics], splits: Sequence[Split | None]
) -> None:
    problems = []
    seen: dict[str, str] = {}
    for number, (name, metrics) in enumerate(folds.items()):
        known = {*metrics.cases, *metrics.failed}
        split = splits[number]
        if split is not None:
            expected = set(split.validation)
            problems += [f"  {name}: case {c} was not validated" for c in sorted(expected - known)]
            problems += [f"  {name}: case {c} is not its own" for c in sorted(known - expected)]
        problems += [f"  {name}: case {c} is also in {seen[c]}" for c in sorted(known & set(seen))]
        seen.update(dict.fromkeys(known, name))
        present = _predictions(run_dir / name, metrics)
        problems += [
            f"  {name}: the prediction of case {case} is missing"
            for case in sorted(set(metrics.cases) - set(present))
        ]
    if problems:
        raise DatasetError(
            "\n".join(
                [
                    f"{run_dir}: the folds' validations do not add up:",
                    *problems,
                    "Validate these folds again: medseg train ... --validate-only.",
                ]
            )
        )


def _predictions(fold_dir: Path, metrics: Metrics) -> dict[str, Path]:
    """Return case id -> label map of the cases that were evaluated."""
    if not metrics.cases:
        return {}
    found = list_segmentations(fold_dir / "validation")
    return {case: file for case, file in found.items() if case in metrics.cases}


def _check_agreement(run_dir: Path, folds: Mapping[str, Metrics]) -> None:
    """Refuse folds that were evaluated for different structures or in different ways."""
    for field in ("structures", "ignore_label", "nsd_tolerance_mm"):
        values = {name: getattr(metrics, field) for name, metrics in folds.items()}
        first_name, first = next(iter(values.items()))
        for name, value in values.items():
            if value != first:
                raise ConfigError(
                    f"{run_dir}: {field} is {first!r} in {first_name} and {value!r} in {name}; "
                    "the folds must be evaluated alike. Validate them again: "
                    "medseg train ... --validate-only."
                )


def _moved(case: CaseMetrics, prediction: Path) -> CaseMetrics:
    return case.model_copy(update={"prediction": str(prediction)})


def _replace(folder: Path, predictions: list[Path], metrics: Metrics) -> None:
    """Write the folder beside its place, then put it there."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for path in predictions:
            for file in (path, path.with_suffix(".img")):
                if file == path or (path.suffix == ".hdr" and file.is_file()):
                    shutil.copyfile(file, part / file.name)
        write(part / "metrics.json", metrics)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
