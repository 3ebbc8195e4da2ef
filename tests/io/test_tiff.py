"""TIFF: pages, packings, meanings and metadata, and that no damage goes unnoticed."""

import itertools
import struct

import numpy as np
import pytest
import SimpleITK
import tifffile
from PIL import Image as Pillow

from medseg.errors import DatasetError, GeometryError
from medseg.geometry import Grid
from medseg.io.image import Header
from medseg.io.read import read_channels, read_image, read_segmentation, read_stored
from medseg.io.write import write_map, write_segmentation

PAGES, ROWS, COLUMNS = 4, 5, 7
MARK = (5, 1, 2)
"""Column, row, page."""


def stack(dtype=np.uint16):
    """Return (pages, rows, columns), no voxel like another, negative ones where there can be."""
    array = np.arange(PAGES * ROWS * COLUMNS).reshape(PAGES, ROWS, COLUMNS)
    return (array - (50 if np.dtype(dtype).kind != "u" else 0)).astype(dtype)


def write(path, array, **options):
    tifffile.imwrite(path, array, **{"photometric": "minisblack", "metadata": None, **options})
    return path


class StackContract:
    """Pages are K, rows are J, columns are I; values as stored."""

    def write(self, path, array):
        raise NotImplementedError

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
    def test_values_and_type_come_as_stored(self, tmp_path, dtype):
        stored = read_stored(self.write(tmp_path / "\u5f71 x.tif", stack(dtype)))
        assert stored.array.dtype == dtype
        np.testing.assert_array_equal(stored.array, stack(dtype).transpose(2, 1, 0))
        assert stored.header.shape == (COLUMNS, ROWS, PAGES)
        assert (stored.header.ending, stored.header.has_spacing) == (".tif", False)
        np.testing.assert_array_equal(stored.header.affine, np.eye(4))

    def test_marked_voxel_lies_at_its_column_row_and_page(self, tmp_path):
        array = np.zeros((PAGES, ROWS, COLUMNS), np.uint8)
        array[MARK[2], MARK[1], MARK[0]] = 9
        found = read_segmentation(self.write(tmp_path / "x.tiff", array))
        assert np.argwhere(found.array).tolist() == [list(MARK)]
        assert found.header.ending == ".tiff"

    def test_cut_anywhere(self, tmp_path):
        """All but the last bytes matter: there some programs fill up to an even address."""
        rng = np.random.default_rng(0)
        array = rng.integers(0, 256, (6, 20, 22)).astype(np.uint8)
        path = self.write(tmp_path / "x.tif", array)
        content = path.read_bytes()
        for kept in (*range(1, 20), *range(20, len(content) - 16, 97), len(content) - 17):
            path.write_bytes(content[:kept])
            with pytest.raises(DatasetError, match=r"x\.tif: .*copy or export it again"):
                read_stored(path)


class TestPlain(StackContract):
    def write(self, path, array):
        return write(path, array)

    @pytest.mark.parametrize("dtype", ["int8", "int16", "uint32", "float64", "int64", "float16"])
    def test_rarer_types(self, tmp_path, dtype):
        stored = read_stored(self.write(tmp_path / "x.tif", stack(dtype)))
        assert stored.array.dtype == dtype
        np.testing.assert_array_equal(stored.array, stack(dtype).transpose(2, 1, 0))


class TestBigEndian(StackContract):
    def write(self, path, array):
        return write(path, array, byteorder=">")

    def test_values_and_type_come_as_stored(self, tmp_path):
        for dtype in ("uint16", "float32"):
            path = self.write(tmp_path / "x.tif", stack(dtype))
            np.testing.assert_array_equal(read_image(path).array, stack(dtype).transpose(2, 1, 0))


class TestBigTiff(StackContract):
    def write(self, path, array):
        return write(path, array, bigtiff=True)


class TestBigEndianBigTiff(TestBigEndian):
    def write(self, path, array):
        return write(path, array, bigtiff=True, byteorder=">", compression="zlib")


class TestDeflate(StackContract):
    def write(self, path, array):
        return write(path, array, compression="zlib")


class TestDeflateWithPredictor(StackContract):
    def write(self, path, array):
        predictor = array.dtype.kind != "f"
        return write(path, array, compression="zlib", predictor=predictor, rowsperstrip=2)


class TestDeflatedTiles(StackContract):
    def write(self, path, array):
        return write(path, array, compression="zlib", tile=(16, 16))


class TestPackBits(StackContract):
    def write(self, path, array):
        image = [Pillow.fromarray(page) for page in array]
        image[0].save(path, save_all=True, append_images=image[1:], compression="packbits")
        return path


class TestLzw(TestPackBits):
    def write(self, path, array):
        image = [Pillow.fromarray(page) for page in array]
        image[0].save(path, save_all=True, append_images=image[1:], compression="tiff_lzw")
        return path


class TestLzwWithPredictor(TestPackBits):
    def write(self, path, array):
        image = [Pillow.fromarray(page) for page in array]
        options = {} if array.dtype.kind == "f" else {"tiffinfo": {317: 2}}
        image[0].save(
            path, save_all=True, append_images=image[1:], compression="tiff_lzw", **options
        )
        return path


class TestWrittenByItk(StackContract):
    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
    def test_values_and_type_come_as_stored(self, tmp_path, dtype):
        path = self.write(tmp_path / "x.tif", stack(dtype))
        stored = read_stored(path)
        assert stored.array.dtype == dtype
        np.testing.assert_array_equal(stored.array, stack(dtype).transpose(2, 1, 0))
        itk = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
        np.testing.assert_array_equal(stored.array, itk.transpose(2, 1, 0))

    def write(self, path, array):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path), True)
        return path


class TestLzwDamage:
    def test_data_that_are_no_lzw(self, tmp_path):
        path = TestLzw().write(tmp_path / "x.tif", stack(np.uint8))
        with tifffile.TiffFile(path) as file:
            offset, length = file.pages[1].dataoffsets[0], file.pages[1].databytecounts[0]
        content = bytearray(path.read_bytes())
        content[offset : offset + length] = b"\xff" * length
        path.write_bytes(content)
        with pytest.raises(DatasetError, match="the compressed data are broken"):
            read_stored(path)

    def test_many_strips_and_one_bit(self, tmp_path):
        """Rows of one bit per pixel fill whole bytes."""
        rng = np.random.default_rng(0)
        mask = rng.random((700, 1003)) < 0.5
        Pillow.fromarray(mask).save(tmp_path / "x.tif", compression="tiff_lzw")
        found = read_segmentation(tmp_path / "x.tif")
        assert found.array.dtype == np.uint8
        np.testing.assert_array_equal(found.array[:, :, 0], mask.T)

    @pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
    def test_large_pictures_have_many_strips(self, tmp_path, mode):
        rng = np.random.default_rng(0)
        shape = (900, 701, 3) if mode == "RGB" else (900, 701)
        array = rng.integers(0, 256, shape).astype(np.uint16 if mode == "I;16" else np.uint8)
        Pillow.fromarray(array).save(tmp_path / "x.tif", compression="tiff_lzw")
        with tifffile.TiffFile(tmp_path / "x.tif") as file:
            assert len(file.pages[0].dataoffsets) > 1
        found = read_stored(tmp_path / "x.tif").array[:, :, 0]
        np.testing.assert_array_equal(found, np.swapaxes(array, 0, 1))


class TestDamage:
    def test_fewer_pages_are_noticed(self, tmp_path):
        """Each page behind the one before; cut between two, the rest is a shorter stack."""
        pages = [Pillow.fromarray(page) for page in stack(np.uint8)]
        pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
        with tifffile.TiffFile(tmp_path / "x.tif") as file:
            third = file.pages[2].offset
        content = (tmp_path / "x.tif").read_bytes()
        (tmp_path / "x.tif").write_bytes(content[: third - 1])
        with pytest.raises(DatasetError, match=r"a part of it is missing \(cut short\)"):
            read_stored(tmp_path / "x.tif")

    def test_pages_in_a_circle(self, tmp_path):
        path = write(tmp_path / "x.tif", stack()[:1])
        content = bytearray(path.read_bytes())
        first = struct.unpack("<I", content[4:8])[0]
        count = struct.unpack("<H", content[first : first + 2])[0]
        content[first + 2 + 12 * count : first + 6 + 12 * count] = struct.pack("<I", first)
        path.write_bytes(content)
        with pytest.raises(DatasetError, match="its pages lead round in a circle"):
            read_stored(path)

    def test_more_fields_than_any_file_holds(self, tmp_path):
        path = write(tmp_path / "x.tif", stack(), bigtiff=True)
        content = bytearray(path.read_bytes())
        first = struct.unpack("<Q", content[8:16])[0]
        content[first : first + 8] = struct.pack("<Q", 2**63)
        path.write_bytes(content)
        with pytest.raises(DatasetError, match="a part of it is missing"):
            read_stored(path)

    def test_no_page_at_all(self, tmp_path):
        (tmp_path / "x.tif").write_bytes(b"II*\0" + bytes(12))
        with pytest.raises(DatasetError, match="holds no picture"):
            read_stored(tmp_path / "x.tif")

    def test_any_other_content(self, tmp_path):
        (tmp_path / "x.tif").write_bytes(b"this is not an image\n" * 40)
        with pytest.raises(DatasetError, match="does not begin as a TIFF file does"):
            read_stored(tmp_path / "x.tif")

    def test_tags_that_make_no_sense(self, tmp_path):
        path = write(tmp_path / "x.tif", stack()[0], compression="zlib")
        with tifffile.TiffFile(path, mode="r+") as file:
            file.pages[0].tags["StripByteCounts"].overwrite(3)
        with pytest.raises(DatasetError, match=r"x\.tif: .*copy or export it again"):
            read_stored(path)

    def test_bomb(self, tmp_path):
        path = write(tmp_path / "x.tif", stack(np.uint8)[0], compression="zlib")
        with tifffile.TiffFile(path, mode="r+") as file:
            file.pages[0].tags["ImageWidth"].overwrite(60000)
            file.pages[0].tags["ImageLength"].overwrite(60000)
        with pytest.raises(DatasetError, match="bytes cannot hold 3600000000 values"):
            read_stored(path)

    def test_empty_part(self, tmp_path):
        """Elsewhere that means: all zero."""
        path = write(tmp_path / "x.tif", stack()[0], compression="zlib", rowsperstrip=3)
        with tifffile.TiffFile(path, mode="r+") as file:
            file.pages[0].tags["StripByteCounts"].overwrite((0, 9))
        with pytest.raises(DatasetError, match="a part of a page is empty"):
            read_stored(path)


class TestMeaning:
    def test_flat_picture(self, tmp_path):
        stored = read_stored(write(tmp_path / "x.tif", stack()[1]))
        assert (stored.array.shape, stored.header.shape) == ((7, 5, 1), (7, 5))
        np.testing.assert_array_equal(stored.array[:, :, 0], stack()[1].T)

    @pytest.mark.parametrize("planar", ["contig", "separate"])
    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
    @pytest.mark.parametrize("opacity", [False, True])
    def test_colours(self, tmp_path, planar, dtype, opacity):
        array = np.stack([stack(dtype)[k] for k in range(3)], -1)
        opaque = 1 if dtype == "float32" else np.iinfo(dtype).max
        full = [array, np.full((ROWS, COLUMNS, 1), opaque, dtype)] if opacity else [array]
        values = np.concatenate(full, -1)
        path = write(
            tmp_path / "x.tif",
            values if planar == "contig" else np.moveaxis(values, -1, 0),
            photometric="rgb",
            planarconfig=planar,
            **({"extrasamples": ["unassalpha"]} if opacity else {}),
        )
        stored = read_stored(path)
        assert (stored.fourth, stored.array.dtype) == ("colours", dtype)
        np.testing.assert_array_equal(stored.array[:, :, 0], array.transpose(1, 0, 2))
        with pytest.raises(DatasetError, match=r"x\.tif: is an RGB label"):
            read_segmentation(path)

    def test_stack_in_colours(self, tmp_path):
        array = np.stack([stack(np.uint8), stack(np.uint8) + 1, stack(np.uint8) + 2], -1)
        image = read_channels([write(tmp_path / "x.tif", array, photometric="rgb")])
        np.testing.assert_array_equal(image.array, array.transpose(3, 2, 1, 0))

    @pytest.mark.parametrize("value", [255, 254])
    def test_grey_with_opacity(self, tmp_path, value):
        array = np.stack([stack(np.uint8)[0], np.full((ROWS, COLUMNS), 255, np.uint8)], -1)
        array[2, 3, 1] = value
        Pillow.fromarray(array).save(tmp_path / "x.tif")
        if value == 255:
            found = read_image(tmp_path / "x.tif").array[:, :, 0]
            np.testing.assert_array_equal(found, array[..., 0].T)
        else:
            with pytest.raises(DatasetError, match="1 of 35 pixels are not opaque"):
                read_image(tmp_path / "x.tif")

    def test_a_fourth_sample_of_no_declared_meaning_is_a_channel(self, tmp_path):
        array = np.stack([stack(np.uint8)[k] for k in range(4)], -1)
        path = write(tmp_path / "x.tif", array, photometric="rgb", extrasamples=["unspecified"])
        assert read_channels([path]).array.shape == (4, COLUMNS, ROWS, 1)

    @pytest.mark.parametrize("photometric", ["miniswhite", "minisblack"])
    def test_values_count_and_not_how_they_are_shown(self, tmp_path, photometric):
        path = write(tmp_path / "x.tif", stack(np.uint8), photometric=photometric)
        np.testing.assert_array_equal(read_image(path).array, stack(np.uint8).T)

    def test_index_counts_where_there_is_a_palette(self, tmp_path):
        colormap = np.arange(3 * 256, dtype=np.uint16).reshape(3, 256)
        labels = stack(np.uint8)[0] % 3
        path = write(tmp_path / "x.tif", labels, photometric="palette", colormap=colormap)
        np.testing.assert_array_equal(read_segmentation(path).array[:, :, 0], labels.T)
        assert read_channels([path]).array.shape == (1, COLUMNS, ROWS, 1)

    @pytest.mark.parametrize("orientation", [1, 3, 6])
    def test_pictures_to_be_shown_turned(self, tmp_path, orientation):
        path = write(tmp_path / "x.tif", stack()[0], extratags=[(274, "H", 1, orientation, True)])
        if orientation == 1:
            assert read_stored(path).array.shape == (7, 5, 1)
        else:
            with pytest.raises(DatasetError, match=f"orientation tag is {orientation}"):
                read_stored(path)

    def test_pictures_of_several_sizes(self, tmp_path):
        with tifffile.TiffWriter(tmp_path / "x.tif") as file:
            file.write(stack()[0], photometric="minisblack", metadata=None)
            file.write(stack()[0, :3], photometric="minisblack", metadata=None)
        with pytest.raises(DatasetError, match=r"2 images of different .*\(5, 7\), \(3, 7\)"):
            read_stored(tmp_path / "x.tif")

    def test_what_is_not_read_is_named_all_at_once(self, tmp_path):
        path = tmp_path / "x.tif"
        rgb = np.stack([stack(np.uint8)[0]] * 3, -1)
        Pillow.fromarray(rgb).convert("CMYK").save(path, compression="jpeg")
        message = r"colours are .*SEPARATED.*packed with .*JPEG.*Save it again without compression"
        with pytest.raises(DatasetError, match=message):
            read_stored(path)

    def test_types_that_are_not_read(self, tmp_path):
        path = write(tmp_path / "x.tif", stack(np.complex64))
        with pytest.raises(DatasetError, match="complex64 values; expected real numbers"):
            read_stored(path)
        path = write(tmp_path / "x.tif", stack(np.uint16)[0])
        with tifffile.TiffFile(path, mode="r+") as file:
            file.pages[0].tags["BitsPerSample"].overwrite(12)
        with pytest.raises(DatasetError, match="12 bits per value; expected 1, 8, 16, 32 or 64"):
            read_stored(path)


class TestMetadata:
    """ImageJ and OME say which axis is which, and how large a voxel is."""

    @pytest.mark.parametrize(
        ("unit", "factor"),
        [("mm", 1), ("um", 1e-3), ("\\u00B5m", 1e-3), ("cm", 10), ("inch", 25.4)],
    )
    def test_imagej_voxel_size(self, tmp_path, unit, factor):
        metadata = {"axes": "ZYX", "spacing": 3.0, "unit": unit}
        path = tmp_path / "x.tif"
        tifffile.imwrite(path, stack(), imagej=True, resolution=(4, 2), metadata=metadata)
        image = read_image(path)
        np.testing.assert_array_equal(image.array, stack().T)
        np.testing.assert_allclose(image.grid.spacing, np.array([0.25, 0.5, 3.0]) * factor)
        assert image.header.has_spacing

    def test_imagej_flat_picture(self, tmp_path):
        metadata = {"axes": "YX", "unit": "mm"}
        tifffile.imwrite(
            tmp_path / "x.tif", stack()[0], imagej=True, resolution=(4, 2), metadata=metadata
        )
        assert read_image(tmp_path / "x.tif").grid.spacing == (0.25, 0.5, 0.5)

    @pytest.mark.parametrize(
        ("resolution", "unit"), [((4, 2), "pixel"), ((4, 2), None), ((0, 2), "mm")]
    )
    def test_imagej_without_a_unit_of_length(self, tmp_path, resolution, unit):
        metadata = {"axes": "ZYX", "spacing": 3.0, **({"unit": unit} if unit else {})}
        path = tmp_path / "x.tif"
        tifffile.imwrite(path, stack(), imagej=True, resolution=resolution, metadata=metadata)
        assert not read_image(path).header.has_spacing

    @pytest.mark.parametrize(
        ("sizes", "expected"),
        [
            ({"X": 0.5, "Y": 0.25, "Z": 2}, (0.0005, 0.00025, 0.002)),
            ({"X": 0.5, "Y": 0.25, "Z": 2, "XUnit": "mm", "YUnit": "mm", "ZUnit": "cm"},
             (0.5, 0.25, 20)),
            ({"X": 0.5, "Y": 0.25}, None),
            ({"X": 0.5, "Y": 0.25, "Z": 2, "ZUnit": "pixel"}, None),
            ({}, None),
        ],
    )  # fmt: skip
    def test_ome_voxel_size(self, tmp_path, sizes, expected):
        metadata = {"axes": "ZYX", **{f"PhysicalSize{name}": v for name, v in sizes.items()}}
        path = tmp_path / "x.ome.tif"
        tifffile.imwrite(path, stack(), metadata=metadata, photometric="minisblack")
        image = read_image(path)
        np.testing.assert_array_equal(image.array, stack().T)
        np.testing.assert_allclose(image.grid.spacing, expected or (1, 1, 1))
        assert image.header.has_spacing == (expected is not None)

    def test_dots_per_inch_are_no_voxel_size(self, tmp_path):
        path = write(tmp_path / "x.tif", stack(), resolution=(300, 300), resolutionunit="INCH")
        assert not read_image(path).header.has_spacing

    @pytest.mark.parametrize(
        ("kind", "axes"),
        [
            ("ome", "CZYX"),
            *itertools.product(("imagej", "ome"), ("CYX", "ZCYX", "TZYX", "ZYX", "TYX")),
        ],
    )
    def test_which_axis_is_which(self, tmp_path, kind, axes):
        """Depth is K; channels, or time beside depth, are the fourth axis."""
        lengths = {"T": 3, "Z": PAGES, "C": 2, "Y": ROWS, "X": COLUMNS}
        shape = [lengths[axis] for axis in axes]
        array = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
        path = tmp_path / ("x.ome.tif" if kind == "ome" else "x.tif")
        tifffile.imwrite(
            path, array, imagej=kind == "imagej", metadata={"axes": axes},
            photometric="minisblack",
        )  # fmt: skip
        depth = "Z" if "Z" in axes else "T" if "T" in axes else None
        channel = next((a for a in axes if a not in ("Y", "X", depth)), None)
        found = read_channels([path]).array
        assert found.shape == (
            lengths.get(channel, 1), COLUMNS, ROWS, lengths[depth] if depth else 1
        )  # fmt: skip
        for index in np.ndindex(*shape):
            at = dict(zip(axes, index, strict=True))
            here = found[at.get(channel, 0), at["X"], at["Y"], at[depth] if depth else 0]
            assert here == array[index]

    def test_too_many_axes(self, tmp_path):
        array = np.zeros((2, 3, 4, 5, 7), np.uint8)
        tifffile.imwrite(tmp_path / "x.tif", array, imagej=True)
        with pytest.raises(DatasetError, match="has the axes TZCYX, shape"):
            read_stored(tmp_path / "x.tif")

    def test_page_in_another_file(self, tmp_path):
        """An OME file may refer to pages that lie elsewhere."""
        path = tmp_path / "x.ome.tif"
        tifffile.imwrite(
            path, stack(), metadata={"axes": "ZYX"}, photometric="minisblack", compression="zlib"
        )
        description = tifffile.TiffFile(path)
        text = description.ome_metadata
        description.close()
        shorter = text.replace('PlaneCount="4"', 'PlaneCount="3"')
        assert shorter != text
        tifffile.tiffcomment(path, shorter.encode())
        with pytest.raises(DatasetError, match="a page is missing, or lies in another file"):
            read_stored(path)


class TestWriting:
    @staticmethod
    def header(shape=(COLUMNS, ROWS, PAGES), affine=None):
        return Header.of_grid(Grid(shape, np.eye(4) if affine is None else affine))

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int16", "int32"])
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_round_trip(self, tmp_path, dtype, order):
        labels = np.asarray(stack(dtype).T, order=order)
        labels[MARK] = np.iinfo(dtype).max
        write_segmentation(tmp_path / "x.tif", labels, self.header())
        found = read_stored(tmp_path / "x.tif")
        assert found.array.dtype == dtype
        np.testing.assert_array_equal(found.array, labels)
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "x.tif"), labels.T)

    @pytest.mark.parametrize("pages", [3, 4])
    def test_few_pages_are_no_colours(self, tmp_path, pages):
        labels = (stack(np.uint8)[:pages] % 3).T
        write_segmentation(tmp_path / "x.tif", labels, self.header((COLUMNS, ROWS, pages)))
        np.testing.assert_array_equal(read_segmentation(tmp_path / "x.tif").array, labels)

    def test_map(self, tmp_path):
        values = stack(np.float32).T / 7
        write_map(tmp_path / "x.tiff", values, self.header())
        np.testing.assert_array_equal(read_image(tmp_path / "x.tiff").array, values)

    def test_same_content_gives_the_same_bytes(self, tmp_path):
        for name in ("a.tif", "b.tif"):
            write_segmentation(tmp_path / name, stack().T, self.header())
        assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()

    def test_places_that_do_not_fit(self, tmp_path):
        turned = self.header(affine=np.diag([-1.0, 1, 1, 1]))
        with pytest.raises(GeometryError, match=r"x\.tif: this format holds a voxel size but no"):
            write_segmentation(tmp_path / "x.tif", stack().T, turned)
        assert list(tmp_path.iterdir()) == []
