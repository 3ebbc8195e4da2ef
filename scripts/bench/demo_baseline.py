"""How far single voxels get on the demo data: the lower bar a network has to clear.

Trains a multinomial logistic regression on the z-scored channels of the training voxels and
prints the Dice on the test cases.

    python scripts/bench/demo_baseline.py FOLDER/Dataset001_DemoBrain
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from medseg.io.read import read_channels, read_segmentation


def load_case(dataset: Path, part: str, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Return z-scored channels (voxels, C) and labels (voxels,) of one case."""
    paths = sorted((dataset / f"images{part}").glob(f"{case}_????.nii.gz"))
    channels = read_channels(paths).array.reshape(len(paths), -1)
    channels = (channels - channels.mean(1, keepdims=True)) / channels.std(1, keepdims=True)
    segmentation = read_segmentation(dataset / f"labels{part}" / f"{case}.nii.gz").array
    return channels.T, segmentation.ravel()


def dice(predicted: np.ndarray, reference: np.ndarray, label: int) -> float:
    """Return the Dice of one label; nan where both are empty."""
    first, second = predicted == label, reference == label
    total = int(first.sum()) + int(second.sum())
    return 2 * int((first & second).sum()) / total if total else float("nan")


def main() -> None:
    """Train on imagesTr, score on imagesTs, print one line per label and the mean."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path, help="folder with imagesTr, labelsTr, imagesTs")
    parser.add_argument("--voxels", type=int, default=10_000, help="training voxels per case")
    arguments = parser.parse_args()
    labels = json.loads((arguments.dataset / "dataset.json").read_text())["labels"]
    cases = {
        part: sorted(
            path.name.removesuffix(".nii.gz")
            for path in (arguments.dataset / f"labels{part}").glob("*.nii.gz")
        )
        for part in ("Tr", "Ts")
    }
    rng = np.random.default_rng(0)
    features, targets = [], []
    for case in cases["Tr"]:
        voxels, segmentation = load_case(arguments.dataset, "Tr", case)
        chosen = rng.choice(len(voxels), min(arguments.voxels, len(voxels)), replace=False)
        features.append(voxels[chosen])
        targets.append(segmentation[chosen])
    model = LogisticRegression(max_iter=500)
    model.fit(np.concatenate(features), np.concatenate(targets))
    scores = []
    for case in cases["Ts"]:
        voxels, segmentation = load_case(arguments.dataset, "Ts", case)
        predicted = model.predict(voxels)
        scores.append([dice(predicted, segmentation, value) for value in labels.values() if value])
    names = [name for name, value in labels.items() if value]
    per_label = np.nanmean(scores, axis=0)
    for name, score in zip(names, per_label, strict=True):
        print(f"{name:12s} {score:.3f}")
    print(f"{'mean':12s} {per_label.mean():.3f}  ({len(scores)} test cases)")


if __name__ == "__main__":
    main()
