"""Start from another model's weights, as far as they fit."""

from __future__ import annotations

import logging

from medseg.api.fold_run import FoldRun
from medseg.api.models import resolve
from medseg.api.run_folder import FoldRecord
from medseg.bundles.bundle import Bundle, read_bundle
from medseg.errors import BundleError
from medseg.labels import LabelScheme
from medseg.models.adapt import Meaning, Takeover, take_over
from medseg.models.weights import load_weights
from medseg.schema.base import FORMAT_VERSION, write_json
from medseg.schema.dataset import DatasetSpec
from medseg.train.trainer import Trainer

logger = logging.getLogger(__name__)

_MOST_LISTED = 6


def take_initial(run: FoldRun, record: FoldRecord, trainer: Trainer) -> Takeover | None:
    """Copy the weights of the model a fold was started with into the trainer's network.

    Of a model with several folds the fold of the same name is taken, otherwise its first. What was
    taken, adapted and skipped is said in the log.

    Raises:
        BundleError: If there is no such model, or nothing of it fits.
    """
    if record.init_from is None:
        return None
    bundle = _bundle(run, record.init_from)
    folds = bundle.manifest.folds
    fold = run.fold if run.fold in folds else folds[0]
    found = take_over(
        trainer.network,
        load_weights(bundle.weights(fold)),
        before=_meaning(bundle.spec),
        now=_meaning(run.folder.spec()),
    )
    if not found.taken and not found.adapted:
        raise BundleError(
            f"{record.init_from}: none of its weights fits this network. {_advice(bundle)}"
        )
    trainer.restart_averages()
    logger.info("%s", _in_words(f"{record.init_from} ({fold})", found, bundle))
    return found


def _bundle(run: FoldRun, model: str) -> Bundle:
    """Return the model that is meant, which the main process imports first where it must be."""
    if not run.processes.is_main:
        run.processes.wait()
    folder = resolve(model, run.folder.path.parents[1])
    if run.processes.is_main:
        run.processes.wait()
    return read_bundle(folder)


def write_taken(run: FoldRun, found: Takeover) -> None:
    """Write what became of every tensor to `init.json`."""
    rows = [{"tensor": name, "became": what, "why": why} for name, what, why in found.rows()]
    write_json(run.fold_path / "init.json", {"format_version": FORMAT_VERSION, "tensors": rows})


def _meaning(spec: DatasetSpec) -> Meaning:
    labels = LabelScheme.from_spec(spec)
    names = sorted(labels.channels, key=labels.channels.__getitem__)
    logits = tuple(names) if labels.has_regions else ("background", *names)
    return Meaning(channels=tuple(spec.channels), logits=logits)


def _in_words(origin: str, found: Takeover, bundle: Bundle) -> str:
    lines = [f"weights of {origin}: {found.summary()} (init.json lists them)"]
    changed = [row for row in found.rows() if row[0] not in found.taken]
    lines += [f"  {name}: {what} ({why})" if why else f"  {name}: {what}"
              for name, what, why in changed[:_MOST_LISTED]]  # fmt: skip
    if len(changed) > _MOST_LISTED:
        lines.append(f"  and {len(changed) - _MOST_LISTED} more")
    if len(found.skipped) > len(found.taken):
        lines.append(_advice(bundle))
    return "\n".join(lines)


def _advice(bundle: Bundle) -> str:
    return (
        f"'medseg plan-and-preprocess DATASET --from {bundle.folder} --plans NAME' plans this "
        "dataset for that network; then train with --plans NAME."
    )
