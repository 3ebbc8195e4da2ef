"""Validation at full volume while a run goes on: early information, and the choice of "best"."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace

from medseg.api.cascade import previous_bundle
from medseg.api.fold_run import FoldRun
from medseg.api.run_folder import FoldRecord
from medseg.api.saver import Saver
from medseg.api.validation import bundle_semantics, predict_validation, training_cases
from medseg.bundles.bundle import write_bundle
from medseg.evaluate.cases import evaluate_pairs
from medseg.infer.loading import load
from medseg.train.loop import FullDice
from medseg.train.trainer import Trainer

_FOLDER = ".volumes"
"""Below the fold: predictions and the bundle of the present weights, deleted when judged."""


def volume_validation(
    run: FoldRun, record: FoldRecord, saver: Saver
) -> Callable[[Trainer], FullDice | None]:
    """Return what judges the weights of the epochs in which that is due, None in the others.

    It is due every so many epochs and after the last. A checkpoint is written before, and a request
    to stop is heard between two images, which are predicted without mirroring. With several
    processes the main one judges, the others wait.
    """
    every = record.validate_every

    def judge(trainer: Trainer) -> FullDice | None:
        if every is None or not run.split.validation:
            return None
        if (trainer.epoch + 1) % every and not trainer.length.is_done():
            return None
        saver.try_checkpoint()
        return run.processes.from_main(lambda: _judge(run, trainer, saver))

    return judge


def _judge(run: FoldRun, trainer: Trainer, saver: Saver) -> FullDice:
    folder = run.fold_path / _FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    try:
        bundle = write_bundle(
            folder / "bundle",
            spec=run.folder.spec(),
            plans=run.plans,
            configuration=run.config,
            weights={run.fold: {"final": trainer.weights()}},
            semantics=bundle_semantics(run),
            training=training_cases(run),
            previous=previous_bundle(run),
        )
        model = load(bundle.folder, device=run.device, trust_code=True)
        quiet = replace(run, progress=False)
        target = folder / "predictions"
        pairs = predict_validation(quiet, model, target, tta="none", after_each=saver.stop_if_asked)
        metrics = evaluate_pairs(pairs, labels=run.folder.spec())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {name: summary.dice.mean for name, summary in metrics.summary.items()}
