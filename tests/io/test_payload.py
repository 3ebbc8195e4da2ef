"""Files that ITK would read without a word although voxels are missing."""

import gzip

import numpy as np
import pytest
import SimpleITK

from medseg.errors import DatasetError
from medseg.io.payload import check_payload
from medseg.io.read import read_image

DAMAGED = r"x\.[\w.]+: .*(copy or export it again|missing)"


@pytest.fixture
def noise():
    """Return values that no compressor shortens."""
    return np.random.default_rng(0).integers(0, 60000, (11, 12, 13)).astype(np.uint16)


def data_file(path):
    """Return the file with the voxels."""
    others = [file for file in path.parent.iterdir() if file != path]
    return others[0] if others else path


def cut(path, kept):
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else kept])


def test_itk_itself_does_not_notice(sample, tmp_path, noise):
    """The reason for this module: half a file gives a whole image."""
    path = sample.write_itk(tmp_path / "x.gipl", noise, np.diag([-0.7, -1.1, 3.0, 1.0]))
    cut(path, 0.5)
    assert SimpleITK.ReadImage(str(path)).GetSize() == noise.shape


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd", ".gipl"])
class TestDamage:
    """Of every format, attached and detached, compressed and not."""

    def write(self, sample, tmp_path, noise, ending, compress):
        affine = np.diag([-0.7, -1.1, 3.0, 1.0])
        path = tmp_path / f"x{ending}"
        return sample.write_itk(path, noise, affine, compress=compress and ending != ".gipl")

    def test_whole_files_pass(self, sample, tmp_path, noise, ending, compress):
        path = self.write(sample, tmp_path, noise, ending, compress)
        np.testing.assert_array_equal(read_image(path).array, noise)

    @pytest.mark.parametrize("kept", [0.3, 0.6, 0.95, -5, -1])
    def test_cut_data(self, sample, tmp_path, noise, ending, compress, kept):
        path = self.write(sample, tmp_path, noise, ending, compress)
        cut(data_file(path), kept)
        with pytest.raises(DatasetError, match=DAMAGED):
            read_image(path)

    def test_surplus_data(self, sample, tmp_path, noise, ending, compress):
        path = self.write(sample, tmp_path, noise, ending, compress)
        data = data_file(path)
        data.write_bytes(data.read_bytes() + b"surplus")
        with pytest.raises(DatasetError, match="7 bytes follow the voxel data"):
            read_image(path)

    @pytest.mark.parametrize("kept", [1, 7, 60])
    def test_cut_header(self, sample, tmp_path, noise, ending, compress, kept):
        path = self.write(sample, tmp_path, noise, ending, compress)
        cut(path, kept)
        with pytest.raises(DatasetError, match=DAMAGED):
            read_image(path)


@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd"])
def test_changed_byte_in_compressed_data(sample, tmp_path, noise, ending):
    """Compressed data carry a checksum."""
    path = sample.write_itk(tmp_path / f"x{ending}", noise, compress=True)
    data = data_file(path)
    content = bytearray(data.read_bytes())
    content[-1000] ^= 0x55
    data.write_bytes(content)
    with pytest.raises(DatasetError, match=DAMAGED):
        read_image(path)


@pytest.mark.parametrize("ending", [".nhdr", ".mhd"])
def test_missing_data_file(sample, tmp_path, noise, ending):
    path = sample.write_itk(tmp_path / f"x{ending}", noise)
    data_file(path).unlink()
    with pytest.raises(DatasetError, match=r"its data file x\.raw is missing"):
        read_image(path)


def edited(path, *changes):
    """Replace bytes of a header."""
    content = path.read_bytes()
    for old, new in changes:
        assert old in content
        content = content.replace(old, new)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("ending", "change", "message"),
    [
        (".nrrd", (b"type: unsigned short", b"type: block"), "its NRRD type is 'block'"),
        (".nrrd", (b"encoding: raw", b"encoding: bzip2"), "its NRRD encoding is 'bzip2'"),
        (".nrrd", (b"encoding: raw\n", b"encoding: gzip\nbyte skip: 4\n"), "byte skip 4"),
        (".nrrd", (b"sizes: 11", b"sizes: eleven"), "its header cannot be read"),
        (".nrrd", (b"sizes: ", b"other: "), "its NRRD header has no sizes"),
        (".nrrd", (b"space directions: (", b"space directions: (oops"), "ITK cannot read it"),
        (".nhdr", (b"data file: x.raw", b"data file: LIST"), "spread over several files"),
        (".nhdr", (b"data file: x.raw", b"data file: x%03d.raw 1 13 1"), "spread over several"),
        (".mha", (b"DimSize = 11", b"DimSize = eleven"), "its header cannot be read"),
        (".mha", (b"DimSize = ", b"Other = "), "its header cannot be read"),
        (".mha", (b"MET_USHORT", b"MET_STRING"), "its header cannot be read"),
        (".mhd", (b"= x.raw", b"= LIST"), "spread over several files"),
    ],
)
def test_headers_with_nonsense(sample, tmp_path, noise, ending, change, message):
    path = edited(sample.write_itk(tmp_path / f"x{ending}", noise), change)
    with pytest.raises(DatasetError, match=message):
        read_image(path)


def test_gipl_of_an_unknown_type(sample, tmp_path, noise):
    path = sample.write_itk(tmp_path / "x.gipl", noise, np.diag([-1.0, -1.0, 1.0, 1.0]))
    content = bytearray(path.read_bytes())
    content[9] = 99
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="its header cannot be read"):
        read_image(path)


def test_nrrd_with_skipped_lines_and_bytes(sample, tmp_path, noise):
    """Data behind a foreign header: skipped lines, then bytes; or the last bytes of the file."""
    path = sample.write_itk(tmp_path / "x.nhdr", noise)
    data = tmp_path / "x.raw"
    voxels = data.read_bytes()
    data.write_bytes(b"a line\nanother\n" + b"12345" + voxels)
    name = b"data file: x.raw"
    edited(path, (name, b"line skip: 2\nbyte skip: 5\n" + name))
    np.testing.assert_array_equal(read_image(path).array, noise)
    edited(path, (b"line skip: 2\nbyte skip: 5\n", b"byte skip: -1\n"))
    np.testing.assert_array_equal(read_image(path).array, noise)
    data.write_bytes(voxels[:-1])
    with pytest.raises(DatasetError, match="1 of 3432 bytes"):
        read_image(path)


@pytest.mark.parametrize("size", [b"24", b"-1"])
def test_meta_image_with_a_foreign_header_before_the_data(sample, tmp_path, noise, size):
    path = sample.write_itk(tmp_path / "x.mhd", noise)
    data = tmp_path / "x.raw"
    data.write_bytes(b"x" * 24 + data.read_bytes())
    edited(path, (b"ElementDataFile", b"HeaderSize = " + size + b"\nElementDataFile"))
    np.testing.assert_array_equal(read_image(path).array, noise)


def test_nrrd_comments_and_old_field_names(sample, tmp_path, noise):
    path = sample.write_itk(tmp_path / "x.nhdr", noise)
    edited(path, (b"data file: x.raw", b"# sizes: 1 2 3\nkey:=value\ndatafile: x.raw\n"))
    np.testing.assert_array_equal(read_image(path).array, noise)


def test_zeros_that_compress_a_thousandfold(sample, tmp_path):
    """The decoder holds output back; the count still is exact."""
    zeros = np.zeros((120, 130, 140), dtype=np.float32)
    for ending in (".nrrd", ".mha"):
        path = sample.write_itk(tmp_path / f"x{ending}", zeros, compress=True)
        check_payload(path, ending)
        cut(path, -1)
        with pytest.raises(DatasetError, match="cut short"):
            check_payload(path, ending)


def test_compressed_data_far_too_long_are_not_unpacked(sample, tmp_path, noise):
    path = sample.write_itk(tmp_path / "x.nhdr", noise, compress=True)
    (tmp_path / "x.raw.gz").write_bytes(gzip.compress(bytes(2**25)))
    with pytest.raises(DatasetError, match="bytes follow the voxel data"):
        check_payload(path, ".nhdr")


def test_other_formats_are_not_checked(tmp_path):
    check_payload(tmp_path / "x.nii.gz", ".nii.gz")
