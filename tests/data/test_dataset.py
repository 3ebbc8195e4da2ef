"""Folders of labelled images: which files make up which case."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from medseg.data.case import case_paths, load_case
from medseg.data.dataset import group_channels, parse_labels, read_dataset, scan_dataset
from medseg.data.layouts.listing import Listing
from medseg.errors import ConfigError, DatasetError, GeometryError
from medseg.io.write import write_nifti


@pytest.fixture(scope="module")
def good(tmp_path_factory, datasets):
    return datasets.write(tmp_path_factory.mktemp("raw") / "Dataset011_Good", num_cases=3)


@pytest.fixture
def raw(good, tmp_path):
    return shutil.copytree(good, tmp_path / "Dataset011_Good")


def describe(folder, **changes):
    path = folder / "dataset.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def test_nnunet_raw_layout(raw):
    spec = read_dataset(raw)
    assert spec.name == "Dataset011_Good"
    assert spec.channels == ("T1w", "FLAIR")
    assert spec.labels == {"background": 0, "organ": 1, "lesion": 2}
    assert list(spec.cases) == ["case_1", "case_2", "case_3"]
    assert spec.cases["case_2"].channels == (
        "imagesTr/case_2_0000.nii.gz",
        "imagesTr/case_2_0001.nii.gz",
    )
    assert spec.cases["case_2"].segmentation == "labelsTr/case_2.nii.gz"
    paths, segmentation = case_paths(spec, "case_3")
    assert all(path.is_file() for path in [*paths, segmentation])


def test_channels_keep_their_numeric_order_beyond_ten(raw):
    """Keys of the object are sorted as numbers: "10" comes after "2"."""
    names = {str(number): f"c{number}" for number in (3, 11, 0, 10, 2, 1, 9, 8, 7, 6, 5, 4)}
    describe(raw, channel_names=names)
    for case in (1, 2, 3):
        for number in range(2, 12):
            shutil.copy(
                raw / f"imagesTr/case_{case}_0001.nii.gz",
                raw / f"imagesTr/case_{case}_{number:04d}.nii.gz",
            )
    spec = read_dataset(raw)
    assert spec.channels == tuple(f"c{number}" for number in range(12))
    assert spec.cases["case_1"].channels[10] == "imagesTr/case_1_0010.nii.gz"


def test_old_spelling_modality_is_understood(raw):
    describe(raw, channel_names=None, modality={"0": "T1w", "1": "FLAIR"})
    assert read_dataset(raw).channels == ("T1w", "FLAIR")


def decathlon(raw, *, label_values):
    """Turn the folder into the Decathlon layout: one file per case, channels along axis 4."""
    import nibabel as nib

    entries = []
    for case in ("case_1", "case_2", "case_3"):
        paths = [raw / f"imagesTr/{case}_{number:04d}.nii.gz" for number in (0, 1)]
        images = [nib.load(path) for path in paths]
        stacked = np.stack([np.asarray(image.dataobj) for image in images], axis=-1)
        nib.save(nib.Nifti1Image(stacked, images[0].affine), raw / f"imagesTr/{case}.nii.gz")
        for path in paths:
            path.unlink()
        entries.append({"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"})
    describe(
        raw,
        channel_names=None,
        file_ending=None,
        modality={"0": "T1w", "1": "FLAIR"},
        labels=label_values,
        training=entries,
    )


def test_decathlon_layout_with_stacked_channels(raw, good):
    decathlon(raw, label_values={"0": "Background", "1": "organ", "2": "lesion"})
    spec = read_dataset(raw)
    assert spec.labels == {"background": 0, "organ": 1, "lesion": 2}
    assert spec.cases["case_1"].channels == ("imagesTr/case_1.nii.gz",)
    found, wanted = load_case(spec, "case_2"), load_case(read_dataset(good), "case_2")
    np.testing.assert_array_equal(found.channels, wanted.channels)
    np.testing.assert_array_equal(found.segmentation, wanted.segmentation)
    np.testing.assert_allclose(found.grid.affine, wanted.grid.affine, atol=1e-5)


def test_stacked_file_with_too_few_channels_is_refused(raw):
    decathlon(raw, label_values={"0": "background", "1": "organ", "2": "lesion"})
    describe(raw, modality={"0": "T1w", "1": "FLAIR", "2": "T2w"})
    with pytest.raises(DatasetError, match=r"holds 2 channels, the dataset has 3") as caught:
        load_case(read_dataset(raw), "case_1")
    assert "case: case_1" in caught.value.__notes__


def test_decathlon_entries_without_channel_suffix_find_split_channels(raw):
    """nnU-Net's converter splits the channels but leaves the list as it was."""
    entries = [
        {"image": f"./imagesTr/case_{n}.nii.gz", "label": f"./labelsTr/case_{n}.nii.gz"}
        for n in (1, 2, 3)
    ]
    describe(raw, training=entries)
    assert read_dataset(raw).cases["case_3"].channels == (
        "imagesTr/case_3_0000.nii.gz",
        "imagesTr/case_3_0001.nii.gz",
    )


def test_test_list_of_the_decathlon_takes_no_part(raw):
    decathlon(raw, label_values={"0": "background", "1": "organ", "2": "lesion"})
    describe(raw, test=["./imagesTs/case_7.nii.gz"])
    assert list(read_dataset(raw).cases) == ["case_1", "case_2", "case_3"]


def test_variables_in_paths_are_not_replaced_but_named(raw):
    entry = {"images": ["$DATA/a.nii.gz", "$DATA/b.nii.gz"], "label": "labelsTr/case_1.nii.gz"}
    describe(raw, dataset={"anna": entry})
    with pytest.raises(DatasetError, match="variables are not replaced, write the path itself"):
        read_dataset(raw)


def test_dataset_dictionary_names_the_files(raw, good, tmp_path):
    """Files may lie outside the folder, by absolute or relative path."""
    entries = {
        "anna": {
            "images": [str(good / f"imagesTr/case_1_{n:04d}.nii.gz") for n in (0, 1)],
            "label": "labelsTr/case_1.nii.gz",
        }
    }
    describe(raw, dataset=entries)
    spec = read_dataset(raw)
    assert list(spec.cases) == ["anna"]
    assert load_case(spec, "anna").channels.shape == (2, 21, 23, 16)


def test_all_problems_of_all_cases_are_listed(raw):
    (raw / "imagesTr/case_1_0001.nii.gz").unlink()
    (raw / "labelsTr/case_3.nii.gz").unlink()
    with pytest.raises(DatasetError) as caught:
        read_dataset(raw)
    text = str(caught.value)
    assert "2 problems" in text
    assert "case 'case_1': imagesTr/case_1_0001.nii.gz is missing (channel 1, FLAIR)" in text
    assert "case 'case_3': no segmentation in labelsTr" in text


def test_more_channels_than_named_are_refused(raw):
    shutil.copy(raw / "imagesTr/case_2_0001.nii.gz", raw / "imagesTr/case_2_0002.nii.gz")
    with pytest.raises(DatasetError, match="case 'case_2': 3 channel files, expected 2"):
        read_dataset(raw)


def test_gap_in_channel_numbers_is_named(raw):
    (raw / "imagesTr/case_2_0000.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"_0000\.nii\.gz is missing \(channel 0, T1w\)"):
        read_dataset(raw)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_names": None}, "channel_names is None"),
        ({"channel_names": {"0": "a", "2": "b"}}, r"expected \['0', '1'\]"),
        ({"channel_names": ["T1w"]}, "expected an object such as"),
        ({"labels": None}, "labels is None"),
        ({"labels": {"background": 0, "organ": "one"}}, "must be an integer"),
        ({"labels": {"background": 0, "organ": 1.5}}, "must be an integer"),
        ({"labels": {"background": 0, "organ": 1, "ignore": [2, 3]}}, "expected one integer"),
        ({"training": ["imagesTr/case_1.nii.gz"]}, "training holds"),
        ({"dataset": {"a": "b.nii.gz"}}, "dataset.a is"),
    ],
)
def test_unusable_description_is_refused(raw, changes, message):
    describe(raw, **changes)
    with pytest.raises(ConfigError, match=message):
        read_dataset(raw)


def test_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        read_dataset(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DatasetError, match=r"it holds notes\.txt"):
        read_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object, got a list"):
        read_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_dataset(tmp_path)


def test_file_ending_is_a_preference_not_a_filter(raw, good):
    """An ending that no file has changes nothing; nnU-Net would find no case."""
    describe(raw, file_ending=".nrrd")
    assert read_dataset(raw).cases == read_dataset(good).cases


def test_endings_may_differ_within_a_case(raw):
    (raw / "imagesTr/case_1_0001.nii.gz").rename(raw / "imagesTr/case_1_0001.mha")
    (raw / "labelsTr/case_1.nii.gz").rename(raw / "labelsTr/case_1.NRRD")
    files = read_dataset(raw).cases["case_1"]
    assert files.channels == ("imagesTr/case_1_0000.nii.gz", "imagesTr/case_1_0001.mha")
    assert files.segmentation == "labelsTr/case_1.NRRD"


def test_of_two_files_for_one_channel_the_declared_ending_is_taken_aloud(raw, caplog):
    shutil.copy(raw / "imagesTr/case_2_0001.nii.gz", raw / "imagesTr/case_2_0001.nrrd")
    spec = read_dataset(raw)
    assert spec.cases["case_2"].channels[1] == "imagesTr/case_2_0001.nii.gz"
    assert "claim to be channel 1 of case 'case_2'" in caplog.text


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_two_files_for_one_thing_are_refused_where_nothing_decides(raw, folder):
    stem = "case_2_0000" if folder == "imagesTr" else "case_2"
    describe(raw, file_ending=None)
    shutil.copy(raw / f"{folder}/{stem}.nii.gz", raw / f"{folder}/{stem}.nii")
    with pytest.raises(DatasetError, match=rf"{stem}\.nii, {folder}/{stem}\.nii\.gz all claim"):
        read_dataset(raw)
    _, problems = scan_dataset(raw)
    assert [(p.code, p.case) for p in problems] == [("two-files", "case_2")]


def test_pictures_beside_the_images_are_left_out_aloud(raw, good, caplog):
    (raw / "imagesTr/overview.png").write_bytes(b"")
    (raw / "imagesTr/._case_1_0000.nii.gz").write_bytes(b"")
    (raw / "labelsTr/notes.txt").write_text("")
    assert read_dataset(raw).cases == read_dataset(good).cases
    assert "imagesTr/overview.png has no segmentation" in caplog.text


def test_segmentation_without_an_image_is_an_error_of_its_case(raw):
    shutil.copy(raw / "labelsTr/case_1.nii.gz", raw / "labelsTr/case_9.nii.gz")
    spec, problems = scan_dataset(raw)
    assert spec.cases["case_9"].segmentation == "labelsTr/case_9.nii.gz"
    assert [(p.code, p.level, p.case, p.file) for p in problems] == [
        ("missing-file", "error", "case_9", f"imagesTr/case_9_000{n}.nii.gz") for n in (0, 1)
    ]
    with pytest.raises(DatasetError, match=r"imagesTr/case_9_0000\.nii\.gz is missing"):
        read_dataset(raw)


def test_segmentation_of_another_kind_without_an_image_is_left_out_aloud(raw, good, caplog):
    (raw / "labelsTr/overview.png").write_bytes(b"")
    assert read_dataset(raw).cases == read_dataset(good).cases
    assert "labelsTr/overview.png has no image in imagesTr" in caplog.text


def test_missing_image_has_the_ending_that_the_images_have(raw):
    describe(raw, file_ending=".nrrd")
    shutil.copy(raw / "labelsTr/case_1.nii.gz", raw / "labelsTr/case_9.nii.gz")
    spec, _ = scan_dataset(raw)
    assert spec.cases["case_9"].channels[1] == "imagesTr/case_9_0001.nii.gz"


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_stands_in_the_place_of_the_only_image_is_named(raw, kind):
    describe(raw, channel_names={"0": "T1w"})
    for path in (raw / "imagesTr").glob("*_0001.nii.gz"):
        path.unlink()
    image = raw / "imagesTr/case_2_0000.nii.gz"
    image.unlink()
    if kind == "folder":
        image.mkdir()
    else:
        image.symlink_to(raw / "gone.nii.gz")
    words = {"folder": "is a folder; expected an image", "link": "is a link to a file that is"}
    with pytest.raises(DatasetError, match=f"case 'case_2': .*_0000.nii.gz {words[kind]}"):
        read_dataset(raw)


def test_picture_holds_all_its_channels_in_one_file(raw):
    """RGB pictures are numbered _0000 by nnU-Net though they hold three channels."""
    for path in (raw / "imagesTr").iterdir():
        path.unlink()
    for number in (1, 2, 3):
        (raw / f"imagesTr/case_{number}_0000.png").write_bytes(b"")
    describe(raw, channel_names={"0": "R", "1": "G", "2": "B"}, file_ending=".png")
    assert read_dataset(raw).cases["case_3"].channels == ("imagesTr/case_3_0000.png",)


def test_analyze_pair_is_one_image(raw):
    for ending in (".hdr", ".img"):
        shutil.copy(raw / "imagesTr/case_1_0000.nii.gz", raw / f"imagesTr/case_1_0000{ending}")
    (raw / "imagesTr/case_1_0000.nii.gz").unlink()
    assert read_dataset(raw).cases["case_1"].channels[0] == "imagesTr/case_1_0000.hdr"


def test_digits_at_the_end_of_an_id_are_no_channel(tmp_path):
    """BRATS_0001.nii.gz is called like its segmentation: it is no channel 1 of a case BRATS."""
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
        for number in (1, 2):
            (tmp_path / folder / f"BRATS_{number:04d}.nii.gz").write_bytes(b"")
    labels = {"background": 0, "a": 1}
    (tmp_path / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "T1", "1": "T2"}, "labels": labels})
    )
    assert read_dataset(tmp_path).cases["BRATS_0002"].channels == ("imagesTr/BRATS_0002.nii.gz",)


def test_letters_composed_otherwise_are_the_same_name(raw):
    """A name may come with its accent as a letter of its own (macOS) or not."""
    for number in (0, 1):
        old = raw / f"imagesTr/case_2_{number:04d}.nii.gz"
        old.rename(raw / f"imagesTr/Z\u00fcrich 2_{number:04d}.nii.gz")
    (raw / "labelsTr/case_2.nii.gz").rename(raw / "labelsTr/Zu\u0308rich 2.nii.gz")
    files = read_dataset(raw).cases["Z\u00fcrich 2"]
    assert files.segmentation == "labelsTr/Zu\u0308rich 2.nii.gz"


def test_folder_called_like_a_file_is_missing(raw):
    (raw / "labelsTr/case_1.nii.gz").unlink()
    (raw / "labelsTr/case_1.nii.gz").mkdir()
    with pytest.raises(DatasetError, match="case 'case_1': no segmentation in labelsTr"):
        read_dataset(raw)


def test_scan_returns_bad_cases_with_their_problems(raw):
    (raw / "imagesTr/case_1_0001.nii.gz").unlink()
    spec, problems = scan_dataset(raw)
    assert len(spec.cases) == 3
    assert [(p.code, p.case, p.file) for p in problems] == [
        ("missing-file", "case_1", "imagesTr/case_1_0001.nii.gz")
    ]


def test_each_folder_is_looked_into_once(raw, monkeypatch):
    """Listing costs one look into each folder, whatever the number of cases."""
    looks = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (looks.append(path), scandir(path))[1])
    monkeypatch.setattr(Path, "stat", None)
    listing = Listing(raw)
    assert all(listing.has_file(f"labelsTr/case_{n}.nii.gz") for n in (1, 2, 3))
    assert len(looks) == 1


def test_labels_of_every_spelling(tmp_path):
    path = tmp_path / "dataset.json"
    assert parse_labels({"labels": {"background": "0", "organ": "1"}}, path) == (
        {"background": 0, "organ": 1},
        None,
        None,
    )
    regions = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    described = {"labels": regions, "regions_class_order": [1, 2]}
    assert parse_labels(described, path) == (
        {"background": 0, "whole": (1, 2), "core": 2},
        (1, 2),
        3,
    )


def test_grouping_wants_exactly_four_digits(tmp_path):
    names = ["b_0001.nii.gz", "b_0000.nii.gz", "a.nii.gz", "c_001.nrrd", "d_12_0000.mha"]
    found = group_channels([tmp_path / name for name in names])
    assert {case: [number for number, _ in files] for case, files in found.items()} == {
        "a": [0],
        "b": [0, 1],
        "c_001": [0],
        "d_12": [0],
    }


def test_shifted_segmentation_is_refused(raw, datasets):
    """Same shape, another place: the grids disagree although the arrays would fit."""
    affine = datasets.affine((0.9, 1.14, 1.9))
    affine[:3, 3] += 2.0
    shape = load_case(read_dataset(raw), "case_2").grid.shape
    write_nifti(raw / "labelsTr/case_2.nii.gz", np.ones(shape, np.uint8), affine)
    with pytest.raises(GeometryError, match=r"case_2\.nii\.gz does not lie on the grid") as caught:
        load_case(read_dataset(raw), "case_2")
    assert "case: case_2" in caught.value.__notes__


def test_two_entries_with_one_label_name_are_refused(raw):
    entry = {"image": "imagesTr/case_1_0000.nii.gz"}
    listed = [{**entry, "label": f"{folder}/seg.nii.gz"} for folder in ("a", "b")]
    describe(raw, training=listed)
    with pytest.raises(DatasetError, match=r"two training entries have a label file named seg"):
        read_dataset(raw)
