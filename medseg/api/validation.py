"""What follows training: the run's bundle, and full-volume validation of a fold with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from medseg.api.cascade import previous_bundle
from medseg.api.fold_run import FoldRun, fold_names, trained_weights
from medseg.bundles.bundle import write_bundle
from medseg.check.files import content_hash
from medseg.data.case import case_paths
from medseg.data.facts import summarise
from medseg.data.store import digest
from medseg.errors import BundleError, ConfigError
from medseg.evaluate.cases import evaluate_pairs
from medseg.evaluate.pairs import Pair
from medseg.execute.progress import progress_bar
from medseg.execute.turns import one_at_a_time
from medseg.infer.loading import load
from medseg.infer.model import Model
from medseg.infer.result import CaseError, Tta
from medseg.io.read import split_ending
from medseg.io.write import output_ending
from medseg.labels import LabelScheme
from medseg.schema.base import FORMAT_VERSION, read, read_json, write, write_json
from medseg.schema.bundle import Semantics
from medseg.schema.dataset import DatasetSpec
from medseg.schema.metrics import Metrics
from medseg.schema.training_cases import TrainingCases

logger = logging.getLogger(__name__)

_REFERENCES = "references.json"
"""Beside `metrics.json`, written after it: a mark of the segmentations it was made with."""


def write_run_bundle(run: FoldRun) -> Path:
    """Write the run's bundle from every fold that is trained; it replaces the one before.

    Folds that end side by side take turns, so that the last one sees all.

    Raises:
        BundleError: If no fold is trained.
    """
    with one_at_a_time(run.path / "recipe.yaml"):
        weights = {}
        for fold in fold_names(run.path):
            found = trained_weights(replace(run, fold=fold))
            if "final" in found:
                weights[fold] = found
        if run.fold not in weights:
            raise BundleError(
                f"{run.weights_path}: no final weights of {run.fold}. Train the fold first."
            )
        write_bundle(
            run.path / "bundle",
            spec=run.folder.spec(),
            plans=run.plans,
            configuration=run.config,
            weights=weights,
            semantics=bundle_semantics(run),
            recipe=run.recipe_name,
            training=training_cases(run),
            previous=previous_bundle(run),
        )
    return run.path / "bundle"


def bundle_semantics(run: FoldRun) -> Semantics:
    """Return how predictions with the weights of a run are put together."""
    has_regions = LabelScheme.from_spec(run.folder.spec()).has_regions
    return Semantics(
        activation="sigmoid" if has_regions else "softmax",
        mirror_axes=run.mirroring.axes,
        swap_axes=run.mirroring.swap_axes,
    )


def training_cases(run: FoldRun) -> TrainingCases | None:
    """Return what the cases of the run's dataset are like, those for validation too.

    None where the dataset has no fingerprint, or one of an earlier version; a bundle needs none.
    """
    if not run.folder.fingerprint_path.is_file():
        return None
    try:
        return summarise(list(run.folder.fingerprint().cases.values()))
    except ConfigError as error:
        logger.warning("the bundle gets no record of the training cases: %s", error)
        return None


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
    with one_at_a_time(run.path / "recipe.yaml"):
        model = load(bundle, device=run.device, folds=[run.fold], trust_code=True)
    pairs = predict_validation(run, model, folder, tta="flips")
    metrics = evaluate_pairs(pairs, labels=spec)
    write(folder / "metrics.json", metrics)
    write_json(folder / _REFERENCES, {"format_version": FORMAT_VERSION, "made_with": references})
    return metrics


def predict_validation(
    run: FoldRun,
    model: Model,
    folder: Path,
    *,
    tta: Tta,
    after_each: Callable[[], None] = lambda: None,
) -> dict[str, Pair]:
    """Predict the validation cases of a fold into a folder.

    Args:
        run: The fold.
        model: What predicts.
        folder: Where the predictions go.
        tta: Whether images are mirrored.
        after_each: Called after each case; what it raises ends the prediction.

    Returns:
        Case id -> prediction and reference, of the cases that have one.

    Raises:
        BundleError: If a case fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec, pairs = run.folder.spec(), {}
    channels = {case: case_paths(spec, case)[0] for case in run.split.validation}
    predicted = model.predict_many(channels.values(), tta=tta)
    with progress_bar(len(channels), f"validate {run.fold}", shown=run.progress) as bar:
        for case, result in zip(channels, predicted, strict=True):
            if isinstance(result, CaseError):
                raise BundleError(f"validation of case {case!r} failed: {result.message}")
            ending = output_ending(split_ending(channels[case][0].name)[1])
            prediction = folder / f"{case}{ending}"
            result.save(prediction)
            reference = case_paths(spec, case)[1]
            if reference is not None:
                pairs[case] = Pair(prediction=prediction, reference=reference)
            bar.update()
            after_each()
    return pairs


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
