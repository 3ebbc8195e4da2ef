"""PNG, JPEG and BMP: what their pixels mean, and that no damage goes unnoticed."""

import io
import struct
import zlib

import numpy as np
import pytest
import SimpleITK
from PIL import Image as Pillow
from PIL import PngImagePlugin

from medseg.errors import DatasetError, GeometryError
from medseg.geometry import Grid
from medseg.io import picture
from medseg.io.image import Header
from medseg.io.read import read_channels, read_image, read_segmentation, read_stored
from medseg.io.write import output_ending, write_map, write_nifti, write_segmentation

COLUMNS, ROWS = 7, 5
MARK = (4, 1)
"""Column and row: right of the middle, near the top."""


def grey(dtype=np.uint8, factor=1):
    """Return (rows, columns), no pixel like another."""
    return (np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) * factor).astype(dtype)


def colours(dtype=np.uint8, factor=1):
    """Return (rows, columns, 3), the mark in pure green."""
    array = np.stack([grey(dtype, factor), grey(dtype, 2 * factor), grey(dtype, 3 * factor)], -1)
    array[MARK[1], MARK[0]] = (0, 255, 0)
    return array


def save(path, array, mode=None, **options):
    image = Pillow.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def png_chunks(content):
    """Return [(kind, body)] of a PNG file, slowly and with the standard library alone."""
    chunks, position = [], 8
    while position < len(content):
        length = struct.unpack(">I", content[position : position + 4])[0]
        chunks.append(
            (content[position + 4 : position + 8], content[position + 8 : position + 8 + length])
        )
        position += 12 + length
    return chunks


def png_bytes(chunks):
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_deep_png(path, array):
    """Write 16-bit samples of several channels, byte by byte, without filters."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    kind = {2: 4, 3: 2, 4: 6}[array.shape[2]]
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, kind, 0, 0, 0)
    path.write_bytes(png_bytes([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]))
    return path


class PictureContract:
    """A flat picture: columns are I, rows are J, from the upper left corner; 1 mm."""

    ending: str

    def path(self, tmp_path):
        return tmp_path / f"p\u00ef c{self.ending}"

    def test_grey_comes_as_stored(self, tmp_path):
        stored = read_stored(save(self.path(tmp_path), grey()))
        assert stored.array.dtype == np.uint8
        np.testing.assert_array_equal(stored.array[:, :, 0], grey().T)
        assert stored.header.shape == (COLUMNS, ROWS)
        assert stored.header.ending == self.ending

    def test_marked_pixel_lies_at_its_column_and_row(self, tmp_path):
        image = read_channels([save(self.path(tmp_path), colours())])
        assert image.array.shape == (3, COLUMNS, ROWS, 1)
        assert image.array[:, MARK[0], MARK[1], 0].tolist() == [0, 255, 0]
        np.testing.assert_array_equal(image.array[..., 0], colours().transpose(2, 1, 0))
        np.testing.assert_array_equal(image.affine, np.eye(4))
        assert not image.header.has_spacing

    def test_one_bit_is_zero_or_one(self, tmp_path):
        stored = read_stored(save(self.path(tmp_path), grey() % 3 == 0))
        assert stored.array.dtype == np.uint8
        np.testing.assert_array_equal(stored.array[:, :, 0], grey().T % 3 == 0)

    def test_colours_are_no_label(self, tmp_path):
        path = save(self.path(tmp_path), colours())
        with pytest.raises(DatasetError, match=r"is an RGB label: it holds 3 .* Save it with one"):
            read_segmentation(path)
        with pytest.raises(DatasetError, match="several values per voxel"):
            read_image(path)

    def test_equal_channels_are_three_in_an_image_and_can_be_mended_in_a_label(self, tmp_path):
        path = save(self.path(tmp_path), np.stack([grey() % 3] * 3, -1))
        assert len(read_channels([path]).array) == 3
        with pytest.raises(DatasetError, match=r"RGB label.*channels are equal.*--fix"):
            read_segmentation(path)

    def test_cut_anywhere(self, tmp_path):
        """In the header, in the pixels, and where only the last bytes are missing."""
        rng = np.random.default_rng(0)
        path = save(self.path(tmp_path), rng.integers(0, 256, (40, 33, 3)).astype(np.uint8))
        content = path.read_bytes()
        for kept in (1, 3, 20, 33, 60, len(content) // 2, len(content) - 40, len(content) - 1):
            path.write_bytes(content[:kept])
            with pytest.raises(DatasetError, match=r"p\u00ef c.*copy or export it again"):
                read_stored(path)

    def test_other_content_is_refused(self, tmp_path):
        self.path(tmp_path).write_bytes(b"GIF89a, or some other picture" * 9)
        with pytest.raises(DatasetError, match="does not begin as a PNG, JPEG or BMP file"):
            read_stored(self.path(tmp_path))

    def test_too_many_pixels_are_refused_before_they_take_memory(self, tmp_path, monkeypatch):
        path = save(self.path(tmp_path), grey())
        monkeypatch.setattr("medseg.io.picture.LARGEST_PICTURE", 34)
        with pytest.raises(DatasetError, match=r"has 7 x 5 pixels; expected at most 34.*tiles"):
            read_stored(path)

    def test_no_warning_however_large(self, tmp_path, monkeypatch):
        """Pillow warns of bombs at a limit of its own."""
        monkeypatch.setattr(Pillow, "MAX_IMAGE_PIXELS", 20)
        assert read_stored(save(self.path(tmp_path), grey())).array.size == 35


class TestPng(PictureContract):
    ending = ".png"

    def test_16_bits(self, tmp_path):
        stored = read_stored(save(tmp_path / "x.png", grey(np.uint16, 1800)))
        assert stored.array.dtype == np.uint16
        np.testing.assert_array_equal(stored.array[:, :, 0], grey(np.uint16, 1800).T)

    @pytest.mark.parametrize("opacity", [False, True])
    def test_16_bit_colours_keep_16_bits(self, tmp_path, opacity):
        array = colours(np.uint16, 600)
        stacked = np.concatenate([array, np.full((ROWS, COLUMNS, 1), 65535, np.uint16)], -1)
        path = write_deep_png(tmp_path / "x.png", stacked if opacity else array)
        stored = read_stored(path)
        assert stored.array.dtype == np.uint16
        np.testing.assert_array_equal(stored.array[:, :, 0], array.transpose(1, 0, 2))

    def test_16_bit_grey_with_opacity(self, tmp_path):
        array = np.stack([grey(np.uint16, 1800), np.full((ROWS, COLUMNS), 65535, np.uint16)], -1)
        path = write_deep_png(tmp_path / "x.png", array)
        np.testing.assert_array_equal(read_image(path).array[:, :, 0], grey(np.uint16, 1800).T)
        array[2, 2, 1] = 65534
        with pytest.raises(DatasetError, match="1 of 35 pixels are not opaque"):
            read_image(write_deep_png(path, array))

    def test_16_bit_colours_that_itk_cannot_read(self, tmp_path):
        path = write_deep_png(tmp_path / "x.png", colours(np.uint16))
        chunks = png_chunks(path.read_bytes())
        chunks[1] = (b"IDAT", zlib.compress(b"\x09" * (ROWS * (1 + 6 * COLUMNS))))
        path.write_bytes(png_bytes(chunks))
        with pytest.raises(DatasetError, match=r"x\.png: ITK cannot read it"):
            read_stored(path)

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_opacity_is_dropped_where_it_hides_everything(self, tmp_path, mode):
        path = save(tmp_path / "x.png", colours() if mode == "RGBA" else grey(), mode)
        found = read_channels([path]).array
        expected = colours().transpose(2, 1, 0) if mode == "RGBA" else grey().T[np.newaxis]
        np.testing.assert_array_equal(found[..., 0], expected)

    @pytest.mark.parametrize("channels", [3, 1])
    def test_one_pixel_that_is_not_opaque(self, tmp_path, channels):
        array = np.concatenate([colours()[..., :channels], np.full((5, 7, 1), 255, np.uint8)], -1)
        array[3, 2, -1] = 254
        path = save(tmp_path / "x.png", array)
        with pytest.raises(DatasetError, match=r"x\.png: 1 of 35 pixels are not opaque"):
            read_stored(path)

    @pytest.mark.parametrize("array", [grey(), colours()], ids=["grey", "colours"])
    def test_a_colour_that_counts_as_transparent(self, tmp_path, array):
        """A single value instead of an alpha channel; harmless where no pixel has it."""
        clear = 7 if array.ndim == 2 else (0, 255, 0)
        path = save(tmp_path / "x.png", array, transparency=clear)
        with pytest.raises(DatasetError, match="1 of 35 pixels are not opaque"):
            read_stored(path)
        path = save(path, array, transparency=99 if array.ndim == 2 else (1, 1, 1))
        assert read_channels([path]).array.max() == (34 if array.ndim == 2 else 255)

    @pytest.mark.parametrize("kind", ["I;16", "L"])
    def test_label_values_are_exact(self, tmp_path, kind):
        dtype, step = (np.uint16, 1000) if kind == "I;16" else (np.uint8, 127)
        labels = grey(dtype) % 3 * dtype(step)
        found = read_segmentation(save(tmp_path / "x.png", labels))
        np.testing.assert_array_equal(found.array[:, :, 0], labels.T)

    def test_checksum_of_every_chunk(self, tmp_path):
        path = save(tmp_path / "x.png", grey(), dpi=(300, 300))
        content = path.read_bytes()
        for kind in (b"IHDR", b"pHYs", b"IDAT"):
            broken = bytearray(content)
            broken[content.index(kind) + 6] ^= 1
            path.write_bytes(broken)
            with pytest.raises(DatasetError, match=f"checksum of its chunk .*{kind.decode()}"):
                read_stored(path)

    def test_pixels_that_are_missing_behind_good_checksums(self, tmp_path):
        path = save(tmp_path / "x.png", grey())
        header, *_, end = png_chunks(path.read_bytes())
        short = (b"IDAT", zlib.compress(b"\0" + bytes(7)))
        path.write_bytes(png_bytes([header, short, end]))
        with pytest.raises(DatasetError, match="32 of 40 bytes of voxel data are missing"):
            read_stored(path)

    def test_bomb(self, tmp_path):
        """Neither a size that its data do not fill, nor data beyond its size, takes memory."""
        path = save(tmp_path / "x.png", grey())
        header, *rest = png_chunks(path.read_bytes())
        size = struct.pack(">II", 16000, 16000)
        path.write_bytes(png_bytes([(b"IHDR", size + header[1][8:]), *rest]))
        with pytest.raises(DatasetError, match=r"of 256016000 bytes of voxel data are missing"):
            read_stored(path)
        bomb = (b"IDAT", zlib.compress(bytes(2**24)))
        path.write_bytes(png_bytes([header, bomb, rest[-1]]))
        with pytest.raises(DatasetError, match="1048536 bytes follow the voxel data"):
            read_stored(path)

    @pytest.mark.parametrize("columns", [1, 2, 4, 7, 9])
    @pytest.mark.parametrize("rows", [1, 3, 5, 8])
    def test_interlaced_pictures(self, tmp_path, rows, columns):
        """Seven passes, each every n-th pixel; written here slowly, pixel by pixel."""
        array = (np.arange(rows * columns).reshape(rows, columns) * 7 % 256).astype(np.uint8)
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2),
                  (0, 1, 2, 2), (1, 0, 2, 1)]  # fmt: skip
        data = b""
        for row, column, down, right in passes:
            part = array[row::down, column::right]
            data += b"".join(b"\0" + line.tobytes() for line in part if part.shape[1])
        header = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 1)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
        path = tmp_path / "x.png"
        path.write_bytes(png_bytes(chunks))
        np.testing.assert_array_equal(read_stored(path).array[:, :, 0], array.T)

    def test_packed_data_that_are_broken(self, tmp_path):
        path = save(tmp_path / "x.png", grey())
        header, *_, end = png_chunks(path.read_bytes())
        for broken in (b"not deflated", zlib.compress(bytes(40))[:-1] + b"?", b""):
            path.write_bytes(png_bytes([header, (b"IDAT", broken), end]))
            with pytest.raises(DatasetError, match=r"x\.png: .*(broken|missing)"):
                read_stored(path)

    @pytest.mark.parametrize("header", [b"", struct.pack(">IIBBBBB", 7, 5, 8, 9, 0, 0, 0)])
    def test_header_that_is_none(self, tmp_path, header):
        path = save(tmp_path / "x.png", grey())
        path.write_bytes(png_bytes([(b"IHDR", header), *png_chunks(path.read_bytes())[1:]]))
        with pytest.raises(DatasetError, match="its header is not valid"):
            read_stored(path)

    def test_header_that_pillow_refuses(self, tmp_path):
        """Bit depth 3 does not exist."""
        header = struct.pack(">IIBBBBB", 8, 1, 3, 0, 0, 0, 0)
        pixels = (b"IDAT", zlib.compress(bytes(4)))
        path = tmp_path / "x.png"
        path.write_bytes(png_bytes([(b"IHDR", header), pixels, (b"IEND", b"")]))
        with pytest.raises(DatasetError, match=r"x\.png: its (header is not|pixels cannot)"):
            read_stored(path)

    def test_animation(self, tmp_path):
        first, second = Pillow.fromarray(grey()), Pillow.fromarray(grey() + 9)
        first.save(tmp_path / "x.png", save_all=True, append_images=[second])
        with pytest.raises(DatasetError, match=r"x\.png: is an animation; expected one picture"):
            read_stored(tmp_path / "x.png")

    def test_what_follows_the_end_is_no_part_of_it(self, tmp_path):
        path = save(tmp_path / "x.png", grey())
        path.write_bytes(path.read_bytes() + b"a newer, shorter picture was written over me")
        np.testing.assert_array_equal(read_stored(path).array[:, :, 0], grey().T)

    def test_two_and_four_bits_are_scaled_as_the_format_says(self, tmp_path):
        """15 of 4 bits is as white as 255 of 8."""
        levels = np.array([[0, 1, 2, 15], [3, 4, 5, 6]])
        packed = b"".join(b"\0" + bytes([row[0] << 4 | row[1], row[2] << 4 | row[3]])
                          for row in levels.tolist())  # fmt: skip
        header = struct.pack(">IIBBBBB", 4, 2, 4, 0, 0, 0, 0)
        path = tmp_path / "x.png"
        path.write_bytes(
            png_bytes([(b"IHDR", header), (b"IDAT", zlib.compress(packed)), (b"IEND", b"")])
        )
        np.testing.assert_array_equal(read_stored(path).array[:, :, 0], levels.T * 17)

    def test_dots_per_inch_are_no_voxel_size(self, tmp_path):
        header = read_stored(save(tmp_path / "x.png", grey(), dpi=(300, 300))).header
        assert (header.grid.spacing, header.has_spacing) == ((1, 1, 1), False)


class TestPalette:
    """As a label the index counts, as an image the colour."""

    COLOURS = ((200, 0, 0), (0, 100, 0), (0, 0, 50))

    def write(self, path, labels, **options):
        image = Pillow.fromarray(labels.astype(np.uint8), "P") if False else Pillow.new(
            "P", labels.shape[::-1]
        )  # fmt: skip
        image.putdata(labels.ravel().tolist())
        image.putpalette(sum(self.COLOURS, ()))
        image.save(path, **options)
        return path

    @pytest.mark.parametrize("ending", [".png", ".bmp"])
    def test_index_is_the_label(self, tmp_path, ending):
        labels = grey() % 3
        found = read_segmentation(self.write(tmp_path / f"x{ending}", labels))
        np.testing.assert_array_equal(found.array[:, :, 0], labels.T)

    @pytest.mark.parametrize("ending", [".png", ".bmp"])
    def test_image_has_the_colours(self, tmp_path, ending):
        labels = grey() % 3
        path = self.write(tmp_path / f"x{ending}", labels)
        found = read_channels([path]).array[..., 0]
        expected = np.array(self.COLOURS)[labels.T].transpose(2, 0, 1)
        np.testing.assert_array_equal(found, expected)
        with pytest.raises(DatasetError, match="several values per voxel"):
            read_image(path)

    @pytest.mark.parametrize("clear", [0, b"\x00\xff\xff"], ids=["one entry", "a table"])
    def test_transparent_entries_matter_to_images_alone(self, tmp_path, clear):
        labels = grey() % 3
        path = self.write(tmp_path / "x.png", labels, transparency=clear)
        np.testing.assert_array_equal(read_segmentation(path).array[:, :, 0], labels.T)
        with pytest.raises(DatasetError, match=r"x\.png: 12 of 35 pixels are not opaque"):
            read_channels([path])

    def test_transparent_entry_that_no_pixel_has(self, tmp_path):
        path = self.write(tmp_path / "x.png", grey() % 2, transparency=2)
        assert read_channels([path]).array.shape == (3, 7, 5, 1)

    def test_pixel_without_an_entry(self, tmp_path):
        path = self.write(tmp_path / "x.png", grey() % 3, bits=8)
        header, *rest = png_chunks(path.read_bytes())
        rest = [(kind, body[:6] if kind == b"PLTE" else body) for kind, body in rest]
        path.write_bytes(png_bytes([header, *rest]))
        assert read_segmentation(path).array.max() == 2
        with pytest.raises(DatasetError, match="entry 2 of its palette, which has 2"):
            read_channels([path])


class TestJpeg(PictureContract):
    ending = ".jpg"

    def test_grey_comes_as_stored(self, tmp_path):
        """As well as the format can."""
        flat = np.full((16, 24), 77, np.uint8)
        flat[:, 8:] = 200
        stored = read_stored(save(tmp_path / "x.jpg", flat, quality=100))
        np.testing.assert_array_equal(stored.array[:, :, 0], flat.T)
        assert stored.is_lossy

    def test_marked_pixel_lies_at_its_column_and_row(self, tmp_path):
        array = np.zeros((16, 40, 3), np.uint8)
        array[:8, 24:32] = (0, 250, 0)
        image = read_channels([save(tmp_path / "x.jpeg", array, quality=95, subsampling=0)])
        assert image.array.shape == (3, 40, 16, 1)
        found = np.argwhere(image.array[1, :, :, 0] > 125)
        assert (found.min(0).tolist(), found.max(0).tolist()) == ([24, 0], [31, 7])

    def test_one_bit_is_zero_or_one(self, tmp_path):
        """JPEG has no such pictures; they become grey."""
        assert read_stored(save(tmp_path / "x.jpg", grey() % 3 == 0, "L")).array.dtype == np.uint8

    def test_a_label_map_is_refused_for_the_format_alone(self, tmp_path):
        path = save(tmp_path / "x.jpg", np.zeros((8, 8), np.uint8))
        with pytest.raises(DatasetError, match=r"x\.jpg: is a JPEG file, which changes the values"):
            read_segmentation(path)

    def test_content_counts_and_not_the_name(self, tmp_path):
        """A JPEG called .png is still lossy; a PNG called .jpg is not."""
        save(tmp_path / "x.png", np.zeros((8, 8), np.uint8), format="JPEG")
        with pytest.raises(DatasetError, match="is a JPEG file"):
            read_segmentation(tmp_path / "x.png")
        save(tmp_path / "x.jpg", grey(), format="PNG")
        np.testing.assert_array_equal(
            read_segmentation(tmp_path / "x.jpg").array[:, :, 0], grey().T
        )

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
    def test_every_way_to_store_scans_has_its_end_found(self, tmp_path, options):
        rng = np.random.default_rng(1)
        array = rng.integers(0, 256, (64, 48, 3)).astype(np.uint8)
        path = save(tmp_path / "x.jpg", array, quality=90, **options)
        assert read_stored(path).array.shape == (48, 64, 1, 3)
        path.write_bytes(path.read_bytes()[:-2])
        with pytest.raises(DatasetError, match=r"no end marker \(cut short\)"):
            read_stored(path)
        path.write_bytes(path.read_bytes() + b"\xff\x01\xff\xd9 and a preview behind it")
        assert read_stored(path).array.shape == (48, 64, 1, 3)

    def test_end_marker_of_a_preview_does_not_count(self, tmp_path):
        preview = io.BytesIO()
        Pillow.fromarray(grey()).save(preview, "JPEG")
        path = save(tmp_path / "x.jpg", np.zeros((64, 64), np.uint8), comment=preview.getvalue())
        path.write_bytes(path.read_bytes()[:-2])
        with pytest.raises(DatasetError, match="no end marker"):
            read_stored(path)

    def test_inks_are_refused(self, tmp_path):
        path = save(tmp_path / "x.jpg", colours(), "CMYK")
        with pytest.raises(DatasetError, match="holds CMYK values; expected grey, RGB or"):
            read_stored(path)

    def test_pixels_that_cannot_be_decoded(self, tmp_path):
        path = save(tmp_path / "x.jpg", grey())
        content = path.read_bytes()
        scan = content.index(b"\xff\xda")
        path.write_bytes(content[:scan] + b"\xff\xd9")
        with pytest.raises(DatasetError, match=r"cannot be read whole|header is not valid"):
            read_stored(path)


class TestBmp(PictureContract):
    ending = ".bmp"

    def test_header_that_makes_no_sense(self, tmp_path):
        path = save(tmp_path / "x.bmp", grey())
        content = bytearray(path.read_bytes())
        content[14:18] = (99).to_bytes(4, "little")
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"x\.bmp: its header is not valid"):
            read_stored(path)


class TestUpright:
    """A tag says: show me turned. Programs differ; a mask could lie on either picture."""

    @staticmethod
    def tagged(path, orientation):
        exif = Pillow.Exif()
        exif[0x0112] = orientation
        return save(path, colours(), exif=exif)

    @pytest.mark.parametrize("ending", [".jpg", ".png"])
    @pytest.mark.parametrize("orientation", [2, 3, 6, 8])
    def test_turned_pictures_are_refused(self, tmp_path, ending, orientation):
        path = self.tagged(tmp_path / f"x{ending}", orientation)
        with pytest.raises(DatasetError, match=f"turned or mirrored .*tag is {orientation}"):
            read_stored(path)

    @pytest.mark.parametrize("orientation", [0, 1])
    def test_upright_pictures_are_read(self, tmp_path, orientation):
        path = self.tagged(tmp_path / "x.png", orientation)
        assert read_stored(path).array.shape == (7, 5, 1, 3)

    def test_turned_picture_of_16_bit_colours(self, tmp_path):
        path = write_deep_png(tmp_path / "x.png", colours(np.uint16))
        exif = Pillow.Exif()
        exif[0x0112] = 6
        chunks = png_chunks(path.read_bytes())
        chunks.insert(1, (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
        path.write_bytes(png_bytes(chunks))
        with pytest.raises(DatasetError, match="turned or mirrored"):
            read_stored(path)

    def test_broken_tags_do_not_count(self, tmp_path):
        path = save(tmp_path / "x.png", grey())
        header, *rest = png_chunks(path.read_bytes())
        path.write_bytes(png_bytes([header, (b"eXIf", b"not a TIFF header"), *rest]))
        assert read_stored(path).array.shape == (7, 5, 1)


def header_2d(spacing=(1.0, 1.0, 1.0), shape=(COLUMNS, ROWS)):
    return Header(shape=shape, affine=tuple(map(tuple, np.diag([*spacing, 1.0]).tolist())))


class TestWriting:
    @pytest.mark.parametrize("ending", [".png", ".bmp", ".PNG", ".tif"])
    @pytest.mark.parametrize(("dtype", "largest"), [("uint8", 255), ("int32", 3), ("uint32", 9)])
    def test_round_trip(self, tmp_path, ending, dtype, largest):
        labels = (grey() % 3).astype(dtype).T[:, :, np.newaxis]
        labels[MARK[0], MARK[1], 0] = largest
        source = read_channels([save(tmp_path / "in.png", colours())])
        path = tmp_path / f"out{ending}"
        write_segmentation(path, labels, source.header)
        found = read_segmentation(path)
        np.testing.assert_array_equal(found.array, labels)
        assert source.grid.disagreement(found.grid) is None
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in.png", f"out{ending}"]

    def test_written_file_has_the_rows_and_columns_of_the_input(self, tmp_path):
        labels = (grey() % 3).T[:, :, np.newaxis]
        source = read_channels([save(tmp_path / "in.jpg", colours())])
        write_segmentation(tmp_path / "out.png", labels, source.header)
        with Pillow.open(tmp_path / "out.png") as image:
            assert (image.size, image.mode) == ((COLUMNS, ROWS), "L")
            np.testing.assert_array_equal(np.asarray(image), grey() % 3)
        other = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "out.png")))
        np.testing.assert_array_equal(other, grey() % 3)

    @pytest.mark.parametrize("largest", [256, 65535])
    def test_16_bits_where_they_are_needed(self, tmp_path, largest):
        labels = np.zeros((COLUMNS, ROWS, 1), np.uint32)
        labels[*MARK] = largest
        write_segmentation(tmp_path / "x.png", labels, header_2d())
        found = read_segmentation(tmp_path / "x.png")
        assert found.array.dtype == np.uint16
        np.testing.assert_array_equal(found.array, labels)
        with Pillow.open(tmp_path / "x.png") as image:
            assert PngImagePlugin.PngImageFile.format == image.format
            assert image.mode == "I;16"

    @pytest.mark.parametrize(
        ("name", "value", "limit"),
        [("x.png", 65536, 65535), ("x.png", -1, 65535), ("x.bmp", 256, 255), ("x.bmp", -7, 255)],
    )
    def test_values_that_do_not_fit(self, tmp_path, name, value, limit):
        labels = np.zeros((COLUMNS, ROWS, 1), np.int32)
        labels[*MARK] = value
        with pytest.raises(DatasetError, match=rf"{name}: got int32 .*{value}.*from 0 to {limit}"):
            write_segmentation(tmp_path / name, labels, header_2d())
        assert list(tmp_path.iterdir()) == []

    def test_real_numbers_do_not_fit(self, tmp_path):
        with pytest.raises(DatasetError, match=r"got float32 values from 0\.0 to 0\.0; this"):
            write_map(tmp_path / "x.png", np.zeros((COLUMNS, ROWS, 1)), header_2d())

    def test_several_slices_do_not_fit(self, sample, tmp_path):
        labels = np.zeros(sample.shape, np.uint8)
        with pytest.raises(DatasetError, match=r"x\.png: a picture holds one slice, got .* 7\)"):
            write_nifti(tmp_path / "x.png", labels, np.eye(4))

    @pytest.mark.parametrize("name", ["x.jpg", "x.jpeg"])
    def test_formats_with_loss_are_refused(self, tmp_path, name):
        labels = np.zeros((COLUMNS, ROWS, 1), np.uint8)
        with pytest.raises(DatasetError, match=r"x\.jpe?g: JPEG changes the values.*\.png instead"):
            write_segmentation(tmp_path / name, labels, header_2d())
        assert list(tmp_path.iterdir()) == []

    def test_places_that_do_not_fit(self, tmp_path):
        labels = np.zeros((COLUMNS, ROWS, 1), np.uint8)
        for affine in (np.diag([-1.0, 1, 1, 1]), np.eye(4) + np.eye(4, k=3) * 2):
            header = Header.of_grid(Grid((COLUMNS, ROWS, 1), affine))
            with pytest.raises(GeometryError, match=r"no position or direction.*Write \.nii\.gz"):
                write_segmentation(tmp_path / "x.png", labels, header)

    def test_output_ending(self):
        assert [output_ending(e) for e in (".jpg", ".jpeg", ".png", ".tiff", ".nii.gz")] == [
            ".png", ".png", ".png", ".tiff", ".nii.gz"
        ]  # fmt: skip


def test_reader_alone(tmp_path):
    """What `read_stored` returns is what the format's reader returns."""
    path = save(tmp_path / "x.png", grey())
    np.testing.assert_array_equal(picture.read(path).array, read_stored(path).array)
