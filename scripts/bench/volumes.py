#!/usr/bin/env python3
"""Fingerprint and preprocess four large CT volumes against nnU-Net, one process each.

    python scripts/bench/volumes.py --peer-python PY [--cases 4] [--shape 512,512,200]

The volumes are smooth random fields in int16 (I, J, K) with voxels of 0.8 x 0.8 x 1.5 to 3 mm and
three labels. Printed are seconds and the peak memory of both sides, and how far the preprocessed
images lie apart when medseg follows the peer's plans and statistics: in standard deviations of the
peer's image, and the share of labels that differ.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import blosc2
import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from peer import MEDSEG, Peer, describe, run
from scipy import ndimage

from medseg.data.store import CaseStore
from medseg.data.workspace import Workspace
from medseg.schema.base import read_json, write_json

NUMBER, NAME = 7, "Volumes"
LABELS = {"background": 0, "organ": 1, "vessel": 2, "lesion": 3}


def main() -> int:
    """Measure, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--shape", default="512,512,200")
    parser.add_argument("--keep", type=Path, help="Folder for the volumes and the peer's result.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = options.keep or Path(folder)
        peer = Peer(options.peer_python, root / "peer")
        raw = peer.dataset(NUMBER, NAME)
        if not (raw / "dataset.json").exists():
            make_volumes(raw, tuple(map(int, options.shape.split(","))), options.cases)
        _compare_cost(peer, raw, root / "work")
        _compare_images(peer, raw, root / "work")
    return 0


def make_volumes(folder: Path, shape: tuple[int, ...], num_cases: int) -> None:
    """Write the data set."""
    rng = np.random.default_rng(5)
    spacings = np.linspace(1.5, 3.0, num_cases)
    for number, thickness in enumerate(spacings):
        field, other = _field(rng, shape), _field(rng, shape)
        labels = np.zeros(shape, np.uint8)
        labels[field > 0.6], labels[field > 1.2], labels[(field > 0.6) & (other > 1.0)] = 1, 2, 3
        noise = 20 * rng.standard_normal(shape, np.float32)
        image = np.clip(300 * field + noise - 100, -1024, 3071)
        affine = np.diag([0.8, 0.8, thickness, 1.0])
        case = f"volume_{number}"
        nib.save(
            nib.Nifti1Image(image.astype(np.int16), affine),
            folder / f"imagesTr/{case}_0000.nii.gz",
        )
        nib.save(nib.Nifti1Image(labels, affine), folder / f"labelsTr/{case}.nii.gz")
    describe(folder, ["CT"], LABELS, num_cases)


def _field(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return a smooth random field of unit variance."""
    coarse = [max(4, length // 12) for length in shape]
    field = rng.standard_normal(coarse).astype(np.float32)
    zoom = [length / few for length, few in zip(shape, coarse, strict=True)]
    field = ndimage.zoom(field, zoom, order=3, mode="nearest", grid_mode=True)
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _compare_cost(peer: Peer, raw: Path, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    ours = [*MEDSEG, "--workspace", work]
    measured = run([*ours, "fingerprint", raw, "--workers", "1"])
    run([*ours, "plan", raw])
    stored = run([*ours, "preprocess", raw.name, "-c", "3d_fullres", "--workers", "1"])
    print(f"medseg:  fingerprint {measured}; preprocess {stored}", flush=True)
    shutil.rmtree(peer.preprocessed(NUMBER, NAME), ignore_errors=True)
    number = str(NUMBER)
    theirs = peer.command("extract_fingerprint", "-d", number, "-np", "1")
    peer.command("plan_experiment", "-d", number)
    their = peer.command("preprocess", "-d", number, "-c", "3d_fullres", "-np", "1")
    print(f"nnU-Net: fingerprint {theirs}; preprocess {their}")
    a, b = measured + stored, theirs + their
    print(
        f"ratio: {b.seconds / a.seconds:.1f} times faster, "
        f"{a.peak_bytes / b.peak_bytes:.2f} of the memory",
        flush=True,
    )


def _compare_images(peer: Peer, raw: Path, work: Path) -> None:
    folder = peer.preprocessed(NUMBER, NAME)
    own = Workspace(work).find(raw.name)[0]
    plans = read_json(folder / "nnUNetPlans.json")
    _follow(plans, own.plans_path("nnunet"), own.plans_path("peer"))
    command = [*MEDSEG, "--workspace", work, "preprocess", raw.name, "-c", "3d_fullres"]
    run([*command, "--plans", "peer", "--workers", "1"])
    store = CaseStore(own.store_path)
    index = json.loads((own.store_path / "index/peer__3d_fullres.json").read_text())["entries"]
    found = folder / plans["configurations"]["3d_fullres"]["data_identifier"]
    for case, key in index.items():
        entry = store.open(key)
        image = blosc2.open(str(found / f"{case}.b2nd"), mode="r")[...]
        labels = np.maximum(blosc2.open(str(found / f"{case}_seg.b2nd"), mode="r")[...], 0)[0]
        apart = np.abs(entry.image[...].astype(np.float32) - image).max() / image.std()
        differing = np.count_nonzero(entry.segmentation[...] != labels)
        print(
            f"{case}: {entry.image.dtype} {entry.shape}, images at most {apart:.1e} standard "
            f"deviations apart, {differing} of {labels.size} labels differ"
        )


def _follow(plans: dict[str, Any], ours: Path, target: Path) -> None:
    """Write our plans with the peer's spacing, patch and statistics."""
    values = read_json(ours)
    theirs = plans["configurations"]["3d_fullres"]
    values["name"] = "peer"
    values["network_axes"] = [2 - axis for axis in plans["transpose_forward"]]
    values["configurations"] = {"3d_fullres": values["configurations"]["3d_fullres"]}
    values["configurations"]["3d_fullres"]["spacing"] = theirs["spacing"]
    channels = plans["foreground_intensity_properties_per_channel"].values()
    values["intensity"] = [dict(channel) for channel in channels]
    write_json(target, values)


if __name__ == "__main__":
    sys.exit(main())
