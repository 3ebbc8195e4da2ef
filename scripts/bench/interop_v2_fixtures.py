#!/usr/bin/env python3
"""Write small models of nnU-Net v2 with its own code, and what its own code predicts with them.

It runs in an environment of nnU-Net v2 (`pip install torch==2.13.0 nnunetv2==2.8.1`), not in
medseg's, on the CPU:

    PEER_PYTHON scripts/bench/interop_v2_fixtures.py OUT [--only NAME ...]
    PEER_PYTHON scripts/bench/interop_v2_fixtures.py --check FIXTURE ...

Every folder OUT/NAME holds the model (taught for a few steps on noise; a cascade as a tree of
results), `in/` with the channels, and `out/`: `case.npz` with the probabilities on the image as its
reader turns it, `case.nii.gz` and `case.pkl`. `prev/case.nii.gz` is what a cascade was given.
`made_with.json` says with which versions. Trainers, checkpoints, networks, preprocessing,
prediction and export are the original's.

`--check` predicts what is there once more and prints the largest differences.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from interop_fixtures import parse_options, read
from interop_v2_original import CHECKPOINT, FULL, predict, prepare_original, write_model
from interop_v2_plans import (
    DATASET,
    PLANS,
    Content,
    by_torch,
    configuration_of,
    dataset_of,
    not_at_all,
    plans_of,
    regions,
    spline,
)
from scipy.ndimage import gaussian_filter

Fixture = Callable[[Path], None]


def main() -> None:
    """Write fixtures, or check some."""
    options = parse_options(__doc__, FIXTURES)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        prepare_original(Path(work))
        for fixture in options.check:
            check(fixture.absolute())
        for name in options.only if options.out else []:
            shutil.rmtree(options.out / name, ignore_errors=True)
            FIXTURES[name](options.out.absolute() / name)
            describe(options.out / name)


def check(fixture: Path) -> None:
    """Predict a fixture again and print the largest differences."""
    models = sorted({path.parent.parent for path in fixture.rglob(CHECKPOINT)})
    model = next(path for path in models if not path.name.endswith("__3d_lowres"))
    previous = fixture / "prev"
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        predict(model, fixture / "in", out, previous=previous if previous.is_dir() else None)
        wanted, found = (probabilities(folder) for folder in (fixture / "out", out))
        largest = float(np.abs(wanted - found).max())
        wanted, found = (read(folder / "case.nii.gz") for folder in (fixture / "out", out))
    differ = int((wanted != found).sum())
    print(f"{fixture.name}: probabilities {largest:.1g}, {differ} labels differ")


def probabilities(folder: Path) -> np.ndarray:
    """Return what was predicted, (class, z, y, x)."""
    with np.load(folder / "case.npz") as file:
        return file["probabilities"]


def describe(fixture: Path) -> None:
    """Write with what a fixture was made, and print what it is."""
    names = ("nnunetv2", "dynamic-network-architectures", "batchgenerators", "torch", "numpy")
    said = {name: metadata.version(name) for name in (*names, "scipy", "scikit-image", "simpleitk")}
    (fixture / "made_with.json").write_text(json.dumps(said, indent=2) + "\n")
    labels = np.unique(read(fixture / "out" / "case.nii.gz"), return_counts=True)
    counts = dict(zip(*(part.tolist() for part in labels), strict=True))
    values = probabilities(fixture / "out")
    has_regions = any("regions_class_order" in path.read_text() for path in fixture.rglob("*.json"))
    ordered = np.sort(values, axis=0)
    lead = np.abs(2 * values - 1).min(axis=0) if has_regions else ordered[-1] - ordered[-2]
    weights = [torch.load(path, weights_only=False) for path in fixture.rglob(CHECKPOINT)]
    losses = [f"{content['logging']['train_losses'][0]:.2f}" for content in weights]
    print(
        f"{fixture.name}: losses {losses}, probabilities {values.shape}, labels {counts}, decided "
        f"by less than 0.01 in {(lead < 0.01).mean():.2%} of the voxels, by more than 0.9 in "
        f"{(lead > 0.9).mean():.0%}",
        flush=True,
    )


# Images


def write_images(
    folder: Path,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    *,
    seed: int,
    rim: int = 1,
    direction: tuple[float, ...] | None = None,
) -> None:
    """Write a case's channels: smooth noise in a body with a corner and a hole missing, rim 0.

    Args:
        folder: Where to.
        shape: (z, y, x), in voxels.
        spacing: (z, y, x), in mm.
        seed: Of the noise.
        rim: Width of what is 0 around the body, in voxels; one or two more at some ends.
        direction: Of the axes (x, y, z) in space, row by row.
    """
    random = np.random.default_rng(seed)
    body = np.zeros(shape, dtype=bool)
    body[rim : -1 - rim, rim + 1 : -rim, rim + 2 : -1 - rim] = True
    body[: shape[0] // 3, : shape[1] // 3, : shape[2] // 3] = False
    body[shape[0] // 2, shape[1] // 2, shape[2] // 2 : shape[2] // 2 + 2] = False
    folder.mkdir(parents=True, exist_ok=True)
    for channel in range(2):
        noise = gaussian_filter(random.normal(size=shape), 1.5)
        values = 85 + 40 * noise / noise.std() + 5 * random.normal(size=shape)
        image = sitk.GetImageFromArray((values * body).astype(np.float32))
        image.SetSpacing(spacing[::-1])
        image.SetOrigin((-12.5, 30.25, 7.0))
        if direction is not None:
            image.SetDirection(direction)
        sitk.WriteImage(image, str(folder / f"case_{channel:04d}.nii.gz"))


TURNED = (-0.96, 0.28, 0, -0.28, -0.96, 0, 0, 0, -1)
"""Two axes tilted, all of them reversed."""
SWAPPED = (0, 0.28, -0.96, -1, 0, 0, 0, -0.96, -0.28)
"""Stored from back to front, from top to bottom, from right to left; two axes tilted."""


# Fixtures

CUBE: Content = {
    "patch": (16, 24, 24),
    "spacing": (1.0, 1.1, 1.3),
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
}
SLAB: Content = {
    "patch": (8, 24, 16),
    "spacing": (4.0, 1.3, 1.1),
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
}
FLAT: Content = {
    "patch": (24, 32),
    "spacing": (1.0, 1.2),
    "strides": [[1, 1], [2, 2], [2, 2]],
}


CUBE_IMAGE: Content = {"shape": (33, 29, 41), "spacing": (1.2, 0.9, 1.1)}
SLAB_IMAGE: Content = {"shape": (40, 14, 45), "spacing": (1.1, 4.6, 0.9), "direction": TURNED}
FLAT_IMAGE: Content = {"shape": (43, 37, 9), "spacing": (1.1, 0.95, 6.0), "direction": TURNED}


def solid(
    fixture: Path,
    dataset: Content | None = None,
    *,
    plans: Content | None = None,
    image: Content | None = None,
    without: str | None = None,
    **model: Any,
) -> None:
    """Write a model, in 3D by default, and its prediction of a case with three different lengths.

    Args:
        fixture: Where to.
        dataset: Content of dataset.json.
        plans: Content of plans.json.
        image: What differs from the usual image.
        without: Key that is taken out of the checkpoints.
        model: Further arguments of `write_model`.
    """
    write_model(fixture, plans or plans_of({FULL: configuration_of(**CUBE)}), dataset, **model)
    for path in fixture.glob(f"*/{CHECKPOINT}") if without else []:
        content = torch.load(path, weights_only=False)
        del content[without]
        torch.save(content, path)
    seed = zlib.crc32(fixture.name.encode())
    write_images(fixture / "in", **{**CUBE_IMAGE, "seed": seed, **(image or {})})
    predict(fixture, fixture / "in", fixture / "out")


def slabs(fixture: Path, **more: Any) -> None:
    """Thick slices along the stored y axis, which come first in the network."""
    plans = plans_of({FULL: configuration_of(**SLAB, **more)}, transpose=(1, 0, 2))
    solid(fixture, plans=plans, image=SLAB_IMAGE)


def slices(fixture: Path, dataset: Content | None = None) -> None:
    """A 2D network over slices along the stored x axis."""
    plans = plans_of({"2d": configuration_of(**FLAT)}, transpose=(2, 0, 1))
    solid(fixture, dataset, plans=plans, configuration="2d", image=FLAT_IMAGE)


def old(fixture: Path) -> None:
    """Plans of the first releases, and a dataset.json with their names."""
    configuration = configuration_of(**SLAB)
    arguments = configuration.pop("architecture")["arch_kwargs"]
    configuration |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 8, "unet_max_num_features": 20,
        "n_conv_per_stage_encoder": arguments["n_conv_per_stage"],
        "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [1, 2, 2],
        "pool_op_kernel_sizes": arguments["strides"],
        "conv_kernel_sizes": arguments["kernel_sizes"],
    }  # fmt: skip
    plans = plans_of({FULL: configuration}, transpose=(1, 0, 2))
    values = plans.pop("foreground_intensity_properties_per_channel")
    plans["foreground_intensity_properties_by_modality"] = values
    dataset = dataset_of()
    dataset["modality"] = dataset.pop("channel_names")
    solid(fixture, dataset, plans=plans, image=SLAB_IMAGE)


def cubes(fixture: Path, *, image: Content | None = None, **more: Any) -> None:
    """Voxels of similar sides; the network has the axes in another order."""
    plans = plans_of({FULL: configuration_of(**{**CUBE, **more})}, transpose=(2, 0, 1))
    solid(fixture, plans=plans, image=image)


def reader(fixture: Path, name: str, direction: tuple[float, ...]) -> None:
    """Images read in another way."""
    plans = plans_of({FULL: configuration_of(**CUBE)}, transpose=(2, 0, 1), reader=name)
    solid(fixture, plans=plans, image={"direction": direction})


def cascade(
    fixture: Path,
    kind: Content,
    image: Content,
    *,
    dataset: Content | None = None,
    resampling: Content | None = None,
    **plan: Any,
) -> None:
    """Both stages of a cascade, in a tree of results."""
    first, last = "3d_lowres", "3d_cascade_fullres"
    coarse = tuple(2 * length for length in kind["spacing"])
    plans = plans_of(
        {
            first: configuration_of(**{**kind, "spacing": coarse}, next_stage=last),
            FULL: configuration_of(**kind, resampling=resampling),
            last: {"inherits_from": FULL, "previous_stage": first},
        },
        **plan,
    )
    models = {
        stage: fixture / DATASET / f"nnUNetTrainer__{PLANS}__{stage}" for stage in (first, last)
    }
    for stage, model in models.items():
        write_model(model, plans, dataset, configuration=stage)
    write_images(fixture / "in", **image, seed=zlib.crc32(fixture.name.encode()))
    predict(models[first], fixture / "in", fixture / "prev")
    for rest in ("case.npz", "case.pkl"):
        (fixture / "prev" / rest).unlink()
    predict(models[last], fixture / "in", fixture / "out", previous=fixture / "prev")
    channels = [read(path) for path in sorted((fixture / "in").iterdir())]
    blank = ~np.any(channels, axis=0)
    found = np.bincount(read(fixture / "prev/case.nii.gz")[blank])
    print(f"{fixture.name}: labels of the first stage where the image is blank: {found}")


NO_MASK = (False, False)
TORCH_SLABS = by_torch(force_separate_z=None, separate_z_anisotropy_threshold=3)
FIXTURES: dict[str, Fixture] = {
    "v2_two": slices,
    "v2_regions_two": lambda fixture: slices(fixture, regions(3)),
    "v2_old": old,
    "v2_bn": lambda fixture: solid(fixture, trainer_name="nnUNetTrainerBN"),
    "v2_torchres": lambda fixture: cubes(fixture, resampling=by_torch(force_separate_z=False)),
    "v2_torchres_sepz": lambda fixture: slabs(fixture, resampling=TORCH_SLABS),
    "v2_nosep": lambda fixture: slabs(fixture, resampling=spline(force_separate_z=False)),
    "v2_hack": lambda fixture: cubes(fixture, resampling=not_at_all()),
    "v2_norms": lambda fixture: cubes(
        fixture, schemes=("RescaleTo01Normalization", "NoNormalization"), masks=NO_MASK
    ),
    "v2_zscore": lambda fixture: cubes(
        fixture, schemes=("ZScoreNormalization",) * 2, masks=NO_MASK, image={"rim": 5}
    ),
    "v2_nomirror": lambda fixture: solid(fixture, without="inference_allowed_mirroring_axes"),
    "v2_mirror01": lambda fixture: solid(fixture, trainer_name="nnUNetTrainer_onlyMirror01"),
    "v2_reorient": lambda fixture: reader(fixture, "NibabelIOWithReorient", SWAPPED),
    "v2_reorient_sitk": lambda fixture: reader(fixture, "SimpleITKIOWithReorient", SWAPPED),
    "v2_nibabel": lambda fixture: reader(fixture, "NibabelIO", TURNED),
    "v2_small": lambda fixture: solid(fixture, image={"shape": (12, 29, 15)}),
    "v2_onetile": lambda fixture: cubes(
        fixture,
        patch=(40, 28, 24),  # the image without its rim, in the network's order
        image={"shape": (31, 27, 45), "spacing": (1.1, 1.3, 1.0)},
    ),
    "v2_casc_auto": lambda fixture: cascade(fixture, CUBE, CUBE_IMAGE, transpose=(1, 0, 2)),
    "v2_casc_slabs": lambda fixture: cascade(
        fixture, SLAB, SLAB_IMAGE, transpose=(1, 0, 2), reader="NibabelIO"
    ),
    "v2_casc_reorient": lambda fixture: cascade(
        fixture, CUBE, {**CUBE_IMAGE, "direction": SWAPPED}, reader="NibabelIOWithReorient"
    ),
    "v2_casc_torch": lambda fixture: cascade(
        fixture, CUBE, CUBE_IMAGE, resampling=by_torch(force_separate_z=False)
    ),
    "v2_casc_torch_sepz": lambda fixture: cascade(
        fixture, SLAB, SLAB_IMAGE, transpose=(1, 0, 2), resampling=TORCH_SLABS
    ),
    "v2_casc_regions": lambda fixture: cascade(fixture, CUBE, CUBE_IMAGE, dataset=regions(3)),
    "v2_manylabels": lambda fixture: solid(fixture, dataset_of(12)),
    "v2_resenc": lambda fixture: slabs(fixture, residual=True),
    "v2_all": lambda fixture: solid(fixture, folds=("all",)),
    "v2_folds": lambda fixture: solid(fixture, folds=(0, 2, 10)),
}


if __name__ == "__main__":
    main()
