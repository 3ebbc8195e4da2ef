"""`dataset init`: what is written about a folder that nobody has described."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from medseg.api.layouts import init_dataset, look_at, write_found
from medseg.data.case import load_case
from medseg.data.dataset import read_dataset
from medseg.data.workspace import Workspace
from medseg.errors import DatasetError
from medseg.io.write import write_nifti
from medseg.schema.base import read_json

SHARED = Path(__file__).parents[2] / "../shared/data"
AFFINE = np.diag([0.9, 1.1, 1.9, 1.0])


def shared(name):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the reference data {name} is not here")
    return folder.resolve()


def put(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, array, AFFINE)


def patients(root, *, images=("t1", "flair"), values=(0, 1, 4), intensity=100.0, dtype=np.float32):
    """Write a folder per patient, each with its own shape."""
    rng = np.random.default_rng(3)
    for number in (1, 2, 3):
        shape = (8 + number, 7, 6)
        for name in images:
            image = rng.normal(intensity, 20, size=shape)
            put(root / f"pat{number}/{name}.nii.gz", np.rint(image).astype(dtype))
        labels = rng.choice(values, size=shape).astype(np.uint8)
        put(root / f"pat{number}/seg.nii.gz", labels)
    return root


@pytest.fixture
def folder(tmp_path):
    return patients(tmp_path / "Task 7")


def test_manifest_is_read_back_as_it_was_found(folder, tmp_path):
    found = look_at(folder)
    path = write_found(found)
    assert path == folder / "medseg.json"
    spec = read_dataset(folder)
    assert spec.channels == found.channels == ("flair", "t1")
    assert spec.labels == {"background": 0, "label_1": 1, "label_4": 4}
    assert spec.cases == dict(found.cases)
    assert spec.cases["pat2"].channels == ("pat2/flair.nii.gz", "pat2/t1.nii.gz")
    assert load_case(spec, "pat2").channels.shape == (2, 10, 7, 6)
    assert found.label_counts == {0: 3, 1: 3, 4: 3}


def test_masks_of_0_and_255_have_a_foreground(tmp_path):
    spec = read_dataset(init_dataset(patients(tmp_path / "d", images=("x",), values=(0, 255))))
    assert spec.labels == {"background": 0, "foreground": 255}
    assert spec.channels == ("image",)


def test_hounsfield_units_are_recognised_by_their_values(tmp_path):
    air = {"images": ("scan",), "intensity": -1000.0}
    assert look_at(patients(tmp_path / "ct", **air, dtype=np.int16)).channels == ("CT",)
    fractions = patients(tmp_path / "other", **air)
    put(fractions / "pat2/scan.nii.gz", np.full((10, 7, 6), -1000.5, np.float32))
    assert look_at(fractions).channels != ("CT",)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.txt", "0 background\n1 liver\n4 left kidney\n"),
        ("labels.csv", "index,name\n1,liver\n4,left kidney\n"),
        ("dseg.tsv", "index\tname\n4\tleft kidney\n1\tliver\n"),
        ("snap_label.label", '1 255 0 0 1 1 1 "liver"\n4 0 255 0 1 1 1 "left kidney"\n'),
        ("label_names.json", '{"liver": 1, "left kidney": 4}'),
        ("dataset.json", '{"labels": {"0": "background", "1": "liver", "4": "left kidney"}}'),
    ],
)
def test_names_of_labels_are_taken_from_a_file(folder, name, text):
    (folder / name).write_text(text)
    found = look_at(folder)
    assert found.names.labels == {"background": 0, "liver": 1, "left kidney": 4}
    assert any(name in note for note in found.notes)


def test_only_values_that_occur_get_names(folder):
    (folder / "labels.txt").write_text("0 clear\n1 liver\n2 spleen\n4 left kidney\n9 aorta\n")
    assert look_at(folder).names.labels == {"background": 0, "liver": 1, "left kidney": 4}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("pat1.nii.gz,1\npat2.nii.gz,4\n", "'pat1.nii.gz' is an image or a case"),
        ("pat1,1\npat2,4\npat3,2\n", "'pat1' is an image or a case"),
        ("1,liver\n2,spleen\n", "it says nothing about the value 4"),
        ("sick,1\nwell,4\nwell,1\n", None),
        ("1,benign\n2,malignant\n3,benign\n4,other\n", None),
    ],
)
def test_table_of_something_else_names_no_label(folder, text, reason):
    """A table of that name may hold the class of each image."""
    (folder / "labels.csv").write_text(text)
    found = look_at(folder)
    assert found.names.labels == {"background": 0, "label_1": 1, "label_4": 4}
    told = [note for note in found.notes if "labels.csv" in note]
    assert told == ([f"labels.csv does not name the labels: {reason}"] if reason else [])


def test_file_that_names_every_value_is_taken_after_one_that_does_not(folder):
    (folder / "a_labels.txt").write_text("1 liver\n")
    (folder / "labels.txt").write_text("1 liver\n4 left kidney\n")
    assert look_at(folder).names.labels == {"background": 0, "liver": 1, "left kidney": 4}


def test_patients_with_two_visits_are_groups(tmp_path):
    for case in ("pat01_visit1", "pat01_visit2", "pat02_visit1"):
        put(tmp_path / f"images/{case}.nii.gz", np.ones((5, 6, 7), np.float32))
        put(tmp_path / f"masks/{case}.nii.gz", np.ones((5, 6, 7), np.uint8))
    spec = read_dataset(init_dataset(tmp_path))
    assert {case: files.group for case, files in spec.cases.items()} == {
        "pat01_visit1": "pat01",
        "pat01_visit2": "pat01",
        "pat02_visit1": "pat02",
    }


def test_image_on_another_grid_is_no_channel(folder):
    for number in (1, 2, 3):
        put(folder / f"pat{number}/scout.nii.gz", np.ones((4, 3, 2), np.float32))
    found = look_at(folder)
    assert found.channels == ("flair", "t1")
    assert [left.files for left in found.left_over] == [
        tuple(f"pat{number}/scout.nii.gz" for number in (1, 2, 3))
    ]


def test_four_dimensional_image_is_several_channels(tmp_path):
    import nibabel as nib

    for case in "ab":
        (tmp_path / "images").mkdir(exist_ok=True)
        image = nib.Nifti1Image(np.ones((5, 6, 7, 3), np.float32), AFFINE)
        nib.save(image, tmp_path / f"images/{case}.nii.gz")
        put(tmp_path / f"labels/{case}.nii.gz", np.ones((5, 6, 7), np.uint8))
    spec = read_dataset(init_dataset(tmp_path))
    assert spec.channels == ("channel_0", "channel_1", "channel_2")
    assert load_case(spec, "b").channels.shape == (3, 5, 6, 7)


def test_an_unreadable_segmentation_is_told(folder):
    (folder / "pat3/seg.nii.gz").write_bytes(b"nothing")
    found = look_at(folder)
    assert len(found.cases) == 3
    assert any("pat3" in note for note in found.notes)


def test_instance_numbers_are_refused(tmp_path):
    root = patients(tmp_path / "d")
    for number in (1, 2, 3):
        shape = (12, 10, 11)
        instances = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape) * 7
        put(root / f"pat{number}/seg.nii.gz", instances)
    with pytest.raises(DatasetError, match=r"different values, from 0 to .* instance numbers"):
        look_at(root)


def test_a_manifest_is_never_overwritten(folder, tmp_path):
    path = init_dataset(folder, workspace=tmp_path / "work")
    before = path.read_bytes()
    with pytest.raises(DatasetError, match=r"medseg\.json: there already"):
        init_dataset(folder, workspace=tmp_path / "work")
    assert path.read_bytes() == before


def test_read_only_folder_keeps_its_manifest_in_the_workspace(folder, tmp_path):
    work = tmp_path / "work"
    folder.chmod(0o555)
    try:
        path = init_dataset(folder, workspace=work)
        assert path == work / "datasets/Task 7/medseg.json"
        for name in ("Task 7", folder):
            place, source = Workspace(work).find(name)
            assert place.path == work / "datasets/Task 7"
            spec = read_dataset(source)
            assert spec.name == "Task 7"
            assert load_case(spec, "pat1").channels.shape == (2, 9, 7, 6)
        with pytest.raises(DatasetError, match="there already"):
            init_dataset(folder, workspace=work)
    finally:
        folder.chmod(0o755)


def test_described_folder_needs_nothing(tmp_path, datasets):
    raw = datasets.write(tmp_path / "Dataset001_A", num_cases=2)
    before = datasets.files(raw)
    assert init_dataset(raw) == raw / "dataset.json"
    assert datasets.files(raw) == before


def test_described_folder_with_patients_gets_its_groups(tmp_path, datasets):
    raw = datasets.write(tmp_path / "Dataset001_A", num_cases=2)
    for path in [*(raw / "imagesTr").iterdir(), *(raw / "labelsTr").iterdir()]:
        path.rename(path.with_name(path.name.replace("case_", "sub-1_ses-")))
    spec = read_dataset(init_dataset(raw))
    assert spec.channels == ("T1w", "FLAIR")
    assert spec.labels == {"background": 0, "organ": 1, "lesion": 2}
    assert {files.group for files in spec.cases.values()} == {"sub-1"}
    assert read_dataset(raw) == spec


def test_table_gets_the_labels_it_lacks(folder, tmp_path):
    rows = [f"pat{n},pat{n}/t1.nii.gz,pat{n}/seg.nii.gz,g{n // 2}" for n in (1, 2, 3)]
    table = folder / "list.csv"
    table.write_text("\n".join(["case,T1w,segmentation,group", *rows]))
    path = init_dataset(table)
    assert path == folder / "list.json"
    assert read_json(path)["labels"] == {"background": 0, "label_1": 1, "label_4": 4}
    spec = read_dataset(table)
    assert spec.name == "list"
    assert spec.cases["pat3"].group == "g1"
    with pytest.raises(DatasetError, match=r"list\.json: there already"):
        init_dataset(table)


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        look_at(tmp_path / "nowhere")
    (tmp_path / "a.nii").write_bytes(b"")
    with pytest.raises(DatasetError, match="expected a folder, or a table"):
        look_at(tmp_path / "a.nii")


class TestRealFolders:
    """Folders as they come, without the description that some of them have."""

    def test_spinal_cord(self, tmp_path):
        folder = shared("spinal_cord")
        found = look_at(folder, workspace=tmp_path)
        assert list(found.cases) == ["mt0", "mt1", "t1", "t2", "t2s"]
        assert found.channels == ("image",)
        assert found.names.labels == {"background": 0, "label_1": 1}
        assert found.left_over == ()

    @pytest.mark.parametrize(
        ("name", "num_cases", "channels", "num_groups"),
        [
            ("nuclei_he_rgb", 60, ("R", "G", "B"), 0),
            ("openms_3ch_brain", 6, ("channel_0", "channel_1", "channel_2"), 4),
            ("sunnybrook_sax3d", 45, ("image",), 0),
        ],
    )
    def test_without_its_description(self, tmp_path, name, num_cases, channels, num_groups):
        described = read_dataset(shared(name))
        target = tmp_path / name
        target.mkdir()
        for part in ("imagesTr", "labelsTr"):
            (target / part).symlink_to(shared(name) / part, target_is_directory=True)
        spec = read_dataset(init_dataset(target))
        assert len(spec.cases) == num_cases
        assert spec.channels == channels
        assert {c: (f.channels, f.segmentation) for c, f in spec.cases.items()} == {
            c: (f.channels, f.segmentation) for c, f in described.cases.items()
        }
        groups = {files.group for files in spec.cases.values()} - {None}
        assert len(groups) == num_groups

    def test_hippocampus_is_described(self, tmp_path):
        folder = shared("Task04_Hippocampus")
        assert look_at(folder, workspace=tmp_path).is_described


def test_written_json_is_for_people(folder):
    """One line a case where it fits; nothing that has no value."""
    text = init_dataset(folder).read_text()
    values = json.loads(text)
    assert list(values) == ["format_version", "channels", "labels", "cases"]
    assert list(values["cases"]["pat1"]) == ["images", "segmentation"]
    shutil.rmtree(folder)
