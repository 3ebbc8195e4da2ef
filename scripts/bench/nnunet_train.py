#!/usr/bin/env python3
"""Run nnU-Net's own trainer on Hippocampus: time its steps, or take its learning curve.

It runs in the peer's environment (`pip install torch==2.13.0 nnunetv2==2.8.1`), not in medseg's:

    PEER_PYTHON scripts/bench/nnunet_train.py HIPPOCAMPUS --work DIR --curve --steps 600 \\
        [--at 100,200,...]
    PEER_PYTHON scripts/bench/nnunet_train.py HIPPOCAMPUS --work DIR --steps 4 --output FILE

Trainer, data loaders with their worker processes, augmentation, network, loss and schedule are
nnU-Net's (`nnUNetTrainer`, its own plan for 3d_fullres), unchanged but for the length. DIR holds
its folders; the data set is planned and preprocessed there once.

--curve trains fold 0 for a number of steps, with a learning rate that falls to 0 over just these
steps, and predicts the 40 validation cases at full volume at some of them, by nnU-Net's predictor
without mirroring and, at the end (or always, --mirror all), with it, scored by its own evaluation
on the raw grids. Mean Dice: mean over labels of the means over cases. Rows of
`DIR/curve_STEPS.json`: steps, seconds from the start (predictions left out), Dice. The same command
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from peer import Peer

STARTED = time.monotonic()
NUMBER, NAME, CONFIGURATION = 4, "Hippocampus", "3d_fullres"


def main() -> None:
    """Time steps, or take the curve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workers", type=int, help="Loader processes; default: as --threads.")
    parser.add_argument("--seed", type=int, default=0, help="Of the first weights alone.")
    parser.add_argument("--fold", default="0", help="Fold, or all.")
    parser.add_argument("--warmup", type=int, default=1, help="Steps before those timed.")
    parser.add_argument("--output", type=Path, help="Where the times are written, as JSON.")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--at", help="Steps to predict at; default: six, evenly.")
    parser.add_argument("--epoch", type=int, default=10, help="Steps of one learning rate.")
    parser.add_argument("--mirror", default="last", choices=("last", "all"))
    parser.add_argument("--cases", type=int, help="Validation cases to predict; default: all.")
    options = parser.parse_args()
    peer = Peer(Path(sys.executable), options.work)
    peer.prepare(options.dataset, NUMBER, NAME)
    workers = options.threads if options.workers is None else options.workers
    os.environ.update(peer.environment)
    os.environ.update({"nnUNet_n_proc_DA": str(workers)})
    if options.curve:
        take_curve(peer, options)
    else:
        time_steps(peer, options)


def new_trainer(peer: Peer, options: argparse.Namespace, num_epochs: int) -> Any:
    """Return nnU-Net's trainer of its own plan, as `nnUNetv2_train` sets it up."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.set_num_threads(options.threads if options.device == "cpu" else 1)
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(options.seed)
    folder = peer.preprocessed(NUMBER, NAME)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    trainer = nnUNetTrainer(
        plans=plans,
        configuration=CONFIGURATION,
        fold=options.fold if options.fold == "all" else int(options.fold),
        dataset_json=json.loads((folder / "dataset.json").read_text()),
        device=torch.device(options.device),
    )
    trainer.num_epochs = num_epochs
    trainer.initialize()
    return trainer


def time_steps(peer: Peer, options: argparse.Namespace) -> None:
    """Write how long each step took, and how much of it the loop waited for data."""
    import torch

    trainer = new_trainer(peer, options, num_epochs=1)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    rows, began = [], 0.0
    for number in range(options.warmup + options.steps):
        if number == options.warmup:
            began = time.time()
        start = time.perf_counter()
        batch = next(trainer.dataloader_train)
        loaded = time.perf_counter()
        trainer.train_step(batch)
        rows.append((time.perf_counter() - start, loaded - start))
    ended = time.time()
    timed = rows[options.warmup :]
    is_amp = options.device == "cuda"
    found = {
        "seconds": [seconds for seconds, _ in timed],
        "wait_seconds": sum(waited for _, waited in timed),
        "warmup_seconds": sum(seconds for seconds, _ in rows[: options.warmup]),
        "window": [began, ended],
        "precision": "float16" if is_amp else "float32",
        "is_compiled": isinstance(trainer.network, torch._dynamo.OptimizedModule),
        "threads": torch.get_num_threads(),
    }
    finish_loaders(trainer)
    options.output.write_text(json.dumps(found))


def finish_loaders(trainer: Any) -> None:
    """End the worker processes of the loaders."""
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if hasattr(loader, "_finish"):
            loader._finish()


def take_curve(peer: Peer, options: argparse.Namespace) -> None:
    """Train, predict at the steps asked for, and keep what came in a file."""
    length, remainder = divmod(options.steps, options.epoch)
    marks = even_marks(options.steps, options.epoch)
    if options.at:
        marks = [int(mark) for mark in options.at.split(",")]
    wrong = [mark for mark in marks if mark % options.epoch or not 0 < mark <= options.steps]
    if remainder or wrong:
        sys.exit(f"--steps and --at must be multiples of --epoch ({options.epoch}), up to --steps")
    file = options.work / f"curve_{options.steps}.json"
    checkpoint = options.work / f"curve_{options.steps}.pth"
    curve = Curve(file, options)
    if curve.has(options.steps) and checkpoint.is_file():
        print(curve.table())
        return
    trainer = new_trainer(peer, options, num_epochs=length)
    if checkpoint.is_file():
        trainer.load_checkpoint(str(checkpoint))
        curve.cut_back(trainer.current_epoch * options.epoch)
    trainer.on_train_start()
    trainer.dataloader_val._finish()
    while trainer.current_epoch < length:
        losses = train_epoch(trainer, options.epoch)
        steps = trainer.current_epoch * options.epoch
        print(f"step {steps}, loss {losses:.4f}, {curve.seconds():.0f} s", flush=True)
        if steps in marks:
            with curve.paused():
                is_mirrored = options.mirror == "all" or steps == options.steps
                curve.add(steps, losses, judge_volumes(trainer, options, is_mirrored))
        if steps in marks or steps == options.steps or curve.is_due():
            curve.note(steps)
            save(trainer, checkpoint)
    finish_loaders(trainer)
    print(curve.table())


def even_marks(steps: int, epoch: int) -> list[int]:
    """Return six multiples of `epoch` that cut the length evenly.

    >>> even_marks(600, 10)
    [100, 200, 300, 400, 500, 600]
    """
    return sorted({max(1, round(steps * part / 6 / epoch)) * epoch for part in range(1, 7)})


def train_epoch(trainer: Any, steps: int) -> float:
    """Do the steps of one learning rate and return the mean loss."""
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(steps)]
    trainer.on_train_epoch_end(outputs)
    trainer.current_epoch += 1
    return float(statistics.mean(float(output["loss"]) for output in outputs))


def save(trainer: Any, checkpoint: Path) -> None:
    """Write a checkpoint that is there whole or not at all."""
    part = checkpoint.with_suffix(".part")
    trainer.current_epoch -= 1  # it writes the number after the present one
    trainer.save_checkpoint(str(part))
    trainer.current_epoch += 1
    part.replace(checkpoint)


def judge_volumes(
    trainer: Any, options: argparse.Namespace, is_mirrored: bool
) -> dict[str, dict[str, Any]]:
    """Return the Dice of the validation cases without mirroring ("plain") and with it."""
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    folder = options.work / "predictions"
    found = {}
    for name in ("plain", "mirrored")[: 1 + is_mirrored]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        predictor = new_predictor(trainer, is_mirrored=name == "mirrored")
        found[name] = score(trainer, predictor, folder, options.cases)
    trainer.set_deep_supervision_enabled(True)
    return found


def new_predictor(trainer: Any, *, is_mirrored: bool) -> Any:
    """Return nnU-Net's predictor with the present weights, as its trainer sets it up."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        use_mirroring=is_mirrored, device=trainer.device, verbose=False, allow_tqdm=False
    )
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        "nnUNetTrainer",
        trainer.inference_allowed_mirroring_axes,
    )
    return predictor


def score(trainer: Any, predictor: Any, folder: Path, num_cases: int | None) -> dict[str, Any]:
    """Predict the validation cases one after another and return mean Dice, also of each label."""
    import numpy as np
    import torch
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.inference.export_prediction import export_prediction_from_logits

    cases = trainer.do_split()[1][:num_cases]
    data = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
    labels = trainer.label_manager.foreground_labels
    ending = trainer.dataset_json["file_ending"]
    references = Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations"
    managers = (trainer.configuration_manager, trainer.plans_manager)
    dice: dict[int, list[float]] = {label: [] for label in labels}
    for case in cases:
        image, _, _, properties = data.load_case(case)
        with torch.no_grad():
            image = torch.from_numpy(image[:])
            logits = predictor.predict_sliding_window_return_logits(image).cpu()
        export_prediction_from_logits(
            logits, properties, *managers, trainer.dataset_json, str(folder / case)
        )
        metrics = compute_metrics(
            str(references / f"{case}{ending}"),
            str(folder / f"{case}{ending}"),
            trainer.plans_manager.image_reader_writer_class(),
            labels,
        )["metrics"]
        for label in labels:
            dice[label].append(float(metrics[label]["Dice"]))
    by_label = {str(label): float(np.nanmean(values)) for label, values in dice.items()}
    return {"dice": statistics.mean(by_label.values()), "labels": by_label, "cases": len(cases)}


class Curve:
    """The rows found so far, in a file, and the time spent; predictions are not counted."""

    def __init__(self, file: Path, options: argparse.Namespace) -> None:
        """Take over what an earlier process left."""
        self._file = file
        self._left_out = 0.0
        self._before = 0.0
        self._saved = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self._noted: dict[str, float] = {}
        self._told = {
            "threads": options.threads,
            "device": options.device,
            "fold": options.fold,
            "epoch": options.epoch,
        }
        if file.is_file():
            found = json.loads(file.read_text())
            if found["told"] != self._told:
                sys.exit(f"{file}: begun with {found['told']}, now {self._told}")
            self.rows, self._noted = found["rows"], found["noted"]

    def has(self, steps: int) -> bool:
        """Return whether there is a row of a step."""
        return any(row["steps"] == steps for row in self.rows)

    def cut_back(self, steps: int) -> None:
        """Go on from a checkpoint: with its rows and its time."""
        self.rows = [row for row in self.rows if row["steps"] <= steps]
        self._before = self._noted[str(steps)]

    def seconds(self) -> float:
        """Return the time spent, processes before this one and its start-up included."""
        return time.monotonic() - STARTED - self._left_out + self._before

    def paused(self) -> _Pause:
        """Return a context whose time is not counted."""
        return _Pause(self)

    def leave_out(self, seconds: float) -> None:
        """Do not count some seconds."""
        self._left_out += seconds

    def add(self, steps: int, loss: float, found: dict[str, Any]) -> None:
        """Add a row; called while the clock is paused."""
        row = {"steps": steps, "loss": loss, **found}
        self.rows = [*(old for old in self.rows if old["steps"] != steps), row]

    def is_due(self) -> bool:
        """Return whether the last checkpoint is five minutes old."""
        return time.monotonic() - self._saved > 300

    def note(self, steps: int) -> None:
        """Write the rows, and the time at a checkpoint."""
        self._saved = time.monotonic()
        self._noted[str(steps)] = self.seconds()
        for row in self.rows:
            row.setdefault("seconds", self._noted.get(str(row["steps"])))
        part = self._file.with_suffix(".part")
        values = {"told": self._told, "noted": self._noted, "rows": self.rows}
        part.write_text(json.dumps(values, indent=1))
        part.replace(self._file)

    def table(self) -> str:
        """Return the rows as text."""
        lines = ["steps  seconds    loss   Dice  with mirroring"]
        for row in self.rows:
            mirrored = f"{row['mirrored']['dice']:.4f}" if "mirrored" in row else ""
            start = f"{row['steps']:5d}  {row['seconds']:7.0f} {row['loss']:7.3f}"
            lines.append(f"{start} {row['plain']['dice']:.4f}  {mirrored}")
        return "\n".join(lines)


class _Pause:
    def __init__(self, curve: Curve) -> None:
        self._curve = curve

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._curve.leave_out(time.monotonic() - self._start)


if __name__ == "__main__":
    main()
