"""Train one fold: put its parts together, run the loop, leave its weights."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import Any

import torch

from medseg.api.faster import use_fastest
from medseg.api.fold_data import open_cases
from medseg.api.fold_parts import FoldParts, fold_seed, put_together
from medseg.api.fold_record import is_trained, settle_record
from medseg.api.fold_run import FoldRun
from medseg.api.initial import take_initial, write_taken
from medseg.api.run_folder import FoldRecord
from medseg.api.saver import Picture, Saver
from medseg.api.volumes import volume_validation
from medseg.data.splits import SPLIT_FILE
from medseg.errors import BundleError
from medseg.execute.progress import progress_bar
from medseg.models.adapt import Takeover
from medseg.models.precision import pick_device
from medseg.report.trackers import Tracker, build_trackers, check_trackers
from medseg.schema.base import write
from medseg.train.alarms import AlarmBell
from medseg.train.checkpoint import load_checkpoint
from medseg.train.journal import Journal
from medseg.train.lock import FoldLock
from medseg.train.loop import train as run_loop
from medseg.train.signals import stop_requests
from medseg.train.trainer import Trainer

logger = logging.getLogger(__name__)

_RANK_SEED = 1_000_003
"""Between the random states of processes that train together."""


def _no_stage() -> None:
    """Give nothing: there is no stage before."""


def train_fold(
    run: FoldRun,
    *,
    restart: bool,
    on_start: Callable[[], None],
    previous: Callable[[], Mapping[str, Any] | None] = _no_stage,
) -> None:
    """Train a fold to its end; go on from its last checkpoint; leave a finished fold alone.

    Args:
        run: What to train.
        restart: Throw away what the fold has.
        on_start: Called once everything is known to fit, before anything is written or deleted.
        previous: Gives case id -> (*spatial) labels that the stage before found, in a cascade.

    Raises:
        ConfigError: If the fold was started otherwise, or another process trains it.
        Stopped: If the process was asked to stop; a checkpoint has then been written.
    """
    record = settle_record(run, restart=restart)
    if is_trained(run) and not (restart or run.extends):
        logger.info("%s is trained already; --extend trains it on, --restart anew", run.fold_path)
        return
    check_trackers(run.trackers)
    with FoldLock(run.fold_path) if run.processes.is_main else nullcontext() as lock:
        run.processes.wait()
        record = settle_record(run, restart=restart)  # what the one before left, now it is ours
        _train_locked(run, record, restart=restart, on_start=on_start, previous=previous, lock=lock)


def _train_locked(
    run: FoldRun,
    record: FoldRecord,
    *,
    restart: bool,
    on_start: Callable[[], None],
    previous: Callable[[], Mapping[str, Any] | None],
    lock: FoldLock | None,
) -> None:
    with _settled(run, record):
        parts = put_together(run, record, open_cases(run), previous())
        state = None if restart else load_checkpoint(run.checkpoints_path)
        took = take_initial(run, record, parts.trainer) if state is None else None
        run.processes.wait()  # each has read what the main one changes now
        on_start()
        _begin(run, record, took, lock if restart else None)
        run.processes.wait()
        _go_on(run, record, parts.trainer, state)
        held = lock.require_held if lock is not None else _nothing
        _train(run, record, parts, held)


def _nothing() -> None:
    """Do nothing: another process holds the lock for this one."""


@contextmanager
def _settled(run: FoldRun, record: FoldRecord) -> Iterator[None]:
    """Compute as the record says; put threads, flags and random states back after.

    With a seed an accelerator takes convolutions whose sums do not vary from run to run, otherwise
    those it finds fastest.
    """
    device, threads = pick_device(run.device), torch.get_num_threads()
    torch.set_num_threads(record.threads)
    flags = torch.backends.cudnn.flags(
        enabled=True, benchmark=not record.is_seeded, deterministic=record.is_seeded
    )
    try:
        with flags, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(fold_seed(record.seed, run.fold) + _RANK_SEED * run.processes.rank)
            yield
    finally:
        torch.set_num_threads(threads)


def _begin(run: FoldRun, record: FoldRecord, took: Takeover | None, lock: FoldLock | None) -> None:
    """Write what the fold is; with its lock, delete first what it was."""
    if not run.processes.is_main:
        return
    if lock is not None:
        if run.checkpoints_path.is_dir():
            shutil.rmtree(run.checkpoints_path)
        lock.clear()
    if took is not None:
        write_taken(run, took)
    write(run.fold_path / "run.json", record)
    write(run.fold_path / SPLIT_FILE, run.split)


def _trackers(run: FoldRun) -> list[Tracker]:
    """Return the trackers asked for."""
    if not run.processes.is_main:
        return []
    config = {"recipe": run.recipe.model_dump(mode="json"), "configuration": run.config}
    name = f"{run.folder.path.name}/{run.path.name}/{run.fold}"
    return build_trackers(run.trackers, run.fold_path, run_name=name, config=config)


def _train(run: FoldRun, record: FoldRecord, parts: FoldParts, held: Callable[[], None]) -> None:
    """Run the loop from where the trainer stands.

    Args:
        run: What is trained.
        record: What it was started with.
        parts: What it consists of.
        held: Raises where another process holds the fold by now.
    """
    trainer, journal = parts.trainer, Journal(run.fold_path / "journal.jsonl")
    if run.processes.is_main:
        journal.cut_back(trainer.epoch)
    record = use_fastest(run, record, parts)
    trackers = _trackers(run)
    picture = Picture(journal, run)
    total = trainer.length.num_iterations and trainer.length.estimated_iterations()
    shown = run.progress and run.processes.is_main
    with (
        ExitStack() as stack,
        stop_requests() as stop,
        progress_bar(total, f"train {run.fold}", shown=shown, unit="step") as bar,
        closing(parts.samples()) as samples,
    ):
        for tracker in trackers:
            stack.callback(tracker.close)
        bar.update(trainer.length.iteration)
        saver = Saver(run, trainer, stop, held)
        run_loop(
            trainer,
            samples=samples,
            validation_samples=parts.validation_samples,
            validate_volumes=volume_validation(run, record, saver),
            observers=[_Holding(held), AlarmBell(journal), journal, picture, *trackers]
            if run.processes.is_main
            else [],
            save=saver,
            on_step=lambda trainer: _tick(bar, trainer),
        )
    saver.finish(record)
    if run.processes.is_main:
        picture.draw()


class _Holding:
    """Before an epoch is recorded, makes sure that the fold is still this process's."""

    def __init__(self, held: Callable[[], None]) -> None:
        self._held = held

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """Raise if it is not."""
        self._held()


def _go_on(
    run: FoldRun, record: FoldRecord, trainer: Trainer, state: dict[str, Any] | None
) -> None:
    """Take over the last checkpoint; begin the next stretch where the run is extended.

    Raises:
        BundleError: If what is to be extended has lost its last checkpoint.
    """
    if state is None:
        return
    trainer.load_state_dict(state)
    logger.info("going on from iteration %d", trainer.length.iteration)
    if trainer.num_stretches == len(record.stretches):
        return
    if trainer.length.iteration != record.stretch.first_iteration:
        raise BundleError(
            f"{run.checkpoints_path}: the newest whole checkpoint is of iteration "
            f"{trainer.length.iteration}, the run to be extended ended at "
            f"{record.stretch.first_iteration}. Start a new run from its model with --init-from."
        )
    trainer.begin_stretch()


def _tick(bar: Any, trainer: Trainer) -> None:
    if bar.disable:
        return
    bar.total = trainer.length.estimated_iterations()
    loss = trainer.peek()
    if loss is not None:
        bar.set_postfix_str(f"loss {loss:.3f}, {trainer.length.progress:.0%}", refresh=False)
    bar.update()
