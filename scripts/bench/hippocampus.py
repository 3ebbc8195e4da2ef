"""Train Hippocampus fold 0 under a time budget and print the full-volume Dice.

Usage: python scripts/bench/hippocampus.py DATASET_FOLDER [--budget 10m] [--workspace DIR]

Runs the two commands a user would, each in a process of its own, and reads the figures from the
files they leave. The budget counts from the start of the training command to its last optimiser
step; validation comes after it. Mean Dice: mean over labels of the means over the 40 validation
cases, each scored on its own grid, cases empty on both sides left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--budget", default="10m")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--workspace", type=Path)
    options = parser.parse_args()
    workspace = options.workspace or Path(tempfile.mkdtemp(prefix="medseg-bench-"))
    medseg = [sys.executable, "-m", "medseg", "--workspace", str(workspace)]
    run_name = f"{options.recipe}_{options.budget}_seed{options.seed}"
    prepare = _timed([*medseg, "plan-and-preprocess", str(options.dataset), "-c", "3d_fullres"])
    training = [*medseg, "train", options.dataset.name, "3d_fullres", "0", "--name", run_name]
    training += ["--recipe", options.recipe, "--budget", options.budget, "--seed", options.seed]
    train = _timed(training)
    name = f"nnunet__3d_fullres__{run_name}"
    fold = workspace / "datasets" / options.dataset.name / "runs" / name / "fold_0"
    run = json.loads((fold / "run.json").read_text())
    metrics = json.loads((fold / "validation" / "metrics.json").read_text())
    print(f"check, fingerprint, plan, preprocess   {prepare:8.1f} s")
    print(f"start to last optimiser step           {run['seconds_to_last_step']:8.1f} s")
    print(f"training command, validation included  {train:8.1f} s")
    print(f"optimiser steps                        {run['iterations']:8d}")
    print(f"precision, threads                     {run['precision']:>8} {run['threads']}")
    for label, summary in metrics["summary"].items():
        print(f"Dice {label:<33} {summary['dice']['mean']:8.4f}  n {summary['dice']['n']}")
    print(f"mean Dice                              {metrics['foreground_mean']['dice']:8.4f}")


def _timed(command: list[str]) -> float:
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
