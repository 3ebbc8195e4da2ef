"""Every defect that was planted is found under its name, in the right words, and no other."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from dataclasses import dataclass

import nibabel
import numpy as np
import pytest
from PIL import Image as Pillow

from medseg.data.case import load_case
from medseg.data.dataset import scan_dataset
from medseg.errors import DatasetError
from medseg.io.image import Header
from medseg.io.write import write_nifti, write_segmentation
from tests.check.conftest import Raw

PLANTS = {}


@dataclass(frozen=True)
class Plant:
    """One way to spoil a dataset, and what must be found."""

    spoil: object
    found: dict
    """Code -> (level, words of its message)."""


def plant(**found):
    """Enter a function that spoils a dataset; `found`: code -> "level", words ..."""

    def enter(function):
        entries = {code.replace("_", "-"): value for code, value in found.items()}
        PLANTS[function.__name__.replace("_", " ")] = Plant(function, entries)
        return function

    return enter


ERROR, WARNING = "error", "warning"
IMAGE, LABELS = "imagesTr/case_2_0000.nii.gz", "labelsTr/case_2.nii.gz"


# Files ----------------------------------------------------------------------------------------


@plant(unreadable=(ERROR, IMAGE, "cut short", "copy or export it again"))
def image_cut_in_half(raw):
    path = raw.channel()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@plant(unreadable=(ERROR, LABELS, "cut short"))
def segmentation_cut_in_half(raw):
    path = raw.segmentation()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@plant(unreadable=(ERROR, IMAGE, "not gzip-compressed"))
def image_of_garbage(raw):
    raw.channel().write_bytes(b"this is no image" * 20)


@plant(unreadable=(ERROR, LABELS, "does not begin with a NIfTI header"))
def segmentation_of_packed_garbage(raw):
    raw.segmentation().write_bytes(gzip.compress(b"this is no image" * 40))


@plant(unreadable=(ERROR, IMAGE, "empty (0 bytes)"))
def empty_file(raw):
    raw.channel().write_bytes(b"")


@plant(unreadable=(ERROR, IMAGE, "7 bytes follow the voxel data"))
def trailing_bytes(raw):
    path = raw.channel()
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"surplus"))


@plant(unreadable=(ERROR, LABELS, "not gzip-compressed"))
def segmentation_that_is_not_packed(raw):
    path = raw.segmentation()
    path.write_bytes(gzip.decompress(path.read_bytes()))


@plant(unreadable=(ERROR, IMAGE, "broken"))
def flipped_bits(raw):
    path = raw.channel()
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(255 - byte for byte in content[middle : middle + 40])
    path.write_bytes(content)


@plant(unreadable=(ERROR, IMAGE, "complex"))
def complex_image(raw):
    values, affine = raw.values(raw.channel())
    raw.save(raw.channel(), nibabel.Nifti1Image(values.astype(np.complex64), affine))


@plant(not_a_file=(ERROR, IMAGE, "is a folder", "channel 0, T1w", "move it out"))
def folder_called_like_an_image(raw):
    raw.channel().unlink()
    raw.channel().mkdir()


@plant(not_a_file=(ERROR, LABELS, "is a folder", "segmentation"))
def folder_called_like_a_segmentation(raw):
    raw.segmentation().unlink()
    raw.segmentation().mkdir()


@plant(missing_file=(ERROR, "imagesTr/case_2_0001.nii.gz is missing", "channel 1, FLAIR", "Add"))
def missing_channel(raw):
    raw.channel(1).unlink()


@plant(missing_file=(ERROR, "imagesTr/case_2_0000.nii.gz is missing", "channel 0, T1w"))
def missing_first_channel(raw):
    raw.channel(0).unlink()


@plant(missing_segmentation=(ERROR, "no segmentation", "Add the file"))
def missing_segmentation(raw):
    raw.segmentation().unlink()


@plant(name=(WARNING, "ASCII (\u00e9)", "other tools"))
def name_that_is_not_ascii(raw):
    raw.rename("case_2", "h\u00e9l\u00e8ne_2".replace("\u00e8", "e"))


@plant(name=(WARNING, "spaces", "other tools"))
def name_with_spaces(raw):
    raw.rename("case_2", "case 2 new")


@plant(name=(WARNING, "ASCII", "\u809d"))
def chinese_name(raw):
    raw.rename("case_2", "\u809d\u810f_2")


@plant(similar_ids=(WARNING, "'CASE_2'", "'case_2'", "upper and lower case"))
def ids_that_differ_in_case_alone(raw):
    raw.rename("case_3", "CASE_2")


# Intensities ----------------------------------------------------------------------------------


def nan(values):
    values[3, 4, 5:8] = np.nan
    return values


@plant(nan=(ERROR, IMAGE, "3 of", "NaN", "Replace"))
def nan_in_the_image(raw):
    raw.change(raw.channel(), nan)


@plant(nan=(ERROR, LABELS, "3 of", "NaN"))
def nan_in_the_segmentation(raw):
    raw.change(raw.segmentation(), lambda values: nan(values.astype(np.float32)))


@plant(infinite=(ERROR, IMAGE, "1 of", "infinite"), nan=(ERROR, "3 of", "NaN"))
def infinite_and_nan(raw):
    def change(values):
        values[1, 1, 1] = -np.inf
        return nan(values)

    raw.change(raw.channel(), change)


@plant(infinite=(ERROR, IMAGE, "1 of", "32-bit"))
def value_too_large_for_32_bits(raw):
    def change(values):
        values = values.astype(np.float64)
        values[1, 2, 3] = 1e300
        return values

    raw.change(raw.channel(), change)


@plant(constant=(WARNING, IMAGE, "every voxel is 5"))
def constant_image(raw):
    raw.change(raw.channel(), lambda values: np.full_like(values, 5))


@plant(intensity_outlier=(WARNING, "T1w", "standard deviation", "Look at the image"))
def intensities_in_other_units(raw):
    raw.change(raw.channel(), lambda values: values * 1000)


@plant(intensity_outlier=(WARNING, "FLAIR", "median"))
def intensities_far_from_the_others(raw):
    raw.change(raw.channel(1), lambda values: values + 5000)


@plant(odd_scaling=(WARNING, IMAGE, "scl_slope is 0.5", "most other images"))
def one_image_with_scl_slope(raw):
    raw.change(raw.channel(), lambda values: np.rint(values).astype(np.int16))
    raw.patch(raw.channel(), 112, "<ff", 0.5, 3.0)


@plant(
    odd_scaling=(WARNING, IMAGE, "scl_slope is -2", "bright into dark"),
    intensity_outlier=(WARNING, "T1w"),
)
def negative_scl_slope(raw):
    raw.change(raw.channel(), lambda values: np.rint(values).astype(np.int16))
    raw.patch(raw.channel(), 112, "<ff", -2.0, 0.0)


@plant(big_endian=(WARNING, IMAGE, "stored big-endian", ">f4", "some tools misread it"))
def big_endian_image(raw):
    values, affine = raw.values(raw.channel())
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(">f4")
    raw.save(raw.channel(), nibabel.Nifti1Image(values, affine, header))


@plant(big_endian=(WARNING, LABELS, "stored big-endian", ">i2"))
def big_endian_segmentation(raw):
    values, affine = raw.values(raw.segmentation())
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    raw.save(raw.segmentation(), nibabel.Nifti1Image(values.astype(np.int16), affine, header))


@plant(not_3d=(ERROR, "case_2_0001", "series of 3 volumes", "4D", "one volume per file"))
def image_with_four_axes(raw):
    values, affine = raw.values(raw.channel(1))
    raw.save(raw.channel(1), nibabel.Nifti1Image(np.stack([values] * 3, -1), affine))


# Segmentation ---------------------------------------------------------------------------------


def with_voxel(values, value):
    values = values.astype(np.int16)
    values[3, 4, 5] = value
    return values


@plant(
    unexpected_label=(
        ERROR, LABELS, "holds 7", "0, 1, 2", "1 organ", "7 in 1 voxel", "Correct the segmentation",
    )
)  # fmt: skip
def label_7_of_2(raw):
    raw.change(raw.segmentation(), lambda values: with_voxel(values, 7))


@plant(unexpected_label=(ERROR, "holds -1", "-1 in 1 voxel"))
def negative_label(raw):
    raw.change(raw.segmentation(), lambda values: with_voxel(values, -1))


@plant(unexpected_label=(ERROR, "holds 255", "0 and 255 are how pictures store a mask"))
def mask_of_0_and_255(raw):
    raw.change(raw.segmentation(), lambda values: ((values > 0) * 255).astype(np.uint8))


@plant(unexpected_label=(ERROR, "is this the image?"))
def image_in_place_of_the_segmentation(raw):
    values, affine = raw.values(raw.channel())
    image = nibabel.Nifti1Image((values * 20).astype(np.int16), affine)
    raw.save(raw.segmentation(), image)


@plant(empty_segmentation=(WARNING, LABELS, "is empty", "voxels are 0"))
def empty_segmentation(raw):
    raw.change(raw.segmentation(), np.zeros_like)


@plant(float_label=(WARNING, LABELS, "float64", "integer type"))
def float64_label(raw):
    raw.change(raw.segmentation(), lambda values: values.astype(np.float64))


@plant(not_integer=(ERROR, LABELS, "no integers", "0.5", "nearest-neighbour"))
def interpolated_segmentation(raw):
    def change(values):
        values = values.astype(np.float32)
        values[2:9, 3, 4] = 0.5
        return values

    raw.change(raw.segmentation(), change)


@plant(scaled_segmentation=(WARNING, LABELS, "scl_slope 0.5", "expected label values as they are"))
def segmentation_with_scl_slope(raw):
    raw.change(raw.segmentation(), lambda values: (values * 2).astype(np.uint8))
    raw.patch(raw.segmentation(), 112, "<ff", 0.5, 0.0)


def save_colours(raw, colours):
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    packed = np.ascontiguousarray(colours).view(kind)[..., 0]
    _, affine = raw.values(raw.segmentation())
    raw.save(raw.segmentation(), nibabel.Nifti1Image(packed, affine))


@plant(rgb_label=(ERROR, LABELS, "RGB", "all equal", "Keep one"))
def rgb_label_in_grey(raw):
    values, _ = raw.values(raw.segmentation())
    save_colours(raw, np.stack([values] * 3, -1))


@plant(rgb_label=(ERROR, LABELS, "RGB", "differ", "one integer per voxel"))
def rgb_label_in_colours(raw):
    values, _ = raw.values(raw.segmentation())
    save_colours(raw, np.stack([values, values * 0, values], -1))


@plant(not_3d=(ERROR, LABELS, "series of 2 volumes", "differ"))
def segmentation_with_four_axes(raw):
    values, affine = raw.values(raw.segmentation())
    stacked = np.stack([values == 1, values == 2], -1).astype(np.uint8)
    raw.save(raw.segmentation(), nibabel.Nifti1Image(stacked, affine))


@plant(unused_label=(WARNING, "'lesion' (2)", "no voxel in any case"))
def label_that_never_occurs(raw):
    for number in range(1, 11):
        path = raw.segmentation(f"case_{number}")
        raw.change(path, lambda values: np.minimum(values, 1))


# Geometry -------------------------------------------------------------------------------------


def moved(affine, gap):
    affine[:3, 3] += gap
    return affine


@plant(shape=(ERROR, LABELS, "(20, 22, 15)", "(20, 22, 16)", "Re-export"))
def segmentation_of_another_shape(raw):
    raw.change(raw.segmentation(), lambda values: values[:, :, :-1])


@plant(shape=(ERROR, "case_2_0001", IMAGE, "(20, 20, 16)", "(20, 22, 16)", "resample"))
def channel_of_another_shape(raw):
    raw.change(raw.channel(1), lambda values: values[:, :-2])


def stretched(affine, axis=1, factor=1.25):
    affine[:3, axis] *= factor
    return affine


@plant(spacing=(ERROR, LABELS, "its spacing is (0.9, 1.425, 1.9) mm", "expected (0.9, 1.14, 1.9)"))
def segmentation_of_another_spacing(raw):
    raw.change(raw.segmentation(), affine=stretched)


@plant(spacing=(ERROR, "case_2_0001", "its spacing is (0.9, 1.425, 1.9) mm", "resample"))
def channel_of_another_spacing(raw):
    raw.change(raw.channel(1), affine=stretched)


@plant(origin=(ERROR, LABELS, "its origin is", "5 mm apart", "allowed 0.05"))
def segmentation_of_another_origin(raw):
    raw.change(raw.segmentation(), affine=lambda affine: moved(affine, (0, 3, -4)))


@plant(origin=(WARNING, LABELS, "0.001 mm apart", "takes them as equal"))
def origin_drift_of_the_segmentation(raw):
    raw.change(raw.segmentation(), affine=lambda affine: moved(affine, (1e-3, 0, 0)))


@plant(origin=(WARNING, "case_2_0001", "0.001 mm apart", IMAGE))
def origin_drift_of_a_channel(raw):
    raw.change(raw.channel(1), affine=lambda affine: moved(affine, (0, 0, 1e-3)))


@plant(spacing=(WARNING, LABELS, "its spacing is", "takes them as equal"))
def spacing_drift(raw):
    raw.change(raw.segmentation(), affine=lambda affine: stretched(affine, 0, 1.0003))


@plant(direction=(ERROR, LABELS, "flipped along I", "the other way", "LAS", "RAS"))
def flipped_direction(raw):
    def change(affine):
        affine[:3, 0] *= -1
        return affine

    raw.change(raw.segmentation(), affine=change)


@plant(
    direction=(ERROR, LABELS, "flipped along I and J", "LPS"), origin=(ERROR, LABELS, "origin is")
)
def world_of_the_other_convention(raw):
    def change(affine):
        affine[:2] *= -1
        return affine

    raw.change(raw.segmentation(), affine=change)


@plant(direction=(ERROR, LABELS, "tilted by 3 degrees"))
def tilted_segmentation(raw):
    def change(affine):
        angle = np.deg2rad(3)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        affine[:2, :3] = turn @ affine[:2, :3]
        return affine

    raw.change(raw.segmentation(), affine=change)


@plant(
    spacing=(ERROR, LABELS, "its spacing is"),
    origin=(ERROR, LABELS, "its origin is"),
)
def several_differences(raw):
    raw.change(raw.segmentation(), affine=lambda a: moved(stretched(a), (10, 0, 0)))


@plant(axes_swapped=(ERROR, LABELS, "(22, 20, 16)", "axes swapped", "transposing I and J"))
def swapped_axes(raw):
    raw.change(raw.segmentation(), lambda values: values.swapaxes(0, 1))


@plant(axes_swapped=(ERROR, LABELS, "axes swapped", "in the order"))
def axes_in_another_order(raw):
    raw.change(raw.segmentation(), lambda values: values.transpose(2, 0, 1))


@plant(orientation=(ERROR, LABELS, "same grid stored in another way", "LAS", "RAS"))
def segmentation_in_another_orientation(raw):
    length = raw.values(raw.segmentation())[0].shape[0]

    def change(affine):
        affine[:3, 3] += affine[:3, 0] * (length - 1)
        affine[:3, 0] *= -1
        return affine

    raw.change(raw.segmentation(), lambda values: values[::-1], change)


@plant(unusable_header=(ERROR, LABELS, "do not span the space"))
def affine_without_volume(raw):
    raw.patch(raw.segmentation(), 280, "<12f", *[0.0] * 12)
    raw.patch(raw.segmentation(), 252, "<hh", 0, 1)


# Between cases --------------------------------------------------------------------------------


def copy_case(raw, old, new):
    for number in range(2):
        shutil.copy(raw.channel(number, old), raw.channel(number, new))
    shutil.copy(raw.segmentation(old), raw.segmentation(new))


@plant(duplicate_image=(WARNING, "case_7_0000", "case 'case_2'", "byte for byte", "fold"))
def same_case_twice(raw):
    copy_case(raw, "case_2", "case_7")


@plant(duplicate_image=(WARNING, "case_7_0000", "case 'case_2'", "stored in another way"))
def same_image_in_another_type(raw):
    copy_case(raw, "case_2", "case_7")
    for number in range(2):
        raw.change(raw.channel(number, "case_7"), lambda values: values.astype(np.float64))


@plant(
    same_channels=(WARNING, "T1w and FLAIR hold the same image", "wrong name"),
    intensity_outlier=(WARNING, "FLAIR"),
)
def one_channel_under_two_names(raw):
    shutil.copy(raw.channel(0), raw.channel(1))


@plant(duplicate_segmentation=(WARNING, "labelsTr/case_8", "case 'case_2'", "images differ"))
def segmentation_of_another_case(raw):
    copy_case(raw, "case_2", "case_8")
    for number in range(2):
        raw.change(raw.channel(number, "case_8"), lambda values: np.roll(values, 3, axis=0))


def turn_case(raw, case, change):
    for path in (raw.channel(0, case), raw.channel(1, case), raw.segmentation(case)):
        values, affine = raw.values(path)
        change(path, values, affine)


@plant(orientation_outlier=(WARNING, "stored LPI", "9 of 10 cases are RAS", "look at the picture"))
def one_case_in_another_orientation(raw):
    def change(path, values, affine):
        raw.change(path, lambda v: v[::-1, ::-1, ::-1], lambda _: reversed_affine(values, affine))

    turn_case(raw, "case_2", change)


def reversed_affine(values, affine):
    affine[:3, 3] += affine[:3, :3] @ (np.array(values.shape) - 1)
    affine[:3, :3] *= -1
    return affine


@plant(spacing_outlier=(WARNING, "900 x 1.14e+03", "in most cases about 0.9", "another unit"))
def voxel_size_in_another_unit(raw):
    def change(path, values, affine):
        raw.change(path, affine=lambda affine: np.diag([1000, 1000, 1000, 1.0]) @ affine)

    turn_case(raw, "case_2", change)


@plant(same_patient=(WARNING, "1 patient seems", "sub-01 (sub-01_ses-1, sub-01_ses-2)", "group"))
def two_sessions_of_one_patient(raw):
    raw.rename("case_2", "sub-01_ses-1")
    raw.rename("case_3", "sub-01_ses-2")


@plant(same_patient=(WARNING, "patient_01 (patient_01_a, patient_01_b)"))
def two_letters_of_one_patient(raw):
    raw.rename("case_2", "patient_01_a")
    raw.rename("case_3", "patient_01_b")


# The tests ------------------------------------------------------------------------------------


def test_the_list_is_long():
    assert len(PLANTS) >= 55


@pytest.mark.parametrize("name", PLANTS)
def test_planted_defect_is_found_in_the_right_words(raw, check, name):
    """The planted problems, their level and words; and nothing that was not planted."""
    entry = PLANTS[name]
    entry.spoil(raw)
    problems = check(raw)
    texts = {}
    for problem in problems:
        texts.setdefault(problem.code, []).append(problem.message)
    levels = {problem.code: problem.level for problem in problems}
    assert levels == {code: level for code, (level, *_) in entry.found.items()}, texts
    for code, (_, *words) in entry.found.items():
        assert [word for word in words if not any(word in text for text in texts[code])] == [], (
            texts[code]
        )


@pytest.mark.parametrize("name", PLANTS)
def test_errors_are_what_keeps_a_case_from_being_loaded(raw, check, name):
    """A case has an error if, and only if, training could not load it."""
    PLANTS[name].spoil(raw)
    problems = check(raw)
    spec, _ = scan_dataset(raw.folder)
    for case, entry in spec.cases.items():
        has_error = any(p.level == "error" and p.case == case for p in problems)
        try:
            loaded = load_case(spec, case)
            failed = loaded.segmentation is None or entry.segmentation is None
        except DatasetError:
            failed = True
        assert failed == has_error, case


def test_all_problems_of_a_case_are_found_at_once(raw, check):
    nan_in_the_image(raw)
    flipped_direction(raw)
    label_7_of_2(raw)
    raw.channel(1).write_bytes(b"")
    found = {problem.code for problem in check(raw)}
    assert found == {"nan", "unreadable", "unexpected-label"} | {"direction"}


def test_labels_beside_a_broken_image_are_checked(raw, check):
    image_cut_in_half(raw)
    label_7_of_2(raw)
    assert {problem.code for problem in check(raw)} == {"unreadable", "unexpected-label"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda hu: (hu + 1000) / 2000, "rescaled, for instance to 0..1"),
        (lambda hu: (hu - hu.mean()) / hu.std(), "rescaled"),
        (lambda hu: np.clip((hu + 160) / 400 * 255, 0, 255).astype(np.uint8), "8 bits"),
        (lambda hu: (hu + 1024).astype(np.uint16), "HU + 1024"),
        (lambda hu: hu * 10, "rescale intercept"),
        (lambda hu: np.where(hu > 900, 60000, hu), "rescale slope"),
        (lambda hu: hu, None),
        (lambda hu: np.where(hu < -990, -3024, hu), None),
        (lambda hu: np.where(hu > 900, 30000, hu), None),
    ],
)
def test_ct_outside_hounsfield_units(tmp_path, datasets, check, change, words):
    raw = Raw(datasets.write(tmp_path / "Dataset008_Ct", num_cases=2, channels=("CT",)))
    rng = np.random.default_rng(3)
    for case in ("case_1", "case_2"):
        shape = raw.values(raw.channel(0, case))[0].shape
        hu = np.clip(rng.normal(-100, 500, shape), -1000, 1200).astype(np.float32)
        raw.change(raw.channel(0, case), lambda _, hu=hu: change(hu).astype(np.float32))
    messages = [p.message for p in check(raw) if p.code == "ct-range"]
    assert len(messages) == (0 if words is None else 2)
    assert all(words in message for message in messages)


def test_groups_silence_the_warning_about_patients(raw, check):
    two_sessions_of_one_patient(raw)
    spec, _ = scan_dataset(raw.folder)
    cases = {
        case: {
            "images": list(entry.channels),
            "segmentation": entry.segmentation,
            "group": case.split("_ses")[0],
        }
        for case, entry in spec.cases.items()
    }
    manifest = {"channels": list(spec.channels), "labels": spec.labels, "cases": cases}
    (raw.folder / "medseg.json").write_text(json.dumps(manifest))
    assert check(raw) == []


@pytest.mark.parametrize(
    ("shape", "channels", "code", "words"),
    [
        ((9, 8, 7), ("T1w", "T2w"), "channel-count", "1 channel in 1 file; expected 2 (T1w, T2w)"),
        ((9, 8, 7, 3), ("T1w",), "not-3d", "holds 3 volumes (4D, or colours); expected 1 (T1w)"),
        ((9, 8, 7, 2), ("T1w", "T2w"), None, ""),
    ],
)
def test_number_of_channels_in_one_file(tmp_path, check, shape, channels, code, words):
    """A file may hold all channels of its case along the fourth axis, no fewer and no more."""
    raw, rng = Raw(tmp_path), np.random.default_rng(1)
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    nibabel.save(
        nibabel.Nifti1Image(rng.normal(9, 2, shape).astype(np.float32), affine), tmp_path / "a.nii"
    )
    write_nifti(tmp_path / "a_seg.nii", (rng.random((9, 8, 7)) > 0.5).astype(np.uint8), affine)
    entry = {"case": "a", "images": ["a.nii"], "segmentation": "a_seg.nii"}
    labels = {"background": 0, "organ": 1}
    manifest = {"channels": list(channels), "labels": labels, "cases": [entry]}
    (tmp_path / "medseg.json").write_text(json.dumps(manifest))
    found = check(raw)
    assert [problem.code for problem in found] == ([] if code is None else [code])
    assert all(words in problem.message for problem in found)


def test_jpeg_is_no_label_map(tmp_path, check):
    folder, rng = tmp_path / "Dataset009_Flat", np.random.default_rng(2)
    header = Header(shape=(9, 13), affine=tuple(map(tuple, np.eye(4).tolist())))
    image = rng.integers(0, 255, (9, 13, 1)).astype(np.uint8)
    write_segmentation(folder / "imagesTr/a_0000.png", image, header)
    (folder / "labelsTr").mkdir()
    rows = Pillow.fromarray((image[..., 0].T > 99).astype(np.uint8))
    rows.save(folder / "labelsTr/a.jpg", quality=100)
    description = {"channel_names": {"0": "grey"}, "labels": {"background": 0, "cell": 1}}
    (folder / "dataset.json").write_text(json.dumps(description))
    found = {problem.code: problem for problem in check(Raw(folder))}
    assert "lossy-label" in found
    assert "JPEG" in found["lossy-label"].message


def test_name_that_is_no_text_is_an_error_and_the_rest_is_looked_at(raw, check):
    """Some old systems write names that are not UTF-8; no JSON can hold them."""
    label_7_of_2(raw)
    for path in sorted(raw.folder.glob("*Tr/case_5[._]*")):
        os.rename(path, os.fsencode(path).replace(b"case_5", b"caf\xe9_5"))
    found = {problem.code: problem for problem in check(raw)}
    assert set(found) == {"name", "unexpected-label"}
    assert found["name"].level == "error"
    assert "not in UTF-8" in found["name"].message
    assert found["name"].model_dump_json()


@pytest.mark.parametrize("highest", [2**40, 2**64 - 1])
def test_values_beyond_32_bits_are_a_problem_of_their_case_alone(raw, check, highest):
    def spoil(labels):
        labels = labels.astype(np.uint64)
        labels[3, 4, 5] = highest
        return labels

    raw.change(raw.segmentation(), spoil)
    (problem,) = check(raw)
    assert (problem.code, problem.case) == ("not-integer", "case_2")
    assert f"1 of {raw.values(raw.segmentation())[0].size} voxels" in problem.message
    assert f"to {highest}" in problem.message


def test_segmentation_without_an_image_is_an_error_of_its_case(raw, check):
    for number in (0, 1):
        raw.channel(number).unlink()
    raw.channel().mkdir()
    assert [(p.code, p.case) for p in check(raw) if p.level == "error"] == [
        ("not-a-file", "case_2"),
        ("missing-file", "case_2"),
    ]
