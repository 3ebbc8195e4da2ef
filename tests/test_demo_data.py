"""The demo data set as files."""

import json

import numpy as np
import pytest

from medseg.demo import DATASET_NAME, write_demo_dataset
from medseg.io.read import read_channels, read_segmentation
from medseg.mr.phantom import CHANNELS, LABELS, simulate


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Return a data set of one training case and one test case."""
    return write_demo_dataset(tmp_path_factory.mktemp("demo"), num_train=1, num_test=1, seed=7)


def test_layout_is_the_raw_layout_of_nnunet(dataset):
    """Every case has one file per channel and a label map; dataset.json describes them."""
    assert dataset.name == DATASET_NAME
    found = sorted(str(path.relative_to(dataset)) for path in dataset.rglob("*.*"))
    expected = ["dataset.json"]
    for part, case in (("Tr", "brain_001"), ("Ts", "brain_002")):
        expected += [f"images{part}/{case}_{n:04d}.nii.gz" for n in range(len(CHANNELS))]
        expected.append(f"labels{part}/{case}.nii.gz")
    assert found == sorted(expected)
    description = json.loads((dataset / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "T1w", "1": "T2w", "2": "FLAIR"}
    assert description["labels"] == LABELS
    assert description["numTraining"] == 1
    assert description["file_ending"] == ".nii.gz"


def test_files_hold_the_simulated_examination(dataset):
    """Voxels and grid survive the files; the same seed gives the same voxels."""
    expected = simulate(np.random.default_rng((7, 1)), scan="isotropic")
    paths = sorted((dataset / "imagesTs").glob("brain_002_*.nii.gz"))
    images = read_channels(paths)
    labels = read_segmentation(dataset / "labelsTs" / "brain_002.nii.gz")
    assert np.array_equal(images.array, expected.images)
    assert np.array_equal(labels.array, expected.segmentation)
    assert images.grid.affine == pytest.approx(expected.affine, abs=1e-4)
    assert images.grid.disagreement(labels.grid) is None


def test_no_training_case_is_refused(tmp_path):
    """Nothing is written when the numbers make no sense."""
    with pytest.raises(ValueError, match="num_train must be at least 1"):
        write_demo_dataset(tmp_path, num_train=0)
    assert not list(tmp_path.iterdir())
