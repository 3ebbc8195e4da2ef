"""How large an image is, told without unpacking it."""

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medseg.io.size import stored_bytes


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_nifti_is_as_large_as_its_voxels_and_header(sample, tmp_path, ending):
    array = np.zeros((40, 50, 60), np.int16)
    path = sample.write_nifti(tmp_path / f"x{ending}", array)
    assert stored_bytes(path) == 352 + array.nbytes


@pytest.mark.parametrize(
    ("ending", "packed"),
    [(".mhd", False), (".mhd", True), (".nhdr", False), (".nhdr", True), (".hdr", False)],
)
def test_voxels_beside_a_header_count(tmp_path, ending, packed):
    """The header alone has some hundred bytes."""
    array = np.arange(40 * 50 * 60, dtype=np.int16).reshape(60, 50, 40) % 90
    path = tmp_path / f"x{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path), useCompression=packed)
    assert path.stat().st_size < 2000
    if packed:
        found = {file.suffix: file.stat().st_size for file in tmp_path.iterdir()}
        assert found.keys() in ({".mhd", ".zraw"}, {".nhdr", ".gz"})
        assert stored_bytes(path) > 2 * sum(found.values())
    else:
        assert array.nbytes < stored_bytes(path) < array.nbytes + 2000


def test_a_header_without_its_voxels_counts_alone(tmp_path):
    (tmp_path / "x.mhd").write_text("ElementDataFile = gone.raw\n")
    assert stored_bytes(tmp_path / "x.mhd") == 27


def test_packed_formats_are_taken_for_larger_than_their_files(tmp_path):
    Image.fromarray(np.zeros((50, 40), np.uint8)).save(tmp_path / "x.png")
    assert stored_bytes(tmp_path / "x.png") > (tmp_path / "x.png").stat().st_size


def test_what_cannot_be_read_counts_nothing(tmp_path):
    assert stored_bytes(tmp_path / "missing.nii.gz") == 0


def test_file_too_short_for_gzip(tmp_path):
    (tmp_path / "x.nii.gz").write_bytes(b"\x1f\x8b")
    assert stored_bytes(tmp_path / "x.nii.gz") == 2


def test_a_file_that_was_cut_short_is_no_larger_than_it_can_be(sample, tmp_path):
    """Its last four bytes are no length."""
    path = sample.write_nifti(
        tmp_path / "x.nii.gz", np.arange(60_000, dtype=np.int16).reshape(40, 50, 30)
    )
    content = path.read_bytes()
    path.write_bytes(content[:500] + b"\xff\xff\xff\xff")
    assert stored_bytes(path) <= 504 * 1032
