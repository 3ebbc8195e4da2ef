"""What follows training: the run's bundle, and full-volume validation of a fold with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from medseg.api.fold import FoldRun, trained_weights
from medseg.data.case import case_paths
from medseg.errors import BundleError
from medseg.evaluate.cases import evaluate_pairs
from medseg.evaluate.pairs import Pair
from medseg.execute.progress import progress_bar
from medseg.infer.bundle import write_bundle
from medseg.infer.model import CaseError, load
from medseg.io.read import split_ending
from medseg.io.write import output_ending
from medseg.labels import LabelScheme
from medseg.schema.base import read, write
from medseg.schema.bundle import Semantics
from medseg.schema.metrics import Metrics


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

    Writes `validation/CASE.nii.gz` and `validation/metrics.json`; all cases are mirrored alike.

    Args:
        run: The fold.
        bundle: The run's bundle.
        again: Predict anew where the present weights have been validated already.
    """
    spec = run.folder.spec()
    folder = run.fold_path / "validation"
    if not again and (stored := _stored_metrics(run, folder)) is not None:
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
    return metrics


def _stored_metrics(run: FoldRun, folder: Path) -> Metrics | None:
    """Return the scores of an earlier validation of these weights and cases."""
    file, weights = folder / "metrics.json", run.weights_path / "final.safetensors"
    if not file.is_file() or file.stat().st_mtime_ns < weights.stat().st_mtime_ns:
        return None
    stored = read(Metrics, file)
    known = set(stored.cases) | set(stored.failed)
    return stored if known == set(run.split.validation) else None
