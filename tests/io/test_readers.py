"""What every reader must do, and that the two of them agree."""

import numpy as np
import pytest

from medseg.errors import DatasetError
from medseg.io import nifti, sitk
from medseg.io.read import read_image


class ReaderContract:
    """A reader turns a file into values as stored and a header with the RAS+ affine."""

    ending: str
    read = None

    def write(self, sample, path, array, affine):
        raise NotImplementedError

    @pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
    def test_values_and_type_come_as_stored(self, sample, tmp_path, dtype):
        array = sample.values(dtype)
        path = self.write(sample, tmp_path / f"x{self.ending}", array, sample.oblique())
        stored = self.read(path)
        assert stored.array.dtype == array.dtype
        assert (stored.slope, stored.inter) == (1.0, 0.0)
        np.testing.assert_array_equal(stored.array, array)

    def test_affine_is_ras(self, sample, tmp_path):
        affine = sample.oblique()
        path = self.write(sample, tmp_path / f"x{self.ending}", sample.values(), affine)
        header = self.read(path).header
        assert header.shape == sample.shape
        assert header.ending == self.ending
        np.testing.assert_allclose(header.affine, affine, atol=1e-5)
        np.testing.assert_allclose(header.grid.spacing, (0.7, 1.1, 3.0), rtol=1e-6)

    def test_marked_voxel_lies_where_it_was_put(self, sample, tmp_path):
        """I, J, K in this order, right and anterior positive."""
        array = np.zeros(sample.shape, dtype=np.int16)
        array[sample.mark] = 9
        affine = np.array([[0, -1.5, 0, 20], [2, 0, 0, -10], [0, 0, 4, 5], [0, 0, 0, 1.0]])
        path = self.write(sample, tmp_path / f"x{self.ending}", array, affine)
        stored = self.read(path)
        assert np.argwhere(stored.array).tolist() == [list(sample.mark)]
        world = np.array(stored.header.affine) @ (*sample.mark, 1)
        np.testing.assert_allclose(world[:3], (14.0, -8.0, 13.0), atol=1e-5)

    def test_non_ascii_names(self, sample, tmp_path):
        folder = tmp_path / "pati\u00ebnt \u5f71\u50cf"
        folder.mkdir()
        path = folder / f"\u043f\u0440\u0438\u0432\u0435\u0442 \U0001f9e0{self.ending}"
        self.write(sample, path, sample.values(), sample.oblique())
        np.testing.assert_array_equal(self.read(path).array, sample.values())

    def test_any_other_content_is_refused_by_name(self, tmp_path):
        path = tmp_path / f"x{self.ending}"
        path.write_bytes(b"this is not an image\n" * 40)
        with pytest.raises(DatasetError, match=f"x{self.ending}.*copy or export it again"):
            self.read(path)

    def test_read_image_gives_float32_and_the_same_grid(self, sample, tmp_path):
        path = self.write(sample, tmp_path / f"x{self.ending}", sample.values(), sample.oblique())
        image = read_image(path)
        assert image.array.dtype == np.float32
        np.testing.assert_array_equal(image.array, sample.values())
        np.testing.assert_allclose(image.affine, sample.oblique(), atol=1e-5)


class TestNiftiThroughNibabel(ReaderContract):
    ending = ".nii.gz"
    read = staticmethod(nifti.read)

    def write(self, sample, path, array, affine):
        return sample.write_nifti(path, array, affine, qform=1)


class TestUncompressedNifti(TestNiftiThroughNibabel):
    ending = ".nii"


class TestNiftiWrittenByItk(ReaderContract):
    ending = ".nii.gz"
    read = staticmethod(nifti.read)

    def write(self, sample, path, array, affine):
        return sample.write_itk(path, array, affine)


class TestNiftiPairWrittenByItk(TestNiftiWrittenByItk):
    ending = ".img"

    def test_any_other_content_is_refused_by_name(self, tmp_path):
        for ending in (".hdr", ".img"):
            (tmp_path / f"x{ending}").write_bytes(b"this is not an image\n" * 40)
        with pytest.raises(DatasetError, match="does not begin with a NIfTI header"):
            self.read(tmp_path / "x.img")


class TestNrrd(ReaderContract):
    ending = ".nrrd"
    read = staticmethod(sitk.read)

    def write(self, sample, path, array, affine):
        return sample.write_itk(path, array, affine, compress=True)


class TestDetachedNrrd(TestNrrd):
    ending = ".nhdr"


class TestMetaImage(TestNrrd):
    ending = ".mha"


class TestDetachedMetaImage(TestNrrd):
    ending = ".mhd"


class TestUncompressedMetaImage(TestNrrd):
    ending = ".mha"

    def write(self, sample, path, array, affine):
        return sample.write_itk(path, array, affine)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64", ">i2", ">f4"])
@pytest.mark.parametrize("scaling", [(None, 0), (0.25, -7.5)])
def test_both_readers_agree_on_one_nifti(sample, tmp_path, dtype, scaling):
    """nibabel's and ITK's views of the same file: intensities and affine."""
    slope, inter = scaling
    path = tmp_path / "x.nii.gz"
    sample.write_nifti(
        path, sample.values(dtype), sample.oblique(), qform=1, slope=slope, inter=inter
    )
    ours, itk = nifti.read(path), sitk.read(path)
    scaled = ours.array.astype(np.float64) * ours.slope + ours.inter
    np.testing.assert_allclose(scaled, itk.array, rtol=1e-6)
    np.testing.assert_allclose(ours.header.affine, itk.header.affine, atol=2e-5)


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nhdr", ".mhd"])
def test_one_image_in_two_formats_reads_the_same(sample, tmp_path, ending):
    array, affine = sample.values("float32"), sample.oblique()
    first = read_image(sample.write_nifti(tmp_path / "x.nii", array, affine))
    second = read_image(sample.write_itk(tmp_path / f"x{ending}", array, affine))
    np.testing.assert_array_equal(first.array, second.array)
    assert first.grid.disagreement(second.grid, tolerance=1e-4) is None


def test_unit_of_length_is_read_as_itk_does(sample, tmp_path):
    """A file in micrometres has the voxel sizes ITK gives it."""
    affine = sample.oblique((700, 1100, 3000), (0, 0, 0))
    path = sample.write_nifti(tmp_path / "x.nii", sample.values(), affine, qform=1, xyzt_units=3)
    np.testing.assert_allclose(read_image(path).grid.spacing, (0.7, 1.1, 3.0), rtol=1e-5)
    np.testing.assert_allclose(sitk.read(path).header.grid.spacing, (0.7, 1.1, 3.0), rtol=1e-5)
