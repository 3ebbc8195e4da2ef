"""Manifests: tables and JSON with one row a case."""

from __future__ import annotations

import json

import pytest

from medseg.data.dataset import read_dataset, scan_dataset
from medseg.errors import ConfigError, DatasetError

LABELS = {"labels": {"background": 0, "liver": 255, "ignore": 1000}}
TABLE = """case,T1w,FLAIR,segmentation,group,fold,stratum,annotated_labels
p1,a b/p1.nii,x/p1.nii.gz,seg/p1.png,anna,0,north,
p2,./a b/p2.nii,x\\p2.nii.gz,seg/p2.png,anna,1,,liver
"""


@pytest.fixture
def folder(tmp_path):
    for case in ("p1", "p2"):
        for name in (f"a b/{case}.nii", f"x/{case}.nii.gz", f"seg/{case}.png"):
            path = tmp_path / "Sp\u00fcl" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    (tmp_path / "Sp\u00fcl/dataset.json").write_text(json.dumps(LABELS))
    return tmp_path / "Sp\u00fcl"


def write(folder, text, name="medseg.csv", encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def test_table_beside_its_labels(folder):
    write(folder, TABLE)
    spec = read_dataset(folder)
    assert spec.name == "Sp\u00fcl"
    assert spec.source == str(folder)
    assert spec.description == str(folder / "medseg.csv")
    assert spec.channels == ("T1w", "FLAIR")
    assert spec.labels == {"background": 0, "liver": 255}
    assert spec.ignore_label == 1000
    first, second = spec.cases["p1"], spec.cases["p2"]
    assert first.channels == ("a b/p1.nii", "x/p1.nii.gz")
    assert second.channels == ("a b/p2.nii", "x/p2.nii.gz")
    assert (first.group, first.fold, first.stratum) == ("anna", 0, "north")
    assert (second.group, second.fold, second.stratum) == ("anna", 1, None)
    assert first.annotated_labels is None
    assert second.annotated_labels == ("liver",)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_tables_of_every_program(folder, separator, encoding, newline):
    """Spreadsheets write other separators, a byte order mark, empty cells and empty lines."""
    text = TABLE.replace("\n", ",,\n") + ",,,,\n\n"
    path = write(folder, text.replace(",", separator).replace("\n", newline), "l.csv", encoding)
    assert read_dataset(path).cases == read_dataset(write(folder, TABLE)).cases


def test_quoted_cells_hold_separators_and_umlauts(folder):
    (folder / "seg/p1.png").rename(folder / "seg/\u00e4, b.png")
    text = 'case,image,segmentation\n"\u00e4, b",a b/p1.nii,"seg/\u00e4, b.png"\n'
    spec = read_dataset(write(folder, text, "own.csv"))
    assert spec.name == "own"
    assert spec.channels == ("image",)
    assert spec.cases["\u00e4, b"].segmentation == "seg/\u00e4, b.png"


def test_paths_may_be_absolute(folder, tmp_path):
    rows = f"case,image,segmentation\np1,{folder}/a b/p1.nii,{folder}/seg/p1.png\n"
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/dataset.json").write_text(json.dumps(LABELS))
    spec = read_dataset(write(tmp_path / "lists", rows, "p.csv"))
    assert spec.cases["p1"].channels == (f"{folder}/a b/p1.nii",)


def test_labels_may_lie_in_a_file_of_the_same_name(folder):
    path = write(folder, TABLE, "mine.csv")
    own = {"labels": {"background": 0, "spleen": 255, "liver": 3}}
    (folder / "mine.json").write_text(json.dumps(own))
    assert list(read_dataset(path).labels) == ["background", "spleen", "liver"]


def test_settings_of_a_table_stand_for_it(folder):
    """medseg.json without cases holds the labels of medseg.csv."""
    write(folder, TABLE)
    expected = read_dataset(folder)
    (folder / "dataset.json").rename(folder / "medseg.json")
    assert read_dataset(folder) == read_dataset(folder / "medseg.csv") == expected


def test_table_without_labels_says_how_to_get_them(folder):
    (folder / "dataset.json").unlink()
    path = write(folder, TABLE)
    with pytest.raises(ConfigError, match=r"Write one that does: .* or let it be written"):
        read_dataset(path)


def test_columns_that_are_no_images_are_left_aside_aloud(folder, caplog):
    text = "case,age,image,segmentation,\np1,63,a b/p1.nii,seg/p1.png,\n"
    assert read_dataset(write(folder, text)).channels == ("image",)
    assert "columns that are not read: age" in caplog.text


def test_listed_channels_choose_the_columns(folder):
    (folder / "dataset.json").write_text(json.dumps({**LABELS, "channel_names": {"0": "FLAIR"}}))
    write(folder, TABLE)
    assert read_dataset(folder).cases["p1"].channels == ("x/p1.nii.gz",)
    (folder / "dataset.json").write_text(json.dumps({**LABELS, "channel_names": {"0": "T2w"}}))
    with pytest.raises(ConfigError, match="no column for the channels T2w; the columns are"):
        read_dataset(folder)


def test_one_file_may_hold_all_channels(folder):
    colours = {**LABELS, "channels": ["R", "G", "B"]}
    (folder / "dataset.json").write_text(json.dumps(colours))
    write(folder, "case,image,segmentation\np1,seg/p1.png,seg/p1.png\n")
    assert read_dataset(folder).cases["p1"].channels == ("seg/p1.png",)


MANIFEST = {
    **LABELS,
    "format_version": 1,
    "channels": ["T1w", "FLAIR"],
    "cases": {
        "p1": {
            "images": ["a b/p1.nii", "x/p1.nii.gz"],
            "segmentation": "seg/p1.png",
            "annotated_labels": ["liver"],
        },
        "p2": {
            "images": {"FLAIR": "x/p2.nii.gz", "T1w": "a b/p2.nii"},
            "segmentation": "seg/p2.png",
            "group": 7,
            "fold": 2,
        },
    },
}


def as_json(folder, values, name="medseg.json"):
    return write(folder, json.dumps(values), name)


def test_json_manifest(folder):
    as_json(folder, MANIFEST)
    write(folder, TABLE)
    spec = read_dataset(folder)
    assert spec.description == str(folder / "medseg.json")
    assert spec.cases["p1"].annotated_labels == ("liver",)
    assert spec.cases["p2"].channels == ("a b/p2.nii", "x/p2.nii.gz")
    assert (spec.cases["p2"].group, spec.cases["p2"].fold) == ("7", 2)


def test_json_rows_are_like_those_of_a_table(folder):
    rows = [
        {"case": "p1", "T1w": "a b/p1.nii", "FLAIR": "x/p1.nii.gz", "segmentation": "seg/p1.png"},
        {"case": "p2", "T1w": "a b/p2.nii", "FLAIR": "x/p2.nii.gz", "segmentation": "seg/p2.png"},
    ]
    spec = read_dataset(as_json(folder, rows, "rows.json"))
    assert spec.channels == ("T1w", "FLAIR")
    assert spec == read_dataset(as_json(folder, {**LABELS, "cases": rows}, "rows.json"))


def test_manifest_may_lie_elsewhere(folder, tmp_path):
    path = as_json(tmp_path, {**MANIFEST, "folder": str(folder)}, "elsewhere.json")
    assert read_dataset(path).source == str(folder)
    path = as_json(tmp_path, {**MANIFEST, "folder": folder.name}, "elsewhere.json")
    assert read_dataset(path).source == str(folder)


def test_unlabelled_rows_take_no_part_aloud(folder, caplog):
    write(folder, TABLE.replace("seg/p2.png", ""))
    assert list(read_dataset(folder).cases) == ["p1"]
    assert "cases without a segmentation and out of training: p2" in caplog.text


def test_every_problem_of_every_row_is_told(folder):
    rows = [
        "case,T1w,FLAIR,segmentation,fold",
        "p1,a b/p1.nii,x/p1.nii.gz,seg/p1.png,one",
        "a/b,a b/p1.nii,x/p1.nii.gz,seg/p1.png,",
        ",a b/p1.nii,x/p1.nii.gz,seg/p1.png,",
        "p2,a b/p2.nii,,seg/p2.png,",
        "p3,a b/p3.nii,x/p2.nii.gz,seg/p2.png,",
        "p3,a b/p2.nii,x/p2.nii.gz,seg/p2.png,",
    ]
    write(folder, "\n".join(rows))
    with pytest.raises(DatasetError) as caught:
        read_dataset(folder)
    text = str(caught.value)
    for expected in (
        "6 problems",
        "line 2: fold is 'one'",
        "line 3: the case id is 'a/b'",
        "line 4: no case id",
        "line 5: no image for FLAIR",
        "case 'p3': a b/p3.nii is missing (channel 0, T1w)",
        "line 7: case 'p3' was there already (line 6)",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the table is empty"),
        (
            "id,image,seg\n",
            "no column 'case', no column 'segmentation'. The columns are id, image, seg",
        ),
        ("case,case,segmentation\n", "column 'case' is there twice"),
        ("case,image,segmentation\na,b.nii,c.nii,d.nii\n", "line 2: 4 cells, but 3 columns"),
        ("case,age,segmentation\na,3,c.nii\n", "it names no channel"),
    ],
)
def test_unusable_table_is_refused(folder, text, message):
    with pytest.raises(ConfigError, match=message):
        read_dataset(write(folder, text))


def test_table_in_another_encoding_is_refused(folder):
    path = write(folder, TABLE.replace("anna", "J\u00f6rg"), encoding="latin-1")
    with pytest.raises(ConfigError, match="Save the table as CSV UTF-8"):
        read_dataset(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labls": {}}, "unknown 'labls'.*Did you mean 'labels'"),
        ({"format_version": 9}, "format_version is 9"),
        ({"cases": 3}, "cases is 3; expected an object or a list"),
        ({"cases": {"a": "b.nii"}}, "cases.a is 'b.nii'; expected an object"),
        ({"channels": ["A", "A"]}, "expected a list of different names"),
        ({"folder": 3}, "folder is 3"),
    ],
)
def test_unusable_json_is_refused(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_dataset(as_json(folder, {**MANIFEST, **changes}, "m.json"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"images": [3]}, r"its images are \[3\]"),
        ({"images": []}, r"its images are \[\]"),
        ({"images": {"T1w": "a.nii"}}, "no image for FLAIR"),
        ({"grup": "a"}, "unknown 'grup'.*Did you mean 'group'"),
        ({"segmentation": 4}, "segmentation is 4"),
        ({"annotated_labels": 4}, "annotated_labels is 4"),
        ({"fold": -1}, "fold is '-1'"),
    ],
)
def test_unusable_entry_is_told(folder, entry, message):
    cases = {"p1": {**MANIFEST["cases"]["p1"], **entry}}
    _, problems = scan_dataset(as_json(folder, {**MANIFEST, "cases": cases}))
    assert len([p for p in problems if p.level == "error"]) == 1
    with pytest.raises(DatasetError, match=message):
        read_dataset(folder)


def test_files_of_another_kind_are_refused(folder):
    with pytest.raises(DatasetError, match=r"ends in \.json, \.csv or \.tsv"):
        read_dataset(folder / "a b/p1.nii")
