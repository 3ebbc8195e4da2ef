"""The demo data set: simulated brain examinations in the nnU-Net raw layout."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from medseg.io.write import write_nifti
from medseg.mr.phantom import CHANNELS, LABELS, SCANS, Examination, simulate
from medseg.schema.base import write_json

DATASET_NAME = "Dataset001_DemoBrain"
"""Folder of the demo data set."""

NUM_THREADS = 2
"""Cases simulated at a time; the voxels do not depend on it."""


def write_demo_dataset(
    folder: Path | str, *, num_train: int = 18, num_test: int = 5, seed: int = 0
) -> Path:
    """Write simulated brain examinations with labels; the same seed gives the same voxels.

    Training and test cases both go through all ways of scanning: isotropic, thick slices along
    each direction, oblique. Every file has its grid in one of the 48 storage orders.

    Args:
        folder: Folder the data set's folder is written into; made when missing.
        num_train: Cases in `imagesTr` and `labelsTr`.
        num_test: Cases in `imagesTs` and `labelsTs`.
        seed: Seed of everything random.

    Returns:
        Folder of the data set, `FOLDER/Dataset001_DemoBrain`.

    Raises:
        ValueError: If a number of cases is negative or there is no training case.
    """
    if num_train < 1 or num_test < 0:
        raise ValueError(
            f"num_train must be at least 1 and num_test at least 0, got {num_train} and {num_test}"
        )
    dataset = Path(folder) / DATASET_NAME
    scans = list(SCANS)

    def write(number: int) -> None:
        part, position = ("Tr", number) if number < num_train else ("Ts", number - num_train)
        rng = np.random.default_rng((seed, number))
        examination = simulate(rng, scan=scans[position % len(scans)])
        _write_case(dataset, f"brain_{number + 1:03d}", part, examination)

    with ThreadPoolExecutor(max_workers=NUM_THREADS) as pool:
        list(pool.map(write, range(num_train + num_test)))
    write_json(dataset / "dataset.json", _description(num_train))
    return dataset


def _write_case(dataset: Path, case: str, part: str, examination: Examination) -> None:
    images, labels = dataset / f"images{part}", dataset / f"labels{part}"
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    affine = examination.affine
    for channel, image in enumerate(examination.images):
        path = images / f"{case}_{channel:04d}.nii.gz"
        write_nifti(path, image.astype(np.int16), affine)
    write_nifti(labels / f"{case}.nii.gz", examination.segmentation, affine)


def _description(num_train: int) -> dict[str, object]:
    return {
        "name": "DemoBrain",
        "description": "Simulated brains with multiple-sclerosis lesions (medseg.mr.phantom)",
        "channel_names": {str(number): name for number, name in enumerate(CHANNELS)},
        "labels": LABELS,
        "numTraining": num_train,
        "file_ending": ".nii.gz",
    }
