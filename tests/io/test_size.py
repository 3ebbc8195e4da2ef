"""How large an image is, told without unpacking it."""

import numpy as np
import pytest
from PIL import Image

from medseg.io.size import stored_bytes


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_nifti_is_as_large_as_its_voxels_and_header(sample, tmp_path, ending):
    array = np.zeros((40, 50, 60), np.int16)
    path = sample.write_nifti(tmp_path / f"x{ending}", array)
    assert stored_bytes(path) == 352 + array.nbytes


def test_packed_formats_are_taken_for_larger_than_their_files(tmp_path):
    Image.fromarray(np.zeros((50, 40), np.uint8)).save(tmp_path / "x.png")
    assert stored_bytes(tmp_path / "x.png") > (tmp_path / "x.png").stat().st_size


def test_what_cannot_be_read_counts_nothing(tmp_path):
    assert stored_bytes(tmp_path / "missing.nii.gz") == 0


def test_file_too_short_for_gzip(tmp_path):
    (tmp_path / "x.nii.gz").write_bytes(b"\x1f\x8b")
    assert stored_bytes(tmp_path / "x.nii.gz") == 2
