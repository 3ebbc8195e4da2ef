#!/usr/bin/env python3
"""Export small trained models for nnU-Net, predict with both, and compare the label maps.

    python scripts/bench/nnunet_round_trip.py --peer PYTHON [--work DIR] [--only labels,cascade]
        [--iterations 200] [--threads 2] [--output FILE]

Simulated examinations (two channels, an organ and a lesion in it, zero outside the body) train one
small model of each kind by `medseg train`: labels (two folds), regions (thick slices from left to
right, so that the network's axes are another order of the image's), 2d (fold "all"), residual,
cascade (fold "all"). Each is written by `medseg export --format nnunet` and predicts new
examinations, stored in other orders and directions of the axes, oblique, finer, and in thick
slices: by `nnUNetv2_predict_from_modelfolder` of the environment of PYTHON (nnunetv2 2.8.1, as the
command that the export printed) and by `medseg predict --tta flips`, in float32 (`--exact`) and as
it does by default. nnU-Net's label maps of a cascade's first stage are handed to the second stage
of both; medseg's own way, which hands over logits, is printed too.

Printed are for each case the Dice of the two label maps (mean over labels), how many voxels differ,
and the Dice to the truth, to show that there is something to agree on. Of each model the worst case
in float32 and the mean of the default arithmetic (16 bits where the processor has them) are judged,
on lines that begin with "met" or "short"; exit status 0 if all are met, 1 if not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from costs import bind, keep
from numpy.typing import NDArray
from peer import MEDSEG, Peer, describe, judge, run
from predict_alone import case_dice, emptied

MIN_DICE = 0.999
"""Of a case, mean over labels."""
MODES = {"exact": ["--exact"], "default": []}
"""Arithmetic of medseg -> options of its command."""
NUM_TRAINING, NUM_CHANNELS = 10, 2
LOWRES, CASCADE = "3d_lowres", "3d_cascade_fullres"
RECIPE = """
description: a small network in a minute
epochs: {epochs}
iterations_per_epoch: 10
validation_iterations: 0
optimizer: {{name: adamw, lr: 4.0e-3, weight_decay: 1.0e-2}}
schedule: {{name: cosine, warmup: 0.1, per: iteration}}
loss: {{name: dice_ce, batch_dice: true, deep_supervision: true}}
sampling: {{batch_size: 2, foreground_fraction: 0.5}}
network: {{base_features: 8, max_features: 32}}
precision: fp32
compile: off
"""


@dataclass(frozen=True)
class Kind:
    """One model."""

    configuration: str = "3d_fullres"
    folds: tuple[str, ...] = ("0",)
    changes: tuple[str, ...] = ()
    """Of the recipe."""
    has_regions: bool = False
    thick_axis: int = 2
    """Canonical axis along which the training images have thick slices."""
    patch: tuple[int, ...] = (16, 32, 32)
    """Smaller than the images, so that there are several tiles."""


KINDS = {
    "labels": Kind(folds=("0", "1")),
    "regions": Kind(has_regions=True, thick_axis=0),
    "2d": Kind(configuration="2d", folds=("all",), patch=(32, 32), thick_axis=1),
    "residual": Kind(changes=("network.kind=residual_unet",)),
    "cascade": Kind(configuration=CASCADE, folds=("all",)),
}
TURNED = np.array([[0, 0, 1], [-1, 0, 0], [0, 1, 0]], float)
ANGLE = np.deg2rad(19.0)
ROTATED = np.array(
    [[np.cos(ANGLE), -np.sin(ANGLE), 0], [np.sin(ANGLE), np.cos(ANGLE), 0], [0, 0, 1]]
)
CASES: dict[str, tuple[NDArray[np.float64], tuple[float, float, float]]] = {
    "plain": (np.eye(3), (1.1, 1.3, 2.2)),
    "reversed": (np.diag([-1.0, -1.0, 1.0]), (1.2, 1.2, 2.4)),
    "turned": (TURNED, (1.25, 2.1, 1.1)),
    "oblique": (ROTATED @ np.diag([1.0, -1.0, -1.0]), (1.15, 1.3, 2.0)),
    "fine": (np.diag([-1.0, 1.0, -1.0]), (0.8, 0.85, 1.1)),
    "thick": (TURNED.T, (6.0, 1.2, 1.3)),
}
"""Name -> (direction cosines of the image's axes as columns, spacing in mm)."""


def main() -> int:
    """Train, export, predict, compare."""
    options = _options()
    bind(options.threads)
    root = options.work or Path(tempfile.mkdtemp(prefix="medseg-bench-"))
    root.mkdir(parents=True, exist_ok=True)
    peer = Peer(options.peer, root / "peer")
    figures: dict[str, Any] = {}
    verdicts: dict[str, bool] = {}
    for name in options.only:
        model = trained(name, KINDS[name], root, options.iterations)
        figures[name] = round_trip(name, KINDS[name], root, model, peer)
        verdicts |= judged(name, figures[name])
    return keep(options.output, figures, verdicts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path, required=True, metavar="PYTHON")
    parser.add_argument("--work", type=Path, help="Kept; models in it are not trained again.")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--iterations", type=int, default=200, help="Training steps of a fold.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="Where the figures are written, as JSON.")
    options = parser.parse_args()
    if unknown := set(options.only) - set(KINDS):
        parser.error(f"--only has {', '.join(sorted(unknown))}; expected of: {', '.join(KINDS)}")
    return options


def write_case(
    stem: str, seed: int, directions: NDArray[np.float64], spacing: Sequence[float]
) -> NDArray[np.uint8]:
    """Write the channels of an examination, STEM_0000.nii.gz ..., and return its label map.

    Args:
        stem: Path and case.
        seed: Of the anatomy and the noise.
        directions: (3, 3) direction cosines of the image's axes, as columns.
        spacing: Voxel size in mm.
    """
    rng = np.random.default_rng(seed)
    shape = tuple(round(64 / size) + 3 * axis for axis, size in enumerate(spacing))
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = rng.normal(0, 40, 3) - affine[:3, :3] @ (np.array(shape) / 2)
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    world = (indices - (np.array(shape) - 1) / 2) @ affine[:3, :3].T
    body = _ellipsoid(world, rng.normal(0, 1.5, 3), rng.uniform(24, 28, 3))
    center = rng.normal(0, 4, 3)
    organ = _ellipsoid(world, center, rng.uniform(12, 18, 3))
    lesion = _ellipsoid(world, center + rng.normal(0, 3, 3), rng.uniform(5, 9, 3))
    segmentation = np.where(lesion, 2, organ).astype(np.uint8)
    for channel, levels in enumerate(((80, 130, 190), (30, 90, 40))):
        noise = rng.normal(0, 18, shape)
        image = np.where(body | (segmentation > 0), np.take(levels, segmentation) + noise, 0)
        nifti = nib.Nifti1Image(np.round(image).astype(np.int16), affine)
        nib.save(nifti, f"{stem}_{channel:04d}.nii.gz")
    return segmentation


def _ellipsoid(
    world: NDArray[np.float64], center: NDArray[np.float64], radii: NDArray[np.float64]
) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = (((world - center) / radii) ** 2).sum(-1) < 1
    return inside


def _dataset(name: str, kind: Kind, root: Path) -> Path:
    """Write the training examinations in nnU-Net's layout."""
    folder = root / f"raw/Dataset{41 + list(KINDS).index(name):03d}_{name.title()}"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(NUM_TRAINING):
        rng = np.random.default_rng(number)
        spacing = rng.uniform(0.95, 1.25, 3) * np.where(np.arange(3) == kind.thick_axis, 2, 1)
        case = f"case_{number:02d}"
        labels = write_case(str(folder / "imagesTr" / case), number, np.eye(3), tuple(spacing))
        image = nib.load(folder / f"imagesTr/{case}_0000.nii.gz")
        nib.save(nib.Nifti1Image(labels, image.affine), folder / f"labelsTr/{case}.nii.gz")
    names: dict[str, Any] = {"background": 0, "organ": 1, "lesion": 2}
    if kind.has_regions:
        names = {"background": 0, "whole": [1, 2], "lesion": 2}
    describe(folder, ["T1w", "CT"], names, NUM_TRAINING)
    if kind.has_regions:
        described = json.loads((folder / "dataset.json").read_text())
        described["regions_class_order"] = [1, 2]
        (folder / "dataset.json").write_text(json.dumps(described))
    return folder


def trained(name: str, kind: Kind, root: Path, iterations: int) -> Path:
    """Return the run of a model; one that is there is used again."""
    medseg = [*MEDSEG, "--workspace", root / f"work_{name}"]
    found = sorted((root / f"work_{name}").glob(f"datasets/*/runs/*__{kind.configuration}__trip"))
    if found and (found[0] / "bundle/bundle.json").is_file():
        return found[0]
    raw = _dataset(name, kind, root)
    run([*medseg, "fingerprint", raw])
    run([*medseg, "plan", raw])
    (plans,) = (root / f"work_{name}").glob("datasets/*/plans/nnunet.json")
    _change_plans(plans, kind)
    run([*medseg, "preprocess", raw.name, "-c", kind.configuration])
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.format(epochs=max(1, iterations // 10)))
    for fold in kind.folds:
        command = [*medseg, "train", raw.name, kind.configuration, fold, "--recipe", recipe]
        command += ["--name", "trip", "--seed", fold if fold.isdigit() else "0", "--device", "cpu"]
        spent = run([*command, *(part for change in kind.changes for part in ("--set", change))])
        print(f"{name}: fold {fold} trained in {spent.seconds:.0f} s", flush=True)
    return next(
        iter((root / f"work_{name}").glob(f"datasets/*/runs/*__{kind.configuration}__trip"))
    )


def _change_plans(path: Path, kind: Kind) -> None:
    """Make the patch smaller than the images, and add a cascade where it is wanted."""
    plans = json.loads(path.read_text())
    configurations = plans["configurations"]
    base = configurations["2d" if kind.configuration == "2d" else "3d_fullres"]
    network = base["architecture"]
    dimension = len(kind.patch)
    base["patch_size"] = list(kind.patch)
    stages, thin = 3, [2] * dimension
    first = [1, 2, 2] if dimension == 3 else thin
    network["strides"] = [[1] * dimension, first, thin]
    for key, value in (("features", 32), ("kernel_sizes", [3] * dimension)):
        network[key] = [value] * stages
    if dimension == 3:
        network["kernel_sizes"][0] = [1, 3, 3]
    network["blocks_encoder"], network["blocks_decoder"] = [1, 2, 2], [2, 1]
    if kind.configuration == CASCADE:
        coarser = [1.5 * size for size in base["spacing"]]
        configurations[LOWRES] = {"inherits_from": "3d_fullres", "spacing": coarser}
        configurations[CASCADE] = {"inherits_from": "3d_fullres", "previous_stage": LOWRES}
    path.write_text(json.dumps(plans))


def round_trip(name: str, kind: Kind, root: Path, model: Path, peer: Peer) -> dict[str, Any]:
    """Export a model, let both predict, and return the figures of each case."""
    images, folder = emptied(root / f"images_{name}"), root / f"exported_{name}"
    truth = {
        case: write_case(str(images / case), 900 + number, directions, spacing)
        for number, (case, (directions, spacing)) in enumerate(CASES.items())
    }
    run([*MEDSEG, "export", model, "--format", "nnunet", "-o", folder])
    exported = json.loads((folder / "medseg_export.json").read_text())
    handed: Path | None = None
    for stage in exported["stages"]:
        theirs = emptied(root / f"nnunet_{name}_{stage['configuration']}")
        _their_prediction(peer, images, theirs, folder / stage["folder"], stage["folds"], handed)
        handed = theirs
    handed = theirs.with_name(f"nnunet_{name}_{LOWRES}") if kind.configuration == CASCADE else None
    modes: dict[str, list[str | Path]] = {mode: [*words] for mode, words in MODES.items()}
    if handed is not None:
        modes = {mode: [*words, "--previous-stage", handed] for mode, words in modes.items()}
        modes["own first stage"] = ["--exact"]
    ours = {mode: emptied(root / f"medseg_{name}_{mode.replace(' ', '_')}") for mode in modes}
    for mode, words in modes.items():
        command = [*MEDSEG, "predict", "-i", images, "-o", ours[mode], "-m", model]
        run([*command, "--tta", "flips", "--device", "cpu", *words])
    return {case: _compared(name, case, theirs, ours, truth[case]) for case in CASES}


def _their_prediction(
    peer: Peer, images: Path, output: Path, model: Path, folds: Sequence[str], handed: Path | None
) -> None:
    arguments = ["-i", images, "-o", output, "-m", model, "-f", *folds, "-device", "cpu"]
    arguments += ["-npp", "1", "-nps", "1", "--disable_progress_bar"]
    arguments += [] if handed is None else ["-prev_stage_predictions", handed]
    peer.command("predict_from_modelfolder", *map(str, arguments))


def _compared(
    name: str, case: str, theirs: Path, ours: dict[str, Path], truth: NDArray[np.uint8]
) -> dict[str, Any]:
    image = nib.load(theirs / f"{case}.nii.gz")
    wanted = np.asarray(image.dataobj)
    figures: dict[str, Any] = {
        "voxels": wanted.size,
        "foreground": int((wanted > 0).sum()),
        "dice_to_truth": case_dice(wanted, truth),
        "dice": {},
        "differing": {},
    }
    for mode, folder in ours.items():
        other = nib.load(folder / f"{case}.nii.gz")
        if not np.allclose(other.affine, image.affine, atol=1e-4):
            sys.exit(f"{name}, {case}: the affines of the two label maps differ")
        found = np.asarray(other.dataobj)
        figures["dice"][mode] = case_dice(found, wanted)
        figures["differing"][mode] = int((found != wanted).sum())
    said = ", ".join(
        f"{mode} {dice:.6f} ({figures['differing'][mode]} voxels)"
        for mode, dice in figures["dice"].items()
    )
    print(
        f"{name}, {case}: Dice {said}; of {wanted.size} voxels {figures['foreground']} foreground; "
        f"nnU-Net to the truth {figures['dice_to_truth']:.3f}",
        flush=True,
    )
    return figures


def judged(name: str, figures: dict[str, Any]) -> dict[str, bool]:
    """Judge the worst case in float32, and the mean of what the default arithmetic makes of it."""
    dice = {mode: [case["dice"][mode] for case in figures.values()] for mode in MODES}
    worst, mean = min(dice["exact"]), statistics.mean(dice["default"])
    is_there = all(case["foreground"] for case in figures.values())
    return {
        f"{name}, exact": judge(
            f"{name}: worst Dice in float32 {worst:.6f}, at least {MIN_DICE} wanted",
            is_met=worst >= MIN_DICE and is_there,
        ),
        f"{name}, default": judge(
            f"{name}: mean Dice by default {mean:.6f} (worst {min(dice['default']):.6f}), at least "
            f"{MIN_DICE} wanted",
            is_met=mean >= MIN_DICE and is_there,
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
