"""What read_image, read_channels and read_segmentation make of files, good and bad."""

import os

import numpy as np
import pytest
import SimpleITK

from medseg.errors import DatasetError, GeometryError
from medseg.geometry import Grid
from medseg.io.read import ENDINGS, read_channels, read_image, read_segmentation, split_ending


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.nii.gz", ("a", ".nii.gz")),
        ("a.b.nii", ("a.b", ".nii")),
        ("scan.seg.nrrd", ("scan.seg", ".nrrd")),
        ("UPPER.NII.GZ", ("UPPER", ".nii.gz")),
        ("\u5f71\u50cf_0000.mha", ("\u5f71\u50cf_0000", ".mha")),
        ("x.img", ("x", ".img")),
        ("Photo.JPEG", ("Photo", ".jpeg")),
        ("stack.ome.tiff", ("stack.ome", ".tiff")),
    ],
)
def test_split_ending(name, expected):
    assert split_ending(name) == expected


@pytest.mark.parametrize("name", ["a.gif", "a", "a.gz", "nii", "a.nii.zip", ""])
def test_unknown_ending_lists_the_known_ones(name):
    with pytest.raises(DatasetError, match="unknown ending") as caught:
        split_ending(name)
    assert all(ending in str(caught.value) for ending in ENDINGS)


@pytest.mark.parametrize(
    "read", [read_image, read_segmentation, lambda path: read_channels([path])]
)
class TestNoImage:
    def test_missing_file(self, tmp_path, read):
        with pytest.raises(DatasetError, match=r"x\.nii\.gz: no such file"):
            read(tmp_path / "x.nii.gz")

    def test_folder_with_the_name_of_an_image(self, tmp_path, read):
        (tmp_path / "x.nii.gz").mkdir()
        with pytest.raises(DatasetError, match=r"x\.nii\.gz: is a folder"):
            read(tmp_path / "x.nii.gz")

    def test_unknown_ending(self, tmp_path, read):
        (tmp_path / "x.dcm").write_bytes(b"DICM")
        with pytest.raises(DatasetError, match=r"'x\.dcm' has an unknown ending"):
            read(tmp_path / "x.dcm")

    @pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".gipl"])
    def test_empty_file(self, tmp_path, read, ending):
        (tmp_path / f"x{ending}").touch()
        with pytest.raises(DatasetError, match="the file is empty"):
            read(tmp_path / f"x{ending}")

    def test_file_that_may_not_be_opened(self, tmp_path, read, sample, monkeypatch):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values())

        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("medseg.io.nifti._open", refuse)
        with pytest.raises(DatasetError, match=r"x\.nii: cannot be read \(Permission denied\)"):
            read(path)

    def test_text_names_are_accepted(self, sample, tmp_path, read):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(np.uint8))
        assert read(str(path)).grid.shape == sample.shape


class TestImage:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_values_that_are_not_finite_are_counted(self, sample, tmp_path, bad):
        array = sample.values(np.float32)
        array[0, 1, 2:4] = bad
        path = sample.write_nifti(tmp_path / "x.nii", array)
        counts = "2 voxels are NaN and 0 inf" if np.isnan(bad) else "0 voxels are NaN and 2 inf"
        with pytest.raises(DatasetError, match=rf"x\.nii: {counts}"):
            read_image(path)

    def test_both_infinities_do_not_cancel(self, sample, tmp_path):
        array = sample.values(np.float32)
        array[0, 0, 0], array[1, 1, 1] = np.inf, -np.inf
        with pytest.raises(DatasetError, match="0 voxels are NaN and 2 infinite"):
            read_image(sample.write_nifti(tmp_path / "x.nii", array))

    def test_values_beyond_float32_are_no_finite_values(self, sample, tmp_path):
        array = sample.values(np.float64)
        array[2, 2, 2] = 1e300
        with pytest.raises(DatasetError, match="0 voxels are NaN and 1 infinite"):
            read_image(sample.write_nifti(tmp_path / "x.nii", array))

    def test_memory_runs_along_the_first_axis(self, sample, tmp_path):
        """So that the network's axis order (K, J, I) is contiguous."""
        path = sample.write_nifti(tmp_path / "x.nii", sample.values())
        assert read_image(path).array.flags.f_contiguous
        assert read_channels([path, path]).array.transpose(0, 3, 2, 1).flags.c_contiguous

    def test_result_owns_its_memory(self, sample, tmp_path):
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(np.float32))
        image = read_image(path)
        path.write_bytes(bytes(1000))
        np.testing.assert_array_equal(image.array, sample.values())

    @pytest.mark.parametrize("ending", [".nrrd", ".mha"])
    def test_slice_through_itk(self, tmp_path, ending):
        array = np.arange(30, dtype=np.int16).reshape(6, 5)
        image = SimpleITK.GetImageFromArray(array)
        image.SetSpacing((0.5, 2.0))
        image.SetOrigin((3.0, -4.0))
        image.SetDirection((0.0, -1.0, 1.0, 0.0))
        SimpleITK.WriteImage(image, str(tmp_path / f"x{ending}"))
        found = read_image(tmp_path / f"x{ending}")
        np.testing.assert_array_equal(found.array[:, :, 0], array.T)
        assert found.header.shape == (5, 6)
        expected = [[0, 2.0, 0, -3], [-0.5, 0, 0, 4], [0, 0, 1, 0], [0, 0, 0, 1]]
        np.testing.assert_allclose(found.affine, expected)

    @pytest.mark.parametrize("ending", [".nrrd", ".mha"])
    def test_several_values_per_voxel_through_itk(self, tmp_path, ending):
        rgb = SimpleITK.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
        SimpleITK.WriteImage(rgb, str(tmp_path / f"x{ending}"))
        with pytest.raises(DatasetError, match=rf"x\{ending}: holds several values per voxel"):
            read_image(tmp_path / f"x{ending}")

    @pytest.mark.parametrize("ending", [".nrrd", ".mha"])
    @pytest.mark.parametrize("kind", ["uint8", "int16"])
    def test_vectors_through_itk_are_channels(self, sample, tmp_path, ending, kind):
        array = sample.values(kind, (6, 5, 4, 3))
        vectors = SimpleITK.GetImageFromArray(array.transpose(2, 1, 0, 3).copy(), isVector=True)
        vectors.SetSpacing((2.0, 3.0, 4.0))
        path = tmp_path / f"x{ending}"
        SimpleITK.WriteImage(vectors, str(path))
        image = read_channels([path])
        np.testing.assert_array_equal(image.array, array.transpose(3, 0, 1, 2))
        assert image.grid.spacing == (2, 3, 4)
        words = "is an RGB label" if kind == "uint8" else "is 3 channels: it holds 3 values"
        with pytest.raises(DatasetError, match=words):
            read_segmentation(path)

    @pytest.mark.parametrize("ending", [".nrrd", ".mha"])
    def test_fourth_axis_through_itk_is_that_of_channels(self, sample, tmp_path, ending):
        array = sample.values(np.float32, (6, 5, 4, 2))
        series = SimpleITK.GetImageFromArray(array.transpose(3, 2, 1, 0).copy(), isVector=False)
        series.SetSpacing((2.0, 3.0, 4.0, 5.0))
        series.SetOrigin((-1.0, -2.0, 3.0, 7.0))
        path = tmp_path / f"x{ending}"
        SimpleITK.WriteImage(series, str(path))
        image = read_channels([path])
        np.testing.assert_array_equal(image.array, array.transpose(3, 0, 1, 2))
        expected = np.diag([-2.0, -3.0, 4.0, 1.0])
        expected[:3, 3] = (1, 2, 3)
        np.testing.assert_allclose(image.affine, expected)
        assert image.header.shape == (6, 5, 4)
        with pytest.raises(DatasetError, match=rf"x\{ending}: holds a series of 2 volumes"):
            read_image(path)

    def test_five_axes_through_itk(self, tmp_path):
        image = SimpleITK.Image((2, 3, 4, 5, 6), SimpleITK.sitkUInt8)
        SimpleITK.WriteImage(image, str(tmp_path / "x.mha"))
        with pytest.raises(DatasetError, match=r"x\.mha: has 5 axes, shape \(2, 3, 4, 5, 6\)"):
            read_image(tmp_path / "x.mha")


class TestSegmentation:
    @pytest.mark.parametrize(
        ("stored", "largest", "expected"),
        [
            ("uint8", 255, "uint8"),
            ("int16", 3, "uint8"),
            ("int16", 256, "uint16"),
            ("int64", 70000, "uint32"),
            ("float32", 2, "uint8"),
            ("float64", 65535, "uint16"),
            (">f8", 300, "uint16"),
        ],
    )
    def test_smallest_unsigned_type(self, sample, tmp_path, stored, largest, expected):
        labels = np.zeros(sample.shape, dtype=stored)
        labels[sample.mark], labels[0, 0, 0] = largest, 1
        found = read_segmentation(sample.write_nifti(tmp_path / "x.nii.gz", labels))
        assert found.array.dtype == expected
        np.testing.assert_array_equal(found.array, labels)

    def test_scaled_labels(self, sample, tmp_path):
        """Scaling in single precision leaves 2.9999998, which is 3."""
        labels = np.zeros(sample.shape, dtype=np.uint8)
        labels[sample.mark] = 90
        path = sample.write_nifti(tmp_path / "x.nii", labels, slope=1 / 30, inter=0)
        found = read_segmentation(path)
        assert found.array.dtype == np.uint8
        assert np.unique(found.array).tolist() == [0, 3]
        assert found.array[sample.mark] == 3

    def test_large_integers_are_exact(self, sample, tmp_path):
        labels = np.full(sample.shape, 2**24 + 1, dtype=np.int32)
        found = read_segmentation(sample.write_nifti(tmp_path / "x.nii", labels))
        assert np.unique(found.array).tolist() == [2**24 + 1]

    def test_values_that_are_no_integers(self, sample, tmp_path):
        labels = np.ones(sample.shape, dtype=np.float32)
        labels[1, 1, :3] = 0.4375
        path = sample.write_nifti(tmp_path / "x.nii", labels)
        message = r"x\.nii: 3 of 210 voxels are no integers \(for example 0\.4375\)"
        with pytest.raises(DatasetError, match=message):
            read_segmentation(path)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_values_that_are_not_finite(self, sample, tmp_path, bad):
        labels = np.ones(sample.shape, dtype=np.float32)
        labels[1, 1, 1] = bad
        with pytest.raises(DatasetError, match="1 of 210 voxels are no integers"):
            read_segmentation(sample.write_nifti(tmp_path / "x.nii", labels))

    @pytest.mark.parametrize(
        ("stored", "values", "expected"),
        [
            ("int8", (-1, 3), "int8"),
            ("float32", (-3, 127), "int8"),
            ("int32", (-1, 128), "int16"),
            ("float64", (-129, 0), "int16"),
            ("int64", (-1, 40000), "int32"),
            (">i4", (-(2**31), 2**31 - 1), "int32"),
            ("uint32", (7, 2**32 - 1), "uint32"),
            ("float64", (0, 2**32 - 1), "uint32"),
        ],
    )
    def test_negative_and_large_values(self, sample, tmp_path, stored, values, expected):
        labels = np.zeros(sample.shape, dtype=stored)
        labels[sample.mark], labels[0, 0, 0] = values
        found = read_segmentation(sample.write_nifti(tmp_path / "x.nii.gz", labels))
        assert found.array.dtype == expected
        np.testing.assert_array_equal(found.array, labels)

    @pytest.mark.parametrize(
        ("stored", "values"),
        [("int64", (0, 2**32)), ("float64", (-(2**31) - 1, 0)), ("int64", (-1, 2**31))],
    )
    def test_values_beyond_32_bits(self, sample, tmp_path, stored, values):
        labels = np.zeros(sample.shape, dtype=stored)
        labels[sample.mark], labels[0, 0, 0] = values
        with pytest.raises(DatasetError, match=rf"from {min(values)} to {max(values)}; .* 32 bits"):
            read_segmentation(sample.write_nifti(tmp_path / "x.nii", labels))

    def test_large_float_labels_go_slab_by_slab(self, sample, tmp_path, monkeypatch):
        """The same result, and the same count of wrong voxels, whatever the slabs."""
        monkeypatch.setattr("medseg.io.read._SLAB_VOXELS", 61)
        labels = sample.values(np.float32)
        path = sample.write_nifti(tmp_path / "x.nii", labels)
        np.testing.assert_array_equal(read_segmentation(path).array, labels)
        labels[1, 1, 1], labels[2, 2, 5] = 0.25, 0.75
        path = sample.write_nifti(tmp_path / "x.nii", labels)
        with pytest.raises(DatasetError, match=r"2 of 210 .* \(for example 0\.25\)"):
            read_segmentation(path)

    def test_through_itk(self, sample, tmp_path):
        labels = (sample.values() % 4).astype(np.int32)
        found = read_segmentation(sample.write_itk(tmp_path / "x.seg.nrrd", labels, compress=True))
        assert found.array.dtype == np.uint8
        np.testing.assert_array_equal(found.array, labels)


class TestChannels:
    def test_channels_are_stacked_in_order(self, sample, tmp_path):
        first = sample.write_nifti(tmp_path / "a_0000.nii.gz", sample.values(), sample.oblique())
        second = sample.write_nifti(
            tmp_path / "a_0001.nii.gz", sample.values(), sample.oblique(), slope=-2, inter=1
        )
        third = sample.write_itk(tmp_path / "a_0002.mha", sample.values(np.float64) / 8)
        image = read_channels([first, second, third])
        assert image.array.dtype == np.float32
        assert image.array.shape == (3, *sample.shape)
        np.testing.assert_array_equal(image.array[0], sample.values())
        np.testing.assert_array_equal(image.array[1], 1 - 2 * sample.values())
        np.testing.assert_array_equal(image.array[2], sample.values() / 8)
        assert image.header.nifti is not None
        assert image.header.ending == ".nii.gz"
        assert isinstance(image.grid, Grid)

    def test_shapes_that_differ(self, sample, tmp_path):
        first = sample.write_nifti(tmp_path / "a_0000.nii", sample.values())
        second = sample.write_nifti(tmp_path / "a_0001.nii", sample.values(shape=(5, 6, 8)))
        message = (
            r"a_0001\.nii does not lie on the grid of .*a_0000\.nii: its shape is \(5, 6, 8\), "
            r"expected \(5, 6, 7\).*resample this channel"
        )
        with pytest.raises(GeometryError, match=message):
            read_channels([first, second])

    def test_grids_that_differ(self, sample, tmp_path):
        affine = sample.oblique(origin=(-31.5, 13.25, 40.0))
        first = sample.write_nifti(tmp_path / "a_0000.nii", sample.values(), sample.oblique())
        second = sample.write_nifti(tmp_path / "a_0001.nii", sample.values(), affine)
        with pytest.raises(GeometryError, match=r"a_0001\.nii does not lie .* voxels away"):
            read_channels([first, second])

    def test_grids_that_differ_by_rounding(self, sample, tmp_path):
        affine = sample.oblique(origin=(-31.501, 12.25, 40.0))
        first = sample.write_nifti(tmp_path / "a_0000.nii", sample.values(), sample.oblique())
        second = sample.write_nifti(tmp_path / "a_0001.nii", sample.values(), affine)
        assert read_channels([first, second]).array.shape == (2, *sample.shape)

    def test_the_damaged_channel_is_named(self, sample, tmp_path):
        first = sample.write_nifti(tmp_path / "a_0000.nii", sample.values(np.float32))
        array = sample.values(np.float32)
        array[0, 0, 0] = np.nan
        second = sample.write_nifti(tmp_path / "a_0001.nii", array)
        with pytest.raises(DatasetError, match=r"a_0001\.nii: 1 voxels are NaN"):
            read_channels([first, second])
        os.truncate(second, 500)
        with pytest.raises(DatasetError, match=r"a_0001\.nii: .* missing"):
            read_channels([first, second])

    def test_the_damaged_volume_of_a_series_is_named(self, sample, tmp_path):
        array = sample.values(np.float32, (3, 4, 5, 2))
        array[0, 0, 0, 1] = np.inf
        path = sample.write_nifti(tmp_path / "x.nii", array)
        with pytest.raises(DatasetError, match=r"x\.nii \(channel 1\): 0 voxels are NaN and 1 inf"):
            read_channels([path])

    def test_files_of_one_and_of_several_channels(self, sample, tmp_path):
        """Whatever their order, the channels follow one another as the files do."""
        series = sample.values(np.int16, (*sample.shape, 3))
        several = sample.write_nifti(tmp_path / "a.nii", series)
        one = sample.write_nifti(tmp_path / "b.nii", sample.values() + 1000)
        for paths in ([several, one], [one, several], [one, several, one], [several, several]):
            expected = [
                channel
                for path in paths
                for channel in (
                    series.transpose(3, 0, 1, 2) if path == several else [sample.values() + 1000]
                )
            ]
            found = read_channels(paths).array
            np.testing.assert_array_equal(found, np.stack(expected))
            assert found.transpose(0, 3, 2, 1).flags.c_contiguous

    def test_scaling_goes_slab_by_slab(self, sample, tmp_path, monkeypatch):
        monkeypatch.setattr("medseg.io.read._SLAB_VOXELS", 61)
        path = sample.write_nifti(tmp_path / "x.nii", sample.values(), slope=0.5, inter=-7)
        np.testing.assert_array_equal(read_channels([path]).array[0], sample.values() * 0.5 - 7)

    def test_no_files(self):
        with pytest.raises(DatasetError, match="got no image files"):
            read_channels([])
