"""The corrected copy: what is safe is corrected, everything else is as it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from medseg.check import fix
from medseg.check.fix import require_empty, write_fixed
from medseg.data.case import load_case
from medseg.data.dataset import read_dataset, scan_dataset
from medseg.errors import ConfigError, DatasetError
from medseg.geometry import reorient
from medseg.io.companions import companions
from medseg.io.image import Header
from medseg.io.read import read_segmentation, read_stored
from medseg.io.write import write_nifti, write_segmentation
from medseg.schema.check import CheckReport
from tests.check.conftest import Raw, look
from tests.check.test_planted_defects import PLANTS

FIXABLE = {
    "big endian image",
    "big endian segmentation",
    "float64 label",
    "origin drift of a channel",
    "origin drift of the segmentation",
    "rgb label in grey",
    "segmentation in another orientation",
    "segmentation with scl slope",
    "spacing drift",
}


def fixed(raw, tmp_path):
    """Write a corrected copy; return what was found before, the copy, and what is found in it."""
    spec, facts, before = look(raw.folder)
    report = CheckReport(dataset=spec.name, made_with="", cases=facts)
    copy = Raw(tmp_path / "copy")
    result = write_fixed(spec, report, copy.folder)
    assert result.failed == ()
    assert sorted(result.done, key=str) == sorted((p for p in before if p.fix), key=str)
    return before, copy, look(copy.folder)[2]


@pytest.mark.parametrize("name", [name for name in PLANTS if "folder called" not in name])
def test_what_can_be_corrected_is_gone_and_nothing_else(raw, tmp_path, datasets, name):
    PLANTS[name].spoil(raw)
    original = datasets.files(raw.folder)
    before, _, after = fixed(raw, tmp_path)
    assert any(problem.fix for problem in before) == (name in FIXABLE)
    kept = sorted((p.code, p.case or "") for p in before if p.fix is None)
    assert sorted((p.code, p.case or "") for p in after) == kept
    assert datasets.files(raw.folder) == original


@pytest.mark.parametrize("name", sorted(FIXABLE - {"segmentation with scl slope"}))
def test_corrected_case_is_the_healthy_case(raw, healthy, tmp_path, name):
    """Values are exactly those before the defect was planted."""
    PLANTS[name].spoil(raw)
    _, copy, _ = fixed(raw, tmp_path)
    ours = load_case(read_dataset(copy.folder), "case_2")
    theirs = load_case(read_dataset(healthy), "case_2")
    np.testing.assert_array_equal(ours.channels, theirs.channels)
    np.testing.assert_array_equal(ours.segmentation, theirs.segmentation)
    assert theirs.grid.disagreement(ours.grid, 1e-6) is None


def test_folder_in_the_place_of_a_file_is_not_copied(raw, tmp_path):
    PLANTS["folder called like an image"].spoil(raw)
    _, copy, after = fixed(raw, tmp_path)
    assert not copy.channel().exists()
    assert [problem.code for problem in after] == ["missing-file"]


def test_header_is_that_of_the_image_and_the_type_the_smallest(raw, tmp_path):
    PLANTS["origin drift of the segmentation"].spoil(raw)
    raw.change(raw.segmentation(), lambda values: values.astype(np.float32))
    _, copy, _ = fixed(raw, tmp_path)
    stored = read_stored(copy.segmentation())
    assert stored.array.dtype == np.uint8
    image = read_stored(copy.channel())
    assert stored.header.affine == image.header.affine
    assert stored.header.nifti == image.header.nifti


def test_scaling_is_folded_in(raw, tmp_path):
    before = read_segmentation(raw.segmentation()).array
    PLANTS["segmentation with scl slope"].spoil(raw)
    _, copy, _ = fixed(raw, tmp_path)
    stored = read_stored(copy.segmentation())
    assert (stored.slope, stored.inter, stored.array.dtype) == (1.0, 0.0, np.uint8)
    np.testing.assert_array_equal(stored.array, before)


@pytest.mark.parametrize(
    "turn",
    [((2, 0, 1), (True, False, True)), ((1, 0, 2), (False, False, True)),
     ((0, 2, 1), (False, True, False)), ((2, 1, 0), (True, True, True))],
)  # fmt: skip
def test_any_way_of_storing_a_segmentation_is_turned_back(raw, healthy, tmp_path, turn):
    """The array is permuted and reversed together with its affine, so that nothing moves."""
    found = read_segmentation(raw.segmentation())
    axes, flips = turn
    array = np.flip(found.array.transpose(axes), tuple(d for d in range(3) if flips[d]))
    header = Header.of_grid(reorient(found.grid, axes, flips))
    write_segmentation(raw.segmentation(), np.ascontiguousarray(array), header)
    before, copy, after = fixed(raw, tmp_path)
    assert [problem.code for problem in before] == ["orientation"]
    assert after == []
    np.testing.assert_array_equal(read_segmentation(copy.segmentation()).array, found.array)


def test_scaled_image_with_a_drift_keeps_its_intensities(raw, tmp_path):
    raw.change(raw.channel(1), lambda values: np.rint(values).astype(np.int16))
    raw.patch(raw.channel(1), 112, "<ff", 0.5, 3.0)
    PLANTS["origin drift of a channel"].spoil(raw)
    raw.patch(raw.channel(1), 112, "<ff", 0.5, 3.0)
    stored = read_stored(raw.channel(1))
    _, copy, _ = fixed(raw, tmp_path)
    result = read_stored(copy.channel(1))
    assert (result.slope, result.array.dtype) == (1.0, np.float32)
    np.testing.assert_array_equal(result.array, stored.array * np.float32(0.5) + np.float32(3))


def test_other_files_are_copied_byte_for_byte_and_not_linked(raw, tmp_path):
    (raw.folder / "splits_final.json").write_text("[]")
    PLANTS["float64 label"].spoil(raw)
    _, copy, _ = fixed(raw, tmp_path)
    for path in sorted(path for path in raw.folder.rglob("*") if path.is_file()):
        same = copy.folder / path.relative_to(raw.folder)
        assert path.name == "case_2.nii.gz" or same.read_bytes() == path.read_bytes()
        assert same.stat().st_ino != path.stat().st_ino
    assert not list(copy.folder.rglob("*.part"))


def test_used_folder_is_refused(raw, tmp_path):
    spec, _ = scan_dataset(raw.folder)
    with pytest.raises(ConfigError, match="lies in the dataset"):
        require_empty(raw.folder / "new", spec)
    (tmp_path / "used").mkdir()
    require_empty(tmp_path / "used", spec)
    (tmp_path / "used/notes.txt").touch()
    with pytest.raises(ConfigError, match="there already"):
        require_empty(tmp_path / "used", spec)


def test_files_from_elsewhere_get_a_manifest(raw, tmp_path):
    """Two files of one name from two folders keep apart; group and labels are kept."""
    for case in ("case_2", "case_3"):
        place = tmp_path / "elsewhere" / case
        place.mkdir(parents=True)
        raw.segmentation(case).rename(place / "seg.nii.gz")
    entries = {
        case: {
            "images": [f"imagesTr/{case}_0000.nii.gz", f"imagesTr/{case}_0001.nii.gz"],
            "segmentation": str(tmp_path / "elsewhere" / case / "seg.nii.gz"),
            "group": "anna",
            "annotated_labels": ["organ", "lesion"],
        }
        for case in ("case_2", "case_3")
    }
    labels = {"background": 0, "organ": [1, 2], "lesion": 2, "ignore": 9}
    manifest = {"channels": ["T1w", "FLAIR"], "labels": labels, "regions_class_order": [1, 2]}
    (raw.folder / "medseg.json").write_text(json.dumps({**manifest, "cases": entries}))
    before = scan_dataset(raw.folder)[0]
    _, copy, after = fixed(raw, tmp_path)
    assert after == []
    spec = read_dataset(copy.folder)
    assert (spec.labels, spec.ignore_label, spec.regions_class_order) == (
        before.labels, 9, (1, 2)
    )  # fmt: skip
    assert spec.cases["case_3"].group == "anna"
    assert spec.cases["case_3"].annotated_labels == ("organ", "lesion")
    for case in spec.cases:
        np.testing.assert_array_equal(
            load_case(spec, case).segmentation, load_case(before, case).segmentation
        )


def test_failed_correction_is_said_and_the_file_copied(raw, tmp_path, monkeypatch):
    PLANTS["float64 label"].spoil(raw)
    spec, facts, _ = look(raw.folder)

    def full(*arguments):
        raise DatasetError("no space")

    monkeypatch.setattr(fix, "write_segmentation", full)
    report = CheckReport(dataset=spec.name, made_with="", cases=facts)
    PLANTS["big endian image"].spoil(raw)
    spec, facts, _ = look(raw.folder)
    report = CheckReport(dataset=spec.name, made_with="", cases=facts)
    result = write_fixed(spec, report, tmp_path / "copy")
    assert result.failed == ("labelsTr/case_2.nii.gz: not corrected (no space)",)
    assert [problem.code for problem in result.done] == ["big-endian"]
    copied = tmp_path / "copy/labelsTr/case_2.nii.gz"
    assert copied.read_bytes() == raw.segmentation().read_bytes()


def test_picture_without_voxel_size_gets_that_of_its_image(tmp_path):
    folder = tmp_path / "Dataset009_Flat"
    affine = np.diag([0.5, 0.25, 0.5, 1.0])
    for number in range(3):
        rng = np.random.default_rng(number)
        image = rng.integers(0, 255, (9, 13, 1)).astype(np.uint8)
        header = Header(shape=(9, 13), affine=tuple(map(tuple, affine.tolist())))
        write_segmentation(folder / f"imagesTr/a{number}_0000.png", image, header)
        labels = folder / f"labelsTr/a{number}.png"
        write_segmentation(labels, (image > 99).astype(np.uint8), header)
        labels.with_suffix(".json").unlink()
    description = {"channel_names": {"0": "grey"}, "labels": {"background": 0, "cell": 1}}
    (folder / "dataset.json").write_text(json.dumps({**description, "file_ending": ".png"}))
    before, copy, after = fixed(Raw(folder), tmp_path)
    assert {problem.code for problem in before} == {"spacing"}
    assert all("nothing tells its voxel size" in problem.message for problem in before)
    assert after == []
    assert read_stored(copy.folder / "labelsTr/a1.png").header.grid.spacing[:2] == (0.5, 0.25)


def test_voxels_of_a_pair_are_copied_with_their_header(raw, tmp_path):
    values, affine = raw.values(raw.channel())
    raw.channel().unlink()
    write_nifti(raw.folder / "imagesTr/case_2_0000.hdr", values, affine)
    _, copy, after = fixed(raw, tmp_path)
    assert (copy.folder / "imagesTr/case_2_0000.img").is_file()
    assert after == []


def detached(raw, ending, place):
    """Store channel 0 of case_2 as a header whose voxels lie elsewhere; return its values."""
    values, affine = raw.values(raw.channel())
    raw.channel().unlink()
    header = raw.folder / f"imagesTr/case_2_0000{ending}"
    write_nifti(header, values, affine)
    (data,) = companions(header)
    target = Path(os.path.normpath(header.parent / place))
    target.parent.mkdir(parents=True, exist_ok=True)
    data.rename(target)
    header.write_text(header.read_text().replace(data.name, place))
    return values


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
@pytest.mark.parametrize("place", ["raw/deeper/x.bin", "../voxels/x.bin", "/ABSOLUTE/x.bin"])
def test_voxels_in_another_folder_are_in_the_copy(raw, tmp_path, ending, place):
    values = detached(raw, ending, place.replace("/ABSOLUTE", str(raw.folder / "imagesTr/raw")))
    _, copy, after = fixed(raw, tmp_path)
    shutil.rmtree(raw.folder)
    assert after == []
    found = read_stored(copy.folder / f"imagesTr/case_2_0000{ending}")
    np.testing.assert_array_equal(found.array, values)
    kept = copy.folder / f"imagesTr/{place}"
    assert kept.is_file() == (place == "raw/deeper/x.bin")


def test_voxel_files_of_one_name_from_two_folders_stay_apart(raw, tmp_path):
    """Images outside the folder of the dataset come together in one folder of the copy."""
    description = {"channels": ["a", "b"], "labels": {"background": 0, "organ": 1, "lesion": 2}}
    arrays, files = [], []
    for number in (0, 1):
        values, affine = raw.values(raw.channel(number))
        header = tmp_path / f"elsewhere/{number}/image{number}.mhd"
        write_nifti(header, values, affine)
        (data,) = companions(header)
        data.rename(header.with_name("x.zraw"))
        header.write_text(header.read_text().replace(data.name, "x.zraw"))
        arrays.append(values)
        files.append(str(header))
    cases = {"case_2": {"images": files, "segmentation": "labelsTr/case_2.nii.gz"}}
    manifest = raw.folder / "medseg.json"
    manifest.write_text(json.dumps({"format_version": 1, **description, "cases": cases}))
    _, copy, _ = fixed(raw, tmp_path)
    spec = read_dataset(copy.folder)
    for name, values in zip(spec.cases["case_2"].channels, arrays, strict=True):
        np.testing.assert_array_equal(read_stored(copy.folder / name).array, values)
