"""What follows training: the run's bundle, and full-volume validation of a fold with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from medseg.api.fold import FoldRun, trained_weights
from medseg.check.files import content_hash
from medseg.data.case import case_paths
from medseg.data.store import digest
from medseg.errors import BundleError
from medseg.evaluate.cases import evaluate_pairs
from medseg.evaluate.pairs import Pair
from medseg.execute.progress import progress_bar
from medseg.infer.bundle import write_bundle
from medseg.infer.model import CaseError, load
from medseg.io.read import split_ending
from medseg.io.write import output_ending
from medseg.labels import LabelScheme
from medseg.schema.base import FORMAT_VERSION, read, read_json, write, write_json
from medseg.schema.bundle import Semantics
from medseg.schema.dataset import DatasetSpec
from medseg.schema.metrics import Metrics

_REFERENCES = "references.json"
"""Beside `metrics.json`, written after it: a mark of the segmentations it was made with."""


def write_run_bundle(run: FoldRun) -> Path:
    """Write the run's bundle from every fold that is trained; it replaces the one before.

    Raises:
        BundleError: If no fold is trained.
    """
    weights = {}
    for path in sorted(run.path.glob("*")):
        if path.name == "all" or path.name.startswith("fold_"):
            found = trained_weights(replace(run, fold=path.name))
            if "final" in found:
                weights[path.name] = found
    if run.fold not in weights:
        raise BundleError(
            f"{run.weights_path}: no final weights of {run.fold}. Train the fold first."
        )
    spec = run.folder.spec()
    has_regions = LabelScheme.from_spec(spec).has_regions
    write_bundle(
        run.path / "bundle",
        spec=spec,
        plans=run.plans,
        configuration=run.config,
        weights=weights,
        semantics=Semantics(
            activation="sigmoid" if has_regions else "softmax",
            mirror_axes=run.mirroring.axes,
            swap_axes=run.mirroring.swap_axes,
        ),
        recipe=run.recipe_name,
    )
    return run.path / "bundle"


def validate_fold(run: FoldRun, bundle: Path, *, again: bool) -> Metrics:
    """Predict the fold's validation cases at full volume and score them.

    Writes `validation/CASE.nii.gz`, `validation/metrics.json` and `validation/references.json`,
    the mark of what the scores were made against; all cases are mirrored alike.

    Args:
        run: The fold.
        bundle: The run's bundle.
        again: Predict anew where the present weights have been validated already, against the
            segmentations that are there now.
    """
    spec = run.folder.spec()
    folder = run.fold_path / "validation"
    references = _references(run, spec)
    if not again and (stored := _stored_metrics(run, folder, references)) is not None:
        return stored
    folder.mkdir(parents=True, exist_ok=True)
    model = load(bundle, device=run.device, folds=[run.fold])
    cases, pairs = run.split.validation, {}
    channels = {case: case_paths(spec, case)[0] for case in cases}
    predicted = model.predict_many(channels.values(), tta="flips")
    with progress_bar(len(cases), f"validate {run.fold}", shown=run.progress) as bar:
        for case, result in zip(cases, predicted, strict=True):
            if isinstance(result, CaseError):
                raise BundleError(f"validation of case {case!r} failed: {result.message}")
            ending = output_ending(split_ending(channels[case][0].name)[1])
            prediction = folder / f"{case}{ending}"
            result.save(prediction)
            reference = case_paths(spec, case)[1]
            if reference is not None:
                pairs[case] = Pair(prediction=prediction, reference=reference)
            bar.update()
    metrics = evaluate_pairs(pairs, labels=spec)
    write(folder / "metrics.json", metrics)
    write_json(folder / _REFERENCES, {"format_version": FORMAT_VERSION, "made_with": references})
    return metrics


def _references(run: FoldRun, spec: DatasetSpec) -> str:
    """Return a mark of what the cases are scored against.

    It follows the content of the segmentations, what of them is annotated, and the labels; a file
    that was only touched or copied leaves it as it is.
    """
    cases = {}
    for case in run.split.validation:
        path = case_paths(spec, case)[1]
        held = content_hash(path) if path is not None and path.is_file() else None
        cases[case] = [held, spec.cases[case].annotated_labels]
    order, labels = spec.regions_class_order, list(spec.labels.items())
    return digest([cases, labels, order, spec.ignore_label])


def _stored_metrics(run: FoldRun, folder: Path, references: str) -> Metrics | None:
    """Return the scores of an earlier validation of these weights, cases and references."""
    file, weights = folder / "metrics.json", run.weights_path / "final.safetensors"
    if not file.is_file() or file.stat().st_mtime_ns < weights.stat().st_mtime_ns:
        return None
    mark = folder / _REFERENCES
    if not mark.is_file() or read_json(mark).get("made_with") != references:
        return None
    stored = read(Metrics, file)
    known = set(stored.cases) | set(stored.failed)
    return stored if known == set(run.split.validation) else None
