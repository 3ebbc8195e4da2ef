#!/usr/bin/env python3
"""Time medseg's training step against nnU-Net's, on one machine in one run.

    python scripts/bench/train.py HIPPOCAMPUS --peer-python PY [--work DIR] [--device cpu|cuda]
        [--threads 2] [--rounds 3] [--steps 4] [--recipe default] [--set FIELD=VALUE]...

Both sides train the network they plan for Hippocampus, which is the same one: plain U-Net with 32,
64, 128 and 256 features, patch 40x56x40, batch 7, deep supervision, Dice + cross-entropy, SGD, full
default augmentation, on all 200 cases (fold "all"), through their own commands: `medseg train` and,
in the peer's environment, `nnUNetTrainer` with its loader processes (nnunet_train.py). Both are
bound to the same --threads cores. The sides alternate; steps before those timed (compilation, first
use) are left out and reported apart. DIR keeps what both preprocessed.

Printed are seconds a step, the share of it spent waiting for data and, for medseg, in augmentation,
forward and backward; precision and compilation; the peak memory of all processes of a side; on CUDA
the share of the time in which the GPU worked and its memory. Limits are judged on lines that begin
with "met" or "short"; exit status 0 if all are met, 1 if not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from nnunet_train import NAME, NUMBER
from peer import MEDSEG, Peer, judge, run
from watch import Use, watch

MIN_SPEED = {"cpu": 2.8, "cuda": 2.0}
"""How many times faster a step than nnU-Net's (on the CPU: one with AVX512-BF16)."""
MAX_WAIT = 0.05
"""Share of a step spent waiting for data."""
MIN_BUSY = 0.9
"""Share of the time in which the GPU works."""
NAMED = {True: "compiled", False: "not compiled"}
PARTS = ("wait", "augment", "forward", "backward")
PLANNED = {"patch_size": [40, 56, 40], "batch_size": 7, "features": [32, 64, 128, 256]}


@dataclass(frozen=True)
class Steps:
    """What the training steps of one run took."""

    seconds: tuple[float, ...]
    """Seconds of each step (medseg: of the mean step of each epoch)."""
    shares: dict[str, float | None]
    """Part of a step -> share of its time; None where it was not recorded."""
    before_seconds: float
    """Steps before those timed, compilation included."""
    arithmetic: str
    """Precision, and whether the network was compiled."""
    peak_bytes: int | None
    gpu_peak_bytes: int | None
    gpu_busy: float | None
    """Share of the timed steps in which the GPU worked; None if it was not measured."""


def main() -> int:
    """Measure, print and judge."""
    options = _options()
    root = options.work or Path(tempfile.mkdtemp(prefix="medseg-bench-"))
    root.mkdir(parents=True, exist_ok=True)
    peer = Peer(options.peer_python, root / "peer")
    folder = peer.prepare(options.dataset, NUMBER, NAME)
    run([*_medseg(root), "plan-and-preprocess", options.dataset, "-c", "3d_fullres"])
    check_plans(
        json.loads((folder / "nnUNetPlans.json").read_text()),
        json.loads(
            (root / "work/datasets" / options.dataset.name / "plans/nnunet.json").read_text()
        ),
    )
    ours, theirs = [], []
    for number in range(options.rounds):
        ours.append(_ours(options, root))
        theirs.append(_theirs(options, root))
        print(f"round {number + 1}: medseg {_line(ours[-1])}", flush=True)
        print(f"         nnU-Net {_line(theirs[-1])}", flush=True)
    report("medseg", ours, options.device)
    report("nnU-Net", theirs, options.device)
    return 0 if all(judge_steps(ours, theirs, options.device)) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="Kept; what is in it is not made again.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="Cores of each side; 2, on cuda 4.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="Steps timed in a round; 4, on cuda 200.")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    options = parser.parse_args()
    is_gpu = options.device == "cuda"
    options.threads = options.threads or (4 if is_gpu else 2)
    options.steps = options.steps or (200 if is_gpu else 4)
    return options


def _medseg(root: Path) -> list[str | Path]:
    return [*MEDSEG, "--workspace", root / "work"]


def check_plans(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Stop unless both sides train the network, patch and batch that the figures are for."""
    their, our = theirs["configurations"]["3d_fullres"], ours["configurations"]["3d_fullres"]
    features = their["architecture"]["arch_kwargs"]["features_per_stage"]
    for side, found in (
        ("nnU-Net", {**their, "features": features}),
        ("medseg", {**our, "features": our["architecture"]["features"]}),
    ):
        wrong = {key: found[key] for key, value in PLANNED.items() if found[key] != value}
        if wrong:
            sys.exit(f"{side} planned {wrong}; expected {PLANNED}")


def _ours(options: argparse.Namespace, root: Path) -> Steps:
    """Start the recipe's whole training and stop it after three epochs; the first is not timed.

    What depends on the length of a run, such as whether compiling pays, is as in the whole one.
    """
    epoch = max(1, options.steps // 2)
    changes = [f"iterations_per_epoch={epoch}", "validation_iterations=0", *options.set]
    command = [*_medseg(root), "train", options.dataset.name, "3d_fullres", "all", "--name", "step"]
    command += ["--recipe", options.recipe, "--device", options.device, "--epochs", "1000"]
    command += [part for change in changes for part in ("--set", change)]
    run_path = root / "work/datasets" / options.dataset.name / "runs/nnunet__3d_fullres__step"
    shutil.rmtree(run_path, ignore_errors=True)
    journal, log = run_path / "all/journal.jsonl", root / "medseg.log"
    use = watch(command, cores=options.threads, log=log, is_enough=lambda: len(_rows(journal)) >= 3)
    record = json.loads((run_path / "all/run.json").read_text())
    return read_ours(_rows(journal), record, log.read_text(errors="replace"), use)


def _rows(journal: Path) -> list[dict[str, Any]]:
    """Return the rows that have been written whole."""
    text = journal.read_text() if journal.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def read_ours(rows: Sequence[dict[str, Any]], record: dict[str, Any], said: str, use: Use) -> Steps:
    """Return what a journal says of its epochs but the first.

    Args:
        rows: The journal; parts that it does not have count as not recorded.
        record: `run.json` of the fold.
        said: What the command logged; a line on compilation is taken over.
        use: What the command used.
    """
    timed = rows[1:]
    numbers = [row["iteration"] - before["iteration"] for before, row in pairwise(rows)]
    times = [row["seconds"] - row.get("validate_seconds", 0.0) for row in timed]
    shares: dict[str, float | None] = {
        part: sum(row[f"{part}_seconds"] for row in timed) / sum(times)
        if all(f"{part}_seconds" in row for row in timed)
        else None
        for part in PARTS
    }
    lines = [line for line in said.splitlines() if "compil" in line]
    is_compiled = record.get("compiled")
    compilation = "compilation not recorded" if is_compiled is None else NAMED[bool(is_compiled)]
    return Steps(
        seconds=tuple(seconds / number for seconds, number in zip(times, numbers, strict=True)),
        shares=shares,
        before_seconds=rows[0]["elapsed_seconds"],
        arithmetic=f"{record['precision']}, {'; '.join([compilation, *lines])}",
        peak_bytes=use.peak_bytes,
        gpu_peak_bytes=use.gpu_peak_bytes,
        gpu_busy=use.gpu_busy(
            use.began + rows[0]["elapsed_seconds"], use.began + rows[-1]["elapsed_seconds"]
        ),
    )


def _theirs(options: argparse.Namespace, root: Path) -> Steps:
    """Let the peer's trainer do as many steps; the first ones are not timed."""
    output = root / "nnunet_steps.json"
    output.unlink(missing_ok=True)
    script = Path(__file__).with_name("nnunet_train.py")
    command = [options.peer_python, script, options.dataset, "--work", root / "peer"]
    command += ["--steps", str(options.steps), "--warmup", str(max(1, options.steps // 4))]
    command += ["--fold", "all", "--device", options.device, "--threads", str(options.threads)]
    command += ["--output", output]
    use = watch(command, cores=options.threads, log=root / "nnunet.log")
    return read_theirs(json.loads(output.read_text()), use)


def read_theirs(found: dict[str, Any], use: Use) -> Steps:
    """Return what nnunet_train.py wrote."""
    shares: dict[str, float | None] = dict.fromkeys(PARTS)
    shares["wait"] = found["wait_seconds"] / sum(found["seconds"])
    return Steps(
        seconds=tuple(found["seconds"]),
        shares=shares,
        before_seconds=found["window"][0] - use.began,
        arithmetic=f"{found['precision']}, {NAMED[found['is_compiled']]}",
        peak_bytes=use.peak_bytes,
        gpu_peak_bytes=use.gpu_peak_bytes,
        gpu_busy=use.gpu_busy(*found["window"]),
    )


def _line(steps: Steps) -> str:
    return " ".join(f"{seconds:.3f}" for seconds in steps.seconds) + " s a step"


def _gigabytes(values: Sequence[int | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known) / 1e9:.2f} GB" if known else "not measured"


def _share(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.1%}" if known else "not measured"


def median_step(runs: Sequence[Steps]) -> float:
    """Return the median over rounds of each round's median step, in seconds."""
    return statistics.median(statistics.median(run.seconds) for run in runs)


def report(side: str, runs: Sequence[Steps], device: str) -> None:
    """Print the figures of a side: medians over its rounds, the largest memory."""
    print(f"{side}: median step {median_step(runs):.3f} s")
    parts = [f"{part} {_share([run.shares[part] for run in runs])}" for part in PARTS]
    print(f"  of which {', '.join(parts)}")
    print(f"  {runs[0].arithmetic}")
    before = statistics.median(run.before_seconds for run in runs)
    print(f"  start to the first timed step, compilation included: {before:.1f} s")
    memory = _gigabytes([run.peak_bytes for run in runs])
    print(f"  peak memory of all its processes: {memory}", flush=True)
    if device == "cuda":
        print(f"  peak memory on the GPU: {_gigabytes([run.gpu_peak_bytes for run in runs])}")
        print(f"  GPU busy: {_share([run.gpu_busy for run in runs])}", flush=True)


def judge_steps(ours: Sequence[Steps], theirs: Sequence[Steps], device: str) -> list[bool]:
    """Judge the ratio of the steps, the wait for data and, on CUDA, how busy the GPU is."""
    speed, wanted = median_step(theirs) / median_step(ours), MIN_SPEED[device]
    verdicts = [
        judge(
            f"a step {speed:.2f} times faster, at least {wanted:g} wanted", is_met=speed >= wanted
        )
    ]
    if device == "cpu" and not ours[0].arithmetic.startswith("bfloat16"):
        print("  (the limit is for a processor with AVX512-BF16; this run was not in bf16)")
    waits = [run.shares["wait"] for run in ours]
    wait = None if None in waits else statistics.median(waits)
    said = "not recorded" if wait is None else f"{wait:.1%}"
    verdicts.append(
        judge(
            f"waiting for data {said}, less than {MAX_WAIT:.0%} wanted",
            is_met=wait is not None and wait < MAX_WAIT,
        )
    )
    busy = [run.gpu_busy for run in ours if run.gpu_busy is not None]
    if device != "cuda":
        print("not measured: step and busy share of a GPU (--device cuda)")
        return verdicts
    share = statistics.median(busy) if busy else None
    said = "not measured" if share is None else f"{share:.0%}"
    is_met = share is not None and share >= MIN_BUSY
    return [*verdicts, judge(f"GPU busy {said}, at least {MIN_BUSY:.0%} wanted", is_met=is_met)]


if __name__ == "__main__":
    sys.exit(main())
