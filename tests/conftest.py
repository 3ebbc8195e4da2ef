"""Small datasets on disk, on grids that betray a mixed-up axis."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from medseg.io.write import write_nifti

LABELS = {"background": 0, "organ": 1, "lesion": 2}


def oblique_affine(spacing=(0.9, 1.1, 1.9), degrees=(17.0, -11.0)):
    """Return an anisotropic affine, rotated about two axes, far from the origin."""
    a, b = np.deg2rad(degrees)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag(spacing)
    affine[:3, 3] = (-31.5, 12.25, 80.0)
    return affine


def make_case(seed, shape=(20, 24, 16), num_channels=2):
    """Return channels (C, I, J, K) and labels: an ellipsoid off centre with a lesion in it."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.arange(length) for length in shape), indexing="ij")
    center = np.array(shape) * (0.45, 0.6, 0.5) + rng.uniform(-1, 1, 3)
    radii = np.array(shape) * (0.3, 0.28, 0.33)
    distance = np.sqrt(sum(((axes[d] - center[d]) / radii[d]) ** 2 for d in range(3)))
    labels = (distance < 1).astype(np.uint8)
    labels[(distance < 0.6) & (axes[2] > center[2])] = 2
    channels = rng.normal(100, 8, size=(num_channels, *shape)).astype(np.float32)
    channels[0] += 60 * (labels > 0)
    channels[-1] += 80 * (labels == 2)
    return channels, labels


def write_dataset(
    folder,
    *,
    num_cases=6,
    channels=("T1w", "FLAIR"),
    labels=None,
    description=None,
    relabel=None,
    shape=(20, 24, 16),
):
    """Write an nnU-Net raw dataset; every case has its own size and spacing.

    Args:
        folder: Folder of the dataset.
        num_cases: Cases case_1, case_2 ...
        channels: Names.
        labels: Entry of `dataset.json`.
        description: Further entries of `dataset.json`.
        relabel: Function of (case number, label map) that changes the label map.
        shape: Size of the first case in voxels.
    """
    folder = Path(folder)
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for number in range(1, num_cases + 1):
        size = (shape[0] + number % 2, shape[1] - number % 3, shape[2])
        images, segmentation = make_case(number, size, len(channels))
        affine = oblique_affine((0.9, 1.1 + 0.02 * number, 1.9))
        if relabel is not None:
            segmentation = relabel(number, segmentation)
        for index, image in enumerate(images):
            write_nifti(folder / f"imagesTr/case_{number}_{index:04d}.nii.gz", image, affine)
        write_nifti(folder / f"labelsTr/case_{number}.nii.gz", segmentation, affine)
    values = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": LABELS if labels is None else labels,
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
        **(description or {}),
    }
    (folder / "dataset.json").write_text(json.dumps(values))
    return folder


class Datasets:
    """The functions above, within reach of every test."""

    write = staticmethod(write_dataset)
    case = staticmethod(make_case)
    affine = staticmethod(oblique_affine)

    @staticmethod
    def files(folder):
        """Return every file and folder below a folder, with the content of the files."""
        paths = sorted(Path(folder).rglob("*")) if Path(folder).exists() else []
        return {
            path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
            for path in paths
        }


@pytest.fixture(scope="session")
def datasets():
    return Datasets


@contextmanager
def _few_samples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medseg.plan.fingerprint.NUM_SAMPLES", 100_000)
        yield


@pytest.fixture(scope="session")
def few_samples():
    """A context that draws fewer intensities for a fingerprint than the default 100 million."""
    return _few_samples


@pytest.fixture(scope="session")
def one_thread():
    """Compute with one thread: the same numbers everywhere, and quicker for tiny networks."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
