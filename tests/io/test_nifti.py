"""NIfTI: which affine counts, what is scaled how, and that no damage goes unnoticed."""

import gzip

import nibabel
import numpy as np
import pytest

from medseg.errors import DatasetError
from medseg.io import nifti
from medseg.io.read import read_channels, read_image, read_segmentation, read_stored

AFFINE_BOTH = np.array([[2.0, 0, 0, 1], [0, 3.0, 0, 2], [0, 0, 4.0, 3], [0, 0, 0, 1]])


def write_colours(sample, path, opacity=None, shape=None):
    """Write (10, 20, 30) at the mark and black elsewhere."""
    names = ["R", "G", "B"] + ["A"] * (opacity is not None)
    array = np.zeros(shape or sample.shape, dtype=[(name, "u1") for name in names])
    for name, value in zip(names, (10, 20, 30), strict=False):
        array[name][sample.mark] = value
    if opacity is not None:
        array["A"] = opacity
    return sample.write_nifti(path, array)


class TestAffine:
    """The sform counts if its code is above 0, else the qform, else voxel sizes alone."""

    def test_sform_only(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii.gz", sample.values(), sform=2, qform=0)
        header = nifti.read(path).header
        np.testing.assert_allclose(header.affine, sample.affine, atol=1e-6)
        assert (header.nifti.sform_code, header.nifti.qform_code) == (2, 0)

    def test_sheared_sform_is_kept_as_it_is(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values())
        world = read_image(path).affine @ (*sample.mark, 1)
        np.testing.assert_allclose(world[:3], sample.mark_world, atol=1e-5)

    def test_qform_only(self, sample, tmp_path):
        path = sample.write_nifti(
            tmp_path / "x.nii", sample.values(), sample.oblique(), sform=0, qform=1
        )
        header = nifti.read(path).header
        np.testing.assert_allclose(header.affine, sample.oblique(), atol=1e-5)
        assert (header.nifti.sform_code, header.nifti.qform_code) == (0, 1)

    def test_sform_wins_where_both_differ(self, sample, tmp_path):
        path = tmp_path / "x.nii"
        image = nibabel.Nifti1Image(sample.values(), None)
        image.set_qform(sample.oblique(), code=1)
        image.set_sform(AFFINE_BOTH, code=4)
        nibabel.save(image, path)
        header = nifti.read(path).header
        np.testing.assert_allclose(header.affine, AFFINE_BOTH)
        assert (header.nifti.sform_code, header.nifti.qform_code) == (4, 1)

    def test_neither_leaves_voxel_sizes_with_the_first_axis_to_the_left(self, sample, tmp_path):
        pixdim = (1, 2.0, 3.0, 4.0, 0, 0, 0, 0)
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(), sform=0, pixdim=pixdim)
        affine = read_image(path).affine
        np.testing.assert_allclose(affine[:3, :3], np.diag([-2.0, 3.0, 4.0]))
        np.testing.assert_allclose(affine, nibabel.load(path).affine)

    @pytest.mark.parametrize(("unit", "factor"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (10, 1)])
    def test_affine_is_in_mm_whatever_the_unit(self, sample, tmp_path, unit, factor):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(), xyzt_units=unit)
        expected = sample.affine * np.array([[factor]] * 3 + [[1]])
        np.testing.assert_allclose(read_image(path).affine, expected, rtol=1e-5)

    def test_sform_of_zeros_is_an_error(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(), srow_x=0, srow_y=0, srow_z=0)
        with pytest.raises(DatasetError, match=r"x\.nii: axes of the affine .* Correct the header"):
            read_image(path)

    def test_impossible_quaternion_is_an_error(self, sample, tmp_path):
        path = sample.write_nifti(
            tmp_path / "x.nii", sample.values(), sform=0, qform_code=1, quatern_b=2.0
        )
        with pytest.raises(DatasetError, match="its NIfTI header is not valid"):
            read_image(path)


class TestHeadersOutOfOrder:
    """What nibabel mends, it still mends."""

    @pytest.mark.parametrize(
        "fields",
        [
            {"pixdim": (1, -2.0, 3.0, 4.0, 0, 0, 0, 0)},
            {"pixdim": (0, 2.0, 3.0, 4.0, 0, 0, 0, 0), "qform_code": 1},
            {"pixdim": (1, 2.0, 3.0, 4.0, 0, 0, 0, 0), "qform_code": 99, "sform_code": -1},
            {"pixdim": (1, 2.0, 3.0, 4.0, 0, 0, 0, 0), "bitpix": 3},
        ],
    )
    def test_reads_as_nibabel_does(self, sample, tmp_path, fields):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(), sform=0, **fields)
        expected = nibabel.load(path)
        found = read_image(path)
        np.testing.assert_array_equal(found.array, np.asarray(expected.dataobj))
        np.testing.assert_allclose(found.affine, expected.affine)

    def test_voxels_at_an_odd_offset(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(), vox_offset=357)
        content = path.read_bytes()
        path.write_bytes(content[:352] + b"said." + content[352:])
        np.testing.assert_array_equal(read_image(path).array, sample.values())


class TestValues:
    @pytest.mark.parametrize("dtype", [">i2", ">f4", ">f8", ">u2", "<i8", "<u4"])
    def test_byte_orders_and_types(self, sample, tmp_path, dtype):
        path = sample.write_nifti(tmp_path / "x.nii.gz", sample.values(dtype))
        np.testing.assert_array_equal(read_image(path).array, sample.values())
        found = read_segmentation(path)
        assert found.array.dtype == np.uint8
        np.testing.assert_array_equal(found.array, sample.values())

    def test_scaling(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(), slope=0.5, inter=-1024)
        np.testing.assert_array_equal(read_image(path).array, sample.values() * 0.5 - 1024)

    @pytest.mark.parametrize("slope", [0, np.nan, np.inf])
    def test_no_slope_is_no_scaling(self, sample, tmp_path, slope):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(), slope=slope, inter=5)
        np.testing.assert_array_equal(read_image(path).array, sample.values())

    def test_slope_without_a_finite_intercept_is_an_error(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(), slope=2, inter=np.nan)
        with pytest.raises(DatasetError, match="its NIfTI header is not valid"):
            read_image(path)

    def test_scaling_is_computed_in_double_precision(self, sample, tmp_path):
        array = np.full(sample.shape, 2**24 + 1, dtype=np.int32)
        path = sample.write_nifti(tmp_path / "x.nii", array, slope=1, inter=-(2**24))
        assert np.unique(read_image(path).array).tolist() == [1]

    def test_nifti2(self, sample, tmp_path):
        nibabel.save(nibabel.Nifti2Image(sample.values(), sample.affine), tmp_path / "x.nii.gz")
        image = read_image(tmp_path / "x.nii.gz")
        np.testing.assert_array_equal(image.array, sample.values())
        np.testing.assert_array_equal(image.affine, sample.affine)
        assert image.header.nifti.version == 2

    def test_extensions_between_header_and_voxels_are_passed_over(self, sample, tmp_path):
        image = nibabel.Nifti1Image(sample.values(), sample.affine)
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"said" * 50))
        nibabel.save(image, tmp_path / "x.nii.gz")
        np.testing.assert_array_equal(read_image(tmp_path / "x.nii.gz").array, sample.values())

    def test_analyze(self, sample, tmp_path):
        image = nibabel.AnalyzeImage(sample.values(), np.diag([-2.0, 3.0, 4.0, 1.0]))
        nibabel.save(image, tmp_path / "x.hdr")
        for ending in (".hdr", ".img"):
            found = read_image(tmp_path / f"x{ending}")
            np.testing.assert_array_equal(found.array, sample.values())
            assert found.header.nifti is None
            np.testing.assert_allclose(found.affine[:3, :3], np.diag([-2.0, 3.0, 4.0]))


class TestShapes:
    def test_slice_gets_a_third_axis(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(shape=(5, 6)))
        image = read_image(path)
        assert image.array.shape == image.grid.shape == (5, 6, 1)
        assert image.header.shape == (5, 6)

    def test_line_gets_two(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(shape=(5,)))
        assert read_image(path).array.shape == (5, 1, 1)

    def test_axes_of_length_one_at_the_end_do_not_count(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values().reshape(5, 6, 7, 1, 1))
        image = read_image(path)
        np.testing.assert_array_equal(image.array, sample.values())
        assert image.header.shape == (5, 6, 7, 1, 1)

    def test_series_is_refused_as_an_image(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(shape=(3, 4, 5, 2)))
        message = r"x\.nii: holds a series of 2 volumes, shape \(3, 4, 5, 2\)"
        for read in (read_image, read_segmentation):
            with pytest.raises(DatasetError, match=message):
                read(path)

    def test_series_is_the_channels_of_one_case(self, sample, tmp_path):
        array = sample.values(shape=(3, 4, 5, 2))
        image = read_channels([sample.write_nifti(tmp_path / "x.nii", array, slope=2, inter=1)])
        assert image.array.shape == (2, 3, 4, 5)
        np.testing.assert_array_equal(image.array[1], array[..., 1] * 2 + 1)
        assert image.header.shape == image.grid.shape == (3, 4, 5)

    def test_five_axes_are_refused(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(shape=(3, 4, 5, 1, 2)))
        with pytest.raises(DatasetError, match="has 5 axes"):
            read_image(path)

    @pytest.mark.parametrize("opacity", [None, 255])
    def test_colours_are_channels(self, sample, tmp_path, opacity):
        path = write_colours(sample, tmp_path / "x.nii.gz", opacity)
        image = read_channels([path])
        assert image.array.shape == (3, *sample.shape)
        assert image.array[(slice(None), *sample.mark)].tolist() == [10, 20, 30]
        assert read_stored(path).array.shape == (*sample.shape, 3)

    def test_colours_are_no_label_and_no_single_image(self, sample, tmp_path):
        path = write_colours(sample, tmp_path / "x.nii")
        with pytest.raises(DatasetError, match=r"x\.nii: is an RGB label: .* Save it with one int"):
            read_segmentation(path)
        with pytest.raises(DatasetError, match=r"several values per voxel \(3, shape \(5, 6, 7, 3"):
            read_image(path)

    def test_colours_that_are_not_opaque_are_refused(self, sample, tmp_path):
        path = write_colours(sample, tmp_path / "x.nii", 254)
        with pytest.raises(DatasetError, match="210 of 210 pixels are not opaque"):
            read_channels([path])

    def test_series_in_colours_is_refused(self, sample, tmp_path):
        path = write_colours(sample, tmp_path / "x.nii", shape=(2, 5, 3, 2))
        with pytest.raises(DatasetError, match="a series of 2 volumes in colours"):
            read_channels([path])

    def test_values_that_are_no_real_numbers_are_refused(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii", np.zeros(sample.shape, "complex64"))
        with pytest.raises(DatasetError, match="holds complex values"):
            read_image(path)

    @pytest.mark.parametrize("dim", [(0,) * 8, (3, 5, 0, 7, 1, 1, 1, 1), (3, 5, -6, 7, 1, 1, 1, 1)])
    def test_impossible_shapes_are_refused(self, sample, tmp_path, dim):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(), dim=dim)
        with pytest.raises(DatasetError, match=r"x\.nii: its (header gives|NIfTI header is)"):
            read_image(path)


class TestDamage:
    """SimpleITK fills what is missing; nibabel reads what it needs and looks no further."""

    @pytest.mark.parametrize("kept", [1, 5, 18, 0.1, 0.3, 0.5, 0.9, -9, -8, -4, -1])
    def test_gz_cut_anywhere(self, sample, tmp_path, kept):
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 999, (20, 22, 24)).astype(np.int16)
        path = sample.write_nifti(tmp_path / "x.nii.gz", noise)
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else kept])
        with pytest.raises(DatasetError, match=r"x\.nii\.gz: .*copy or export it again"):
            read_image(path)
        with pytest.raises(DatasetError, match=r"x\.nii\.gz: .*copy or export it again"):
            read_segmentation(path)

    @pytest.mark.parametrize("position", [0, 30, 0.5, -6, -2])
    def test_gz_with_a_changed_byte(self, sample, tmp_path, position):
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 999, (20, 22, 24)).astype(np.int16)
        path = sample.write_nifti(tmp_path / "x.nii.gz", noise)
        content = bytearray(path.read_bytes())
        content[int(position * len(content)) if 0 < position < 1 else position] ^= 0x55
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"x\.nii\.gz: .*copy or export it again"):
            read_image(path)

    def test_gz_with_something_behind_it(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii.gz", sample.values())
        path.write_bytes(path.read_bytes() + b"more")
        with pytest.raises(DatasetError, match="the compressed data are broken"):
            read_image(path)

    def test_gz_whose_content_is_too_short(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii.gz", sample.values())
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-3]))
        with pytest.raises(DatasetError, match="3 of 420 bytes of voxel data are missing"):
            read_image(path)

    def test_gz_whose_content_is_too_long(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii.gz", sample.values())
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"12345"))
        with pytest.raises(DatasetError, match="5 bytes follow the voxel data; expected the 420"):
            read_image(path)

    @pytest.mark.parametrize("missing", [1, 100, 419])
    def test_nii_with_missing_voxels(self, sample, tmp_path, missing):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values())
        path.write_bytes(path.read_bytes()[:-missing])
        with pytest.raises(DatasetError, match=f"{missing} of 420 bytes of voxel data are missing"):
            read_image(path)

    @pytest.mark.parametrize("kept", [1, 4, 100, 347, 348, 352])
    def test_nii_cut_in_or_after_the_header(self, sample, tmp_path, kept):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values())
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(DatasetError, match=r"x\.nii: .*copy or export it again"):
            read_image(path)

    def test_nifti2_cut_in_the_header(self, sample, tmp_path):
        nibabel.save(nibabel.Nifti2Image(sample.values(), sample.affine), tmp_path / "x.nii")
        (tmp_path / "x.nii").write_bytes((tmp_path / "x.nii").read_bytes()[:400])
        with pytest.raises(DatasetError, match="its header has 400 bytes; expected 540"):
            read_image(tmp_path / "x.nii")

    def test_huge_shape_is_refused_before_memory_is_taken(self, sample, tmp_path):
        dim = (3, 32000, 32000, 32000, 1, 1, 1, 1)
        for name in ("x.nii", "x.nii.gz"):
            path = sample.write_nifti(tmp_path / name, sample.values(), dim=dim)
            with pytest.raises(DatasetError, match=r"of 65536000000000 bytes .* are missing"):
                read_image(path)

    @pytest.mark.parametrize("fields", [{"datatype": 9999}, {"vox_offset": np.inf}])
    def test_headers_that_make_no_sense(self, sample, tmp_path, fields):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(), **fields)
        with pytest.raises(DatasetError, match="its NIfTI header is not valid"):
            read_image(path)

    def test_wrong_endings_are_named(self, sample, tmp_path):
        packed = sample.write_nifti(tmp_path / "x.nii.gz", sample.values())
        packed = packed.rename(tmp_path / "packed.nii")
        with pytest.raises(DatasetError, match=r"gzip-compressed: name it \.nii\.gz"):
            read_image(packed)
        bare = sample.write_nifti(tmp_path / "x.nii", sample.values())
        bare = bare.rename(tmp_path / "bare.nii.gz")
        with pytest.raises(DatasetError, match=r"ends in \.gz and is not gzip-compressed"):
            read_image(bare)

    @pytest.mark.parametrize("lost", [".hdr", ".img"])
    def test_half_a_pair(self, sample, tmp_path, lost):
        nibabel.save(nibabel.Nifti1Pair(sample.values(), sample.affine), tmp_path / "x.img")
        (tmp_path / f"x{lost}").unlink()
        kept = {".hdr": ".img", ".img": ".hdr"}[lost]
        with pytest.raises(DatasetError, match=f"its other file x{lost} is missing"):
            read_image(tmp_path / f"x{kept}")

    def test_pair_cut_short(self, sample, tmp_path):
        nibabel.save(nibabel.Nifti1Pair(sample.values(), sample.affine), tmp_path / "x.img")
        (tmp_path / "x.img").write_bytes((tmp_path / "x.img").read_bytes()[:-7])
        with pytest.raises(DatasetError, match=r"x\.img: 7 of 420 bytes .* are missing"):
            read_image(tmp_path / "x.hdr")
