"""What a training leaves on disk while it runs, and when."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from typing import Any

from medseg.api.fold_run import FoldRun
from medseg.api.run_folder import FoldRecord
from medseg.models.weights import save_weights
from medseg.report.figures import progress_figure
from medseg.schema.base import write
from medseg.train.checkpoint import save_checkpoint
from medseg.train.journal import Journal
from medseg.train.signals import Stopped, StopRequest
from medseg.train.trainer import Trainer

logger = logging.getLogger(__name__)

_PICTURE_SECONDS = 30.0


class Saver:
    """Writes checkpoints when it is time, the best weights when they are, the final at the end.

    With several processes the main one writes; all of them stop at the same step.
    """

    def __init__(
        self, run: FoldRun, trainer: Trainer, stop: StopRequest, held: Callable[[], None]
    ) -> None:
        """Begin; `held` raises where another process holds the fold by now."""
        self._run, self._trainer, self._stop, self._held = run, trainer, stop, held
        self._saved_at = time.monotonic()
        self._saved_iteration = trainer.length.iteration
        self._best_epoch = trainer.epoch

    def __call__(self) -> None:
        """Write what is due.

        Raises:
            Stopped: After a checkpoint, if the process has been asked to stop.
        """
        if self._trainer.epoch > self._best_epoch:
            self._best_epoch = self._trainer.epoch
            if self._trainer.best.is_now:
                self._save("best")
        if self._run.processes.any(self._stop.signal is not None):
            self.checkpoint()
            self.stop()
        if time.monotonic() - self._saved_at >= 60 * self._run.recipe.checkpoint_minutes:
            self.try_checkpoint()

    def try_checkpoint(self) -> None:
        """Write a checkpoint; a disk that is full now may not be so at the next one."""
        try:
            self.checkpoint()
        except OSError as error:
            self._saved_at = time.monotonic()
            logger.warning(
                "no checkpoint of iteration %d could be written (%s); the one before stays, the "
                "next is tried in %g minutes",
                self._trainer.length.iteration,
                error,
                self._run.recipe.checkpoint_minutes,
            )

    def checkpoint(self) -> None:
        """Write a checkpoint of the present step.

        Raises:
            OSError: If it cannot be written.
        """
        state = self._trainer.state_dict()
        if self._run.processes.is_main:
            self._held()
            save_checkpoint(self._run.checkpoints_path, self._trainer.length.iteration, state)
        self._saved_at = time.monotonic()

    def stop(self) -> None:
        """End the training.

        Raises:
            Stopped: Always.
        """
        raise Stopped(self._stop.signal or signal.SIGTERM, self._trainer.length.iteration)

    def stop_if_asked(self) -> None:
        """End the training, if this process alone trains and has been asked to stop.

        Raises:
            Stopped: If so; the last checkpoint is as it was.
        """
        if self._stop.signal is not None and self._run.processes.count == 1:
            self.stop()

    def finish(self, record: FoldRecord) -> None:
        """Write the last checkpoint, the final weights and what the run was."""
        self.checkpoint()
        if not self._run.processes.is_main:
            return
        self._save("final")
        trained = record.model_copy(
            update={
                "iterations": self._trainer.length.iteration,
                "epochs": self._trainer.epoch,
                "seconds_to_last_step": self._trainer.seconds_to_last_step,
                "skipped_steps": self._trainer.watch.total,
                "best_patch_dice": self._trainer.best.patch_dice,
                "best_full_dice": self._trainer.best.full_dice,
            }
        )
        write(self._run.fold_path / "run.json", trained)

    def _save(self, name: str) -> None:
        if not self._run.processes.is_main:
            return
        self._held()
        metadata = {"iteration": str(self._trainer.length.iteration), "fold": self._run.fold}
        self._run.weights_path.mkdir(parents=True, exist_ok=True)
        path = self._run.weights_path / f"{name}.safetensors"
        save_weights(path, self._trainer.weights(), metadata)


class Picture:
    """Redraws the progress picture, at most every half minute."""

    def __init__(self, journal: Journal, run: FoldRun) -> None:
        self._journal, self._path = journal, run.fold_path / "progress.png"
        self._drawn = time.monotonic()

    def on_epoch_end(self, row: Any) -> None:
        """Redraw if it is time."""
        if time.monotonic() - self._drawn > _PICTURE_SECONDS:
            self.draw()

    def draw(self) -> None:
        """Redraw; a disk that is full does not end a training."""
        self._drawn = time.monotonic()
        try:
            progress_figure(self._journal.rows(), self._path)
        except OSError as error:
            logger.warning("the progress picture could not be written: %s", error)
