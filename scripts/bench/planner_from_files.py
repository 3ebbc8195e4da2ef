#!/usr/bin/env python3
"""Take the fingerprint of image files and plan, here and with nnU-Net, and compare the plans.

    python scripts/bench/planner_from_files.py --peer-python PYTHON [DATASET...]

DATASET is a folder of raw data in NIfTI, such as Task04_Hippocampus. Besides, three data sets with
thick slices are made up, axial, sagittal and coronal, each case stored in another orientation, some
oblique. nnU-Net reads with its NibabelIOWithReorient, whose frame is medseg's: its axes z, y, x are
K, J, I. Compared are the intensity statistics, axis order, and all configurations of all planners;
numbers agree to 1e-5 relatively (headers hold voxel sizes in single precision).

As in planner_parity.py, channel names are read as nnU-Net reads them; medseg's own rule for
parameter maps, which every command uses, plans too and may differ in the normalisation of those.

Prints each difference, what the own rule changes, then `equal N of M`. Exit status 0 if all are and
the own rule changes nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from planner_parity import (
    PRESETS,
    as_reference,
    by_own_rule,
    differences,
    own_rule_in_words,
    planned_by_peer,
)

from medseg.api import prepare
from medseg.data.dataset import read_dataset
from medseg.data.workspace import Workspace
from medseg.plan.planner import make_plans
from medseg.schema.dataset import DatasetSpec
from medseg.schema.plans import Plans

TOLERANCE = 1e-5
THICK: dict[str, tuple[tuple[int, int, int], tuple[float, float, float], list[str]]] = {
    "axial": ((150, 130, 22), (0.8, 0.9, 5.0), ["CT"]),
    "sagittal": ((18, 160, 140), (4.4, 0.7, 0.6), ["T2w", "ADC"]),
    "coronal": ((120, 16, 170), (0.9, 6.0, 0.9), ["CT", "noNorm"]),
}
"""Kind -> shape and spacing of a middle case on canonical axes (I, J, K), channels."""
REGIONS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}


def make_dataset(folder: Path, kind: str, *, num_cases: int = 7, seed: int = 5) -> Path:
    """Write a data set of thick slices in nnU-Net's raw layout."""
    shape, spacing, channels = THICK[kind]
    rng = np.random.default_rng([seed, *kind.encode()])
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(num_cases):
        size = [max(int(v * rng.uniform(0.85, 1.2)), 6) for v in shape]
        voxels = np.round(np.array(spacing) * rng.uniform(0.8, 1.25, 3), 3)
        affine = _oblique(rng.uniform(-9, 9) if number % 2 else 0.0) @ np.diag([*voxels, 1])
        affine[:3, 3] = rng.normal(0, 60, 3)
        target = nib.orientations.axcodes2ornt(_orientation(rng))
        segmentation = _segmentation(rng, size, kind)
        for index, _ in enumerate(channels):
            image = _image(rng, segmentation)
            name = folder / "imagesTr" / f"case{number}_{index:04d}.nii.gz"
            nib.save(nib.Nifti1Image(image, affine).as_reoriented(target), name)
        name = folder / "labelsTr" / f"case{number}.nii.gz"
        nib.save(nib.Nifti1Image(segmentation, affine).as_reoriented(target), name)
    dataset = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
    }
    if kind == "coronal":
        dataset |= {"labels": REGIONS, "regions_class_order": [1, 2]}
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


def _oblique(degrees: float) -> np.ndarray:
    turn = np.deg2rad(degrees)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    return matrix


def _orientation(rng: np.random.Generator) -> str:
    """Return the directions of the stored axes, one of all 48."""
    return "".join(str(rng.choice(list(("LR", "PA", "IS")[axis]))) for axis in rng.permutation(3))


def _segmentation(rng: np.random.Generator, shape: list[int], kind: str) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    low, high = ([int(share * v) for v in shape] for share in (0.3, 0.65))
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    labels[box] = rng.integers(0, 4 if kind == "coronal" else 3, labels[box].shape)
    return labels


def _image(rng: np.random.Generator, segmentation: np.ndarray) -> np.ndarray:
    """Return an image with a margin of zeros on some sides, so that it is cropped."""
    image = rng.normal(40 + 60 * segmentation, 35).astype(np.int16) + np.int16(1)
    for axis in range(3):
        margin = np.moveaxis(image, axis, 0)
        margin[: int(rng.integers(0, 0.15 * len(margin) + 2))] = 0
    return image


def job(spec: DatasetSpec) -> dict[str, Any]:
    """Return what nnU-Net needs to plan from the same files."""
    names = "channel_names"
    dataset: dict[str, Any] = {
        names: {str(index): name for index, name in enumerate(spec.channels)},
        "labels": spec.labels,
        "numTraining": len(spec.cases),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
        "dataset": {
            case_id: {
                "images": [str(Path(spec.source) / name) for name in case.channels],
                "label": str(Path(spec.source) / str(case.segmentation)),
            }
            for case_id, case in spec.cases.items()
        },
    }
    if spec.ignore_label is not None:
        dataset["labels"] = {**dataset["labels"], "ignore": spec.ignore_label}
    if spec.regions_class_order is not None:
        dataset["regions_class_order"] = spec.regions_class_order
    return {"dataset": dataset, "files": True, "planners": list(PRESETS)}


def plan_here(raw: Path, workspace: Path) -> dict[bool, dict[str, Plans]]:
    """Return whether by the own rule for parameter maps -> planner -> plans, from the files."""
    measured = prepare.fingerprint(raw, workspace=workspace)
    spec = Workspace(workspace).find(raw)[0].spec()
    return {
        own: {
            planner: make_plans(measured, spec, name=preset, quantitative=own)
            for planner, preset in PRESETS.items()
        }
        for own in (False, True)
    }


def compare(expected: dict[str, dict[str, Any]], plans: dict[str, Plans]) -> Iterator[str]:
    """Yield every difference between nnU-Net's plans and ours, of all planners."""
    for planner, reference in expected.items():
        for difference in _compare(reference, plans[planner]):
            yield f"{planner}: {difference}"


def _compare(expected: dict[str, Any], plans: Plans) -> Iterator[str]:
    found = as_reference(plans)
    found["intensity"] = [item.model_dump() for item in plans.intensity]
    yield from differences(expected, found, tolerance=TOLERANCE)


def main(arguments: list[str]) -> int:
    """Plan every data set on both sides and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("datasets", nargs="*", type=Path, metavar="DATASET")
    parser.add_argument("--peer-python", required=True, metavar="PYTHON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sources = [make_dataset(root / "raw" / kind, kind) for kind in THICK]
        sources += options.datasets
        start = time.perf_counter()
        ours = [plan_here(source, root / "work") for source in sources]
        middle = time.perf_counter()
        specs = [read_dataset(source) for source in sources]
        theirs = planned_by_peer(map(job, specs), options.peer_python)
        print(f"{middle - start:.1f} s here, {time.perf_counter() - middle:.1f} s with nnU-Net")
    num_equal, num_others = 0, 0
    changed = []
    for source, spec, plans, result in zip(sources, specs, ours, theirs, strict=True):
        lines = list(compare(result["plans"], plans[False]))
        maps, others = by_own_rule(compare(result["plans"], plans[True]), spec.channels)
        others = [line for line in others if line not in lines]
        shown = plans[False]["ExperimentPlanner"]
        print(
            f"{source.name}: network axes {shown.network_axes}, {', '.join(shown.configurations)}"
        )
        for line in (*lines, *(f"with the shipped rule: {line}" for line in others)):
            print(f"{source.name}: {line}")
        changed.append(maps)
        num_equal += not lines
        num_others += len(others)
    if not num_others:
        print(own_rule_in_words(changed))
    print(f"equal {num_equal} of {len(sources)}")
    return 0 if num_equal == len(sources) and not num_others else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
