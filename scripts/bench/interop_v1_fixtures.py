#!/usr/bin/env python3
"""Write small models of nnU-Net v1 with its own code, and what its own code predicts with them.

It runs in an environment of nnU-Net v1 (`pip install nnunet==1.7.1`), not in medseg's, on the CPU:

    PEER_PYTHON scripts/bench/interop_v1_fixtures.py OUT [--only NAME ...]
    PEER_PYTHON scripts/bench/interop_v1_fixtures.py --check FIXTURE ...

Every folder OUT/NAME holds the model (random weights; a cascade as a tree of results), `in/` with
the channels, and `out/`: `before.npy` (mean of the folds, network grid), `resampled.npy` (on the
cropped image), `case.npz` and `case.nii.gz`; `raw.nii.gz` is the segmentation before a stored
postprocessing. `prev/case.nii.gz` is what a cascade was given. `made_with.json` says with which
versions. Trainers, networks, preprocessing, prediction and export are the original's; replaced is
what needs several processes, a screen or an old torch. Labels are resized by the rule of the
installed batchgenerators (up to 0.25.3 the last of those with at least half, later the largest).

`--check` predicts what is there once more and prints the largest differences.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from interop_fixtures import parse_options, read
from interop_v1_original import CHECKPOINT, predict, prepare_original, quiet
from scipy.ndimage import gaussian_filter

TASK = "Task900_Small"
PLANS = "nnUNetPlansv2.1"
Fixture = Callable[[Path], None]


def main() -> None:
    """Write fixtures, or check some."""
    options = parse_options(__doc__, FIXTURES)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        fixtures = [path.absolute() for path in options.check]
        out = options.out.absolute() if options.out else None
        os.chdir(work)
        prepare_original(Path(work))
        for fixture in fixtures:
            check(fixture)
        for name in options.only if out else []:
            shutil.rmtree(out / name, ignore_errors=True)
            FIXTURES[name](out / name)
            describe(out / name)


def check(fixture: Path) -> None:
    """Predict a fixture again and print the largest differences."""
    out = Path(tempfile.mkdtemp(dir=Path.cwd()))
    previous = fixture / "prev" / "case.nii.gz"
    models = sorted(fixture.rglob(f"{CHECKPOINT}.model"))
    first = next(path for path in models if "3d_lowres" not in path.parts)
    model = first.parent.parent
    folds = sorted(path.parent.name for path in model.glob(f"*/{CHECKPOINT}.model"))
    predict(
        model,
        fixture / "in",
        out,
        folds=tuple(int(fold[5:]) if fold != "all" else fold for fold in folds),
        previous=previous if previous.exists() else None,
        mirrored=b"noMirroring" not in Path(f"{first}.pkl").read_bytes(),
    )
    said = []
    for name in ("before", "resampled"):
        wanted, found = (np.load(place / f"{name}.npy") for place in (fixture / "out", out))
        same = wanted.shape == found.shape
        said.append(f"{name} {np.abs(wanted - found).max() if same else 'has another shape'}")
    wanted, found = (read(place / "case.nii.gz") for place in (fixture / "out", out))
    print(f"{fixture.name}: {', '.join(said)}, {int((wanted != found).sum())} labels differ")


def describe(fixture: Path) -> None:
    """Write with what a fixture was made, and print what it is."""
    names = ("nnunet", "batchgenerators", "torch", "numpy", "scipy", "scikit-image", "SimpleITK")
    import batchgenerators.augmentations.utils as resizing

    old = not hasattr(resizing, "_resample_seg_by_argmax")
    said = {name: metadata.version(name) for name in names}
    said["label_resize"] = "threshold" if old else "argmax"
    (fixture / "made_with.json").write_text(json.dumps(said, indent=2) + "\n")
    before, after = (np.load(fixture / "out" / f"{name}.npy") for name in ("before", "resampled"))
    labels = np.unique(read(fixture / "out" / "case.nii.gz"), return_counts=True)
    counts = dict(zip(*(part.tolist() for part in labels), strict=True))
    margins = [margin(path) for path in sorted(fixture.glob("*/resampled.npy"))]
    print(
        f"{fixture.name}: network {before.shape}, cropped {after.shape}, labels {counts}, "
        f"closest call {min(margins):.1g}"
    )


def margin(path: Path) -> float:
    """Return by how much the likeliest label leads where it leads least."""
    values = np.sort(np.load(path), axis=0)
    return float((values[-1] - values[-2]).min())


# Models and images


def plans_of(
    stages: list[dict[str, Any]],
    *,
    schemes: tuple[str, ...] = ("CT", "nonCT"),
    masks: tuple[bool, ...] = (False, True),
    transpose: tuple[int, int, int] = (0, 1, 2),
    num_classes: int = 2,
    preprocessor: str = "GenericPreprocessor",
) -> dict[str, Any]:
    """Return plans as the original's planners write them."""
    properties = {
        "mean": 80.0, "sd": 40.0, "median": 79.0, "mn": 0.0, "mx": 300.0,
        "percentile_00_5": 30.0, "percentile_99_5": 140.0, "local_props": OrderedDict(),
    }  # fmt: skip
    names = [{"CT": "CT", "CT2": "CT", "noNorm": "noNorm"}.get(name, "T2") for name in schemes]
    has_ct = any(scheme.startswith("CT") for scheme in schemes)
    classes = list(range(1, num_classes + 1))
    return {
        "num_stages": len(stages),
        "num_modalities": len(schemes),
        "modalities": dict(enumerate(names)),
        "normalization_schemes": OrderedDict(enumerate(schemes)),
        "dataset_properties": {
            "all_sizes": [], "all_spacings": [], "all_classes": classes,
            "modalities": dict(enumerate(names)), "size_reductions": OrderedDict(),
            "intensityproperties": OrderedDict((i, dict(properties)) for i in range(len(schemes)))
            if has_ct else None,
        },
        "list_of_npz_files": [], "original_spacings": [], "original_sizes": [],
        "preprocessed_data_folder": "x", "num_classes": num_classes, "all_classes": classes,
        "base_num_features": 8, "use_mask_for_norm": OrderedDict(enumerate(masks)),
        "keep_only_largest_region": None, "min_region_size_per_class": None,
        "min_size_per_class": None, "transpose_forward": list(transpose),
        "transpose_backward": [transpose.index(axis) for axis in range(3)],
        "data_identifier": "nnUNetData_plans_v2.1", "plans_per_stage": dict(enumerate(stages)),
        "preprocessor_name": preprocessor, "conv_per_stage": 2,
    }  # fmt: skip


def stage_of(
    patch: tuple[int, ...],
    spacing: tuple[float | None, ...],
    pools: list[list[int]],
    kernels: list[list[int]] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return one stage of plans; axes in network order."""
    return {
        "batch_size": 2,
        "num_pool_per_axis": [sum(pool[axis] > 1 for pool in pools) for axis in range(len(patch))],
        "patch_size": np.array(patch),
        "median_patient_size_in_voxels": np.array([40, 36, 44]),
        "current_spacing": np.array(spacing),
        "original_spacing": np.array([1.3, 1.1, 0.9]),
        "do_dummy_2D_data_aug": False,
        "pool_op_kernel_sizes": pools,
        "conv_kernel_sizes": kernels or [[3] * len(patch) for _ in range(len(pools) + 1)],
        **more,
    }


def write_model(
    folder: Path,
    plans: dict[str, Any],
    trainer_name: str = "nnUNetTrainerV2",
    *,
    stage: int = 0,
    folds: tuple[Any, ...] = (0, 1),
) -> None:
    """Write a model of random weights, saved by its trainer."""
    import nnunet
    from nnunet.training.model_restore import recursive_find_python_class

    base = "nnunet.training.network_training"
    places = [os.path.join(nnunet.__path__[0], "training", "network_training")]
    trainer_class = recursive_find_python_class(places, trainer_name, current_module=base)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.pkl").write_bytes(pickle.dumps(plans))
    for number, fold in enumerate(folds):
        with quiet():
            place = f"results/3d/{TASK}/{trainer_name}__{PLANS}"
            trainer = trainer_class("plans.pkl", fold, place, "data", True, stage)
            torch.manual_seed(zlib.crc32(f"{folder.name} {trainer_name} {number}".encode()))
            trainer.plans = copy.deepcopy(plans)
            trainer.initialize(False)
            stir(trainer.network)
            trainer.all_tr_losses, trainer.all_val_losses = [np.float32(0.5)], [np.float32(0.6)]
            trainer.all_val_eval_metrics = [np.float64(0.25)]
            target = folder / (f"fold_{fold}" if isinstance(fold, int) else fold)
            target.mkdir()
            trainer.save_checkpoint(str(target / f"{CHECKPOINT}.model"))


def stir(network: torch.nn.Module) -> None:
    """Draw what the original starts at 0 and 1, and make the outputs steep."""
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        values = tensor.detach()
        if name.endswith("running_mean"):
            values.normal_(0, 0.3)
        elif name.endswith("running_var"):
            values.uniform_(0.5, 1.5)
        elif values.ndim == 1 and values.is_floating_point():
            values.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
        elif "seg_outputs" in name or "output" in name:
            values.mul_(4)


def write_images(
    folder: Path,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    *,
    seed: int,
    channels: int = 2,
    turned: bool = False,
) -> None:
    """Write a case's channels: smooth noise in a body with a corner and a hole missing, rim 0.

    Args:
        folder: Where to.
        shape: (z, y, x), in voxels.
        spacing: (z, y, x), in mm.
        seed: Of the noise.
        channels: How many.
        turned: Whether the axes are reversed and tilted in space.
    """
    random = np.random.default_rng(seed)
    body = np.zeros(shape, dtype=bool)
    body[1:-2, 2:-1, 3:-2] = True
    body[: shape[0] // 3, : shape[1] // 3, : shape[2] // 4] = False
    body[shape[0] // 2, shape[1] // 2, shape[2] // 2 : shape[2] // 2 + 2] = False
    folder.mkdir(parents=True, exist_ok=True)
    for channel in range(channels):
        noise = gaussian_filter(random.normal(size=shape), 1.5)
        values = 85 + 40 * noise / noise.std() + 5 * random.normal(size=shape)
        image = sitk.GetImageFromArray((values * body).astype(np.float32))
        image.SetSpacing(spacing[::-1])
        image.SetOrigin((-12.5, 30.25, 7.0))
        if turned:
            sine, cosine = 0.28, 0.96
            image.SetDirection((-cosine, sine, 0, -sine, -cosine, 0, 0, 0, -1))
        sitk.WriteImage(image, str(folder / f"case_{channel:04d}.nii.gz"))


def isotropic(fixture: Path, plans: dict[str, Any], trainer: str = "nnUNetTrainerV2") -> None:
    """Write a 3D model and its prediction of a case with three different lengths."""
    write_model(fixture, plans, trainer)
    channels = plans["num_modalities"]
    write_images(fixture / "in", (33, 29, 41), (1.2, 0.9, 1.1), seed=1, channels=channels)
    predict(fixture, fixture / "in", fixture / "out", mirrored="noMirroring" not in trainer)


CUBE = stage_of((16, 24, 24), (1.0, 1.1, 1.3), [[2, 2, 2], [2, 2, 2]])


def anisotropic(fixture: Path) -> None:
    """Thick slices along the stored y axis, which come first in the network."""
    stage = stage_of(
        (8, 24, 16), (4.0, 1.3, 1.1), [[1, 2, 2], [2, 2, 2]], [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
    )
    write_model(fixture, plans_of([stage], transpose=(1, 0, 2)))
    write_images(fixture / "in", (40, 14, 45), (1.1, 4.6, 0.9), seed=2, turned=True)
    predict(fixture, fixture / "in", fixture / "out")


def other_axis(fixture: Path) -> None:
    """Only the network's grid has thick slices, and their axis is another one in the image."""
    stage = stage_of((8, 24, 16), (4.2, 1.1, 1.3), [[1, 2, 2], [2, 2, 2]])
    write_model(fixture, plans_of([stage], transpose=(1, 0, 2)))
    write_images(fixture / "in", (38, 27, 33), (1.0, 2.2, 0.9), seed=3)
    predict(fixture, fixture / "in", fixture / "out")


def flat(fixture: Path, spacing: tuple[float, float, float] = (1.1, 0.95, 6.0)) -> None:
    """A 2D network over slices along the stored x axis."""
    stage = stage_of((24, 32), (5.0, 1.0, 1.2), [[2, 2], [2, 2]])
    plans = plans_of([stage], transpose=(2, 0, 1), preprocessor="PreprocessorFor2D")
    write_model(fixture, plans)
    write_images(fixture / "in", (43, 37, 9), spacing, seed=4, turned=True)
    predict(fixture, fixture / "in", fixture / "out")


def halfway(fixture: Path) -> None:
    """As before, where 34 voxels of 0.9 mm make 25.5 of 1.2 mm.

    The header's voxel size is a little below 0.9, the length of the affine's column above it: the
    original takes the former, and has 25.
    """
    flat(fixture, (1.1, 0.9, 6.0))


def cascade(fixture: Path) -> None:
    """Both stages of a cascade, in a tree of results."""
    low = stage_of((16, 16, 16), (2.0, 2.2, 2.6), [[2, 2, 2], [2, 2, 2]])
    plans = plans_of([low, CUBE])
    models = {
        place: fixture / place / TASK / f"{trainer}__{PLANS}"
        for place, trainer in (
            ("3d_lowres", "nnUNetTrainerV2"),
            ("3d_cascade_fullres", "nnUNetTrainerV2CascadeFullRes"),
        )
    }
    write_model(models["3d_lowres"], plans, stage=0)
    write_model(models["3d_cascade_fullres"], plans, "nnUNetTrainerV2CascadeFullRes", stage=1)
    write_images(fixture / "in", (33, 29, 41), (1.2, 0.9, 1.1), seed=8)
    predict(models["3d_lowres"], fixture / "in", fixture / "prev")
    found = fixture / "prev" / "case.nii.gz"
    predict(models["3d_cascade_fullres"], fixture / "in", fixture / "out", previous=found)


def regions(fixture: Path) -> None:
    """Overlapping regions, batch norm; four channels."""
    schemes, masks = ("nonCT",) * 4, (True,) * 4
    plans = plans_of([CUBE], schemes=schemes, masks=masks, num_classes=3)
    isotropic(fixture, plans, "nnUNetTrainerV2BraTSRegions_DA3_BN")


def residual(fixture: Path) -> None:
    """The network with a residual encoder."""
    stage = stage_of(
        (16, 24, 16),
        (1.0, 1.1, 1.3),
        [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        num_blocks_encoder=(1, 2, 2),
        num_blocks_decoder=(1, 1),
    )
    isotropic(fixture, plans_of([stage]), "nnUNetTrainerV2_ResencUNet")


def by_case(fixture: Path) -> None:
    """CT normalised by each case, blank outside, beside a channel that stays as it is."""
    plans = plans_of([CUBE], schemes=("CT2", "noNorm"), masks=(True, False))
    isotropic(fixture, plans)


def blank_ct(fixture: Path) -> None:
    """CT that is blank outside, a z-score without a mask; exported as the plans say."""
    plans = plans_of([CUBE], masks=(True, False))
    plans["segmentation_export_params"] = {
        "force_separate_z": True, "interpolation_order": 1, "interpolation_order_z": 0,
    }  # fmt: skip
    isotropic(fixture, plans)


def postprocessed(fixture: Path) -> None:
    """Largest pieces of a label and of two labels together, the others from a size on."""
    plans = plans_of([CUBE], num_classes=3)
    fixture.mkdir(parents=True)
    content = {
        "for_which_classes": [[1, 2], 3],
        "min_valid_object_sizes": str({(1, 2): 30.0, 3: 12.5}),
        "dc_per_class_raw": {"1": 0.5}, "num_samples": 3, "validation_raw": "validation_raw",
    }  # fmt: skip
    (fixture / "postprocessing.json").write_text(json.dumps(content, indent=4))
    isotropic(fixture, plans)


def legacy(fixture: Path) -> None:
    """Plans of the first releases, and weights in the format torch had then."""
    plans = plans_of([CUBE])
    for name in ("transpose_forward", "transpose_backward", "preprocessor_name", "conv_per_stage"):
        del plans[name]
    stage = {name: value for name, value in CUBE.items() if "kernel" not in name}
    plans["plans_per_stage"] = {0: {**stage, "num_pool_per_axis": [1, 2, 2]}}
    write_model(fixture, plans)
    for path in sorted(fixture.glob(f"fold_*/{CHECKPOINT}.model")):
        content = torch.load(path)
        state = {f"module.{name}": tensor for name, tensor in content["state_dict"].items()}
        content["state_dict"] = OrderedDict(state)
        torch.save(content, path, _use_new_zipfile_serialization=False)
        told = Path(f"{path}.pkl")
        content = pickle.loads(told.read_bytes())  # noqa: S301 - written above
        content["plans"] = plans
        old = pickle.dumps(content, protocol=2).replace(b"numpy._core", b"numpy.core")
        told.write_bytes(old)
    write_images(fixture / "in", (33, 29, 41), (1.2, 0.9, 1.1), seed=6)
    predict(fixture, fixture / "in", fixture / "out")


def keeps_slices(fixture: Path) -> None:
    """A 3D network that leaves the spacing across slices alone."""
    stage = stage_of((8, 24, 24), (None, 1.1, 1.3), [[1, 2, 2], [2, 2, 2]])
    plans = plans_of([stage], preprocessor="PreprocessorFor3D_LeaveOriginalZSpacing")
    write_model(fixture, plans)
    write_images(fixture / "in", (14, 37, 41), (3.5, 0.9, 1.1), seed=7)
    predict(fixture, fixture / "in", fixture / "out")


def as_it_is(fixture: Path) -> None:
    """A network that sees images on their own grid; one that never saw them mirrored."""
    plans = plans_of([CUBE], preprocessor="PreprocessorFor3D_NoResampling")
    isotropic(fixture, plans, "nnUNetTrainerV2_noMirroring")


def smooth(fixture: Path) -> None:
    """Activation before the norm, another activation."""
    isotropic(fixture, plans_of([CUBE]), "nnUNetTrainerV2_ReLU_convReLUIN")


FIXTURES: dict[str, Fixture] = {
    "v1_aniso": anisotropic,
    "v1_axis": other_axis,
    "v1_flat": flat,
    "v1_halfway": halfway,
    "v1_casc": cascade,
    "v1_bn_regions": regions,
    "v1_resenc": residual,
    "v1_ct2": by_case,
    "v1_ct_mask": blank_ct,
    "v1_post": postprocessed,
    "v1_legacy": legacy,
    "v1_keepz": keeps_slices,
    "v1_asis": as_it_is,
    "v1_relu": smooth,
    "v1_mish": lambda fixture: isotropic(fixture, plans_of([CUBE]), "nnUNetTrainerV2_Mish"),
    "v1_gelu": lambda fixture: isotropic(fixture, plans_of([CUBE]), "nnUNetTrainerV2_GeLU"),
    "v1_slope": lambda fixture: isotropic(
        fixture, plans_of([CUBE]), "nnUNetTrainerV2_LReLU_slope_2en1"
    ),
}


if __name__ == "__main__":
    main()
