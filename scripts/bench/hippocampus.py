#!/usr/bin/env python3
"""Train Hippocampus under time budgets, over seeds and folds, and judge the full-volume Dice.

    python scripts/bench/hippocampus.py HIPPOCAMPUS [--workspace DIR] [--seeds 0,1,2]
        [--budgets 8m,30m] [--folds 0] [--recipe fast] [--peer-curve FILE]
    python scripts/bench/hippocampus.py HIPPOCAMPUS --folds cv --budgets 10m
    python scripts/bench/hippocampus.py HIPPOCAMPUS --iterations 600

Runs the commands a user would, each in a process of its own, and reads the figures from the files
they leave. A budget counts from the start of the training command to its last optimiser step;
validation comes after it. Mean Dice: mean over labels of the means over the validation cases, each
scored on its own grid, cases empty on both sides left out. With --folds cv all five folds are
trained and `medseg crossval` scores all 200 cases, each by the model that has not seen it.

Runs that are finished in --workspace are not repeated, one that was stopped goes on: give the same
command again. Limits (of the mean over at least three seeds on fold 0, of the out-of-fold mean with
cv) are judged on lines that begin with "met" or "short", other lengths are not judged; exit status
0 if all that were judged are met, 1 if not. --peer-curve prints nnU-Net's own curve beside it
(`nnunet_train.py --curve`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer import MEDSEG, judge

MIN_DICE = {"8m": 0.865, "30m": 0.878}
"""Budget -> mean Dice of fold 0, mean over seeds."""
MIN_OUT_OF_FOLD = {"10m": 0.865}
"""Budget of each fold -> out-of-fold mean Dice."""
MIN_SEEDS = 3
CONFIGURATION = "3d_fullres"
NUM_FOLDS = 5


@dataclass(frozen=True)
class Trained:
    """One fold."""

    length: str
    """A budget, or "N steps"."""
    seed: int
    fold: int
    dice: float
    """Mean over labels."""
    labels: dict[str, float]
    steps: int
    seconds: float
    """From the start of the command to the last step."""
    arithmetic: str
    """Precision and threads."""


def main() -> int:
    """Train, print and judge."""
    options = _options()
    workspace = options.workspace or Path(tempfile.mkdtemp(prefix="medseg-bench-"))
    medseg = [*MEDSEG, "--workspace", str(workspace)]
    seconds = _timed([*medseg, "plan-and-preprocess", str(options.dataset), "-c", CONFIGURATION])
    print(f"check, fingerprint, plan, preprocess: {seconds:.1f} s", flush=True)
    data = workspace / "datasets" / options.dataset.name
    is_cv = options.folds == "cv"
    folds = range(NUM_FOLDS) if is_cv else [int(fold) for fold in options.folds.split(",")]
    verdicts: list[bool] = []
    for length in options.lengths:
        runs, pooled = [], []
        for seed in options.seeds:
            name = f"{options.recipe}_{length.replace(' ', '_')}_seed{seed}"
            for fold in folds:
                runs.append(_trained(medseg, options, data, (length, seed, fold), name))
                print(_row(runs[-1]), flush=True)
            if is_cv:
                pooled.append(_crossval(medseg, data, name))
        print(_summary(length, runs), flush=True)
        verdicts += judge_folds(length, runs, is_cv=is_cv)
        verdicts += judge_crossval(length, pooled) if is_cv else []
    if options.peer_curve:
        print(peer_curve(json.loads(options.peer_curve.read_text())))
    return 0 if all(verdicts) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--workspace", type=Path)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--seeds", default="0", help="Such as 0,1,2.")
    parser.add_argument("--budgets", help="Such as 8m,30m; default: 8m.")
    parser.add_argument("--iterations", type=int, help="Length in steps instead of a budget.")
    parser.add_argument("--folds", default="0", help="Such as 0,3, or cv: all and their mean.")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--peer-curve", type=Path)
    options = parser.parse_args()
    if options.budgets and options.iterations:
        parser.error("--budgets and --iterations both set the length; give one")
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.lengths = (options.budgets or "8m").split(",")
    if options.iterations:
        options.lengths = [f"{options.iterations} steps"]
    return options


def _timed(command: Sequence[str]) -> float:
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def _trained(
    medseg: Sequence[str],
    options: argparse.Namespace,
    data: Path,
    which: tuple[str, int, int],
    name: str,
) -> Trained:
    """Train and validate a fold, unless it has been, and return what came."""
    length, seed, fold = which
    path = data / f"runs/nnunet__{CONFIGURATION}__{name}/fold_{fold}"
    if not is_finished(path):
        command = [*medseg, "train", data.name, CONFIGURATION, str(fold), "--name", name]
        command += ["--recipe", options.recipe, "--seed", str(seed)]
        command += [part for change in options.set for part in ("--set", change)]
        amount = ["--iterations", str(options.iterations)]
        _timed([*command, *(amount if options.iterations else ["--budget", length])])
    run = json.loads((path / "run.json").read_text())
    metrics = json.loads((path / "validation/metrics.json").read_text())
    return Trained(
        length=length,
        seed=seed,
        fold=fold,
        dice=metrics["foreground_mean"]["dice"],
        labels={label: found["dice"]["mean"] for label, found in metrics["summary"].items()},
        steps=run["iterations"],
        seconds=run["seconds_to_last_step"],
        arithmetic=f"{run['precision']}, {run['threads']} threads",
    )


def is_finished(fold_path: Path) -> bool:
    """Return whether a fold has been trained to its end and validated since."""
    run, metrics = fold_path / "run.json", fold_path / "validation/metrics.json"
    if not (run.is_file() and metrics.is_file()):
        return False
    is_newer = metrics.stat().st_mtime_ns >= run.stat().st_mtime_ns
    return is_newer and json.loads(run.read_text()).get("iterations") is not None


def _crossval(medseg: Sequence[str], data: Path, name: str) -> float:
    """Return the out-of-fold mean Dice."""
    _timed([*medseg, "crossval", data.name, CONFIGURATION, "--name", name])
    path = data / f"runs/nnunet__{CONFIGURATION}__{name}/crossval/metrics.json"
    metrics = json.loads(path.read_text())
    dice = float(metrics["foreground_mean"]["dice"])
    print(f"  out of fold, {len(metrics['cases'])} cases: mean Dice {dice:.4f}", flush=True)
    return dice


def _row(run: Trained) -> str:
    labels = ", ".join(f"{label} {dice:.4f}" for label, dice in run.labels.items())
    return (
        f"{run.length:>9}  seed {run.seed}  fold {run.fold}  Dice {run.dice:.4f} ({labels})  "
        f"{run.steps} steps, last after {run.seconds:.1f} s, {run.arithmetic}"
    )


def _summary(length: str, runs: Sequence[Trained]) -> str:
    values = [run.dice for run in runs]
    spread = f", standard deviation {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return (
        f"{length:>9}  {len(values)} runs: mean Dice {statistics.mean(values):.4f}{spread}, "
        f"{min(values):.4f} to {max(values):.4f}"
    )


def judge_folds(length: str, runs: Sequence[Trained], *, is_cv: bool) -> list[bool]:
    """Judge that each budget was kept and, on fold 0 alone, the mean over seeds."""
    verdicts = []
    if not length.endswith("steps"):
        latest = max(run.seconds for run in runs)
        said = f"{length}: last step at most {latest:.1f} s after the start of the command"
        verdicts.append(judge(said, is_met=latest <= seconds_of(length)))
    limit = MIN_DICE.get(length)
    if is_cv:
        return verdicts
    if limit is None or {run.fold for run in runs} != {0} or len(runs) < MIN_SEEDS:
        known = " or ".join(MIN_DICE)
        print(f"not judged: Dice ({known} on fold 0 with {MIN_SEEDS} seeds are)", flush=True)
        return verdicts
    mean = statistics.mean(run.dice for run in runs)
    said = f"{length}: mean Dice {mean:.4f} over {len(runs)} seeds, at least {limit} wanted"
    return [*verdicts, judge(said, is_met=mean >= limit)]


def judge_crossval(length: str, pooled: Sequence[float]) -> list[bool]:
    """Judge the out-of-fold mean, averaged over seeds."""
    limit, mean = MIN_OUT_OF_FOLD.get(length), statistics.mean(pooled)
    if limit is None:
        known = " or ".join(MIN_OUT_OF_FOLD)
        print(f"not judged: out-of-fold mean Dice {mean:.4f} ({known} a fold is)", flush=True)
        return []
    said = f"{length} a fold: out-of-fold mean Dice {mean:.4f}, at least {limit} wanted"
    return [judge(said, is_met=mean >= limit)]


def seconds_of(budget: str) -> float:
    """Return a budget in seconds.

    >>> seconds_of("8m"), seconds_of("90s"), seconds_of("1.5h")
    (480.0, 90.0, 5400.0)
    """
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(budget[-1])
    return float(budget[:-1]) * unit if unit else float(budget)


def peer_curve(found: dict[str, Any]) -> str:
    """Return nnU-Net's own curve as lines."""
    told = found["told"]
    lines = [f"nnU-Net 2.8.1, fold {told['fold']}, {told['threads']} threads, {told['device']}:"]
    for row in found["rows"]:
        mirrored = row.get("mirrored")
        also = f", with mirroring {mirrored['dice']:.4f}" if mirrored else ""
        minutes = row["seconds"] / 60
        lines.append(
            f"{minutes:7.1f}m  {row['steps']} steps  Dice {row['plain']['dice']:.4f}{also}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
