"""DICOM series: what is read, where it lies, and that every defect of a series is named."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from medseg.errors import DatasetError, GeometryError
from medseg.io.dicom import find_series, is_dicom_folder, read_series
from medseg.io.dicom_header import read_header, tag_words
from medseg.io.read import read_image, read_segmentation, read_stored
from medseg.io.write import write_segmentation

SHARED = Path(__file__).parents[3] / "shared/data/dicom_brain_mr"
SHAPE, SPACING = (5, 6, 7), (0.7, 1.1, 3.0)
IMPLICIT, EXPLICIT, RLE = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.5"
MR = "1.2.840.10008.5.1.4.1.1.4"
NAMES = ("m", "IMG0002", "b.dcm", "0001.ima", "z.z", "a", "c.txt", "x1", "x2")
"""File names in an order that has nothing to do with that of the slices."""
CODE = {"US": "<H", "UL": "<I"}


def element(tag, kind, value, *, is_explicit=True):
    """Return one data element."""
    group, number = (int(part, 16) for part in tag.split(","))
    if kind in CODE:
        value = struct.pack(CODE[kind], value)
    elif isinstance(value, str):
        value = value.encode()
    value += (b"\0" if kind in ("UI", "OB", "OW") else b" ") * (len(value) % 2)
    head = struct.pack("<HH", group, number)
    if not is_explicit:
        return head + struct.pack("<I", len(value)) + value
    if kind in ("OB", "OW", "SQ", "UN"):
        return head + kind.encode() + struct.pack("<HI", 0, len(value)) + value
    return head + kind.encode() + struct.pack("<H", len(value)) + value


def write_slice(path, rows, *, syntax=EXPLICIT, storage=MR, extra=b"", packed=None, **changes):
    """Write one DICOM file byte by byte.

    Args:
        path: The file.
        rows: (J, I) integers.
        syntax: Transfer syntax.
        storage: Storage class.
        extra: Bytes of elements between (0020,0037) and (0028,0002).
        packed: Encapsulated pixel data instead of plain ones.
        changes: `t00280030=("DS", "1\\\\1")` sets an element, None leaves it out.
    """
    bits = 8 * rows.dtype.itemsize
    tags = {
        "0008,0008": ("CS", "ORIGINAL\\PRIMARY"), "0008,0016": ("UI", storage),
        "0008,0060": ("CS", "MR"), "0008,103e": ("LO", "T1 axial"), "0018,0050": ("DS", "2.5"),
        "0020,000e": ("UI", "1.2.3.111"), "0020,0013": ("IS", "1"),
        "0020,0032": ("DS", "0\\0\\0"), "0020,0037": ("DS", "1\\0\\0\\0\\1\\0"),
        "0028,0002": ("US", 1), "0028,0004": ("CS", "MONOCHROME2"),
        "0028,0010": ("US", rows.shape[0]), "0028,0011": ("US", rows.shape[1]),
        "0028,0030": ("DS", "1.1\\0.7"), "0028,0100": ("US", bits), "0028,0101": ("US", bits),
        "0028,0102": ("US", bits - 1), "0028,0103": ("US", int(rows.dtype.kind == "i")),
        "7fe0,0010": ("OW", rows.tobytes()),
    }  # fmt: skip
    tags |= {f"{name[1:5]},{name[5:]}": value for name, value in changes.items()}
    tags = {tag: value for tag, value in sorted(tags.items()) if value is not None}
    body = {
        tag: element(tag, kind, value, is_explicit=syntax != IMPLICIT)
        for tag, (kind, value) in tags.items()
    }
    body["0020,ffff"] = extra
    if packed is not None:
        body["7fe0,0010"] = packed
    meta = element("0002,0001", "OB", b"\0\1") + element("0002,0002", "UI", storage)
    meta += element("0002,0010", "UI", syntax)
    length = element("0002,0000", "UL", len(meta))
    content = b"".join(body[tag] for tag in sorted(body))
    path.write_bytes(bytes(128) + b"DICM" + length + meta + content)
    return path


def decimals(values):
    return "DS", "\\".join(f"{value:.10f}" for value in values)


def write_series(folder, array, affine, names=NAMES, **changes):
    """Write an (I, J, K) array as one file per slice; the RAS+ affine is turned to LPS by hand."""
    folder.mkdir(exist_ok=True)
    lps = affine[:3].copy()
    lps[:2] *= -1
    spacing = np.sqrt((lps[:, :3] ** 2).sum(axis=0))
    for k in range(array.shape[2]):
        tags = {
            "t00200032": decimals(lps[:, 3] + k * lps[:, 2]),
            "t00200037": decimals([*(lps[:, 0] / spacing[0]), *(lps[:, 1] / spacing[1])]),
            "t00280030": decimals([spacing[1], spacing[0]]),
        }
        rows = np.ascontiguousarray(array[:, :, k].T)
        write_slice(folder / names[k], rows, **tags | changes)
    return folder


@pytest.fixture
def series(tmp_path, sample):
    """Return a folder with a healthy oblique series of seven slices."""
    return write_series(tmp_path / "series", sample.values(), sample.oblique())


def change(path, **changes):
    """Write a slice of the healthy series again, some of its elements changed."""
    header = read_header(path)
    tags = {"t00200032": 0x00200032, "t00200037": 0x00200037, "t00280030": 0x00280030}
    same = {name: ("DS", header.text(tag)) for name, tag in tags.items()}
    rows = changes.pop("rows", None)
    if rows is None:
        content = path.read_bytes()[header.pixels_at :]
        rows = np.frombuffer(content, "<i2").reshape(SHAPE[1], SHAPE[0])
    write_slice(path, rows, **same | changes)


def single(tmp_path, rows=None, **changes):
    folder = tmp_path / "single"
    folder.mkdir()
    write_slice(folder / "a", np.arange(30, dtype="<i2").reshape(6, 5) if rows is None else rows,
                **changes)  # fmt: skip
    return folder


class TestHealthySeries:
    def test_values_and_affine_are_those_written(self, series, sample):
        image = read_image(series)
        assert image.array.dtype == np.float32
        np.testing.assert_array_equal(image.array, sample.values())
        np.testing.assert_allclose(image.affine, sample.oblique(), atol=1e-6)
        np.testing.assert_allclose(image.grid.spacing, SPACING, rtol=1e-6)

    def test_marked_voxel_lies_where_the_tags_say(self, tmp_path):
        """Worked out by hand: 40 - 2*3 left, -10 + 0.7 posterior, 25 - 4*1.1 superior."""
        folder = tmp_path / "sagittal"
        folder.mkdir()
        for k in range(4):
            rows = np.zeros((6, 5), dtype="<i2")
            rows[4, 1] = 9 if k == 2 else 0
            write_slice(
                folder / NAMES[k], rows, t00280030=("DS", "1.1\\0.7"),
                t00200032=("DS", f"{40 - 3 * k}\\-10\\25"),
                t00200037=("DS", "0\\1\\0\\0\\0\\-1"),
            )  # fmt: skip
        image = read_image(folder)
        assert np.argwhere(image.array).tolist() == [[1, 4, 2]]
        np.testing.assert_allclose((image.affine @ (1, 4, 2, 1))[:3], (-34.0, 9.3, 20.6))

    def test_agrees_with_the_series_reader_of_itk(self, series):
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
        check_against_itk(read_image(series), reader.Execute())

    def test_order_is_neither_that_of_names_nor_of_instance_numbers(self, series, sample):
        found = find_series(series)[0]
        assert [path.name for path in found.files] == list(NAMES[:7])
        np.testing.assert_array_equal(read_image(series).array, sample.values())

    @pytest.mark.parametrize("dtype", ["<u1", "<i1", "<u2", "<i2", "<u4", "<i4"])
    def test_types_come_as_stored(self, tmp_path, sample, dtype):
        array = sample.values(dtype) - np.dtype(dtype).type(100 if dtype[1] == "i" else 0)
        stored = read_stored(write_series(tmp_path / "x", array, sample.oblique()))
        assert stored.array.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(stored.array, array)

    def test_odd_number_of_bytes_is_padded(self, tmp_path):
        rows = np.arange(15, dtype=np.uint8).reshape(3, 5)
        np.testing.assert_array_equal(read_image(single(tmp_path, rows)).array[..., 0], rows.T)

    def test_implicit_little_endian(self, tmp_path, sample):
        folder = write_series(tmp_path / "x", sample.values(), sample.oblique(), syntax=IMPLICIT)
        np.testing.assert_array_equal(read_image(folder).array, sample.values())

    def test_monochrome1_keeps_its_values(self, tmp_path, sample):
        changes = {"t00280004": ("CS", "MONOCHROME1")}
        folder = write_series(tmp_path / "x", sample.values(), sample.oblique(), **changes)
        np.testing.assert_array_equal(read_image(folder).array, sample.values())

    @pytest.mark.parametrize(("signed", "expected"), [(0, 0xFFE), (1, -2)])
    def test_bits_beside_the_stored_ones_are_dropped(self, tmp_path, signed, expected):
        """12 of 16 bits from bit 12 down: the top three and the lowest hold something else."""
        rows = np.full((6, 5), 0b101_111111111110_1, dtype="<u2")
        changes = {"t00280101": ("US", 12), "t00280102": ("US", 12), "t00280103": ("US", signed)}
        image = read_image(single(tmp_path, rows, **changes))
        assert np.unique(image.array).tolist() == [expected]

    def test_values_that_may_be_missing(self, tmp_path):
        """Samples per pixel, bits stored, the highest of them, and the sign."""
        missing = dict.fromkeys(("t00280002", "t00280101", "t00280102", "t00280103"))
        image = read_image(single(tmp_path, np.full((6, 5), 65000, dtype="<u2"), **missing))
        assert np.unique(image.array).tolist() == [65000]

    def test_segmentation_is_written_on_the_grid_of_the_series(self, series, tmp_path):
        image = read_image(series)
        assert image.header.ending == ".nii.gz"
        labels = (image.array > 100).astype(np.uint8)
        for ending in (".nii.gz", ".nrrd"):
            write_segmentation(tmp_path / f"out{ending}", labels, image.header)
            found = read_segmentation(tmp_path / f"out{ending}")
            np.testing.assert_array_equal(found.array, labels)
            assert image.grid.disagreement(found.grid, tolerance=1e-4) is None

    def test_labels_stored_as_a_series(self, tmp_path, sample):
        array = (sample.values() % 4).astype(np.uint8)
        found = read_segmentation(write_series(tmp_path / "x", array, sample.oblique()))
        assert found.array.dtype == np.uint8
        np.testing.assert_array_equal(found.array, array)

    def test_positions_may_be_rounded(self, tmp_path, sample):
        """Slices 0.625 mm apart whose positions have one decimal."""
        affine = np.diag([0.7, 1.1, 0.625, 1.0])
        folder = write_series(tmp_path / "x", sample.values(), affine)
        for k, name in enumerate(NAMES[:7]):
            change(folder / name, t00200032=("DS", f"0\\0\\{round(0.625 * k + 0.001, 1)}"))
        assert read_image(folder).grid.spacing[2] == pytest.approx(0.625, abs=0.03)


class TestScaling:
    SCALED = {"t00281052": ("DS", "-7.25"), "t00281053": ("DS", "2.5")}  # noqa: RUF012

    def test_slope_and_intercept_are_applied(self, tmp_path, sample):
        folder = write_series(tmp_path / "x", sample.values(), sample.oblique(), **self.SCALED)
        np.testing.assert_array_equal(read_image(folder).array, sample.values() * 2.5 - 7.25)
        stored = read_stored(folder)
        assert (stored.array.dtype, stored.slope, stored.inter) == (np.int16, 2.5, -7.25)

    def test_each_slice_has_its_own_slope(self, tmp_path, sample):
        """As in PET."""
        folder = write_series(tmp_path / "x", sample.values(), sample.oblique())
        expected = sample.values().astype(np.float64)
        for k, name in enumerate(NAMES[:7]):
            change(folder / name, t00281052=("DS", "1"), t00281053=("DS", str(0.5 + k)))
            expected[..., k] = expected[..., k] * (0.5 + k) + 1
        np.testing.assert_array_equal(read_image(folder).array, expected)

    @pytest.mark.parametrize("text", ["abc", "nan", "1e999"])
    def test_slope_that_is_no_number(self, tmp_path, text):
        with pytest.raises(DatasetError, match=r"single/a: RescaleSlope .* expected numbers"):
            read_image(single(tmp_path, t00281053=("DS", text)))

    def test_slope_of_zero(self, tmp_path):
        with pytest.raises(DatasetError, match=r"RescaleSlope \(0028,1053\) is 0, so that all"):
            read_image(single(tmp_path, t00281053=("DS", "0")))

    def test_table_instead_of_a_slope(self, tmp_path):
        with pytest.raises(DatasetError, match="scaled by a table"):
            read_image(single(tmp_path, t00283000=("SQ", b"")))


def packbits(values):
    """Return bytes as PackBits, literally; a segment has an even length."""
    parts = [values[start : start + 128] for start in range(0, len(values), 128)]
    packed = b"".join(bytes([len(part) - 1]) + part for part in parts)
    return packed + bytes(len(packed) % 2)


def rle_frame(rows):
    """Return 16-bit rows in DICOM's RLE: two segments, the upper bytes first."""
    content = rows.astype(">i2").tobytes()
    segments = [packbits(content[0::2]), packbits(content[1::2])]
    offsets = [2, 64, 64 + len(segments[0]), *[0] * 13]
    return struct.pack("<16I", *offsets) + b"".join(segments)


def encapsulated(frame):
    item = struct.pack("<HH", 0xFFFE, 0xE000)
    head = struct.pack("<HH", 0x7FE0, 0x0010) + b"OB" + struct.pack("<HI", 0, 0xFFFFFFFF)
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return head + item + bytes(4) + item + struct.pack("<I", len(frame)) + frame + end


def write_compressed(folder, array, affine, frame_of=rle_frame, syntax=RLE, **changes):
    write_series(folder, array, affine)
    for k in range(array.shape[2]):
        rows = np.ascontiguousarray(array[:, :, k].T)
        packed = encapsulated(frame_of(rows))
        change(folder / NAMES[k], rows=rows, packed=packed, syntax=syntax, **changes)
    return folder


class TestCompressed:
    SHAPE = (15, 16, 7)
    """Large enough for the RLE decoder of ITK, which fails on the smallest frames."""

    def test_run_lengths(self, tmp_path, sample):
        folder = write_compressed(tmp_path / "x", sample.values(shape=self.SHAPE), sample.oblique())
        image = read_image(folder)
        np.testing.assert_array_equal(image.array, sample.values(shape=self.SHAPE))
        np.testing.assert_allclose(image.affine, sample.oblique(), atol=1e-6)

    def test_scaling_is_applied_once(self, tmp_path, sample):
        folder = write_compressed(
            tmp_path / "x", sample.values(shape=self.SHAPE), sample.oblique(), **TestScaling.SCALED
        )
        np.testing.assert_array_equal(
            read_image(folder).array, sample.values(shape=self.SHAPE) * 2.5 - 7.25
        )

    @pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
    def test_lossless_jpeg_written_by_itk(self, tmp_path, compressor):
        rows = np.arange(60 * 50, dtype=np.int16).reshape(60, 50)
        image = SimpleITK.GetImageFromArray(rows[None])
        tags = {"0020|0032": "1\\2\\3", "0020|0037": "0.8\\0.6\\0\\0\\0\\-1", "0018|0050": "4"}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        image.SetSpacing((0.7, 1.1, 3.0))
        writer = SimpleITK.ImageFileWriter()
        writer.SetFileName(str(tmp_path / "a.dcm"))
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        writer.Execute(image)
        assert read_header(tmp_path / "a.dcm").is_packed
        found = read_image(tmp_path)
        np.testing.assert_array_equal(found.array[..., 0], rows.T)
        np.testing.assert_allclose((found.affine @ (1, 0, 0, 1))[:3], (-1.56, -2.42, 3))

    def test_frame_that_cannot_be_unpacked(self, tmp_path, sample):
        folder = write_compressed(
            tmp_path / "x", sample.values(shape=self.SHAPE), sample.oblique(),
            lambda rows: bytes(100), "1.2.840.10008.1.2.4.70",
        )  # fmt: skip
        with pytest.raises(DatasetError, match=r"x/m: its pixel data \(lossless JPEG, .*unpacked"):
            read_image(folder)

    @pytest.mark.parametrize("cut", [1, 8, 9, 60])
    def test_cut_short(self, tmp_path, sample, cut):
        folder = write_compressed(tmp_path / "x", sample.values(shape=self.SHAPE), sample.oblique())
        path = folder / NAMES[3]
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(DatasetError, match=r"0001\.ima: .*damaged or was not copied whole"):
            read_image(folder)

    def test_inverted_grey_is_refused(self, tmp_path, sample):
        changes = {"t00280004": ("CS", "MONOCHROME1")}
        folder = write_compressed(
            tmp_path / "x", sample.values(shape=self.SHAPE), sample.oblique(), **changes
        )
        with pytest.raises(DatasetError, match="compressed and shows large values dark"):
            read_image(folder)

    def test_frame_of_another_size(self, tmp_path, monkeypatch, sample):
        folder = write_compressed(tmp_path / "x", sample.values(shape=self.SHAPE), sample.oblique())
        monkeypatch.setattr("medseg.io.sitk.read_rows", lambda path: np.zeros((1, 5, 6)))
        with pytest.raises(
            DatasetError, match=r"unpacks to shape \(1, 5, 6\); expected \(1, 16, 15"
        ):
            read_image(folder)

    @pytest.mark.parametrize(
        ("syntax", "words"),
        [
            ("1.2.840.10008.1.2.1.99", "transfer syntax 1.2.840.10008.1.2.1.99; expected one of"),
            ("1.2.840.10008.1.2.4.201", "Convert the series to explicit little endian"),
            ("", r"transfer syntax \(none given\)"),
        ],
    )
    def test_transfer_syntax_that_cannot_be_read(self, tmp_path, syntax, words):
        with pytest.raises(DatasetError, match=f"single/a: is encoded with the .*{words}"):
            read_image(single(tmp_path, syntax=syntax))

    def test_fragments_under_a_plain_syntax(self, tmp_path):
        folder = single(tmp_path, packed=encapsulated(bytes(60)))
        with pytest.raises(DatasetError, match="are in fragments, but its transfer syntax is"):
            read_image(folder)


def check_against_itk(image, itk):
    """Compare voxels and the world positions of all corners with ITK's own series reader."""
    np.testing.assert_array_equal(
        image.array, SimpleITK.GetArrayFromImage(itk).transpose(2, 1, 0).astype(np.float32)
    )
    for corner in np.ndindex(2, 2, 2):
        index = [int(end * (length - 1)) for end, length in zip(corner, itk.GetSize(), strict=True)]
        x, y, z = itk.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((image.affine @ (*index, 1))[:3], (-x, -y, z), atol=2e-3)


class TestStack:
    """What keeps slices from being one even stack; the folder and a file are named."""

    def test_missing_slice(self, series):
        (series / NAMES[4]).unlink()
        words = r"series: 1 of 7 slices missing: between 0001\.ima and a are 6 mm, expected 3 mm"
        with pytest.raises(GeometryError, match=words):
            read_image(series)

    def test_missing_slices_at_several_places(self, series):
        for k in (1, 3, 4):
            (series / NAMES[k]).unlink()
        with pytest.raises(GeometryError, match=r"3 of 7 slices missing: between b\.dcm and a are"):
            read_image(series)

    def test_one_missing_of_four(self, tmp_path, sample):
        folder = write_series(tmp_path / "x", sample.values()[..., :4], sample.oblique())
        (folder / NAMES[1]).unlink()
        with pytest.raises(GeometryError, match=r"1 of 4 slices missing.*are 6 mm, expected 3 mm"):
            read_image(folder)

    def test_uneven_distances(self, series):
        change(series / NAMES[2], t00200032=moved(series / NAMES[2], 2, 1.0))
        words = "distance of slices changes from 2 to 4 mm: between IMG0002 and b.dcm are 4 mm"
        with pytest.raises(GeometryError, match=words):
            read_image(series)

    def test_two_slices_at_one_position(self, series):
        shutil.copy(series / NAMES[3], series / "copy")
        words = r"8 slices lie at 7 positions: 0001\.ima and copy are both at \("
        with pytest.raises(GeometryError, match=words):
            read_image(series)

    def test_two_volumes_in_one_series(self, series, tmp_path, sample):
        second = write_series(tmp_path / "y", sample.values() + 1, sample.oblique())
        for path in second.iterdir():
            path.rename(series / f"echo2_{path.name}")
        with pytest.raises(GeometryError, match=r"14 slices lie at 7 positions.*each echo, time"):
            read_image(series)

    def test_gantry_tilt(self, tmp_path, sample):
        affine = np.diag([0.7, 1.1, 3.0, 1.0])
        affine[1, 2] = 3.0 * np.tan(np.deg2rad(15))
        with pytest.raises(GeometryError, match=r"leans by 15 degrees .*0\.804 mm sideways"):
            read_image(write_series(tmp_path / "x", sample.values(), affine))

    def test_lean_of_rounded_directions_stays_in_the_affine(self, tmp_path, sample):
        affine = np.diag([0.7, 1.1, 3.0, 1.0])
        affine[1, 2] = 3.0 * np.tan(np.deg2rad(0.05))
        image = read_image(write_series(tmp_path / "x", sample.values(), affine))
        np.testing.assert_allclose(image.affine, affine, atol=1e-9)

    def test_slice_beside_the_others(self, series):
        change(series / NAMES[3], t00200032=moved(series / NAMES[3], 0, 0.5))
        with pytest.raises(GeometryError, match=r"0001\.ima lies 0\.5 mm beside the line"):
            read_image(series)

    def test_localizer_among_the_slices(self, series):
        change(
            series / NAMES[5], t00200037=("DS", "0\\1\\0\\0\\0\\-1"),
            t00080008=("CS", "ORIGINAL\\PRIMARY\\LOCALIZER"),
        )  # fmt: skip
        words = (
            r"series: 1 of 7 slices do not fit the others: a lies in another plane: its "
            r"ImageOrientationPatient \(0020,0037\) is 0.1.0.0.0.-1, expected -0\.9.* Localizers "
            r"among them: 1\. Move what is not part of the volume out of the folder: a\."
        )
        with pytest.raises(GeometryError, match=words):
            read_image(series)

    def test_slices_of_another_shape(self, series):
        change(series / NAMES[0], rows=np.zeros((6, 4), dtype="<i2"))
        words = r"m has \(4, 6\) columns and rows, expected \(5, 6\) \(as most have\)\. Move"
        with pytest.raises(GeometryError, match=words):
            read_image(series)

    def test_slices_of_another_pixel_size(self, series):
        for k in range(6, 0, -1):  # six of seven: the seventh is the odd one out
            change(series / NAMES[k], t00280030=("DS", "1.1\\0.75"))
        with pytest.raises(GeometryError, match=r"m has pixels of \(0\.7, 1\.1\) mm, expected \(0"):
            read_image(series)

    def test_many_odd_slices_are_counted(self, series, tmp_path, sample):
        odd = write_series(tmp_path / "y", sample.values()[:, :, :6], np.diag([2.0, 1, 1, 1]))
        for path in odd.iterdir():
            path.rename(series / f"scout_{path.name}")
        words = "6 of 13 slices do not fit.*scout_IMG0002, .* and 1 more"
        with pytest.raises(GeometryError, match=words):
            read_image(series)

    @pytest.mark.parametrize(
        ("tag", "value", "words"),
        [
            ("t00200032", None, r"ImagePositionPatient \(0020,0032\) is missing; expected 3 num"),
            ("t00200032", "1\\2", r"ImagePositionPatient .* is '1.2'; expected 3 numbers"),
            ("t00200032", "1\\2\\x", "is '1.2.x'; expected numbers"),
            ("t00200037", None, "ImageOrientationPatient .* is missing; expected 6 numbers"),
            ("t00200037", "1\\0\\0\\1\\0\\0", "expected two perpendicular unit vectors"),
            ("t00200037", "1\\0\\0\\0\\1.1\\0", "expected two perpendicular unit vectors"),
            ("t00280030", None, "PixelSpacing .* is missing; expected 2 numbers"),
            ("t00280030", "0\\1", "PixelSpacing .* is '0.1'; expected two lengths above 0"),
        ],
    )
    def test_slice_that_does_not_say_where_it_lies(self, series, tag, value, words):
        change(series / NAMES[2], **{tag: value and ("DS", value)})
        with pytest.raises(DatasetError, match=rf"b\.dcm: .*{words}"):
            read_image(series)
        assert find_series(series)[0].num_slices == 7

    def test_directions_of_three_decimals(self, tmp_path, sample):
        """They are not quite unit vectors; the pixels keep their size."""
        folder = single(tmp_path, t00200037=("DS", "0.707\\0.707\\0\\0\\0\\-1"))
        np.testing.assert_allclose(read_image(folder).grid.spacing, (0.7, 1.1, 2.5))


def moved(path, axis, distance):
    """Return the position of a slice moved along its axis, in mm."""
    header = read_header(path)
    along = np.reshape(header.numbers(0x00200037), (2, 3))
    axes = [*along, np.cross(*along)]
    return decimals(np.array(header.numbers(0x00200032)) + distance * axes[axis])


class TestSingleSlice:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [({}, 2.5), ({"t00180050": None, "t00180088": ("DS", "3.5")}, 3.5)],
    )
    def test_thickness(self, tmp_path, changes, expected):
        image = read_image(single(tmp_path, **changes))
        assert image.array.shape == (5, 6, 1)
        np.testing.assert_allclose(image.grid.spacing, (0.7, 1.1, expected))

    def test_without_thickness(self, tmp_path):
        with pytest.raises(GeometryError, match=r"SliceThickness .* is missing; expected the"):
            read_image(single(tmp_path, t00180050=None))


class TestPixels:
    def test_several_frames(self, tmp_path):
        rows = np.zeros((6, 5), dtype="<i2")
        folder = single(tmp_path, rows, t00280008=("IS", "3"), t7fe00010=("OW", bytes(180)))
        assert find_series(folder)[0].num_slices == 3
        with pytest.raises(DatasetError, match=r"single/a: holds 3 frames .*dcm2niix"):
            read_image(folder)

    @pytest.mark.parametrize(
        ("samples", "kind"), [(3, "RGB"), (1, "PALETTE COLOR"), (1, None), (3, "MONOCHROME2")]
    )
    def test_colours(self, tmp_path, samples, kind):
        changes = {"t00280002": ("US", samples), "t00280004": kind and ("CS", kind)}
        words = rf"single/a: is in colour \({kind or 'kind not given'}, {samples} samples"
        with pytest.raises(DatasetError, match=words):
            read_image(single(tmp_path, **changes))

    @pytest.mark.parametrize("num_bytes", [58, 62, 0])
    def test_another_number_of_bytes_than_rows_and_columns(self, tmp_path, num_bytes):
        """The file is consistent with itself; only the shape does not fit."""
        folder = single(tmp_path, t7fe00010=("OW", bytes(num_bytes)))
        with pytest.raises(DatasetError, match=rf"{num_bytes} bytes of pixel data; expected 60"):
            read_image(folder)

    def test_no_pixel_data(self, tmp_path):
        with pytest.raises(DatasetError, match="single/a: holds no pixel data"):
            read_image(single(tmp_path, t7fe00010=None))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"t00280100": ("US", 12)}, "stores 16 of 12 bits per pixel"),
            ({"t00280101": ("US", 17)}, "stores 17 of 16 bits per pixel"),
            ({"t00280101": ("US", 0)}, "stores 0 of 16 bits per pixel"),
            ({"t00280102": ("US", 3)}, "stores 16 bits up to bit 3 of 16"),
            ({"t00280100": None}, r"BitsAllocated \(0028,0100\) is missing; expected a number"),
            ({"t00280010": None}, r"Rows \(0028,0010\) is missing"),
        ],
    )
    def test_bits_that_make_no_sense(self, tmp_path, changes, words):
        with pytest.raises(DatasetError, match=f"single/a: .*{words}"):
            read_image(single(tmp_path, **changes))


class TestDamage:
    @pytest.mark.parametrize("cut", [1, 2, 30, 60, 61, 100, 300])
    def test_file_cut_short(self, series, cut):
        path = series / NAMES[3]
        path.write_bytes(path.read_bytes()[:-cut])
        words = r"0001\.ima: .*([0-9]+ bytes .*copied whole|no pixel data|is missing; expected)"
        with pytest.raises(DatasetError, match=words):
            read_image(series)

    def test_missing_bytes_are_counted(self, series):
        path = series / NAMES[3]
        path.write_bytes(path.read_bytes()[:-13])
        with pytest.raises(DatasetError, match="13 of 60 bytes of the pixel data are missing"):
            read_image(series)

    def test_garbage_behind_the_preamble(self, tmp_path):
        folder = single(tmp_path)
        content = (folder / "a").read_bytes()
        at = content.index(b"\x08\x00\x08\x00CS")
        (folder / "a").write_bytes(content[: at + 4] + b"\1\2" + content[at + 6 :])
        with pytest.raises(DatasetError, match=r"value representation of \(0008,0008\), byte \d+"):
            read_image(folder)

    def test_file_that_may_not_be_opened(self, series, monkeypatch):
        def refuse(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("medseg.io.dicom.is_dicom", refuse)
        with pytest.raises(DatasetError, match=r"series/0001\.ima: cannot be read \(Permission de"):
            read_image(series)


def sequence(tag, items, *, kind=b"SQ", end=True, is_explicit=True):
    """Return a sequence of undefined length."""
    group, number = (int(part, 16) for part in tag.split(","))
    head = struct.pack("<HH", group, number)
    head += kind + struct.pack("<HI", 0, 0xFFFFFFFF) if is_explicit else b"\xff" * 4
    return head + b"".join(items) + (struct.pack("<HHI", 0xFFFE, 0xE0DD, 0) if end else b"")


def item(content, *, is_open=True):
    head = struct.pack("<HH", 0xFFFE, 0xE000)
    if is_open:
        return head + b"\xff" * 4 + content + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    return head + struct.pack("<I", len(content)) + content


class TestSequences:
    """Values within sequences are no values of the slice, whatever their tags."""

    INNER = element("0028,0030", "DS", "9\\9")

    @pytest.mark.parametrize("is_open", [True, False])
    def test_sequences_are_passed_over(self, tmp_path, is_open):
        nested = sequence("0008,1140", [item(self.INNER, is_open=is_open)])
        extra = sequence("0020,9111", [item(nested + self.INNER, is_open=is_open)] * 2)
        extra += element("0020,9113", "SQ", item(self.INNER, is_open=is_open))
        extra += element("0020,9999", "OB", bytes(5000))
        np.testing.assert_allclose(
            read_image(single(tmp_path, extra=extra)).grid.spacing, (0.7, 1.1, 2.5)
        )

    def test_unknown_sequences_are_implicit_inside(self, tmp_path):
        inner = element("0028,0030", "DS", "9\\9", is_explicit=False)
        nested = sequence("0008,1140", [item(inner)], is_explicit=False)
        extra = sequence("0021,1001", [item(nested + inner)], kind=b"UN")
        extra += sequence("0021,1003", [item(sequence("0021,1005", [item(inner)], kind=b"UN"))])
        assert read_image(single(tmp_path, extra=extra)).array.shape == (5, 6, 1)

    def test_implicit_sequences(self, tmp_path):
        inner = element("0028,0030", "DS", "9\\9", is_explicit=False)
        extra = sequence("0020,9111", [item(inner), item(inner, is_open=False)], is_explicit=False)
        folder = single(tmp_path, extra=extra, syntax=IMPLICIT)
        np.testing.assert_allclose(read_image(folder).grid.spacing, (0.7, 1.1, 2.5))

    def test_sequence_without_end(self, tmp_path):
        extra = sequence("0020,9111", [item(self.INNER)], end=False)
        with pytest.raises(DatasetError, match=r"holds \(0028,0002\) within a sequence, byte \d+"):
            read_image(single(tmp_path, extra=extra))

    def test_endless_nesting(self, tmp_path):
        extra = b""
        for _ in range(40):
            extra = sequence("0020,9111", [item(extra)])
        with pytest.raises(DatasetError, match="holds sequences nested 33 deep"):
            read_image(single(tmp_path, extra=extra))

    def test_elements_behind_the_pixels_do_not_matter(self, tmp_path):
        folder = single(tmp_path)
        with (folder / "a").open("ab") as file:
            file.write(bytes(7))
        assert read_image(folder).array.shape == (5, 6, 1)


class TestFolder:
    def test_several_series_are_listed(self, series, tmp_path, sample):
        other = write_series(
            tmp_path / "y", sample.values()[..., :3], sample.oblique(),
            t0020000e=("UI", "1.2.3.222"), t0008103e=None, t00080060=None,
        )  # fmt: skip
        for path in other.iterdir():
            path.rename(series / f"other_{path.name}")
        with pytest.raises(DatasetError, match=r"holds 2 DICOM series; expected one\.") as caught:
            read_image(series)
        assert str(caught.value).splitlines()[1:] == [
            "  (no description), no modality, 3 slices, UID ending in 1.2.3.222, files "
            "other_IMG0002 to other_m",
            "  T1 axial, MR, 7 slices, UID ending in 1.2.3.111, files 0001.ima to z.z",
        ]
        found = find_series(series)
        assert [one.num_slices for one in found] == [3, 7]
        assert [one.uid for one in found] == ["1.2.3.222", "1.2.3.111"]
        np.testing.assert_array_equal(read_series(found[1]).array, sample.values())

    def test_files_without_uid_are_one_series(self, tmp_path):
        assert find_series(single(tmp_path, t0020000e=None))[0].uid == ""

    @pytest.mark.parametrize(
        ("charset", "value", "expected"),
        [
            (None, b"Sch\xe4del", "Sch\u00e4del"),
            ("ISO_IR 192", "Sch\u00e4del".encode(), "Sch\u00e4del"),
            ("GB18030", "\u8111\u90e8".encode("gb18030"), "\u8111\u90e8"),
            ("ISO 2022 IR 149", b"a\xc7", "a\ufffd"),
        ],
    )
    def test_description_in_its_character_set(self, tmp_path, charset, value, expected):
        changes = {"t00080005": charset and ("CS", charset), "t0008103e": ("LO", value)}
        assert find_series(single(tmp_path, **changes))[0].description == expected

    def test_other_files_are_passed_over(self, series, sample):
        (series / "notes.txt").write_text("DICM")
        (series / "empty").touch()
        (series / ".hidden").write_bytes(bytes(128) + b"DICM and garbage")
        (series / "sub").mkdir()
        rows = np.zeros((2, 2), dtype=np.uint8)
        write_slice(series / "DICOMDIR", rows, storage="1.2.840.10008.1.3.10")
        write_slice(series / "report", rows, storage="1.2.840.10008.5.1.4.1.1.88.11", syntax="9")
        write_slice(series / "seg", rows, storage="1.2.840.10008.5.1.4.1.1.66.4")
        np.testing.assert_array_equal(read_image(series).array, sample.values())

    def test_folder_without_dicom(self, tmp_path):
        (tmp_path / "notes.txt").write_text("nothing")
        (tmp_path / "sub").mkdir()
        words = r"is a folder without DICOM images \(it holds 1 other files and 1 folders\); expect"
        with pytest.raises(DatasetError, match=words):
            read_image(tmp_path)

    def test_folder_of_series_folders(self, series):
        with pytest.raises(DatasetError, match=r"Give one of the folders in it .*: series\."):
            read_image(series.parent)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(DatasetError, match=r"no: cannot be read \(No such file or directory\)"):
            find_series(tmp_path / "no")

    def test_quick_question(self, series, tmp_path):
        assert is_dicom_folder(series)
        assert is_dicom_folder(str(series))
        assert not is_dicom_folder(tmp_path)
        (tmp_path / "other").mkdir()
        shutil.copy(series / "m", tmp_path / "other" / "DICOMDIR")
        assert not is_dicom_folder(tmp_path / "other")

    def test_quick_question_opens_few_files(self, tmp_path, monkeypatch):
        for number in range(50):
            (tmp_path / f"{number:02d}.txt").touch()
        opened = []
        monkeypatch.setattr("medseg.io.dicom.is_dicom", lambda path: bool(opened.append(path)))
        assert not is_dicom_folder(tmp_path)
        assert len(opened) == 16

    def test_tags_in_words(self):
        assert tag_words(0x00280030) == "PixelSpacing (0028,0030)"
        assert tag_words(0x001811AA) == "(0018,11AA)"


CODE_THAT_READS = """
import json, sys
from medseg.io.read import read_image
read_image(sys.argv[1])
print(json.dumps([name for name in ("SimpleITK", "nibabel", "pydicom", "torch",
                                    "medseg.io.dicom") if name in sys.modules]))
"""


@pytest.mark.parametrize(
    ("kind", "expected"), [("series", ["medseg.io.dicom"]), ("nifti", ["nibabel"])]
)
def test_reading_imports_only_what_it_needs(series, tmp_path, sample, kind, expected):
    path = series if kind == "series" else tmp_path / "x.nii.gz"
    sample.write_nifti(tmp_path / "x.nii.gz", sample.values())
    command = [sys.executable, "-c", CODE_THAT_READS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert json.loads(done.stdout) == expected


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
class TestBrain:
    """Four series of one examination, 22 oblique slices each."""

    FOLDERS = sorted(path.name for path in SHARED.iterdir() if path.is_dir()) if (
        SHARED.is_dir()) else []  # fmt: skip

    @pytest.mark.parametrize("name", FOLDERS)
    def test_agrees_with_the_series_reader_of_itk(self, name):
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(SHARED / name)))
        image = read_image(SHARED / name)
        assert image.array.shape == (280, 320, 22)
        np.testing.assert_allclose(image.grid.spacing, (0.6875, 0.6875, 6.5), rtol=1e-4)
        check_against_itk(image, reader.Execute())

    def test_what_is_listed(self):
        found = [find_series(SHARED / name) for name in self.FOLDERS]
        assert [len(one) for one in found] == [1] * 4
        assert {one[0].description for one in found} == {
            "T1post",
            "T1pre_reg",
            "T2_reg",
            "FLAIR_reg",
        }
        assert {(one[0].num_slices, one[0].modality) for one in found} == {(22, "MR")}
        assert not is_dicom_folder(SHARED)

    def test_all_series_in_one_folder(self, tmp_path):
        for name in self.FOLDERS:
            for path in (SHARED / name).iterdir():
                (tmp_path / f"{name}_{path.name}").symlink_to(path)
        with pytest.raises(DatasetError, match="holds 4 DICOM series"):
            read_image(tmp_path)
        for one in find_series(tmp_path):
            alone = read_stored(one.files[0].resolve().parent)
            np.testing.assert_array_equal(read_series(one).array, alone.array)

    def test_missing_slice(self, tmp_path):
        for path in (SHARED / self.FOLDERS[0]).iterdir():
            (tmp_path / path.name).symlink_to(path)
        find_series(tmp_path)[0].files[7].unlink()
        with pytest.raises(GeometryError, match=r"1 of 22 slices missing: .* are 13 mm"):
            read_image(tmp_path)
