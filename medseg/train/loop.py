"""The training loop, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from medseg.train.feed import Samples
from medseg.train.journal import Observer
from medseg.train.trainer import Trainer

FullDice = dict[str, float | None]
"""Structure -> Dice at full volume."""


def train(
    trainer: Trainer,
    *,
    samples: Iterator[Samples],
    validation_samples: Callable[[], Iterable[Samples]],
    validate_volumes: Callable[[Trainer], FullDice | None],
    observers: Iterable[Observer],
    save: Callable[[], None],
    on_step: Callable[[Trainer], None],
) -> None:
    """Run `trainer` to the end of its length.

    Args:
        trainer: State of the run; continued from where it stands.
        samples: Augmented training batches from the trainer's next iteration on.
        validation_samples: Gives the batches of one epoch's patch validation.
        validate_volumes: Gives the Dice at full volume in the epochs in which it is due.
        observers: Told of every finished epoch.
        save: Called after every step and every epoch; decides for itself whether it is time for a
            checkpoint, and raises where the run has been asked to stop.
        on_step: Told of every step, for progress bars.
    """
    while not trainer.length.is_done() or trainer.is_epoch_over():
        start = time.monotonic()
        while not trainer.is_epoch_over():
            trainer.step(next(samples))
            on_step(trainer)
            save()
        loss, elapsed = trainer.mean_loss(), trainer.length.elapsed_seconds()
        seconds, judged_from = trainer.clock.read(), time.monotonic()
        scores = trainer.validate(validation_samples())
        full_dice = validate_volumes(trainer)
        if full_dice is not None:
            trainer.length.forget_pause()
        row: dict[str, Any] = {
            "epoch": trainer.epoch,
            "session": trainer.session,
            "iteration": trainer.length.iteration,
            "progress": round(trainer.length.progress, 6),
            "lr": trainer.learning_rate,
            "train_loss": loss,
            "validation_loss": scores.loss,
            "patch_dice": scores.dice,
            "mean_patch_dice": _mean(scores.dice),
            "patch_voxels": scores.voxels,
            "full_dice": full_dice,
            "mean_full_dice": _mean(full_dice or {}),
            "steps": trainer.step_in_epoch,
            "seconds": round(time.monotonic() - start, 3),
            "elapsed_seconds": round(elapsed, 1),
            **{f"{part}_seconds": round(value, 3) for part, value in seconds.items()},
            "validate_seconds": round(time.monotonic() - judged_from, 3),
            "skipped_steps": trainer.watch.total,
        }
        trainer.end_epoch(row)
        for observer in observers:
            observer.on_epoch_end(row)
        save()


def _mean(dice: FullDice) -> float | None:
    known = [value for value in dice.values() if value is not None]
    return sum(known) / len(known) if known else None
