#!/usr/bin/env python3
"""nnU-Net's side of predict.py and export.py: a model of its trainer, its command, its export.

It runs in the peer's environment (`pip install torch==2.13.0 nnunetv2==2.8.1`), not in medseg's:

    PEER_PYTHON scripts/bench/nnunet_predict.py train HIPPOCAMPUS --work DIR --steps 60 \\
        [--pretrained CHECKPOINT] --output FILE
    PEER_PYTHON scripts/bench/nnunet_predict.py predict -i IN -o OUT -m MODEL -f 0 -device cpu
    PEER_PYTHON scripts/bench/nnunet_predict.py export TASK.json

`train` writes a model folder as its trainer does, after a few steps of fold 0 with a learning rate
that falls to 0 over them, from other weights if given (of such a network or a narrower one); FILE
then says where it is. `predict` is its command `nnUNetv2_predict_from_modelfolder` with all its
options, told of the cores it may use alone (it takes a thread for each of the machine's). `export`
times `convert_predicted_logits_to_segmentation_with_correct_shape` on the logits of a file and
writes the segmentation; TASK.json is what export.py wrote.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from costs import alone
from nnunet_train import CONFIGURATION, NAME, NUMBER, finish_loaders, new_trainer, train_epoch
from peer import Peer

EPOCH = 10
"""Steps of one learning rate."""
FINE_TUNING = 1e-3
"""Learning rate that training goes on with from a trained network."""


def main() -> None:
    """Do one of the three."""
    name, arguments = sys.argv[1], sys.argv[2:]
    if name == "predict":
        predict(arguments)
    elif name == "export":
        export(Path(arguments[0]))
    else:
        train(arguments)


def train(arguments: list[str]) -> None:
    """Write a model folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--pretrained", type=Path, help="Checkpoint of such a network.")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    peer = Peer(Path(sys.executable), options.work)
    peer.prepare(options.dataset, NUMBER, NAME)
    cores = len(os.sched_getaffinity(0))
    os.environ.update({**peer.environment, "nnUNet_n_proc_DA": str(cores)})
    told = argparse.Namespace(threads=cores, device="cpu", seed=0, fold="0")
    num_epochs = max(1, options.steps // EPOCH)
    trainer = new_trainer(peer, told, num_epochs)
    if options.pretrained is not None:
        _take_over(trainer, options.pretrained)
        trainer.initial_lr = FINE_TUNING
        trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    trainer.on_train_start()
    while trainer.current_epoch < num_epochs:
        loss = train_epoch(trainer, min(EPOCH, options.steps))
        print(f"step {trainer.current_epoch * EPOCH}, loss {loss:.4f}", flush=True)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    finish_loaders(trainer)
    options.output.write_text(trainer.output_folder_base)


def _take_over(trainer: Any, path: Path) -> None:
    """Let the first channels of every layer be those of a stored network; others do not disturb."""
    import torch

    content = torch.load(path, weights_only=True)
    stored = content["network_weights"]
    with torch.no_grad():
        for name, own in trainer.network.state_dict().items():
            given = stored[name]
            if given.shape == own.shape:
                own.copy_(given)
                continue
            outputs, is_up = len(given), ".transpconvs." in name and given.ndim > 1
            if given.ndim == 1:
                own[:outputs] = given
                continue
            halves = 2 if name.startswith("decoder.stages.") and ".convs.0." in name else 1
            inputs, narrow = own.shape[1] // halves, given.shape[1] // halves
            if is_up:  # (inputs, outputs, ...)
                own[:, :narrow] = 0
                own[:outputs, :narrow] = given
                continue
            own[:outputs] = 0
            for half in range(halves):
                part = given[:, half * narrow : (half + 1) * narrow]
                own[:outputs, half * inputs : half * inputs + narrow] = part


def predict(arguments: list[str]) -> None:
    """Run nnU-Net's command in this process."""
    multiprocessing.cpu_count = lambda: len(os.sched_getaffinity(0))
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder

    sys.argv = ["nnUNetv2_predict_from_modelfolder", *arguments]
    predict_entry_point_modelfolder()


def export(file: Path) -> None:
    """Export the logits of a task, after a small export that is not timed."""
    import torch

    task = json.loads(file.read_text())
    torch.set_num_threads(task["threads"])
    small = torch.zeros((task["num_logits"], *[8] * 3))
    _exported(small, {**task, "shape_image": [9] * 3})
    logits = torch.from_numpy(np.load(task["logits"]))
    segmentation, found = alone(lambda: _exported(logits, task))
    np.save(task["segmentation"], segmentation)
    Path(task["figures"]).write_text(json.dumps(found))


def _exported(logits: Any, task: dict[str, Any]) -> Any:
    """Return nnU-Net's label map of logits, for a plan of the task's spacing."""
    from nnunetv2.inference.export_prediction import (
        convert_predicted_logits_to_segmentation_with_correct_shape,
    )
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(_plans(task["spacing_network"]))
    labels = {"background": 0, **{f"label_{n}": n for n in range(1, task["num_logits"])}}
    shape = tuple(task["shape_image"])
    properties = {
        "spacing": task["spacing_image"],
        "shape_before_cropping": shape,
        "shape_after_cropping_and_before_resampling": shape,
        "bbox_used_for_cropping": [[0, length] for length in shape],
    }
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        logits,
        plans,
        plans.get_configuration(CONFIGURATION),
        plans.get_label_manager({"channel_names": {"0": "CT"}, "labels": labels}),
        properties,
        num_threads_torch=task["threads"],
    )


def _plans(spacing: list[float]) -> dict[str, Any]:
    """Return plans as far as its export reads them, with the resampling it plans by default."""
    configuration = {
        "spacing": spacing,
        "architecture": {},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {
            "is_seg": False,
            "order": 1,
            "order_z": 0,
            "force_separate_z": None,
        },
    }
    return {
        "dataset_name": "Dataset008_Export",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "configurations": {CONFIGURATION: configuration},
    }


if __name__ == "__main__":
    main()
