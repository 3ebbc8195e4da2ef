"""Compare predicted label maps with references: one case, or all cases of two folders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from medseg.data.dataset import parse_labels, scan_dataset
from medseg.data.layouts.names import MANIFESTS, describing_file
from medseg.errors import ConfigError, GeometryError, MedsegError, case_context
from medseg.evaluate.pairs import Pair, pair_files
from medseg.execute.local import map_cases
from medseg.io.read import read_segmentation
from medseg.labels import LabelScheme
from medseg.metrics.case import NSD_TOLERANCE_MM, evaluate_case, summarize
from medseg.schema.base import read_json, validate
from medseg.schema.dataset import DatasetSpec
from medseg.schema.metrics import CaseMetrics, Metrics
from medseg.values import distinct_values

__all__ = ["evaluate_case", "evaluate_folder", "evaluate_pairs", "find_description"]

T = TypeVar("T")
_MAX_LISTED = 5


def evaluate_folder(
    prediction: Path,
    reference: Path,
    *,
    labels: DatasetSpec | None = None,
    cases: Collection[str] | None = None,
    nsd_tolerance_mm: float = NSD_TOLERANCE_MM,
    workers: int | None = None,
) -> Metrics:
    """Compare the label maps of two folders, or two files.

    Files are paired by name without the ending. A case that cannot be evaluated is recorded and
    the others go on; for two single files its error is raised.

    Args:
        prediction: Predicted label maps: a folder, or one file.
        reference: Reference label maps: a folder, or one file.
        labels: What the values mean; None: `dataset.json` in or above the reference's folder,
            and where there is none every value that occurs in the references is a structure.
        cases: Case ids to evaluate; None: all. The two folders must then hold the same cases.
        nsd_tolerance_mm: Tolerance of the normalised surface Dice, mm.
        workers: Processes; None uses the processors there are.

    Raises:
        DatasetError: If files are missing on either side; all are listed at once.
        ConfigError: If `dataset.json` is not usable.
    """
    prediction, reference = Path(prediction), Path(reference)
    pairs = pair_files(prediction, reference, cases=cases)
    spec = labels or find_description(reference)
    metrics, errors = _evaluate(pairs, spec, nsd_tolerance_mm, workers)
    if errors and prediction.is_file() and reference.is_file():
        raise next(iter(errors.values()))
    return metrics


def evaluate_pairs(
    pairs: Mapping[str, Pair],
    *,
    labels: DatasetSpec | None,
    nsd_tolerance_mm: float = NSD_TOLERANCE_MM,
    workers: int | None = None,
) -> Metrics:
    """Compare label maps whose pairs are known; else as `evaluate_folder`."""
    return _evaluate(pairs, labels, nsd_tolerance_mm, workers)[0]


def _evaluate(
    pairs: Mapping[str, Pair],
    spec: DatasetSpec | None,
    nsd_tolerance_mm: float,
    workers: int | None,
) -> tuple[Metrics, dict[str, MedsegError]]:
    scheme = LabelScheme.from_spec(spec) if spec else None
    unreadable: dict[str, MedsegError] = {}
    if scheme is None:
        values, unreadable = _map(_ReferenceValues(pairs=pairs), list(pairs), workers)
        structures = _structure_per_value(values.values())
    else:
        structures = scheme.structures
    compare = _Comparison(
        pairs=pairs,
        structures=structures,
        scheme=scheme,
        annotated=_annotated_labels(spec, pairs),
        nsd_tolerance_mm=nsd_tolerance_mm,
    )
    found, errors = _map(compare, [case for case in pairs if case not in unreadable], workers)
    errors = {**unreadable, **errors}
    metrics = summarize(
        {case: metrics for case, (metrics, _) in found.items()},
        structures=structures,
        ignore_label=scheme.ignore_label if scheme else None,
        nsd_tolerance_mm=nsd_tolerance_mm,
        failed={case: _in_words(case, error) for case, error in errors.items()},
        notes=_notes({case: unscored for case, (_, unscored) in found.items()}),
    )
    return metrics, errors


def _annotated_labels(
    spec: DatasetSpec | None, pairs: Mapping[str, Pair]
) -> dict[str, tuple[str, ...]]:
    """Return pair -> names of what was annotated, for the cases that say so.

    A pair belongs to the case whose segmentation is its reference, or to the one of its name.
    """
    if spec is None:
        return {}
    cases = {
        case: files for case, files in spec.cases.items() if files.annotated_labels is not None
    }
    root = Path(spec.source)
    by_file = {
        (root / files.segmentation).resolve(): files
        for files in cases.values()
        if files.segmentation
    }
    found = {}
    for case, pair in pairs.items():
        files = by_file.get(pair.reference.resolve()) if by_file else None
        files = files or cases.get(case)
        if files is not None and files.annotated_labels is not None:
            found[case] = files.annotated_labels
    return found


def find_description(reference: Path) -> DatasetSpec | None:
    """Return what a description in or above the folder of the references says about labels.

    That is a manifest (`medseg.json`, `medseg.csv`, `medseg.tsv`) or else `dataset.json`.

    Raises:
        ConfigError: If there is such a file and it is not usable.
    """
    folder = reference if reference.is_dir() else reference.parent
    for place in (folder, folder.resolve().parent):
        path = describing_file(place)
        if path is not None:
            return _read_labels(path)
    return None


def _read_labels(path: Path) -> DatasetSpec:
    if path.name in MANIFESTS:
        return scan_dataset(path)[0]
    description = read_json(path)
    if not isinstance(description, dict):
        raise ConfigError(f"{path}: expected a JSON object, got a {type(description).__name__}")
    if "format_version" in description:
        return validate(DatasetSpec, description, str(path))
    labels, regions_class_order, ignore_label = parse_labels(description, path)
    return DatasetSpec(
        name=path.parent.name,
        channels=("unknown",),
        labels=labels,
        regions_class_order=regions_class_order,
        ignore_label=ignore_label,
    )


def _map(
    function: Callable[[str], T], cases: Sequence[str], workers: int | None
) -> tuple[dict[str, T], dict[str, MedsegError]]:
    """Return the values of the cases that succeed and the errors of those that do not."""
    values: dict[str, T] = {}
    errors: dict[str, MedsegError] = {}
    for outcome in map_cases(function, cases, workers=workers):
        if outcome.error is not None:
            errors[outcome.item] = outcome.error
        elif outcome.value is not None:
            values[outcome.item] = outcome.value
    return values, errors


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReferenceValues:
    """Read which values a reference holds; an object, so that it can go to another process."""

    pairs: Mapping[str, Pair]

    def __call__(self, case: str) -> frozenset[int]:
        with case_context(case):
            array = read_segmentation(self.pairs[case].reference).array
        return frozenset(distinct_values(array).tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Comparison:
    """Compare one case; an object, so that it can go to another process."""

    pairs: Mapping[str, Pair]
    structures: Mapping[str, tuple[int, ...]]
    scheme: LabelScheme | None
    nsd_tolerance_mm: float
    annotated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Case id -> names of what was annotated, of the cases in which not all of it was."""

    def __call__(self, case: str) -> tuple[CaseMetrics, tuple[int, ...]]:
        """Return the measures, and the values of the prediction that belong to no structure."""
        pair = self.pairs[case]
        with case_context(case):
            prediction = read_segmentation(pair.prediction)
            reference = read_segmentation(pair.reference)
            difference = reference.grid.disagreement(prediction.grid)
            if difference is not None:
                raise GeometryError(
                    f"case {case!r}: {pair.prediction} does not lie on the grid of "
                    f"{pair.reference}: {difference}. Predict again from the image the "
                    "reference was drawn on, or resample one of the two."
                )
            names = self.annotated.get(case)
            found = frozenset(distinct_values(prediction.array).tolist())
            if self.scheme is not None:
                held = distinct_values(reference.array).tolist()
                self.scheme.check(held, str(pair.reference), names)
                self.scheme.check(found, str(pair.prediction))
            scores = evaluate_case(
                prediction.array,
                reference.array,
                structures={
                    name: values
                    for name, values in self.structures.items()
                    if names is None or name in names
                },
                affine=reference.grid.affine,
                ignore_label=self.scheme.ignore_label if self.scheme else None,
                nsd_tolerance_mm=self.nsd_tolerance_mm,
            )
        metrics = CaseMetrics(
            prediction=str(pair.prediction), reference=str(pair.reference), structures=scores
        )
        scored = {value for values in self.structures.values() for value in values}
        unscored = () if self.scheme else tuple(sorted(found - scored - {0}))
        return metrics, unscored


def _structure_per_value(values: Iterable[frozenset[int]]) -> dict[str, tuple[int, ...]]:
    occurring = sorted(frozenset[int]().union(*values) - {0})
    return {str(value): (value,) for value in occurring}


def _in_words(case: str, error: MedsegError) -> str:
    """Return message and notes without the case id: it is the key the text is stored at."""
    notes = [note for note in getattr(error, "__notes__", ()) if note != f"case: {case}"]
    return "\n".join([str(error).removeprefix(f"case {case!r}: "), *notes])


def _notes(unscored: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Say which predicted values no reference holds: they count as background."""
    cases: dict[int, list[str]] = {}
    for case, values in sorted(unscored.items()):
        for value in values:
            cases.setdefault(value, []).append(case)
    return [
        f"label {value} is in no reference and was not scored; {len(where)} predictions hold it: "
        + ", ".join(where[:_MAX_LISTED])
        + (" ..." if len(where) > _MAX_LISTED else "")
        for value, where in sorted(cases.items())
    ]
