#!/usr/bin/env python3
"""Store how batchgeneratorsv2's transforms are distributed, one by one and together.

    PEER_PYTHON scripts/bench/augment_reference.py [OUTPUT]

Runs in an environment with nnU-Net 2.8.1 alone. Every transform is taken out of the training
transforms that nnU-Net itself puts together, run many times on one fixed patch, and what comes out
is measured. tests/augment/test_distributions.py compares it with ours. OUTPUT is by default
tests/augment/reference_batchgeneratorsv2.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import augment_probe as probe
import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

OUTPUT = Path(__file__).resolve().parents[2] / "tests/augment/reference_batchgeneratorsv2.json"
NUM_SHARES, NUM_VALUES = 5000, 2500
INTENSITIES = {
    "noise": "GaussianNoiseTransform",
    "blur": "GaussianBlurTransform",
    "brightness": "MultiplicativeBrightnessTransform",
    "contrast": "ContrastTransform",
    "low_resolution": "SimulateLowResolutionTransform",
    "gamma": "GammaTransform",
    "inverted_gamma": "GammaTransform",
}
CORRUPTIONS = {
    "previous_operator": "ApplyRandomBinaryOperatorTransform",
    "previous_removal": "RemoveRandomConnectedComponentFromOneHotEncodingTransform",
}


def transforms(patch: tuple[int, ...], degrees: float, *, dummy_2d: bool = False) -> Any:
    """Return nnU-Net's training transforms of a cascade's second stage."""
    angle = degrees / 180 * np.pi
    return nnUNetTrainer.get_training_transforms(
        patch,
        (-angle, angle),
        None,
        tuple(range(len(patch))),
        dummy_2d,
        use_mask_for_norm=[False, True],
        is_cascaded=True,
        foreground_labels=list(range(1, probe.NUM_PREVIOUS + 1)),
    )


def pick(whole: Any, kind: str, *, inverts: bool = False) -> Any:
    """Return one transform with the chance that it is given."""
    for one in whole.transforms:
        inner = getattr(one, "transform", one)
        if type(inner).__name__ == kind and bool(getattr(inner, "p_invert_image", 0)) == inverts:
            return one
    raise LookupError(kind)


def chances(whole: Any) -> list[list[Any]]:
    """Return name and chance of all transforms in order; chance 1 where they always happen."""
    return [
        [type(getattr(one, "transform", one)).__name__, getattr(one, "apply_probability", 1)]
        for one in whole.transforms
    ]


def repeat(count: int, change: Callable[[], Any]) -> list[Any]:
    """Seed and repeat."""
    np.random.seed(17)
    torch.manual_seed(17)
    return [change() for _ in range(count)]


def intensities(name: str, *, dummy_2d: bool = False) -> dict[str, Any]:
    """Measure one intensity transform."""
    patch = probe.SPATIAL["dummy_2d"][0] if dummy_2d else probe.PATCH
    whole = transforms(patch, 30, dummy_2d=dummy_2d)
    transform = pick(whole, INTENSITIES[name], inverts=name == "inverted_gamma")
    before = probe.images(patch)

    def change() -> Any:
        return transform(image=torch.from_numpy(before.copy()))["image"].numpy()

    found = {"shares": probe.shares(probe.changed(x, before) for x in repeat(NUM_SHARES, change))}
    transform.apply_probability = 1
    results = repeat(NUM_VALUES, change)
    found["certain"] = probe.shares(probe.changed(x, before) for x in results)
    return found | {"values": summary([probe.of_intensities(x, before) for x in results])}


def deformations(name: str) -> dict[str, Any]:
    """Measure rotation and zoom, with labels."""
    patch, dummy_2d, degrees = probe.SPATIAL[name]
    whole = transforms(patch, degrees, dummy_2d=dummy_2d)
    spatial = pick(whole, "SpatialTransform")
    parts = whole.transforms[:3] if dummy_2d else whole.transforms[:1]
    source = probe.source_shape(name)
    ramps, labels = torch.from_numpy(probe.ramps(source)), torch.from_numpy(probe.labels(source))

    def change() -> tuple[Any, Any]:
        sample = {"image": ramps.clone(), "segmentation": labels[None].clone()}
        for part in parts:
            sample = part(**sample)
        return sample["image"].numpy(), sample["segmentation"][0].numpy()

    found = {"shares": probe.shares(probe.moved(x) for x, _ in repeat(NUM_SHARES, change))}
    spatial.p_rotation = spatial.p_scaling = 1
    rows = [probe.of_positions(x) | probe.of_labels(y) for x, y in repeat(NUM_VALUES, change)]
    return found | {"values": summary(rows)}


def mirroring() -> dict[str, Any]:
    """Measure mirroring."""
    transform = pick(transforms(probe.PATCH, 30), "MirrorTransform")
    ramps = torch.from_numpy(probe.ramps(probe.PATCH))
    found = repeat(NUM_SHARES, lambda: transform(image=ramps)["image"].numpy())
    return {"shares": probe.mirror_shares(found)}


def corruption(name: str) -> dict[str, Any]:
    """Measure one corruption of what the stage before found."""
    transform = pick(transforms(probe.PATCH, 30), CORRUPTIONS[name])
    labels = probe.labels(probe.PREVIOUS_PATCH)
    before = np.stack([labels == k for k in range(1, 4)]).astype(np.float32)

    def change() -> Any:
        return transform(image=torch.from_numpy(before.copy()))["image"].numpy()

    results = repeat(NUM_SHARES, change)
    found = {"shares": probe.shares(probe.corrupted(x, before) for x in results)}
    transform.apply_probability = 1
    results = repeat(NUM_VALUES, change)
    found["certain"] = probe.shares(probe.corrupted(x, before) for x in results)
    return found | {"values": summary([probe.of_structures(x, before) for x in results])}


def everything() -> dict[str, Any]:
    """Measure all transforms together, on an image of which a part is outside."""
    name = "3d"
    patch, dummy_2d, degrees = probe.SPATIAL[name]
    whole = transforms(patch, degrees, dummy_2d=dummy_2d)
    image, labels, outside, previous = probe.whole_sample(probe.source_shape(name))
    codes = np.where(outside, -1, labels).astype(np.int16)
    segmentation = torch.from_numpy(np.stack([codes, previous]))
    before = probe.centre(image, patch)

    def change() -> tuple[Any, Any]:
        made = whole(image=torch.from_numpy(image.copy()), segmentation=segmentation.clone())
        return made["image"].numpy(), made["segmentation"][0].numpy()

    rows = [probe.of_everything(x, y, before) for x, y in repeat(NUM_VALUES, change)]
    return {"values": summary(rows)}


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Return the quantiles of each measurement."""
    return {name: probe.quantiles(values) for name, values in probe.collect(rows).items()}


def main() -> None:
    """Measure all and write the file."""
    torch.set_num_threads(1)
    packages = ("nnunetv2", "batchgeneratorsv2", "torch", "numpy", "scikit-image")
    runs = {name: intensities(name) for name in INTENSITIES}
    runs["low_resolution_dummy_2d"] = intensities("low_resolution", dummy_2d=True)
    runs |= {f"deformation_{name}": deformations(name) for name in probe.SPATIAL}
    runs |= {name: corruption(name) for name in CORRUPTIONS}
    runs |= {"mirroring": mirroring(), "everything": everything()}
    content = {
        "made_by": "scripts/bench/augment_reference.py",
        "versions": {package: version(package) for package in packages},
        "samples": {"shares": NUM_SHARES, "values": NUM_VALUES},
        "transforms": chances(transforms(probe.PATCH, 30)),
        "runs": runs,
    }
    probe.write(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT, content)


if __name__ == "__main__":
    main()
