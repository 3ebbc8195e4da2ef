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
from medseg.api.fold_run import FoldRun
from medseg.api.initial import take_initial
from medseg.api.run_folder import FoldRecord, Stretch, check_record, read_record
from medseg.api.saver import Picture, Saver
from medseg.api.volumes import volume_validation
from medseg.data.splits import SPLIT_FILE
from medseg.errors import ConfigError
from medseg.execute.progress import progress_bar
from medseg.models.precision import autocast_dtype, pick_device
from medseg.report.trackers import Tracker, build_trackers, check_trackers
from medseg.schema.base import write
from medseg.train.alarms import AlarmBell
from medseg.train.checkpoint import load_checkpoint
from medseg.train.journal import Journal
from medseg.train.lock import LOCK, FoldLock
from medseg.train.loop import train as run_loop
from medseg.train.signals import stop_requests
from medseg.train.trainer import Trainer

logger = logging.getLogger(__name__)


def train_fold(
    run: FoldRun,
    *,
    restart: bool,
    on_start: Callable[[], None],
    previous: Mapping[str, Any] | None = None,
) -> None:
    """Train a fold to its end; go on from its last checkpoint; leave a finished fold alone.

    Args:
        run: What to train.
        restart: Throw away what the fold has.
        on_start: Called once everything is known to fit, before anything is written or deleted.
        previous: Case id -> (*spatial) labels that the stage before found, in a cascade.

    Raises:
        ConfigError: If the fold was started otherwise, or another process trains it.
        Stopped: If the process was asked to stop; a checkpoint has then been written.
    """
    if _is_trained(run) and not (restart or run.extends):
        _record(run, restart)  # refuses another seed or length
        logger.info("%s is trained already; --extend trains it on, --restart anew", run.fold_path)
        return
    record = _record(run, restart)
    with _settled(record):
        torch.manual_seed(fold_seed(record.seed, run.fold))
        parts = put_together(run, record, open_cases(run), previous)
        goes_on = run.checkpoints_path.is_dir() and not restart
        took = None if goes_on else take_initial(run, parts.trainer)
        check_trackers(run.trackers)
        with FoldLock(run.fold_path) if run.processes.is_main else nullcontext() as lock:
            run.processes.wait()  # each has read what the main one changes now
            on_start()
            _begin(run, record, restart)
            run.processes.wait()
            held = lock.require_held if lock is not None else lambda: None
            _train(run, record, parts, took, held)


@contextmanager
def _settled(record: FoldRecord) -> Iterator[None]:
    """Compute with the number of threads of the record; put it and random states back after."""
    devices = [record.device] if record.device.startswith("cuda") else []
    threads = torch.get_num_threads()
    torch.set_num_threads(record.threads)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.set_num_threads(threads)


def _is_trained(run: FoldRun) -> bool:
    record = read_record(run.fold_path)
    has_weights = (run.weights_path / "final.safetensors").is_file()
    return record is not None and record.is_trained and has_weights


def _begin(run: FoldRun, record: FoldRecord, restart: bool) -> None:
    """Write what the fold is; with `restart`, delete what it was."""
    if not run.processes.is_main:
        return
    if restart:
        for path in run.fold_path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink()
    write(run.fold_path / "run.json", record)
    write(run.fold_path / SPLIT_FILE, run.split)


def _trackers(run: FoldRun) -> list[Tracker]:
    """Return the trackers asked for."""
    if not run.processes.is_main:
        return []
    config = {"recipe": run.recipe.model_dump(mode="json"), "configuration": run.config}
    name = f"{run.folder.path.name}/{run.path.name}/{run.fold}"
    return build_trackers(run.trackers, run.fold_path, run_name=name, config=config)


def _train(
    run: FoldRun,
    record: FoldRecord,
    parts: FoldParts,
    took: str | None,
    held: Callable[[], None],
) -> None:
    """Run the loop from the last checkpoint on, or from the start.

    Args:
        run: What is trained.
        record: What it was started with.
        parts: What it consists of.
        took: What it started from, in words.
        held: Raises where another process holds the fold by now.
    """
    trainer, journal = parts.trainer, Journal(run.fold_path / "journal.jsonl")
    _go_on(run, record, trainer, took)
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
            validate_volumes=volume_validation(run, record),
            observers=[AlarmBell(journal), journal, picture, *trackers]
            if run.processes.is_main
            else [],
            save=saver,
            on_step=lambda trainer: _tick(bar, trainer),
        )
    saver.finish(record)
    if run.processes.is_main:
        picture.draw()


def _go_on(run: FoldRun, record: FoldRecord, trainer: Trainer, took: str | None) -> None:
    """Take over the last checkpoint; begin the next stretch where the run is extended."""
    state = load_checkpoint(run.checkpoints_path)
    if state is None:
        if took is not None:
            logger.info("%s", took)
        return
    trainer.load_state_dict(state)
    logger.info("going on from iteration %d", trainer.length.iteration)
    if trainer.num_stretches < len(record.stretches):
        trainer.begin_stretch()


def _record(run: FoldRun, restart: bool) -> FoldRecord:
    """Return what the fold was started with, or what it is started with now.

    Raises:
        ConfigError: If it was started otherwise, or cannot be extended.
    """
    record = None if restart else read_record(run.fold_path)
    asked = Stretch(
        planned_iterations=run.length.planned_iterations(run.recipe),
        budget_seconds=run.length.budget_seconds,
    )
    if record is None:
        if run.extends:
            raise ConfigError(f"{run.fold_path}: nothing to extend. Train the fold first.")
        return _new_record(run, asked)
    check_record(
        run.fold_path,
        record,
        seed=run.seed,
        init_from=None if run.init_from is None else str(run.init_from),
        **({} if run.extends else asked.model_dump()),
    )
    if run.extends:
        return _extended(run, record, asked)
    return record.model_copy(update={"validate_every": run.validate_every or record.validate_every})


def _new_record(run: FoldRun, asked: Stretch) -> FoldRecord:
    if not run.length.is_given:
        planned = run.recipe.epochs * run.recipe.iterations_per_epoch
        asked = Stretch(planned_iterations=planned, budget_seconds=None)
    device = pick_device(run.device)
    dtype = autocast_dtype(device, run.recipe.precision)
    return FoldRecord(
        seed=run.seed or 0,
        stretches=(asked,),
        device=str(device),
        precision=str(dtype or torch.float32).removeprefix("torch."),
        threads=torch.get_num_threads(),
        processes=run.processes.count,
        init_from=None if run.init_from is None else str(run.init_from),
        validate_every=run.validate_every,
    )


def _extended(run: FoldRun, record: FoldRecord, asked: Stretch) -> FoldRecord:
    """Return the record of a finished fold with one more stretch."""
    if not record.is_trained:
        raise ConfigError(
            f"{run.fold_path}: its training is not finished. Go on with it first: leave out "
            "--extend and the length."
        )
    if not run.length.is_given:
        raise ConfigError("--extend needs a length: give --budget, --epochs or --iterations.")
    results = ("iterations", "epochs", "seconds_to_last_step", "skipped_steps")
    changes: dict[str, Any] = dict.fromkeys(results)
    return record.model_copy(update={**changes, "stretches": (*record.stretches, asked)})


def _tick(bar: Any, trainer: Trainer) -> None:
    if bar.disable:
        return
    bar.total = trainer.length.estimated_iterations()
    loss = trainer.peek()
    if loss is not None:
        bar.set_postfix_str(f"loss {loss:.3f}, {trainer.length.progress:.0%}", refresh=False)
    bar.update()
