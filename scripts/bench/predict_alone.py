"""What predict.py measures of medseg alone: first and later answers, imports, arithmetic."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from costs import measured
from numpy.typing import NDArray
from peer import MEDSEG, judge

MAX_COLD_SECONDS = 4.0
MAX_WARM_SECONDS = 0.3
MIN_AGREEMENT = 0.998
"""Mean Dice of the segmentations of two arithmetics."""
MAX_CHANGE = 0.001
"""Of the mean Dice against the reference."""
BANNED = ("SimpleITK", "matplotlib")
SHAPE = (40, 56, 40)
WARM_REPEATS = 9
Figures = dict[str, Any]
Labels = NDArray[np.integer[Any]]

IMPORTS = """
import json, sys
from medseg.cli.main import run
status = run(sys.argv[2:])
names = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
names = sorted(name for name in names if not name.startswith("_"))
open(sys.argv[1], "w").write(json.dumps(names))
sys.exit(status)
"""


def emptied(folder: Path) -> Path:
    """Make a folder that holds nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _small_image(options: argparse.Namespace, root: Path) -> Path:
    """Write the first training image, its edges repeated to 40x56x40, and return where."""
    case = next(iter(sorted((root / "images").iterdir())))
    image = nib.load(case)
    values = fitted(np.asarray(image.dataobj), SHAPE)
    path = root / "small/one_0000.nii.gz"
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(values, image.affine), path)
    return path


def fitted(values: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """Return an array cut at its end, or its last values repeated, to a shape."""
    cut = values[tuple(slice(0, length) for length in shape)]
    lacks = [(0, length - has) for length, has in zip(shape, cut.shape, strict=True)]
    return np.pad(cut, lacks, mode="edge")


def cold(options: argparse.Namespace, root: Path, model: Path) -> tuple[Figures, dict[str, bool]]:
    """Judge the first prediction of one image, by the command's defaults."""
    image, seconds = _small_image(options, root), []
    for _ in range(options.rounds):
        output = emptied(root / "predicted_one")
        command = [*MEDSEG, "predict", "-i", image, "-o", output, "-m", model, "--device", "cpu"]
        seconds.append(measured(command, log=root / "cold.log").seconds)
    return {"seconds": seconds}, judge_cold(seconds)


def judge_cold(seconds: Sequence[float]) -> dict[str, bool]:
    """Judge the median of cold starts."""
    median = statistics.median(seconds)
    said = f"one 40x56x40 image from a cold start {median:.2f} s, less than {MAX_COLD_SECONDS:g} s"
    return {"cold start": judge(f"{said} wanted", is_met=median < MAX_COLD_SECONDS)}


def warm(options: argparse.Namespace, root: Path, model: Path) -> tuple[Figures, dict[str, bool]]:
    """Judge how soon a loaded model answers, without mirroring; the first answers do not count."""
    import medseg

    image = nib.load(_small_image(options, root))
    case = (np.asarray(image.dataobj), image.affine)
    loaded, seconds = medseg.load(model, device="cpu"), []
    for _ in range(2 + WARM_REPEATS):
        start = time.perf_counter()
        loaded.predict(case, tta="none")
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}, judge_warm(seconds[2:])


def judge_warm(seconds: Sequence[float]) -> dict[str, bool]:
    """Judge the median answer of a loaded model."""
    median = statistics.median(seconds)
    said = f"a loaded model's answer {median:.3f} s, less than {MAX_WARM_SECONDS:g} s wanted"
    return {"loaded model": judge(said, is_met=median < MAX_WARM_SECONDS)}


def imports(
    options: argparse.Namespace, root: Path, model: Path
) -> tuple[Figures, dict[str, bool]]:
    """Judge what predicting a NIfTI file imports."""
    output, told = emptied(root / "predicted_one"), root / "imports.json"
    command = [sys.executable, "-c", IMPORTS, told, "predict", "-i", _small_image(options, root)]
    command += ["-o", output, "-m", model, "--device", "cpu"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    names = json.loads(told.read_text())
    print(f"predicting a NIfTI file imports {', '.join(names)}")
    return {"modules": names}, judge_imports(names)


def judge_imports(names: Sequence[str]) -> dict[str, bool]:
    """Judge that nothing heavy is imported that the format does not need."""
    found = [name for name in BANNED if name in names]
    said = f"predicting a NIfTI file imports {' and '.join(found) or 'none'} of {', '.join(BANNED)}"
    return {"imports": judge(said, is_met=not found)}


def accuracy(run: Path, dataset: Path, images: dict[str, Path]) -> tuple[Figures, dict[str, bool]]:
    """Judge how the default arithmetic and float32 agree, without mirroring.

    Args:
        run: The model.
        dataset: Folder of the images.
        images: Case -> its label file.
    """
    import torch

    import medseg
    from medseg.models.precision import autocast_dtype

    arithmetic = str(autocast_dtype(torch.device("cpu"), "auto") or torch.float32)
    found: dict[str, dict[str, Labels]] = {}
    for mode in ("default", "exact"):
        model = medseg.load(run, device="cpu", mode=mode)
        paths = {case: dataset / "imagesTr" / f"{case}.nii.gz" for case in images}
        found[mode] = {c: model.predict(path, tta="none").segmentation for c, path in paths.items()}
    references = {case: np.asarray(nib.load(path).dataobj) for case, path in images.items()}
    between = [case_dice(found["default"][case], found["exact"][case]) for case in images]
    against = {
        mode: statistics.mean(case_dice(rows[case], references[case]) for case in images)
        for mode, rows in found.items()
    }
    print(f"default arithmetic: {arithmetic}; worst case {min(between):.5f} to float32")
    figures = {"arithmetic": arithmetic, "between": between, "against_reference": against}
    if arithmetic == str(torch.float32):
        print("not judged: what bf16 changes (this processor is not asked to compute in it)")
        return figures, {}
    return figures, judge_accuracy(between, against["default"], against["exact"])


def judge_accuracy(between: Sequence[float], default: float, exact: float) -> dict[str, bool]:
    """Judge the mean Dice of two arithmetics with each other and the change to the reference."""
    mean, change = statistics.mean(between), abs(default - exact)
    return {
        "agreement": judge(
            f"mean Dice of the default arithmetic and float32 {mean:.5f} over {len(between)} "
            f"cases, at least {MIN_AGREEMENT} wanted",
            is_met=mean >= MIN_AGREEMENT,
        ),
        "accuracy": judge(
            f"mean Dice to the reference {default:.5f} and {exact:.5f}, a change of {change:.5f}, "
            f"at most {MAX_CHANGE:g} wanted",
            is_met=change <= MAX_CHANGE,
        ),
    }


def mean_dice(references: dict[str, Path], folder: Path) -> float:
    """Return the mean over cases of each one's Dice, of the files in a folder."""
    return statistics.mean(
        case_dice(
            np.asarray(nib.load(folder / f"{case}.nii.gz").dataobj),
            np.asarray(nib.load(path).dataobj),
        )
        for case, path in references.items()
    )


def case_dice(one: Labels, other: Labels) -> float:
    """Return the mean Dice over the labels of either; 1 where neither has any.

    >>> case_dice(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]))
    0.6666666666666666
    """
    labels = [label for label in np.union1d(one, other) if label]
    dice = [
        2.0
        * float(((one == label) & (other == label)).sum())
        / float((one == label).sum() + (other == label).sum())
        for label in labels
    ]
    return statistics.mean(dice) if dice else 1.0
