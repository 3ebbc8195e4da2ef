#!/usr/bin/env python3
"""Fingerprint and preprocess four large CT volumes against nnU-Net, one process each.

    python scripts/bench/volumes.py --peer-python PY [--cases 4] [--shape 512,512,200]

The volumes are smooth random fields in int16 (I, J, K) with voxels of 0.8 x 0.8 x 1.5 to 3 mm and
three labels. Printed are seconds and the peak memory of both sides, and how far the preprocessed
images lie apart when medseg follows the peer's plans and statistics: in standard deviations of the
peer's image, and how many labels differ. A label may differ where several are equally near (a tie);
that is found out with the file's labels, voxel by voxel.

Each limit is judged on a line that begins with "met" or "short". Exit status 0 if all are met, 1 if
not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from peer import MEDSEG, Cost, Peer, describe, judge, run
from scipy import ndimage

from medseg.data.store import CaseStore, Entry
from medseg.data.workspace import Workspace
from medseg.resample import separate_axis
from medseg.schema.base import read_json, write_json

NUMBER, NAME = 7, "Volumes"
MIN_SPEED = 6.0
"""How many times faster than nnU-Net."""
MAX_MEMORY = 1 / 3
"""Peak memory, as a share of nnU-Net's."""
MAX_APART = 1e-3
"""Largest difference of two images, in standard deviations."""
TIED = 1e-6
"""Shares of two labels in a voxel, or distances of two slices, that differ by less are equal."""
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
        verdicts = _compare_cost(peer, raw, root / "work")
        verdicts += _compare_images(peer, raw, root / "work")
    return 0 if all(verdicts) else 1


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


def _compare_cost(peer: Peer, raw: Path, work: Path) -> list[bool]:
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
    return judge_costs(measured + stored, theirs + their)


def judge_costs(ours: Cost, theirs: Cost) -> list[bool]:
    """Judge time and memory against nnU-Net's."""
    speed, share = theirs.seconds / ours.seconds, ours.peak_bytes / theirs.peak_bytes
    return [
        judge(
            f"{speed:.1f} times faster, at least {MIN_SPEED:g} wanted", is_met=speed >= MIN_SPEED
        ),
        judge(
            f"{share:.2f} of the memory, at most {MAX_MEMORY:.2f} wanted",
            is_met=share <= MAX_MEMORY,
        ),
    ]


def _compare_images(peer: Peer, raw: Path, work: Path) -> list[bool]:
    folder = peer.preprocessed(NUMBER, NAME)
    own = Workspace(work).find(raw.name)[0]
    plans = read_json(folder / "nnUNetPlans.json")
    _follow(plans, own.plans_path("nnunet"), own.plans_path("peer"))
    command = [*MEDSEG, "--workspace", work, "preprocess", raw.name, "-c", "3d_fullres"]
    run([*command, "--plans", "peer", "--workers", "1"])
    store = CaseStore(own.store_path)
    index = json.loads((own.store_path / "index/peer__3d_fullres.json").read_text())["entries"]
    found = folder / plans["configurations"]["3d_fullres"]["data_identifier"]
    verdicts = []
    for case, key in index.items():
        entry = store.open(key)
        image = blosc2.open(str(found / f"{case}.b2nd"), mode="r")[...]
        labels = np.maximum(blosc2.open(str(found / f"{case}_seg.b2nd"), mode="r")[...], 0)[0]
        apart = float(np.abs(entry.image[...].astype(np.float32) - image).max() / image.std())
        source = np.asarray(nib.load(raw / f"labelsTr/{case}.nii.gz").dataobj)
        print(f"{case}: {entry.image.dtype} {entry.shape}")
        verdicts += judge_case(case, apart, _differing(entry, labels, source), labels.size)
    return verdicts


def judge_case(case: str, apart: float, differing: Sequence[bool], size: int) -> list[bool]:
    """Judge how far one case's images lie apart, and the labels that differ (whether it is a tie).

    NaN, as where an image holds one value, is short.
    """
    no_ties = len(differing) - sum(differing)
    return [
        judge(
            f"{case}: images at most {apart:.1e} standard deviations apart, {MAX_APART:g} allowed",
            is_met=apart <= MAX_APART,
        ),
        judge(
            f"{case}: {len(differing)} of {size} labels differ, {no_ties} of them without a tie",
            is_met=no_ties == 0,
        ),
    ]


def _differing(entry: Entry, theirs: NDArray[Any], source: NDArray[Any]) -> list[bool]:
    """Return for each label that differs whether it is a tie."""
    record = entry.record
    box = tuple(slice(low, high) for low, high in record.box)
    cropped = record.to_network_axes(source)[box]
    separate = separate_axis(record.spacing_cropped, record.spacing_network)
    ours = entry.segmentation[...]
    return [
        {int(ours[point]), int(theirs[point])} <= best_labels(cropped, ours.shape, point, separate)
        for point in map(tuple, np.argwhere(ours != theirs))
    ]


def best_labels(
    labels: NDArray[Any], shape: Sequence[int], point: Sequence[int], separate: int | None
) -> set[int]:
    """Return the labels with the largest share in a voxel of a resized label map.

    Shares are linear; along the axis `separate` the nearest slice counts alone, and where two are
    equally near, the best labels of both.

    Args:
        labels: (*spatial) label map before resizing.
        shape: Shape after resizing.
        point: Voxel of the resized map.
        separate: Axis that is resized on its own.
    """
    axes = [_neighbours(*lengths) for lengths in zip(point, labels.shape, shape, strict=True)]
    if separate is None:
        return _largest(labels, axes)
    nearest = max(axes[separate].values())
    slices = [index for index, share in axes[separate].items() if share > nearest - TIED]
    return set().union(
        *(_largest(labels, [*axes[:separate], {k: 1.0}, *axes[separate + 1 :]]) for k in slices)
    )


def _neighbours(place: int, length_in: int, length_out: int) -> dict[int, float]:
    """Return the two input voxels around an output voxel of an axis and their shares."""
    position = (place + 0.5) * length_in / length_out - 0.5
    position = min(max(position, 0.0), length_in - 1.0)
    low = min(math.floor(position), max(length_in - 2, 0))
    return {low + 1: position - low, low: 1 - position + low} if length_in > 1 else {0: 1.0}


def _largest(labels: NDArray[Any], axes: Sequence[dict[int, float]]) -> set[int]:
    shares: dict[int, float] = {}
    for corner in itertools.product(*axes):
        label = int(labels[corner])
        share = math.prod(axis[index] for axis, index in zip(axes, corner, strict=True))
        shares[label] = shares.get(label, 0.0) + share
    return {label for label, share in shares.items() if share > max(shares.values()) - TIED}


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
