"""The training loop, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from medseg.data.loader import Batch
from medseg.train.journal import Observer
from medseg.train.trainer import Trainer


def train(
    trainer: Trainer,
    *,
    batches: Iterator[Batch],
    validation_batches: Callable[[], Iterable[Batch]],
    observers: Iterable[Observer],
    save_checkpoint: Callable[[], None],
    on_iteration: Callable[[float | None], None],
) -> None:
    """Run `trainer` to the end of its length.

    Args:
        trainer: State of the run; continued from where it stands.
        batches: Training batches from the trainer's next iteration on.
        validation_batches: Gives the batches of one epoch's patch validation.
        observers: Told of every finished epoch.
        save_checkpoint: Called after every epoch; decides for itself whether it is time.
        on_iteration: Told the mean loss of the epoch so far, for progress bars.
    """
    while not trainer.length.is_done():
        start, waited, losses = time.monotonic(), 0.0, trainer.new_loss_sum()
        for number in range(1, trainer.iterations_per_epoch + 1):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            losses += trainer.step(batch)
            on_iteration(trainer.peek(losses, number))
            if trainer.length.is_done():
                break
        elapsed = trainer.length.elapsed_seconds()
        dice, validation_loss = trainer.validate(validation_batches())
        row: dict[str, Any] = {
            "epoch": trainer.epoch,
            "iteration": trainer.length.iteration,
            "progress": round(trainer.length.progress, 6),
            "lr": trainer.learning_rate,
            "train_loss": float(losses) / number,
            "validation_loss": validation_loss,
            "patch_dice": dice,
            "mean_patch_dice": _mean(list(dice.values())),
            "seconds": round(time.monotonic() - start, 3),
            "elapsed_seconds": round(elapsed, 1),
            "wait_seconds": round(waited, 3),
            "skipped_steps": trainer.num_skipped,
        }
        trainer.end_epoch(row)
        for observer in observers:
            observer.on_epoch_end(row)
        save_checkpoint()


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
