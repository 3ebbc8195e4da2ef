"""One case: the values of its file become indices, and what was not annotated may not occur."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest

from medseg.data.case import load_case
from medseg.errors import DatasetError, GeometryError
from medseg.schema.dataset import CaseFiles, DatasetSpec

SHAPE = (6, 5, 4)
AFFINE = np.diag([0.7, -1.9, 3.1, 1.0])


@pytest.fixture
def dataset(tmp_path):
    """A dataset with odd values: vein 1017, artery -3, background 255, and -1 to be ignored."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=SHAPE).astype(np.float32)
    values = rng.choice([255, 1017, -3, -1], size=SHAPE).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(image, AFFINE), tmp_path / "a.nii")
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), tmp_path / "a_seg.nii")
    spec = DatasetSpec(
        name="Dataset001_Odd",
        source=str(tmp_path),
        channels=("T1w",),
        labels={"vein": 1017, "artery": -3, "background": 255},
        ignore_label=-1,
        cases={"a": CaseFiles(channels=("a.nii",), segmentation="a_seg.nii")},
    )
    return spec, values


def annotated(spec, *names):
    files = spec.cases["a"].model_copy(update={"annotated_labels": names})
    return spec.model_copy(update={"cases": {"a": files}})


def test_a_case_holds_indices(dataset):
    spec, values = dataset
    found = load_case(spec, "a").segmentation
    assert found.dtype == np.uint8
    index = {255: 0, -3: 1, 1017: 2, -1: 3}
    np.testing.assert_array_equal(found, np.vectorize(index.get)(values))


def test_a_value_of_no_label_is_told_as_it_stands_in_the_file(dataset, tmp_path):
    spec, values = dataset
    values[1, 2, 3] = 254
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), tmp_path / "a_seg.nii")
    with pytest.raises(DatasetError, match=r"^a_seg\.nii: the segmentation holds 254; expected"):
        load_case(spec, "a")


def test_a_case_annotated_in_part_may_hold_no_other_label(dataset, tmp_path):
    spec, values = dataset
    with pytest.raises(DatasetError, match=r"holds 1017 \(vein\), but .*only for artery"):
        load_case(annotated(spec, "artery"), "a")
    nibabel.save(
        nibabel.Nifti1Image(np.where(values == 1017, 255, values), AFFINE), tmp_path / "a_seg.nii"
    )
    found = load_case(annotated(spec, "artery"), "a").segmentation
    assert sorted(np.unique(found).tolist()) == [0, 1, 3]
    np.testing.assert_array_equal(found == 1, values == -3)


def test_a_segmentation_lies_on_the_grid_of_its_image(dataset, tmp_path):
    spec, values = dataset
    shifted = AFFINE.copy()
    shifted[1, 3] = 4
    nibabel.save(nibabel.Nifti1Image(values, shifted), tmp_path / "a_seg.nii")
    with pytest.raises(GeometryError, match=r"a_seg\.nii does not lie on the grid of a\.nii"):
        load_case(spec, "a")
