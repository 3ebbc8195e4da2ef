"""Written files have the geometry of their input to the bit, and are whole or absent."""

import gzip
import itertools
import pickle

import nibabel
import numpy as np
import pytest
import SimpleITK

from medseg.errors import DatasetError, GeometryError
from medseg.geometry import Grid, reorient
from medseg.io.convert import from_object
from medseg.io.image import Header
from medseg.io.read import read_image, read_segmentation, read_stored
from medseg.io.write import write_image, write_map, write_nifti, write_segmentation

GEOMETRY = (
    "dim",
    "pixdim",
    "xyzt_units",
    "qform_code",
    "sform_code",
    "quaternion",
    "offset",
    "srow",
)
FORMS = {
    "sform only": {"sform": 1, "qform": 0},
    "qform only": {"sform": 0, "qform": 2},
    "both": {"sform": 4, "qform": 1},
    "neither": {"sform": 0, "qform": 0, "pixdim": (1, 2, 3, 4, 0, 0, 0, 0)},
    "left-handed": {"sform": 0, "qform": 1, "flip": True},
    "metres": {"xyzt_units": 1},
    "micrometres and milliseconds": {"sform": 0, "qform": 1, "xyzt_units": 3 | 16},
    "no unit": {"xyzt_units": 0},
}


def labels_like(sample):
    return (sample.values() % 5).astype(np.uint8)


class TestNiftiGeometry:
    @pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
    @pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
    def test_every_field_is_that_of_the_input(self, sample, tmp_path, form, ending):
        form = dict(form)
        affine = sample.oblique()
        if form.pop("flip", False):
            affine[:, 0] *= -1
        source = sample.write_nifti(
            tmp_path / f"in{ending}", sample.values(), affine, slope=3, inter=7, **form
        )
        target = tmp_path / "new" / "folder" / f"out{ending}"
        write_segmentation(target, labels_like(sample), read_image(source).header)
        before, after = sample.header_of(source), sample.header_of(target)
        for name in GEOMETRY:
            assert after[name] == before[name], name
        assert after["scl_slope"] == (1.0,)
        assert after["scl_inter"] == (0.0,)
        np.testing.assert_allclose(
            nibabel.load(target).affine, nibabel.load(source).affine, atol=1e-6
        )
        np.testing.assert_array_equal(np.asarray(nibabel.load(target).dataobj), labels_like(sample))
        assert SimpleITK.ReadImage(str(target)).GetSize() == sample.shape

    def test_forms_that_differ_both_survive(self, sample, tmp_path):
        image = nibabel.Nifti1Image(sample.values(), None)
        image.set_qform(sample.oblique(), code=1)
        image.set_sform(sample.affine, code=3)
        nibabel.save(image, tmp_path / "in.nii")
        write_segmentation(
            tmp_path / "out.nii", labels_like(sample), read_image(tmp_path / "in.nii").header
        )
        found = nibabel.load(tmp_path / "out.nii")
        np.testing.assert_allclose(found.get_qform(coded=True)[0], sample.oblique(), atol=1e-5)
        np.testing.assert_allclose(found.get_sform(coded=True)[0], sample.affine, atol=1e-6)
        assert (found.get_qform(coded=True)[1], found.get_sform(coded=True)[1]) == (1, 3)

    def test_big_endian_input(self, sample, tmp_path):
        source = sample.write_nifti(tmp_path / "in.nii", sample.values(">i2"), qform=1)
        write_segmentation(tmp_path / "out.nii", labels_like(sample), read_image(source).header)
        before, after = nibabel.load(source).header, nibabel.load(tmp_path / "out.nii").header
        assert (before.endianness, after.endianness) == (">", "<")
        for name in ("pixdim", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x"):
            np.testing.assert_array_equal(before[name], after[name])

    @pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 7, 1)])
    def test_stored_shape_is_kept(self, sample, tmp_path, shape):
        source = sample.write_nifti(tmp_path / "in.nii.gz", sample.values(shape=shape))
        image = read_image(source)
        write_segmentation(tmp_path / "out.nii.gz", image.array.astype(np.uint8), image.header)
        assert nibabel.load(tmp_path / "out.nii.gz").shape == shape
        np.testing.assert_array_equal(
            read_segmentation(tmp_path / "out.nii.gz").array, image.array.astype(np.uint8)
        )

    def test_nifti2_stays_nifti2(self, sample, tmp_path):
        """Its affine is in double precision."""
        affine = sample.oblique(origin=(1000.123456789, 2.0, 3.0))
        nibabel.save(nibabel.Nifti2Image(sample.values(), affine), tmp_path / "in.nii")
        image = read_image(tmp_path / "in.nii")
        for name in ("out.nii", "out.nii.gz", "out.img"):
            write_segmentation(tmp_path / name, labels_like(sample), image.header)
            found = read_segmentation(tmp_path / name)
            np.testing.assert_array_equal(found.affine, image.affine)
            np.testing.assert_array_equal(found.array, labels_like(sample))

    def test_long_axes_need_nifti2(self, tmp_path):
        array = np.arange(40000, dtype=np.uint16).reshape(1, 40000, 1)
        write_nifti(tmp_path / "x.nii", array, np.eye(4))
        np.testing.assert_array_equal(read_segmentation(tmp_path / "x.nii").array, array)
        assert isinstance(nibabel.load(tmp_path / "x.nii"), nibabel.Nifti2Image)

    def test_pair(self, sample, tmp_path):
        nibabel.save(nibabel.Nifti1Pair(sample.values(), sample.affine), tmp_path / "in.img")
        image = read_image(tmp_path / "in.hdr")
        write_segmentation(tmp_path / "out.hdr", labels_like(sample), image.header)
        assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.hdr", "out.img"]
        found = nibabel.load(tmp_path / "out.img")
        np.testing.assert_allclose(found.affine, sample.affine, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(found.dataobj), labels_like(sample))

    def test_analyze_input_gives_the_same_grid(self, sample, tmp_path):
        image = nibabel.AnalyzeImage(sample.values(), np.diag([-2.0, 3.0, 4.0, 1.0]))
        nibabel.save(image, tmp_path / "in.hdr")
        image = read_image(tmp_path / "in.hdr")
        write_segmentation(tmp_path / "out.img", labels_like(sample), image.header)
        assert image.grid.disagreement(read_segmentation(tmp_path / "out.img").grid, 1e-5) is None

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int8", "int16", "int32"])
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_types_and_memory_orders(self, sample, tmp_path, dtype, order):
        array = np.array(
            sample.values(np.int64) + np.iinfo(dtype).max - 210, dtype=dtype, order=order
        )
        write_segmentation(
            tmp_path / "x.nii.gz", array, Header.of_grid(Grid(sample.shape, np.eye(4)))
        )
        found = nibabel.load(tmp_path / "x.nii.gz")
        assert found.get_data_dtype() == dtype
        np.testing.assert_array_equal(np.asarray(found.dataobj), array)

    def test_48_storages_keep_their_geometry(self, sample, tmp_path):
        grid = Grid(sample.shape, sample.oblique())
        for number, (axes, *flips) in enumerate(
            itertools.product(itertools.permutations(range(3)), *[(False, True)] * 3)
        ):
            stored = reorient(grid, axes, tuple(flips))
            source = sample.write_nifti(
                tmp_path / f"{number}.nii",
                sample.values(shape=stored.shape),
                stored.affine,
                qform=1,
            )
            image = read_image(source)
            write_segmentation(tmp_path / "out.nii", image.array.astype(np.uint8), image.header)
            found = nibabel.load(tmp_path / "out.nii")
            np.testing.assert_allclose(found.affine, nibabel.load(source).affine, atol=1e-6)
            assert found.shape == stored.shape


class TestItkGeometry:
    @pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd"])
    def test_geometry_is_that_of_the_input(self, sample, tmp_path, ending):
        source = sample.write_itk(tmp_path / f"in{ending}", sample.values())
        image = read_image(source)
        write_segmentation(tmp_path / f"out{ending}", labels_like(sample), image.header)
        before, after = (
            SimpleITK.ReadImage(str(tmp_path / f"{name}{ending}")) for name in ("in", "out")
        )
        assert before.GetOrigin() == after.GetOrigin()
        np.testing.assert_allclose(before.GetSpacing(), after.GetSpacing(), rtol=1e-12)
        np.testing.assert_allclose(before.GetDirection(), after.GetDirection(), atol=1e-12)
        assert after.GetPixelID() == SimpleITK.sitkUInt8
        np.testing.assert_array_equal(
            SimpleITK.GetArrayFromImage(after), labels_like(sample).transpose(2, 1, 0)
        )

    @pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd", ".gipl"])
    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int8", "int16", "int32"])
    def test_labels_are_exact(self, sample, tmp_path, ending, dtype):
        """Smallest and largest value of each type; GIPL says that it has no 32-bit labels."""
        labels = (sample.values(np.int64) % 5).astype(dtype)
        labels[sample.mark], labels[0, 0, 0] = np.iinfo(dtype).max, np.iinfo(dtype).min
        grid = Grid(sample.shape, np.diag([-0.5, -1.25, 2.0, 1.0]))
        path = tmp_path / f"x{ending}"
        if ending == ".gipl" and labels.itemsize == 4:
            with pytest.raises(
                DatasetError, match=rf"cannot write {dtype}.* Write \.nii\.gz instead"
            ):
                write_segmentation(path, labels, Header.of_grid(grid))
            return
        write_segmentation(path, labels, Header.of_grid(grid))
        found = read_stored(path)
        assert found.array.dtype == dtype
        np.testing.assert_array_equal(found.array, labels)
        np.testing.assert_array_equal(read_segmentation(path).array, labels)

    @pytest.mark.parametrize("ending", [".nrrd", ".mha"])
    def test_slice(self, tmp_path, ending):
        image = SimpleITK.GetImageFromArray(np.arange(30, dtype=np.int16).reshape(6, 5))
        image.SetSpacing((0.5, 2.0))
        image.SetDirection((0.0, -1.0, 1.0, 0.0))
        SimpleITK.WriteImage(image, str(tmp_path / f"in{ending}"))
        found = read_image(tmp_path / f"in{ending}")
        write_segmentation(tmp_path / f"out{ending}", found.array.astype(np.uint8), found.header)
        after = SimpleITK.ReadImage(str(tmp_path / f"out{ending}"))
        assert after.GetSize() == (5, 6)
        assert after.GetSpacing() == (0.5, 2.0)
        np.testing.assert_allclose(after.GetDirection(), (0.0, -1.0, 1.0, 0.0))

    @pytest.mark.parametrize("ending", [".nrrd", ".mha"])
    def test_sheared_nifti_as_itk_format(self, sample, tmp_path, ending):
        source = sample.write_nifti(tmp_path / "in.nii", sample.values())
        image = read_image(source)
        write_segmentation(tmp_path / f"out{ending}", labels_like(sample), image.header)
        found = read_segmentation(tmp_path / f"out{ending}")
        np.testing.assert_allclose(found.affine, image.affine, atol=1e-6)

    @pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
    def test_itk_input_as_nifti(self, sample, tmp_path, ending):
        """sform and qform agree, in mm, so that every program places it alike."""
        image = read_image(sample.write_itk(tmp_path / "in.mha", sample.values()))
        write_segmentation(tmp_path / f"out{ending}", labels_like(sample), image.header)
        found = nibabel.load(tmp_path / f"out{ending}")
        np.testing.assert_allclose(found.affine, image.affine, atol=1e-5)
        np.testing.assert_allclose(found.get_qform(), image.affine, atol=1e-5)
        fields = sample.header_of(tmp_path / f"out{ending}")
        assert fields["qform_code"] == fields["sform_code"] == (1,)
        assert fields["xyzt_units"] == (2,)

    def test_format_that_cannot_hold_the_geometry(self, sample, tmp_path):
        image = read_image(sample.write_nifti(tmp_path / "in.nii", sample.values()))
        with pytest.raises(GeometryError, match=r"out\.gipl: this format cannot hold .*\.nii\.gz"):
            write_segmentation(tmp_path / "out.gipl", labels_like(sample), image.header)
        assert [path.name for path in tmp_path.iterdir()] == ["in.nii"]

    def test_gipl_without_rotation(self, sample, tmp_path):
        affine = np.diag([-0.5, -1.25, 2.0, 1.0])
        image = read_image(sample.write_itk(tmp_path / "in.gipl", sample.values(), affine))
        write_segmentation(tmp_path / "out.gipl", labels_like(sample), image.header)
        np.testing.assert_allclose(read_image(tmp_path / "out.gipl").affine, affine)

    def test_type_that_itk_cannot_write(self, sample, tmp_path):
        grid = Grid(sample.shape, np.diag([-1.0, -1.0, 1.0, 1.0]))
        with pytest.raises(DatasetError, match=r"out\.gipl: ITK cannot write uint64 values"):
            write_segmentation(
                tmp_path / "out.gipl", labels_like(sample).astype(np.uint64), Header.of_grid(grid)
            )
        assert list(tmp_path.iterdir()) == []


class TestMaps:
    @pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd"])
    def test_map_is_float32(self, sample, tmp_path, ending):
        image = read_image(sample.write_nifti(tmp_path / "in.nii", sample.values(), qform=0))
        probability = sample.values(np.float64) / 210
        write_map(tmp_path / f"out{ending}", probability, image.header)
        found = read_image(tmp_path / f"out{ending}")
        np.testing.assert_array_equal(found.array, probability.astype(np.float32))
        np.testing.assert_allclose(found.affine, image.affine, atol=1e-6)

    @pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".tif"])
    def test_image_keeps_its_type(self, sample, tmp_path, ending):
        header = Header.of_grid(Grid(sample.shape, np.diag([1.0, 1.5, 2.0, 1.0])))
        write_image(tmp_path / f"x{ending}", sample.values(np.float64) / 7, header)
        found = read_stored(tmp_path / f"x{ending}")
        assert found.array.dtype == np.float64
        np.testing.assert_array_equal(found.array, sample.values(np.float64) / 7)
        assert found.header.grid.disagreement(header.grid) is None

    @pytest.mark.parametrize("dtype", ["int16", "float32", "float64", "uint8"])
    def test_new_image(self, sample, tmp_path, dtype):
        path = tmp_path / "x.nii.gz"
        write_nifti(path, sample.values(dtype), sample.oblique())
        found = nibabel.load(path)
        assert found.get_data_dtype() == dtype
        np.testing.assert_array_equal(np.asarray(found.dataobj), sample.values(dtype))
        np.testing.assert_allclose(found.affine, sample.oblique(), atol=1e-5)
        np.testing.assert_allclose(found.get_qform(), sample.oblique(), atol=1e-5)

    def test_new_sheared_image_has_no_qform(self, sample, tmp_path):
        write_nifti(tmp_path / "x.nii", sample.values(), sample.affine)
        fields = sample.header_of(tmp_path / "x.nii")
        assert (fields["sform_code"], fields["qform_code"]) == ((1,), (0,))
        np.testing.assert_allclose(read_image(tmp_path / "x.nii").affine, sample.affine, atol=1e-6)

    def test_affine_that_is_none(self, sample, tmp_path):
        with pytest.raises(GeometryError, match="do not span the space"):
            write_nifti(tmp_path / "x.nii", sample.values(), np.diag([1, 1, 0, 1]))


class TestWhole:
    """Whole or not at all, and nothing else left behind."""

    def test_same_content_gives_the_same_bytes(self, sample, tmp_path):
        write_nifti(tmp_path / "a.nii.gz", sample.values(), sample.oblique())
        write_nifti(tmp_path / "b.nii.gz", sample.values(), sample.oblique())
        assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
        assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes())[344:348] == b"n+1\0"

    @pytest.mark.parametrize("ending", [".nii.gz", ".mhd", ".img"])
    def test_only_the_files_of_the_image_appear(self, sample, tmp_path, ending):
        name = "\u5f71\u50cf " + "x" * 150
        write_nifti(tmp_path / f"{name}{ending}", labels_like(sample), np.eye(4))
        found = [path.name for path in tmp_path.iterdir()]
        assert all(entry.startswith(name) and ".part" not in entry for entry in found)
        np.testing.assert_array_equal(
            read_segmentation(tmp_path / f"{name}{ending}").array, labels_like(sample)
        )

    def test_failure_leaves_the_old_file(self, sample, tmp_path, monkeypatch):
        path = tmp_path / "x.nii.gz"
        write_nifti(path, sample.values(), np.eye(4))
        before = path.read_bytes()

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("medseg.io.write._flush", full)
        with pytest.raises(DatasetError, match=r"x.nii.gz: not written, the disk is full"):
            write_nifti(path, sample.values() + 1, np.eye(4))
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_existing_file_is_replaced(self, sample, tmp_path):
        for offset in (0, 1):
            write_nifti(tmp_path / "x.mhd", labels_like(sample) + np.uint8(offset), np.eye(4))
        found = read_segmentation(tmp_path / "x.mhd").array
        np.testing.assert_array_equal(found, labels_like(sample) + 1)

    def test_permissions_are_those_of_any_new_file(self, sample, tmp_path):
        (tmp_path / "other").touch()
        write_nifti(tmp_path / "x.nii", sample.values(), np.eye(4))
        assert (tmp_path / "x.nii").stat().st_mode == (tmp_path / "other").stat().st_mode

    def test_unknown_ending(self, sample, tmp_path):
        with pytest.raises(DatasetError, match="unknown ending"):
            write_nifti(tmp_path / "x.gif", sample.values(), np.eye(4))
        assert list(tmp_path.iterdir()) == []

    def test_misuse(self, sample, tmp_path):
        header = Header.of_grid(Grid(sample.shape, np.eye(4)))
        with pytest.raises(ValueError, match=r"array has shape \(7, 6, 5\); expected \(5, 6, 7\)"):
            write_segmentation(tmp_path / "x.nii", np.zeros((7, 6, 5), np.uint8), header)
        for dtype in (np.float32, np.bool_):
            with pytest.raises(TypeError, match="holds integers, got"):
                write_segmentation(tmp_path / "x.nii", np.zeros(sample.shape, dtype), header)


class TestObjects:
    """Images other libraries hold in memory."""

    def test_sitk_image(self, sample):
        image = from_object(sample.itk_image(sample.values()))
        assert image.array.dtype == np.float32
        np.testing.assert_array_equal(image.array, sample.values())
        np.testing.assert_allclose(image.affine, sample.oblique(), atol=1e-12)

    def test_nibabel_image(self, sample, tmp_path):
        image = from_object(nibabel.Nifti1Image(sample.values(), sample.affine))
        np.testing.assert_array_equal(image.array, sample.values())
        np.testing.assert_allclose(image.affine, sample.affine, atol=1e-6)
        write_segmentation(tmp_path / "x.nii", labels_like(sample), image.header)
        np.testing.assert_allclose(
            nibabel.load(tmp_path / "x.nii").affine, sample.affine, atol=1e-6
        )

    def test_nibabel_image_from_a_file_is_scaled_once(self, sample, tmp_path):
        path = sample.write_nifti(
            tmp_path / "x.nii", sample.values(), slope=2, inter=1, xyzt_units=3
        )
        image, expected = from_object(nibabel.load(path)), read_image(path)
        np.testing.assert_array_equal(image.array, expected.array)
        np.testing.assert_allclose(image.affine, expected.affine)

    def test_nibabel_image_of_another_format(self, sample):
        image = from_object(nibabel.MGHImage(sample.values(np.float32), sample.oblique()))
        np.testing.assert_array_equal(image.array, sample.values())
        np.testing.assert_allclose(image.affine, sample.oblique(), atol=1e-4)

    def test_series_and_vectors_are_refused(self, sample):
        series = nibabel.Nifti1Image(sample.values(shape=(3, 4, 5, 2)), sample.affine)
        with pytest.raises(DatasetError, match="nibabel image: holds a series of 2 volumes"):
            from_object(series)
        with pytest.raises(DatasetError, match="holds complex values"):
            from_object(nibabel.Nifti1Image(sample.values(np.complex64), sample.affine))
        with pytest.raises(DatasetError, match="holds complex"):
            from_object(SimpleITK.Image((3, 4, 5), SimpleITK.sitkComplexFloat32))
        with pytest.raises(DatasetError, match="SimpleITK image: holds several values"):
            from_object(SimpleITK.Image((3, 4, 5), SimpleITK.sitkVectorUInt8, 3))

    def test_anything_else_is_none(self, sample):
        assert from_object(sample.values()) is None
        assert from_object("x.nii.gz") is None


def test_header_survives_pickling(sample, tmp_path):
    for path in (
        sample.write_nifti(tmp_path / "x.nii", sample.values()),
        sample.write_itk(tmp_path / "x.mha", sample.values()),
    ):
        header = read_image(path).header
        assert pickle.loads(pickle.dumps(header)) == header
