#!/usr/bin/env python3
"""Export logits of many classes against nnU-Net, and predict a large image in little memory.

    python scripts/bench/export.py --peer-python PY [--classes 60,20] [--network 128,128,128]
        [--image 192,256,256] [--rounds 3] [--threads 2] [--work DIR] [--output FILE]
    python scripts/bench/export.py [--size 512] [--patch 128] [--large-classes 118] [--budget 4GB]

Export (--only export for it alone): the same float32 logits, one smooth random field for each
class, are brought from the network's grid to the image's and become labels: by medseg's
`segmentation_from_logits` and by nnU-Net's
`convert_predicted_logits_to_segmentation_with_correct_shape` (nnunet_predict.py), in turn, each in
a process of its own on the same --threads cores. Timed is the one call, logits in memory to labels
in memory, after a small one; memory is its peak above what the process held with the logits in it.
Labels of both are compared: they may differ where two classes are as good as equal.

Large image (--only large): a synthetic CT of --size^3 voxels of 1 mm (a body with organs and bones
in air; .nii.gz), a bundle with a plan of 1.5 mm, --patch^3, 118 classes, 8 base features and random
weights, `medseg predict --max-memory 4GB --tta none` in a process of its own. Memory is the peak
resident memory of the whole process, by the kernel. Shape, affine and labels of the output are
looked at.

Each limit is judged on a line that begins with "met" or "short"; exit status 0 if all are met, 1 if
not. Speed and memory of the export are judged for 60 classes, others printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from costs import Spent, alone, bind, keep, measured
from numpy.typing import NDArray
from peer import MEDSEG, judge
from predict_alone import emptied

JUDGED_CLASSES = 60
MIN_SPEED = 8.0
"""How many times faster than nnU-Net."""
MAX_EXPORT_BYTES = 0.6e9
"""Above the input."""
MIN_SAME = 0.9999
"""Share of voxels with the same label on both sides."""
MIN_LABELS = 3
"""Different values in the large image's segmentation."""
SPACING = 1.5
"""Of the large image's plan, in mm; the image has 1 mm."""
FEATURES, MAX_FEATURES = 8, 320
CONFIGURATION = "3d_fullres"
Figures = dict[str, Any]


def main() -> int:
    """Measure, print and judge; with a task, export once (as a process of its own)."""
    if sys.argv[1:2] == ["--task"]:
        return export_once(Path(sys.argv[2]))
    options = _options()
    bind(options.threads)
    root = options.work or Path(tempfile.mkdtemp(prefix="medseg-bench-"))
    root.mkdir(parents=True, exist_ok=True)
    figures: Figures = {}
    verdicts: dict[str, bool] = {}
    if options.only != "large" and options.peer_python is None:
        print("not judged without --peer-python: export", flush=True)
    elif options.only != "large":
        for num_classes in options.classes:
            figures[f"{num_classes} classes"], found = _compare(options, root, num_classes)
            verdicts |= found
    if options.only != "export":
        figures["large"], found = _large(options, root)
        verdicts |= found
    return keep(options.output, figures, verdicts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--only", choices=("export", "large"))
    parser.add_argument("--work", type=Path, help="Kept; needs 3 GB.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="Cores of each side.")
    parser.add_argument("--classes", type=_numbers, default=(60, 20))
    parser.add_argument("--network", type=_numbers, default=(128, 128, 128), help="Shape.")
    parser.add_argument("--image", type=_numbers, default=(192, 256, 256), help="Shape.")
    parser.add_argument("--size", type=int, default=512, help="Edge of the large image.")
    parser.add_argument("--patch", type=int, default=128, help="Edge of its patch.")
    parser.add_argument("--large-classes", type=int, default=118, help="Background included.")
    parser.add_argument("--budget", default="4GB", help="--max-memory of the large image.")
    parser.add_argument("--output", type=Path, help="Where the figures are written, as JSON.")
    return parser.parse_args()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _compare(
    options: argparse.Namespace, root: Path, num_classes: int
) -> tuple[Figures, dict[str, bool]]:
    """Let both sides export the same logits in turn."""
    logits = root / "logits.npy"
    write_logits(logits, num_classes, options.network)
    here = Path(__file__)
    sides: dict[str, list[str | Path]] = {
        "medseg": [sys.executable, here, "--task"],
        "nnU-Net": [options.peer_python, here.with_name("nnunet_predict.py"), "export"],
    }
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(options.rounds):
        for side, command in sides.items():
            task = root / f"{side}.json"
            task.write_text(json.dumps(_task(options, root, side, num_classes)))
            measured([*command, task], log=root / f"{side}.log")
            rows[side].append(json.loads((root / f"{side}_figures.json").read_text()))
            print(f"{num_classes} classes, round {number + 1}, {side}: {_row(rows[side][-1])}",
                  flush=True)  # fmt: skip
    one, other = (np.load(root / f"{side}_labels.npy") for side in sides)
    logits.unlink()
    same = float((one == other).mean())
    print(f"{num_classes} classes: {len(np.unique(one))} of them are found")
    verdicts = judge_export(num_classes, rows["medseg"], rows["nnU-Net"], same)
    return {"runs": rows, "same_labels": same}, verdicts


def _task(options: argparse.Namespace, root: Path, side: str, num_classes: int) -> dict[str, Any]:
    """Return what an export is asked for; the image has voxels of 1 mm."""
    pairs = zip(options.image, options.network, strict=True)
    return {
        "logits": str(root / "logits.npy"),
        "segmentation": str(root / f"{side}_labels.npy"),
        "figures": str(root / f"{side}_figures.json"),
        "threads": options.threads,
        "num_logits": num_classes,
        "shape_image": options.image,
        "spacing_image": [1.0, 1.0, 1.0],
        "spacing_network": [image / network for image, network in pairs],
    }


def _row(found: dict[str, float]) -> str:
    return f"{found['seconds']:.2f} s, {found['peak_bytes'] / 1e9:.2f} GB above the input"


def write_logits(path: Path, num_classes: int, shape: Sequence[int]) -> None:
    """Write (L, *shape) float32 logits, a smooth random field for each class."""
    rng = np.random.default_rng(11)
    logits = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float32, shape=(num_classes, *shape)
    )
    for channel in logits:
        channel[...] = 3 * smooth(rng, shape)
    logits.flush()


def smooth(
    rng: np.random.Generator, shape: Sequence[int], *, wide: int = 12
) -> NDArray[np.float32]:
    """Return a smooth random field of unit variance.

    Args:
        rng: Where it is drawn from.
        shape: Its shape.
        wide: How far apart the random values lie that it runs between, in voxels.
    """
    field = rng.standard_normal([max(4, length // wide) for length in shape]).astype(np.float32)
    for axis, length in enumerate(shape):
        few = field.shape[axis]
        places = (np.arange(length) + 0.5) * few / length - 0.5
        shares = np.exp(-0.5 * ((places[:, None] - np.arange(few)) / 0.7) ** 2).astype(np.float32)
        field = np.moveaxis(np.tensordot(shares, field, (1, axis)), 0, axis)
    return np.ascontiguousarray(field / field.std())


def export_once(file: Path) -> int:
    """Export the logits of a task by medseg, after a small export that is not timed."""
    import torch

    task = json.loads(file.read_text())
    torch.set_num_threads(task["threads"])
    small = torch.zeros((task["num_logits"], *[8] * 3))
    _exported(small, {**task, "shape_image": [9] * 3})
    logits = torch.from_numpy(np.load(task["logits"]))
    segmentation, found = alone(lambda: _exported(logits, task))
    np.save(task["segmentation"], segmentation)
    Path(task["figures"]).write_text(json.dumps(found))
    return 0


def _exported(logits: Any, task: dict[str, Any]) -> NDArray[Any]:
    """Return medseg's label map of logits."""
    from medseg.geometry import SpatialRecord
    from medseg.infer.export import segmentation_from_logits
    from medseg.labels import LabelScheme

    first, second, third = task["shape_image"]
    record = SpatialRecord(
        shape_image=(first, second, third),
        affine_image=tuple(map(tuple, np.eye(4).tolist())),
        axes=(0, 1, 2),
        flips=(False, False, False),
        box=((0, first), (0, second), (0, third)),
        spacing_cropped=tuple(task["spacing_image"]),
        shape_network=tuple(logits.shape[1:]),
        spacing_network=tuple(task["spacing_network"]),
    )
    return segmentation_from_logits(logits, record, LabelScheme(labels=label_names(len(logits))))


def label_names(num_classes: int) -> dict[str, int]:
    """Return a background and as many labels as it takes.

    >>> label_names(3)
    {'background': 0, 'label_1': 1, 'label_2': 2}
    """
    return {"background": 0, **{f"label_{number}": number for number in range(1, num_classes)}}


def judge_export(
    num_classes: int,
    ours: Sequence[dict[str, float]],
    theirs: Sequence[dict[str, float]],
    same: float,
) -> dict[str, bool]:
    """Judge time (medians) and memory (largest) of exports, and whether labels agree."""
    fast, slow = (statistics.median(run["seconds"] for run in runs) for runs in (ours, theirs))
    small, large = (max(run["peak_bytes"] for run in runs) for runs in (ours, theirs))
    name = f"{num_classes} classes"
    said = f"{name}: {same:.6f} of the labels are the same, at least {MIN_SAME} wanted"
    verdicts = {f"{name}: labels": judge(said, is_met=same >= MIN_SAME)}
    speed = f"{name}: {fast:.2f} against {slow:.2f} s, {slow / fast:.1f} times faster"
    memory = f"{name}: {small / 1e9:.3f} against {large / 1e9:.3f} GB above the input"
    if num_classes != JUDGED_CLASSES:
        print(f"not judged: {speed}\nnot judged: {memory}", flush=True)
        return verdicts
    return {
        **verdicts,
        f"{name}: speed": judge(
            f"{speed}, at least {MIN_SPEED:g} wanted", is_met=slow / fast >= MIN_SPEED
        ),
        f"{name}: memory": judge(
            f"{memory}, at most {MAX_EXPORT_BYTES / 1e9:g} wanted", is_met=small <= MAX_EXPORT_BYTES
        ),
    }


def _large(options: argparse.Namespace, root: Path) -> tuple[Figures, dict[str, bool]]:
    """Predict the large image by the command, and look at what came."""
    image = root / "large" / f"body{options.size}_0000.nii.gz"
    if not image.is_file():
        image.parent.mkdir(exist_ok=True)
        nib.save(make_body(options.size), image)
    bundle = root / "large_bundle"
    write_random_bundle(bundle, patch=options.patch, num_classes=options.large_classes)
    output, log = emptied(root / "large_predicted"), root / "large.log"
    command = [*MEDSEG, "predict", "-i", image, "-o", output, "-m", bundle, "--device", "cpu"]
    spent = measured([*command, "--tta", "none", "--max-memory", options.budget], log=log)
    print(log.read_text(errors="replace"), flush=True)
    told, found = nib.load(image), nib.load(output / f"body{options.size}.nii.gz")
    labels = np.unique(np.asarray(found.dataobj))
    verdicts = judge_large(spent, bytes_of(options.budget), len(labels))
    is_same = found.shape == told.shape and np.array_equal(found.affine, told.affine)
    verdicts["large image: grid"] = judge(
        f"large image: shape {found.shape}, affine as in the image", is_met=is_same
    )
    return {"spent": asdict(spent), "labels": len(labels)}, verdicts


def bytes_of(size: str) -> float:
    """Return a size in bytes.

    >>> bytes_of("4GB"), bytes_of("800MB")
    (4000000000.0, 800000000.0)
    """
    return float(size[:-2]) * {"GB": 1e9, "MB": 1e6}[size[-2:]]


def judge_large(spent: Spent, limit: float, num_labels: int) -> dict[str, bool]:
    """Judge the peak resident memory of a prediction, and that it found several labels."""
    peak = spent.memory_bytes
    return {
        "large image: memory": judge(
            f"large image: {spent.seconds:.1f} s, peak resident memory {peak / 1e9:.2f} GB, at "
            f"most {limit / 1e9:g} GB wanted",
            is_met=peak <= limit,
        ),
        "large image: labels": judge(
            f"large image: {num_labels} different labels, at least {MIN_LABELS} wanted",
            is_met=num_labels >= MIN_LABELS,
        ),
    }


def make_body(size: int) -> nib.Nifti1Image:
    """Return a synthetic CT: a body with organs and bones in air, int16, voxels of 1 mm."""
    rng = np.random.default_rng(3)
    organs = smooth(rng, (size,) * 3, wide=40)
    bones = smooth(rng, (size,) * 3, wide=25)
    values = np.empty((size,) * 3, np.int16)
    places = np.linspace(-1, 1, size, dtype=np.float32)
    across = (places[:, None] / 0.6) ** 2 + (places[None, :] / 0.95) ** 2
    for number, place in enumerate(places):
        tissue = np.where(bones[number] > 1.5, 700, 40 + 60 * organs[number])
        row = np.where(across + (place / 0.8) ** 2 < 1, tissue, -1000)
        values[number] = row + 10 * rng.standard_normal(row.shape, np.float32)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[:3, 3] = (size / 2, size / 3, -217.5)
    return nib.Nifti1Image(values, affine)


def write_random_bundle(folder: Path, *, patch: int, num_classes: int) -> None:
    """Write a bundle with random weights, always the same ones."""
    import torch

    from medseg.bundles.bundle import write_bundle
    from medseg.models.build import build_network
    from medseg.schema.bundle import Semantics
    from medseg.schema.dataset import DatasetSpec

    plans = make_plans(patch)
    network = build_network(
        plans.configuration(CONFIGURATION).architecture,
        num_inputs=1,
        num_logits=num_classes,
        generator=torch.Generator().manual_seed(5),
    )
    write_bundle(
        folder,
        spec=DatasetSpec(
            name="Dataset009_Large", channels=("CT",), labels=label_names(num_classes)
        ),
        plans=plans,
        configuration=CONFIGURATION,
        weights={"fold_0": {"final": network.state_dict()}},
        semantics=Semantics(mirror_axes=(0, 1, 2)),
    )


def make_plans(patch: int) -> Any:
    """Return plans of 1.5 mm for a patch."""
    from medseg.plan.topology import network_topology
    from medseg.schema.fingerprint import IntensityStatistics
    from medseg.schema.plans import Architecture, Configuration, Plans

    topology = network_topology((SPACING,) * 3, (patch,) * 3)
    stages = len(topology.strides)
    architecture = Architecture(
        kind="plain_unet",
        features=tuple(min(MAX_FEATURES, FEATURES * 2**stage) for stage in range(stages)),
        kernel_sizes=topology.kernel_sizes,
        strides=topology.strides,
        blocks_encoder=(2,) * stages,
        blocks_decoder=(2,) * (stages - 1),
    )
    configuration = Configuration(
        patch_size=(patch,) * 3,
        batch_size=2,
        spacing=(SPACING,) * 3,
        median_shape=(float(2 * patch),) * 3,
        normalization=("ct",),
        use_mask_for_norm=(False,),
        batch_dice=False,
        architecture=architecture,
    )
    statistics_ct = IntensityStatistics(
        mean=60.0, std=140.0, median=45.0, min=-1020.0, max=740.0,
        percentile_00_5=-120.0, percentile_99_5=710.0,
    )  # fmt: skip
    return Plans(
        name="large",
        dataset="Dataset009_Large",
        network_axes=(2, 1, 0),
        original_median_spacing=(1.0, 1.0, 1.0),
        original_median_shape=(float(3 * patch),) * 3,
        intensity=(statistics_ct,),
        configurations={CONFIGURATION: configuration},
    )


if __name__ == "__main__":
    sys.exit(main())
