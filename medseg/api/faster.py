"""The form of the network that does training steps faster on this machine."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import nn

from medseg.api.fold_parts import FoldParts
from medseg.api.fold_run import FoldRun
from medseg.api.run_folder import FoldRecord
from medseg.models.compile import Compiled, Step, fastest
from medseg.schema.base import write
from medseg.train.feed import Samples
from medseg.train.trainer import Trainer


def use_fastest(run: FoldRun, record: FoldRecord, parts: FoldParts) -> FoldRecord:
    """Compile the network where that pays, and settle it in the fold's record.

    A run that goes on does what it did before: a compiled network adds up in another order. With
    several processes the main one's choice is everyone's; it is timed without the loss, which all
    of them would have to take part in.
    """
    trainer, decided = parts.trainer, record.compiled
    if decided is None and _is_hopeless(trainer):
        decided = False
    if trainer.length.is_done() or decided is False:
        return _recorded(run, record, is_compiled=False)
    samples = _example(run, trainer)
    trial = partial(
        fastest,
        trainer.network,
        lambda: samples.images,
        step=_step_of(trainer, samples) if run.processes.count == 1 else None,
    )
    trainer.network.train()
    chosen: list[Compiled] = []

    def choose() -> bool:
        left = _seconds_left(trainer, samples)
        chosen.append(trial(mode=trainer.recipe.compile, seconds_left=left))
        return chosen[0].is_compiled

    is_compiled = run.processes.from_main(choose) if decided is None else decided
    if is_compiled:
        has_graphs = trainer.recipe.compile == "graphs"
        found = chosen[0] if chosen else trial(mode="graphs" if has_graphs else "on", decided=True)
        trainer.use(found.module)
    return _recorded(run, record, is_compiled=is_compiled)


def _step_of(trainer: Trainer, samples: Samples) -> Step:
    """Return a step as training does it, up to the gradients."""

    def step(module: nn.Module) -> None:
        trainer.loss_of(module, samples).backward()  # type: ignore[no-untyped-call]

    return step


def _is_hopeless(trainer: Trainer) -> bool:
    """Return whether compiling is not worth a trial: single precision on a CPU.

    The library's convolutions take nearly all of the time there and stay what they are
    (docs/benchmarks.md).
    """
    on_cpu = trainer.parts.device.type == "cpu"
    return trainer.recipe.compile == "off" or (
        trainer.recipe.compile == "auto" and on_cpu and trainer.parts.dtype is None
    )


def _seconds_left(trainer: Trainer, samples: Samples) -> float:
    """Return about how long the run will take: three forward passes a step, timed once warm."""
    length, device = trainer.length, trainer.parts.device
    if length.budget_seconds is not None:
        return length.budget_seconds - length.elapsed_seconds()
    seconds = 0.0
    trainer.network.eval()  # neither draws nor running averages
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad(), trainer.autocast():
            trainer.network(samples.images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    trainer.network.train()
    return 3 * seconds * (length.estimated_iterations() - length.iteration)


def _example(run: FoldRun, trainer: Trainer) -> Samples:
    """Return a batch of noise, shaped as this process's share of a batch is."""
    device, labels = trainer.parts.device, trainer.parts.labels
    positions = run.processes.positions(run.batch_size)
    count = run.batch_size if positions is None else len(positions)
    patch = run.configuration.patch_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, trainer.parts.num_inputs, *patch, generator=generator)
    segmentation = torch.randint(0, len(labels.values), (count, *patch), generator=generator)
    target, valid = labels.target(segmentation.to(torch.uint8).to(device))
    return Samples(
        images=images.to(device), target=target, valid=valid, annotated=None, case_ids=()
    )


def _recorded(run: FoldRun, record: FoldRecord, *, is_compiled: bool) -> FoldRecord:
    if record.compiled is None:
        record = record.model_copy(update={"compiled": is_compiled})
        if run.processes.is_main:
            write(run.fold_path / "run.json", record)
    return record
