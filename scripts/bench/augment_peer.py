"""nnU-Net's own training transforms, timed; runs in the peer's environment alone.

Started by augment.py. Reads one JSON object a line, {"patch": ..., "count": ..., "seed": ...}, and
answers with the seconds of processor time of each sample.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import augment_probe
import numpy as np
import torch
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

ANGLE = 30 / 180 * np.pi


def transforms(patch: tuple[int, ...]) -> Any:
    """Return the default set for a 3D patch of one channel."""
    return nnUNetTrainer.get_training_transforms(
        patch, (-ANGLE, ANGLE), None, (0, 1, 2), False, use_mask_for_norm=[False]
    )


def seconds(patch: tuple[int, ...], count: int, seed: int) -> list[float]:
    """Return the processor time of each of `count` samples, after a few to warm up."""
    source = tuple(int(n) for n in get_patch_size(patch, *[(-ANGLE, ANGLE)] * 3, (0.85, 1.25)))
    if patch not in _TRANSFORMS:
        _TRANSFORMS[patch] = transforms(patch), *arrays(source)
        seconds(patch, 40, 0)
    change, image, labels = _TRANSFORMS[patch]
    np.random.seed(seed)
    torch.manual_seed(seed)
    found = []
    for _ in range(count):
        sample = {"image": image.clone(), "segmentation": labels.clone()}
        start = time.thread_time()
        change(**sample)
        found.append(time.thread_time() - start)
    return found


_TRANSFORMS: dict[tuple[int, ...], Any] = {}


def arrays(source: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the image and the segmentation to change."""
    image, labels = augment_probe.image(source), augment_probe.labels(source)
    return torch.from_numpy(image[None]), torch.from_numpy(labels[None])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = seconds(tuple(asked["patch"]), asked["count"], asked["seed"])
        print(json.dumps(answer), flush=True)
