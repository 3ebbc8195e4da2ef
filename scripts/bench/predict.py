#!/usr/bin/env python3
"""Predict Hippocampus cases against nnU-Net, and judge time, memory and what arithmetic changes.

    python scripts/bench/predict.py HIPPOCAMPUS --peer-python PY [--work DIR] [--rounds 3]
        [--cases 60] [--threads 2] [--accuracy-model RUN] [--output FILE]
    python scripts/bench/predict.py HIPPOCAMPUS [--model RUN] [--accuracy-model RUN]

Against nnU-Net: both sides segment the same images (the first --cases training images, files named
as both want them) with one fold of the network they plan for Hippocampus, which is the same one:
plain U-Net with 32, 64, 128 and 256 features, patch 40x56x40. Each does it by its own command,
`medseg predict` and `nnUNetv2_predict_from_modelfolder` (with as many worker processes as it takes
by default, or --peer-workers), from the start of the process to its end; in turn, with mirroring
and without, on the same --threads cores. Files may be in the page cache. Weights, unless given by
--model and --peer-model: each side's own trainer, --steps steps on fold 0 (recipe `default`;
nnunet_predict.py); the Dice of both is printed, to show that they predict something.

Memory is that of all processes of a side at one moment, shared pages counted once, or of its
largest process by the kernel where that is more, and so judged. Printed beside it: the largest
processes of both (nnU-Net has several, medseg one), and the sum of each one's peak.

Of medseg alone: the first prediction of one 40x56x40 image, as the command does it by default, from
the start of the process to its end; a loaded model's answer to it without mirroring, median of 9;
which modules predicting a NIfTI file imports; and, with --accuracy-model (a run of recipe `fast`),
how the default arithmetic and `mode="exact"` (float32) agree on the same cases without mirroring.
Dice there: mean over cases of the mean over labels, judged; the worst case is printed.

Each limit is judged on a line that begins with "met" or "short"; exit status 0 if all are met, 1 if
not. What cannot be judged is said.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from costs import Spent, bind, keep, measured
from nnunet_train import CONFIGURATION
from peer import MEDSEG, Peer, judge, run
from predict_alone import accuracy, cold, emptied, imports, mean_dice, warm
from train import check_plans

MIN_SPEED = {"flips": 2.5, "none": 3.0}
"""Mirroring -> how many times faster than nnU-Net."""
GOALS = {"flips": 3.5, "none": 4.0}
WORDS = {"flips": "with mirroring", "none": "without mirroring"}
MAX_MEMORY = 0.5
"""Of all processes, as a share of nnU-Net's."""
Figures = dict[str, Any]


def main() -> int:
    """Measure, print and judge."""
    options = _options()
    bind(options.threads)
    root = options.work or Path(tempfile.mkdtemp(prefix="medseg-bench-"))
    root.mkdir(parents=True, exist_ok=True)
    model = options.model or _trained(options, root)
    images = link_images(options.dataset, root / "images", options.cases)
    figures: Figures = {"cases": len(images), "threads": options.threads}
    verdicts: dict[str, bool] = {}
    if options.peer_python is None:
        print("not judged without --peer-python: speed and memory", flush=True)
    else:
        figures["sides"], found = _compare(options, root, model, images)
        verdicts |= found
    for part in (cold, warm, imports):
        figures[part.__name__], found = part(options, root, model)
        verdicts |= found
    if options.accuracy_model is None:
        print("not judged without --accuracy-model: what arithmetic changes")
    else:
        figures["accuracy"], found = accuracy(options.accuracy_model, options.dataset, images)
        verdicts |= found
    return keep(options.output, figures, verdicts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--work", type=Path, help="Kept; what is in it is not made again.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2, help="Cores of each side.")
    parser.add_argument("--steps", type=int, default=60, help="Training steps of each side.")
    parser.add_argument("--model", type=Path, help="Run or bundle instead of a trained one.")
    parser.add_argument("--peer-model", type=Path, help="nnU-Net's model folder, fold 0.")
    parser.add_argument("--peer-workers", type=int, default=3, help="Its -npp and -nps.")
    parser.add_argument("--accuracy-model", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, help="Where the figures are written, as JSON.")
    return parser.parse_args()


def _trained(options: argparse.Namespace, root: Path) -> Path:
    """Return a run of the recipe `default` after a few steps; what is there is used again."""
    medseg = [*MEDSEG, "--workspace", root / "work"]
    name = f"predict_{options.steps}"
    path = root / f"work/datasets/{options.dataset.name}/runs/nnunet__{CONFIGURATION}__{name}"
    if not (path / "bundle/bundle.json").is_file():
        run([*medseg, "plan-and-preprocess", options.dataset, "-c", CONFIGURATION])
        command = [*medseg, "train", options.dataset.name, CONFIGURATION, "0", "--name", name]
        command += ["--recipe", "default", "--epochs", str(max(1, options.steps // 10))]
        command += ["--set", f"iterations_per_epoch={min(10, options.steps)}"]
        run([*command, "--set", "validation_iterations=0"])
    return path


def _peer_model(options: argparse.Namespace, root: Path) -> Path:
    """Return a model folder of nnU-Net's trainer; what is there is used again."""
    told = root / f"peer_model_{options.steps}.txt"
    if not told.is_file():
        script = Path(__file__).with_name("nnunet_predict.py")
        command = [options.peer_python, script, "train", options.dataset, "--work", root / "peer"]
        command += ["--steps", str(options.steps), "--output", told]
        measured(command, log=root / "nnunet_train.log")
    return Path(told.read_text())


def link_images(dataset: Path, folder: Path, num_cases: int) -> dict[str, Path]:
    """Link the first training images as CASE_0000.nii.gz; return case -> its label file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    entries = json.loads((dataset / "dataset.json").read_text())["training"]
    entries = sorted(entries, key=lambda entry: str(entry["image"]))[:num_cases]
    if len(entries) < num_cases:
        sys.exit(f"{dataset}: {len(entries)} training images, {num_cases} wanted")
    found = {}
    for entry in entries:
        case = Path(entry["image"]).name.removesuffix(".nii.gz")
        (folder / f"{case}_0000.nii.gz").symlink_to((dataset / entry["image"]).resolve())
        found[case] = (dataset / entry["label"]).resolve()
    return found


def _compare(
    options: argparse.Namespace, root: Path, model: Path, images: dict[str, Path]
) -> tuple[Figures, dict[str, bool]]:
    """Let both sides predict in turn."""
    their_model = options.peer_model or _peer_model(options, root)
    bundle = model / "bundle" if (model / "bundle").is_dir() else model
    check_plans(
        json.loads((their_model / "plans.json").read_text()),
        json.loads((bundle / "plans.json").read_text()),
    )
    sides: dict[str, Callable[[str], Spent]] = {
        "medseg": lambda tta: _ours(root, model, tta),
        "nnU-Net": lambda tta: _theirs(options, root, their_model, tta),
    }
    spent: dict[str, dict[str, list[Spent]]] = {tta: {side: [] for side in sides} for tta in WORDS}
    for number in range(options.rounds):
        for tta, rows in spent.items():
            for side, predict in sides.items():
                rows[side].append(predict(tta))
                what = f"round {number + 1}, {WORDS[tta]}, {side}: {rows[side][-1]}"
                print(what, flush=True)
    verdicts: dict[str, bool] = {}
    for tta, rows in spent.items():
        verdicts |= judge_sides(tta, rows["medseg"], rows["nnU-Net"])
    dice = {side: mean_dice(images, root / f"predicted_{side}") for side in sides}
    print(f"mean Dice of the last round: {', '.join(f'{k} {v:.4f}' for k, v in dice.items())}")
    rows = {
        t: {s: [asdict(run) for run in runs] for s, runs in r.items()} for t, r in spent.items()
    }
    return {"runs": rows, "dice": dice}, verdicts


def _ours(root: Path, model: Path, tta: str) -> Spent:
    output = emptied(root / "predicted_medseg")
    command = [*MEDSEG, "predict", "-i", root / "images", "-o", output, "-m", model, "--tta", tta]
    spent = measured([*command, "--device", "cpu"], log=root / "medseg.log")
    return _checked(spent, root / "images", output)


def _theirs(options: argparse.Namespace, root: Path, model: Path, tta: str) -> Spent:
    """Run nnU-Net's command; where the machine has more cores, told of those it may use."""
    output = emptied(root / "predicted_nnU-Net")
    command = [options.peer_python.parent / "nnUNetv2_predict_from_modelfolder"]
    if os.cpu_count() != options.threads:
        command = [options.peer_python, Path(__file__).with_name("nnunet_predict.py"), "predict"]
    command += ["-i", root / "images", "-o", output, "-m", model, "-f", "0", "-device", "cpu"]
    command += ["-npp", str(options.peer_workers), "-nps", str(options.peer_workers)]
    command += ["--disable_tta"] if tta == "none" else []
    peer = Peer(options.peer_python, root / "peer")
    spent = measured(command, log=root / "nnunet.log", environment=peer.environment)
    return _checked(spent, root / "images", output)


def _checked(spent: Spent, images: Path, output: Path) -> Spent:
    """Stop unless every image has its segmentation."""
    wanted = {path.name.replace("_0000.nii.gz", ".nii.gz") for path in images.iterdir()}
    lacking = sorted(wanted - {path.name for path in output.iterdir()})
    if lacking:
        sys.exit(f"{output}: {len(lacking)} of {len(wanted)} are missing: {', '.join(lacking)}")
    return spent


def judge_sides(tta: str, ours: Sequence[Spent], theirs: Sequence[Spent]) -> dict[str, bool]:
    """Judge time (medians over rounds) and memory (largest over rounds) against nnU-Net's."""
    fast, slow = (statistics.median(run.seconds for run in runs) for runs in (ours, theirs))
    small, large = (max(run.memory_bytes for run in runs) / 1e9 for runs in (ours, theirs))
    single = [max(run.largest_bytes for run in runs) / 1e9 for runs in (ours, theirs)]
    summed = [max(run.summed_bytes for run in runs) / 1e9 for runs in (ours, theirs)]
    speed, share, wanted = slow / fast, small / large, MIN_SPEED[tta]
    print(
        f"{WORDS[tta]}, medians: medseg {fast:.2f} s, nnU-Net {slow:.2f} s; largest process "
        f"{single[0]:.2f} and {single[1]:.2f} GB ({single[0] / single[1]:.2f}), sums of the peaks "
        f"of all {summed[0]:.2f} and {summed[1]:.2f} GB"
    )
    goal = f", goal {GOALS[tta]:g} {'reached' if speed >= GOALS[tta] else 'not reached'}"
    return {
        f"speed {WORDS[tta]}": judge(
            f"{WORDS[tta]} {speed:.2f} times faster, at least {wanted:g} wanted{goal}",
            is_met=speed >= wanted,
        ),
        f"memory {WORDS[tta]}": judge(
            f"{WORDS[tta]} {small:.2f} against {large:.2f} GB of all processes ({share:.2f}), "
            f"at most {MAX_MEMORY:g} wanted",
            is_met=share <= MAX_MEMORY,
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
