"""nnU-Net v2's own trainers and prediction at work on small models, in one process.

For interop_v2_fixtures.py, in an environment of nnU-Net v2.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import types
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interop_fixtures import quiet
from interop_v2_plans import DATASET, PLANS, Content, dataset_of
from scipy.ndimage import gaussian_filter

CHECKPOINT = "checkpoint_final.pth"
FULL = "3d_fullres"
TEACHING_STEPS = 100


def prepare_original(work: Path) -> None:
    """Tell the original where it may write, and keep it from what it does not need here."""
    for kind in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{kind}"] = str(work / kind)
    stored = work / "preprocessed" / DATASET / f"{PLANS}_data"
    stored.mkdir(parents=True)
    (stored / "case.b2nd").touch()  # tells trainers how cases are stored
    unused = "nnunetv2.training.nnUNetTrainer.primus.primus_trainers"  # wants more packages
    sys.modules[unused] = types.ModuleType(unused)
    warnings.filterwarnings("ignore", message="Detected old nnU-Net plans format")


def write_model(
    folder: Path,
    plans: Content,
    dataset: Content | None = None,
    configuration: str = FULL,
    *,
    trainer_name: str = "nnUNetTrainer",
    folds: tuple[Any, ...] = (0, 1),
) -> None:
    """Write a model that its trainer saved after a few steps on noise."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    dataset = dataset or dataset_of()
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans, indent=4))
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=4))
    for fold in folds:
        seed = zlib.crc32(f"{folder.name} {fold}".encode())
        torch.manual_seed(seed)
        with quiet():
            trainer = recursive_find_trainer_class_by_name(trainer_name)(
                {**copy.deepcopy(plans), "continue_training": False}, configuration, fold,
                copy.deepcopy(dataset), torch.device("cpu"),
            )  # fmt: skip
            trainer.initialize()
            trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            stir(trainer.network)
            loss = teach(trainer, np.random.default_rng(seed))
            for key in ("train_losses", "val_losses", "mean_fg_dice"):
                trainer.logger.log(key, np.float32(loss), 0)
            trainer._best_ema = np.float64(0.25)
            (folder / f"fold_{fold}").mkdir()
            trainer.save_checkpoint(str(folder / f"fold_{fold}" / CHECKPOINT))


def stir(network: torch.nn.Module) -> None:
    """Draw what the original starts at 0 and 1."""
    for name, tensor in network.named_parameters():
        if tensor.ndim == 1:
            tensor.detach().normal_(1.0 if name.endswith("weight") else 0.0, 0.2)


def teach(trainer: Any, random: np.random.Generator) -> float:
    """Train to tell levels of smooth noise apart, so that most voxels are decided clearly."""
    network, loss = trainer.network.train(), torch.zeros(())
    is_hard = len(trainer.label_manager.all_labels) > 4
    for _ in range(TEACHING_STEPS * (4 if is_hard else 1)):
        image, target = lesson(trainer, random)
        outputs = network(torch.from_numpy(image[None]))
        loss = sum(output.square().mean() for output in outputs[1:]) * 1e-3
        if trainer.label_manager.has_regions:
            wanted = torch.from_numpy(target[None].astype(np.float32))
            loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(outputs[0], wanted)
        else:
            wanted = torch.from_numpy(target[None])
            loss = loss + torch.nn.functional.cross_entropy(outputs[0], wanted)
        trainer.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        trainer.optimizer.step()
    return loss.item()


def lesson(trainer: Any, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a patch of noise and what it means: labels, or regions one within the other."""
    patch, labels = tuple(trainer.configuration_manager.patch_size), trainer.label_manager
    levels = []
    for _ in range(2):
        noise = gaussian_filter(random.normal(size=patch), 1.5)
        levels.append((noise / noise.std()).astype(np.float32))
    image = np.stack(levels) + 0.1 * random.normal(size=(2, *patch)).astype(np.float32)
    number = len(labels.all_labels)
    if trainer.is_cascaded:  # the stage before knew part of it
        before = quantised(levels[0] + 0.8 * levels[1], number)
        hot = [(before == label).astype(np.float32) for label in labels.foreground_labels]
        image = np.concatenate([image, hot])
    if labels.has_regions:
        steps = np.linspace(-0.7, 0.7, len(labels.foreground_regions))
        return image, np.stack([levels[0] > step for step in steps])
    if number > 4:  # more than one channel tells apart
        target = 4 * quantised(levels[0], -(-number // 4)) + quantised(levels[1], 4)
    else:
        target = quantised(levels[0] + 0.5 * levels[1], number)
    return image, np.minimum(target, number - 1)


def quantised(values: np.ndarray, number: int) -> np.ndarray:
    """Return which of some levels, all as frequent, each value has."""
    return np.digitize(values, np.quantile(values, np.arange(1, number) / number))


def predict(
    model: Path,
    images: Path,
    out: Path,
    *,
    folds: tuple[Any, ...] | None = None,
    previous: Path | None = None,
) -> None:
    """Predict a case as the original's command does, in this process.

    Args:
        model: Folder of the model.
        images: Folder of its channels.
        out: Where to.
        folds: None: all there are, in the order of their numbers.
        previous: Folder with the segmentation of the stage before.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    if folds is None:
        names = [path.parent.name.removeprefix("fold_") for path in model.glob(f"*/{CHECKPOINT}")]
        folds = tuple(sorted(names, key=lambda name: (len(name), name)))
    out.mkdir(parents=True, exist_ok=True)
    files = [str(path) for path in sorted(images.glob("*.nii.gz"))]
    with quiet():
        predictor = nnUNetPredictor(
            perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
        )
        predictor.initialize_from_trained_model_folder(str(model), folds, CHECKPOINT)
        predictor.predict_from_files_sequential(
            [files],
            [str(out / "case")],
            save_probabilities=True,
            folder_with_segs_from_prev_stage=None if previous is None else str(previous),
        )
    for name in ("predict_from_raw_data_args.json", "dataset.json", "plans.json"):
        (out / name).unlink()
