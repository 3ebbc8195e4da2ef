"""What a fold was started with, and whether what is asked for now agrees."""

from __future__ import annotations

import logging
from typing import Any

import torch

from medseg.api.fold_run import FoldRun
from medseg.api.run_folder import FoldRecord, Stretch, check_record, read_record
from medseg.errors import ConfigError
from medseg.models.precision import autocast_dtype, pick_device

logger = logging.getLogger(__name__)


def is_trained(run: FoldRun) -> bool:
    """Return whether the fold has come to the end of what was asked of it."""
    record = read_record(run.fold_path)
    has_weights = (run.weights_path / "final.safetensors").is_file()
    return record is not None and record.is_trained and has_weights


def num_finished(run: FoldRun) -> int:
    """Return how many schedules a fold has come to the end of."""
    record = read_record(run.fold_path)
    return 0 if record is None else len(record.stretches) - (not record.is_trained)


def settle_record(run: FoldRun, *, restart: bool) -> FoldRecord:
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
    begins_stretch = run.extends and record.is_trained
    check_record(
        run.fold_path,
        record,
        seed=run.seed,
        init_from=None if run.init_from is None else str(run.init_from),
        **({} if begins_stretch else _lengths(asked)),
    )
    if run.extends:
        record = _extended(run, record, asked)
    return _on_this_machine(run, record).model_copy(
        update={"validate_every": run.validate_every or record.validate_every}
    )


def _lengths(asked: Stretch) -> dict[str, Any]:
    return {
        "planned_iterations": asked.planned_iterations,
        "budget_seconds": asked.budget_seconds,
    }


def _new_record(run: FoldRun, asked: Stretch) -> FoldRecord:
    if not run.length.is_given:
        planned = run.recipe.epochs * run.recipe.iterations_per_epoch
        asked = Stretch(planned_iterations=planned, budget_seconds=None)
    return FoldRecord(
        seed=run.seed or 0,
        is_seeded=run.seed is not None,
        stretches=(asked,),
        device=str(pick_device(run.device)),
        precision=_precision(run),
        threads=torch.get_num_threads(),
        processes=run.processes.count,
        init_from=None if run.init_from is None else str(run.init_from),
        validate_every=run.validate_every,
    )


def _precision(run: FoldRun) -> str:
    dtype = autocast_dtype(pick_device(run.device), run.recipe.precision)
    return str(dtype or torch.float32).removeprefix("torch.")


def _extended(run: FoldRun, record: FoldRecord, asked: Stretch) -> FoldRecord:
    """Return the record with one more stretch; one that was begun goes on."""
    if not run.length.is_given:
        raise ConfigError("--extend needs a length: give --budget, --epochs or --iterations.")
    if not record.is_trained:
        if len(record.stretches) > 1:
            return record
        raise ConfigError(
            f"{run.fold_path}: its training is not finished. Go on with it first: leave out "
            "--extend and the length."
        )
    begun = asked.model_copy(update={"first_iteration": record.iterations})
    results = ("iterations", "epochs", "seconds_to_last_step", "skipped_steps")
    changes: dict[str, Any] = dict.fromkeys(results)
    return record.model_copy(update={**changes, "stretches": (*record.stretches, begun)})


def _on_this_machine(run: FoldRun, record: FoldRecord) -> FoldRecord:
    """Return the record for where the run goes on, which may be another machine."""
    device = pick_device(run.device)
    if device.type == torch.device(record.device).type:
        return record.model_copy(update={"device": str(device), "processes": run.processes.count})
    logger.warning(
        "%s was started on %s and goes on on %s: its numbers differ from those of a run that "
        "stayed where it was",
        run.fold_path,
        record.device,
        device,
    )
    changes = {"device": str(device), "precision": _precision(run), "compiled": None}
    return record.model_copy(
        update={**changes, "threads": torch.get_num_threads(), "processes": run.processes.count}
    )
