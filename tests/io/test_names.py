"""Names and colours inside NIfTI files: what other readers find, and that nothing else changes."""

from __future__ import annotations

import struct
from xml.etree import ElementTree

import nibabel
import numpy as np
import pytest
import SimpleITK

from medseg.io.names import LabelEntry, label_extension, map_extension
from medseg.io.palette import COLOURS, colour, rgb
from medseg.io.read import read_image, read_segmentation
from medseg.io.write import write_segmentation

ENTRIES = (
    LabelEntry(value=0, name="background", colour="#000000", opacity=0.0),
    LabelEntry(value=1, name='left <lung> & "hilum"', colour="#E69F00"),
    LabelEntry(value=4, name="Leber-Gef\u00e4\u00dfe \u809d", colour="#56B4E9"),
)


def table_of(path):
    """Return key -> (name, red, green, blue, alpha) as readers of the extensions do.

    TotalSegmentator's take the first one by nibabel's `get_content`, Workbench that of code 30.
    """
    first, second = nibabel.load(path).header.extensions
    assert (first.get_code(), second.get_code()) == (0, 30)
    assert first.content == second.content
    root = ElementTree.fromstring(first.get_content())
    assert root.tag == "CaretExtension"
    assert root.find("VolumeInformation").get("Index") == "0"
    assert root.find("VolumeInformation/VolumeType").text == "Label"
    return {
        int(label.get("Key")): (
            label.text,
            *(float(label.get(name)) for name in ("Red", "Green", "Blue", "Alpha")),
        )
        for label in root.findall("VolumeInformation/LabelTable/Label")
    }


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_readers_find_names_colours_and_the_same_voxels(sample, tmp_path, ending, version):
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    nibabel.save(kind(sample.values(), sample.oblique()), tmp_path / "in.nii")
    header = read_image(tmp_path / "in.nii").header
    array = (sample.values() % 5).astype(np.uint8)
    with_names, without = tmp_path / f"with{ending}", tmp_path / f"without{ending}"
    write_segmentation(with_names, array, header, labels=ENTRIES)
    write_segmentation(without, array, header)
    table = table_of(with_names)
    assert {key: row[0] for key, row in table.items()} == {e.value: e.name for e in ENTRIES}
    assert table[1][1:] == pytest.approx((230 / 255, 159 / 255, 0, 1), abs=1e-5)
    assert table[0][4] == 0
    found, plain = nibabel.load(with_names), nibabel.load(without)
    assert len(plain.header.extensions) == 0
    np.testing.assert_array_equal(np.asarray(found.dataobj), array)
    np.testing.assert_array_equal(found.affine, plain.affine)
    before, after = (dict(image.header) for image in (plain, found))
    assert [n for n in before if str(before[n]) != str(after[n])] == []
    if version == 1:  # it knows no NIfTI-2, with or without names
        itk = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(with_names)))
        np.testing.assert_array_equal(itk, array.transpose(2, 1, 0))
    np.testing.assert_array_equal(read_segmentation(with_names).array, array)


def test_the_bytes_are_those_of_the_standard(sample, tmp_path):
    """Flag, twice length (a multiple of 16), code, text; the voxels come right behind."""
    array = (sample.values() % 5).astype(np.uint8)
    write_segmentation(tmp_path / "x.nii", array, read_header(sample, tmp_path), labels=ENTRIES)
    content = (tmp_path / "x.nii").read_bytes()
    assert content[348:352] == bytes([1, 0, 0, 0])
    size, code = struct.unpack("=ii", content[352:360])
    assert (size % 16, code) == (0, 0)
    assert struct.unpack("=ii", content[352 + size : 360 + size]) == (size, 30)
    assert content[360 : 352 + size] == content[360 + size : 352 + 2 * size]
    assert sample.header_of(tmp_path / "x.nii")["vox_offset"] == (352 + 2 * size,)
    assert content[352 + 2 * size :] == array.tobytes(order="F")


def read_header(sample, folder):
    return read_image(sample.write_nifti(folder / "in.nii", sample.values())).header


@pytest.mark.parametrize("ending", [".img", ".nrrd", ".tif"])
def test_other_formats_go_without(tmp_path, sample, ending):
    array = (sample.values() % 5).astype(np.uint8)
    source = sample.write_itk(tmp_path / "in.nrrd", sample.values(), np.diag([-0.7, -1.1, 3, 1]))
    header = read_image(source).header
    if ending == ".tif":
        nibabel.save(nibabel.Nifti1Image(sample.values(), np.eye(4)), tmp_path / "in.nii")
        header = read_image(tmp_path / "in.nii").header
    write_segmentation(tmp_path / f"x{ending}", array, header, labels=ENTRIES)
    np.testing.assert_array_equal(read_segmentation(tmp_path / f"x{ending}").array, array)
    if ending == ".img":
        assert len((tmp_path / "x.hdr").read_bytes()) == 352


@pytest.mark.parametrize("name", ["", " ", "\0\x1f", "a\nb"])
def test_names_that_xml_cannot_hold_are_mended(name):
    entry = LabelEntry(value=3, name=name, colour="#000000")
    extension = label_extension([entry])
    content = extension[8 : len(extension) // 2].rstrip(b"\0")
    (label,) = ElementTree.fromstring(content).iter("Label")
    assert label.text == ("a b" if "a" in name else "unnamed")


@pytest.mark.parametrize("length", range(1, 18))
def test_every_length_is_a_multiple_of_16(length):
    entry = LabelEntry(value=1, name="x" * length, colour="#FFFFFF")
    labels, maps = label_extension([entry]), map_extension(["x" * length, "y"])
    for extension in (labels[: len(labels) // 2], labels[len(labels) // 2 :], maps):
        assert len(extension) % 16 == 0
        assert struct.unpack("=i", extension[:4]) == (len(extension),)


class TestPalette:
    def test_colours_stay_as_they_are(self):
        """Files that were written before keep the colours they have."""
        assert [colour(index) for index in range(14)] == list(COLOURS)
        assert [colour(index) for index in (14, 15, 60)] == ["#4C14F4", "#30F414", "#684CF4"]

    def test_colours_of_a_whole_body_differ_and_are_visible(self):
        shades = np.array([rgb(colour(index)) for index in range(150)], dtype=float)
        distances = np.sqrt(((shades[:, None] - shades[None]) ** 2).sum(axis=-1))
        assert distances[~np.eye(150, dtype=bool)].min() > 35
        brightness = shades @ (0.299, 0.587, 0.114)
        assert brightness.min() > 40
        assert brightness.max() < 235

    def test_there_is_always_a_colour(self):
        assert len({colour(index) for index in range(10_000)}) > 600
