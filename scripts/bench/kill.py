#!/usr/bin/env python3
"""Kill a training again and again, continue it, and compare with one that was left alone.

    python scripts/bench/kill.py [--iterations 300] [--kills 10] [--aimed 3] [--stops 3] [--seed 0]
        [--threads 2] [--set FIELD=VALUE]... [--work DIR]

A small network is trained on cases made here, by `medseg train ... --iterations N` on the CPU with
a fixed number of threads, once without interruption. Then it is trained in another run that is
killed (kill -9) at moments drawn evenly over all steps, a few more while a checkpoint is being
written and once when the final weights have just appeared; the same command goes on each time. A
third run is asked to stop with SIGTERM instead.

Both must end with what the first one has: every tensor of the final and best weights and of the
last checkpoint (network, moving average, optimiser, random states) bit for bit, the rest of its
state but for times, the journal but for times, and run.json. Limits are judged on lines that begin
with "met" or "short"; exit status 0 if all are met, 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import nibabel as nib
import numpy as np
import torch
from peer import MEDSEG, describe, judge, run
from safetensors.torch import load_file

from medseg.train.checkpoint import load_checkpoint

RECIPE = """
description: a small network, checkpoints every second
epochs: 100
iterations_per_epoch: 5
validation_iterations: 1
optimizer: {name: adamw, lr: 3.0e-3, weight_decay: 1.0e-2}
schedule: {name: cosine, warmup: 0.1, per: iteration}
sampling: {batch_size: 2}
network: {base_features: 4, max_features: 16}
ema: 0.95
checkpoint_minutes: 0.02
"""
TIMES = ("seconds", "elapsed", "spent", "session")
"""Parts of the names of values that differ from run to run: times, and the count of processes."""
STOP_SECONDS = 20.0
"""Within which a training that is asked to stop must have ended."""


@dataclass(frozen=True)
class Training:
    """A command that trains, and the folder it fills."""

    command: tuple[str, ...]
    fold: Path
    log: Path
    threads: int

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command, or start it again."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, env=environment)

    def finish(self) -> float:
        """Run the command to its end and return its seconds; stop the benchmark if it fails."""
        start = time.monotonic()
        if self.start().wait():
            self.fail()
        return time.monotonic() - start

    def fail(self) -> NoReturn:
        """Stop the benchmark with what the command said last."""
        sys.exit(f"{' '.join(self.command)} failed:\n{self.log.read_text()[-3000:]}")

    def steps_in_journal(self) -> int:
        """Return the steps of the epochs that have ended."""
        rows = journal_rows(self.fold)
        return int(rows[-1]["iteration"]) if rows else 0

    def half_written(self) -> list[Path]:
        """Return checkpoints that are being written, or were when the process died."""
        return list((self.fold / "checkpoints").glob(".*.part"))

    def newest_checkpoint(self) -> int:
        """Return the steps of the newest whole checkpoint, 0 if there is none."""
        found = (self.fold / "checkpoints").glob("[0-9]*")
        return max((int(path.name) for path in found), default=0)


@dataclass(frozen=True)
class Moment:
    """When a process is to be hit."""

    step: float
    """Not before so many optimiser steps of the run."""
    delay: float = 0.0
    """Seconds to wait then."""
    at: str = "any"
    """`any`, `checkpoint`: while one is being written, `end`: when the final weights appear."""

    def has_come(self, training: Training) -> bool:
        """Return whether to strike, but for the delay."""
        if self.at == "end":
            return (training.fold / "weights/final.safetensors").exists()
        if training.steps_in_journal() < self.step:
            return False
        return self.at == "any" or bool(training.half_written())


@dataclass(frozen=True)
class Hit:
    """What came of a signal."""

    moment: Moment
    is_alive: bool
    """Whether the process was running when it was hit."""
    status: int
    """Its exit status; negative: the signal it died of."""
    was_writing: bool
    """Whether it left a checkpoint half-written."""
    seconds: float
    """Between signal and end."""


def main() -> int:
    """Train, kill, compare and judge."""
    options = _options()
    root = Path(options.work or tempfile.mkdtemp(prefix="medseg-bench-"))
    make_dataset(root / "Dataset001_Kill")
    (root / "kill.yaml").write_text(RECIPE)
    prepare = ["plan-and-preprocess", root / "Dataset001_Kill", "-c", "3d_fullres"]
    run([*MEDSEG, "--workspace", root / "work", *prepare, "--workers", "1"])
    whole, killed, stopped = (_training(root, options, name) for name in ("whole", "kill", "stop"))
    print(f"uninterrupted: {options.iterations} steps, {whole.finish():.1f} s in all", flush=True)
    rng = random.Random(options.seed)
    epoch_seconds = sum(row["seconds"] for row in journal_rows(whole.fold)) / (
        options.iterations / 5
    )
    hits = strike(killed, killing(rng, options, epoch_seconds), signal.SIGKILL)
    verdicts = judge_kills(hits, killed)
    verdicts += judge_equal("after kill -9", whole.fold, killed.fold)
    if options.stops:
        moments = drawn(rng, options.stops, options.iterations, epoch_seconds)
        hits = strike(stopped, moments, signal.SIGTERM)
        verdicts += judge_stops(hits)
        verdicts += judge_equal("after SIGTERM", whole.fold, stopped.fold)
    print(f"logs and runs: {root}")
    return 0 if all(verdicts) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--kills", type=int, default=10, help="At moments drawn over all steps.")
    parser.add_argument("--aimed", type=int, default=3, help="While a checkpoint is written.")
    parser.add_argument("--stops", type=int, default=3, help="SIGTERM, in a run of its own.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--work", type=Path, help="An empty folder; default: a temporary one.")
    return parser.parse_args()


def make_dataset(folder: Path, num_cases: int = 6) -> None:
    """Write cases of an ellipsoid with a smaller one in it, each of another size."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    affine = np.diag([0.9, 1.1, 1.4, 1.0])
    for number in range(num_cases):
        shape = (24 + number % 2, 28 - number % 3, 20)
        axes = np.meshgrid(*(np.linspace(-1, 1, length) for length in shape), indexing="ij")
        center = rng.uniform(-0.2, 0.2, 3)
        distance = np.sqrt(
            sum((axis - middle) ** 2 for axis, middle in zip(axes, center, strict=True))
        )
        labels = (distance < 0.7).astype(np.uint8) + (distance < 0.35)
        image = 50.0 * labels + rng.normal(0, 20, shape)
        case = f"case_{number}"
        nib.save(
            nib.Nifti1Image(image.astype(np.float32), affine),
            folder / f"imagesTr/{case}_0000.nii.gz",
        )
        nib.save(nib.Nifti1Image(labels, affine), folder / f"labelsTr/{case}.nii.gz")
    describe(folder, ["MR"], {"background": 0, "shell": 1, "core": 2}, num_cases)


def _training(root: Path, options: argparse.Namespace, name: str) -> Training:
    command = [*MEDSEG, "--workspace", str(root / "work"), "train", "Dataset001_Kill", "3d_fullres"]
    command += ["0", "--recipe", str(root / "kill.yaml"), "--name", name, "--device", "cpu"]
    command += ["--iterations", str(options.iterations)]
    command += [part for change in options.set for part in ("--set", change)]
    run_path = root / f"work/datasets/Dataset001_Kill/runs/nnunet__3d_fullres__{name}"
    return Training(tuple(command), run_path / "fold_0", root / f"{name}.log", options.threads)


def drawn(rng: random.Random, count: int, steps: int, epoch_seconds: float) -> list[Moment]:
    """Return moments spread evenly at random over all steps; between epochs by a delay."""
    return sorted(
        (Moment(rng.uniform(0, steps - 5), rng.uniform(0, epoch_seconds)) for _ in range(count)),
        key=lambda moment: moment.step,
    )


def killing(rng: random.Random, options: argparse.Namespace, epoch_seconds: float) -> list[Moment]:
    """Return when to kill: at random, while checkpoints are written, and at the very end."""
    steps = options.iterations
    moments = drawn(rng, options.kills, steps, epoch_seconds)
    aimed = [Moment(rng.uniform(0, 0.9 * steps), at="checkpoint") for _ in range(options.aimed)]
    return [*sorted([*moments, *aimed], key=lambda moment: moment.step), Moment(steps, at="end")]


def strike(training: Training, moments: Sequence[Moment], number: signal.Signals) -> list[Hit]:
    """Start the training once for each moment, send it a signal then, and let it end at last."""
    hits = []
    for moment in moments:
        process = training.start()
        while process.poll() is None and not moment.has_come(training):
            time.sleep(0.0005)
        time.sleep(moment.delay)
        is_alive = process.poll() is None
        if not is_alive and process.returncode:
            training.fail()
        process.send_signal(number)
        start = time.monotonic()
        status = process.wait()
        hits.append(
            Hit(
                moment,
                is_alive,
                status,
                bool(training.half_written()),
                time.monotonic() - start,
            )
        )
        print(_line(hits[-1], training), flush=True)
    training.finish()
    return hits


def _line(hit: Hit, training: Training) -> str:
    moment = hit.moment
    where = {"any": "", "checkpoint": ", in a checkpoint", "end": ", at the end"}[moment.at]
    left = ", left one half-written" if hit.was_writing else ""
    return (
        f"  {'hit' if hit.is_alive else 'missed'} after step {moment.step:.0f}{where}: journal at "
        f"{training.steps_in_journal()}, checkpoint at {training.newest_checkpoint()}{left}; "
        f"status {hit.status} after {hit.seconds:.2f} s"
    )


def judge_kills(hits: Sequence[Hit], training: Training) -> list[bool]:
    """Judge that the kills hit something, and that nothing half-written is left at the end."""
    alive = sum(hit.is_alive and hit.status == -signal.SIGKILL for hit in hits)
    aimed = [hit for hit in hits if hit.moment.at == "checkpoint"]
    writing = sum(hit.was_writing for hit in aimed)
    said = f"{writing} of {len(aimed)} aimed kills came while a checkpoint was being written"
    return [
        judge(f"{alive} of {len(hits)} kills hit a running process", is_met=alive == len(hits)),
        judge(f"{said}, at least one wanted", is_met=writing > 0 or not aimed),
        judge("nothing half-written is left", is_met=not training.half_written()),
    ]


def judge_stops(hits: Sequence[Hit]) -> list[bool]:
    """Judge that SIGTERM ends a training soon and by itself."""
    wanted = 128 + signal.SIGTERM
    good = sum(hit.is_alive and hit.status == wanted for hit in hits)
    slowest = max(hit.seconds for hit in hits)
    return [
        judge(
            f"{good} of {len(hits)} ended by themselves with status {wanted} on SIGTERM",
            is_met=good == len(hits),
        ),
        judge(
            f"they ended within {slowest:.1f} s, at most {STOP_SECONDS:g} allowed",
            is_met=slowest <= STOP_SECONDS,
        ),
    ]


def judge_equal(when: str, fold: Path, other: Path) -> list[bool]:
    """Judge that two folds ended alike."""
    verdicts = []
    for name in ("final", "best"):
        files = [path / f"weights/{name}.safetensors" for path in (fold, other)]
        if all(file.is_file() for file in files):
            found = differences(*(load_file(file) for file in files))
            verdicts.append(_judge_same(f"{when}: {name} weights", found))
        elif any(file.is_file() for file in files):
            verdicts.append(judge(f"{when}: {name} weights in one run only", is_met=False))
    states = [load_checkpoint(path / "checkpoints") for path in (fold, other)]
    if None not in states:
        verdicts.append(_judge_same(f"{when}: last checkpoint", differences(*states)))
    else:
        verdicts.append(judge(f"{when}: no checkpoint is left", is_met=False))
    rows = [dict(enumerate(journal_rows(path))) for path in (fold, other)]
    verdicts.append(_judge_same(f"{when}: journal", differences(*rows)))
    records = [json.loads((path / "run.json").read_text()) for path in (fold, other)]
    return [*verdicts, _judge_same(f"{when}: run.json", differences(*records))]


def _judge_same(what: str, found: Mapping[str, bool]) -> bool:
    wrong = [name for name, is_same in found.items() if not is_same]
    said = f"{what}: {len(found) - len(wrong)} of {len(found)} values identical"
    listed = f"; not: {', '.join(wrong[:6])}" if wrong else ""
    return judge(said + listed, is_met=bool(found) and not wrong)


def differences(one: Any, other: Any) -> dict[str, bool]:
    """Return for every value of either of two nested dictionaries whether both hold the same.

    Tensors are compared bit for bit; times are left out.
    """
    flat_one, flat_other = dict(_leaves(one, "")), dict(_leaves(other, ""))
    return {
        name: name in flat_one and name in flat_other and _same(flat_one[name], flat_other[name])
        for name in sorted(flat_one.keys() | flat_other.keys())
        if not any(word in name for word in TIMES)
    }


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}/{index}")
    else:
        yield path, value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(_bits(one), _bits(other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, so that NaN equals NaN and 0 is not -0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def journal_rows(fold: Path) -> list[dict[str, Any]]:
    """Return the rows of a fold's journal that have been written whole."""
    try:
        text = (fold / "journal.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


if __name__ == "__main__":
    sys.exit(main())
