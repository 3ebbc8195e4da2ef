"""Which files make up which case, and everything that is wrong with them at once."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg.errors import ConfigError, DatasetError
from medseg.infer.inputs import collect_cases, part_of
from tests.io.test_dicom import write_series

CHANNELS = ("T1w", "CT")
RGB = ("R", "G", "B")


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def colours(seed=0, rows=17, columns=23):
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3)).astype(np.uint8)


def series(folder, number=0):
    """Write a small DICOM series."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    values = np.arange(60, dtype=np.int16).reshape(5, 4, 3) + number
    return write_series(folder, values, np.diag([0.7, 1.1, 3.0, 1.0]))


def test_files_are_grouped_by_case(tmp_path):
    folder = touch(
        tmp_path / "in",
        "b_0001.nii.gz", "b_0000.nii.gz", "a_2_0000.nrrd", "a_2_0001.nrrd",
        "notes.txt", "b.json", ".DS_Store",
    )  # fmt: skip
    (folder / "deeper").mkdir()
    cases = collect_cases([folder], CHANNELS)
    assert list(cases) == ["a_2", "b"]
    assert [path.name for path in cases["b"]] == ["b_0000.nii.gz", "b_0001.nii.gz"]


def test_no_suffix_means_one_channel(tmp_path):
    folder = touch(tmp_path, "a.nii.gz", "b_0000.nii.gz", "c_01.nii.gz")
    assert list(collect_cases([folder], ["T1w"])) == ["a", "b", "c_01"]


def test_files_and_folders_may_be_mixed_and_named_twice(tmp_path):
    one = touch(tmp_path / "one", "a_0000.nii.gz", "a_0001.nii.gz")
    two = touch(tmp_path / "two", "b_0000.nii", "b_0001.nii", "c_0000.nii", "c_0001.nii")
    cases = collect_cases(
        [one, one / "a_0000.nii.gz", two / "b_0000.nii", two / "b_0001.nii"], CHANNELS
    )
    assert list(cases) == ["a", "b"]


def test_data_files_of_a_header_are_no_images_of_their_own(tmp_path):
    folder = touch(
        tmp_path, "a.hdr", "a.img", "b.mhd", "b.raw", "c.mhd", "c.zraw", "d.nhdr", "d.raw.gz"
    )
    cases = collect_cases([folder], ["T1w"])
    assert [paths[0].name for paths in cases.values()] == ["a.hdr", "b.mhd", "c.mhd", "d.nhdr"]


def test_one_file_may_hold_every_channel(make, tmp_path):
    channels = make.channels((5, 6, 7))
    nib.save(nib.Nifti1Image(np.moveaxis(channels, 0, 3), make.oblique()), tmp_path / "four.nii")
    assert list(collect_cases([tmp_path], CHANNELS)) == ["four"]
    with pytest.raises(DatasetError, match=r"case 'four': got channels 0000 \(four.nii\)"):
        collect_cases([tmp_path], ("T1w", "CT", "FLAIR"))


def test_pictures_in_colours_hold_all_channels(tmp_path):
    """With and without number, whatever their endings; a fourth channel may follow."""
    for name in ("a.png", "b_0000.png", "c_0000.jpg", "d.bmp", "e_0000.tif", "f_0000.png"):
        Image.fromarray(colours()).save(tmp_path / name)
    cases = collect_cases(sorted(tmp_path.iterdir()), RGB)
    assert list(cases) == ["a", "b", "c", "d", "e", "f"]
    with pytest.raises(DatasetError, match=r"case 'a': got channels 0000 \(a\.png\); expected"):
        collect_cases([tmp_path], (*RGB, "depth"))
    Image.fromarray(colours()[..., 0]).save(tmp_path / "f_0001.png")
    found = collect_cases([tmp_path / "f_0000.png", tmp_path / "f_0001.png"], (*RGB, "depth"))
    assert [path.name for path in found["f"]] == ["f_0000.png", "f_0001.png"]


def test_several_files_for_one_picture_are_a_problem(tmp_path):
    for name in ("a.png", "a_0000.jpg"):
        Image.fromarray(colours()).save(tmp_path / name)
    with pytest.raises(DatasetError, match="case 'a': several files claim one channel"):
        collect_cases([tmp_path], RGB)


def test_a_damaged_picture_is_reported_when_its_turn_comes(tmp_path):
    touch(tmp_path, "a_0000.png")
    assert list(collect_cases([tmp_path], RGB)) == ["a"]


def test_endings_may_differ_within_a_case(tmp_path):
    folder = touch(tmp_path, "a_0000.nii.gz", "a_0001.mha")
    assert [path.name for path in collect_cases([folder], CHANNELS)["a"]] == [
        "a_0000.nii.gz", "a_0001.mha"
    ]  # fmt: skip


def test_every_problem_is_listed_at_once(tmp_path):
    folder = touch(
        tmp_path / "in",
        "a_0000.nii.gz", "b_0001.nii.gz", "c_0000.nii.gz", "c_0001.nii.gz", "c_0002.nii.gz",
        "d_0000.nii.gz", "d_0000.nrrd", "d_0001.nrrd", "e_0000.nii.gz", "e_0001.nii.gz",
        "picture.gif",
    )  # fmt: skip
    empty = touch(tmp_path / "empty", "readme.md")
    (empty / "sub").mkdir()
    with pytest.raises(DatasetError) as caught:
        collect_cases([folder, empty, tmp_path / "nowhere"], CHANNELS)
    lines = str(caught.value).splitlines()
    assert lines[0] == "7 problems with the input; nothing was predicted:"
    text = "\n".join(lines[1:])
    assert "picture.gif: 'picture.gif' has an unknown ending; expected one of: .nii.gz" in text
    assert "empty: holds no image (1 other files, 1 folders); expected CASE_0000.nii.gz" in text
    assert "nowhere: no such file or folder" in text
    expected = "expected 0000 (T1w), 0001 (CT)"
    assert f"case 'a': got channels 0000 (a_0000.nii.gz); {expected}" in text
    assert f"case 'b': got channels 0001 (b_0001.nii.gz); {expected}" in text
    assert f"0002 (c_0002.nii.gz); {expected}" in text
    assert "case 'd': several files claim one channel: " in text
    assert "'e'" not in text


def test_a_long_list_of_problems_is_cut(tmp_path):
    folder = touch(tmp_path, *(f"case{number:02d}_0000.nii.gz" for number in range(25)))
    with pytest.raises(DatasetError, match=r"25 problems(.|\n)*\.\.\. and 5 more"):
        collect_cases([folder], CHANNELS)


def test_no_input_is_a_problem():
    with pytest.raises(DatasetError, match="no input was given"):
        collect_cases([], CHANNELS)


class TestLists:
    def listed(self, tmp_path, text, encoding="utf-8"):
        path = tmp_path / "lists/cases.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode(encoding))
        return path

    def test_their_paths_are_relative_to_them_or_absolute(self, tmp_path):
        one = touch(tmp_path / "one", "a.nii.gz", "b.nii.gz")
        two = touch(tmp_path / "two", "c.nrrd", "d.nrrd")
        series(tmp_path / "scans/e")
        text = f"# cases\n\n  ../one/b.nii.gz\n{two}\n../scans/e\n"
        cases = collect_cases([self.listed(tmp_path, text), one / "a.nii.gz"], ["T1w"])
        assert list(cases) == ["a", "b", "c", "d", "e"]

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    def test_they_may_come_from_windows(self, tmp_path, encoding):
        """With its line ends and its mark of the encoding."""
        touch(tmp_path / "lists", "m\u00fcller.nii.gz", "b.nii.gz")
        listed = self.listed(tmp_path, "m\u00fcller.nii.gz\r\nb.nii.gz\r\n", encoding)
        assert list(collect_cases([listed], ["T1w"])) == ["b", "m\u00fcller"]

    @pytest.mark.parametrize(
        ("text", "encoding", "expected"),
        [
            ("\n# nothing\n", "utf-8", "names no image"),
            ("more.txt\n", "utf-8", "names the list"),
            ("nowhere.nii\n", "utf-8", "nowhere.nii: no such file or folder"),
            ("m\u00fcller.nii.gz\n", "latin-1", "is no text in UTF-8"),
        ],
    )
    def test_what_is_wrong_with_them_is_told(self, tmp_path, text, encoding, expected):
        touch(tmp_path / "lists", "more.txt", "m\u00fcller.nii.gz")
        with pytest.raises(DatasetError, match=expected):
            collect_cases([self.listed(tmp_path, text, encoding)], ["T1w"])


class TestDicom:
    def test_a_folder_of_series_folders(self, tmp_path):
        for case in ("anna", "bert"):
            for number in (0, 1):
                series(tmp_path / f"in/{case}_{number:04d}", number)
        touch(tmp_path / "in", "cora_0000.nii.gz", "cora_0001.nii.gz", "notes.txt")
        touch(tmp_path / "in/empty")
        touch(tmp_path / "in/.hidden", "x")
        cases = collect_cases([tmp_path / "in"], CHANNELS)
        assert list(cases) == ["anna", "bert", "cora"]
        assert [path.name for path in cases["bert"]] == ["bert_0000", "bert_0001"]

    def test_a_series_folder_is_an_input_itself(self, tmp_path, monkeypatch):
        folder = series(tmp_path / "anna")
        assert collect_cases([folder], ["T1w"]) == {"anna": (folder,)}
        monkeypatch.chdir(folder)
        assert list(collect_cases(["."], ["T1w"])) == ["anna"]

    def test_series_of_one_name_are_a_problem(self, tmp_path):
        folders = [series(tmp_path / patient / "scan") for patient in ("one", "two")]
        with pytest.raises(DatasetError, match="case 'scan': several files claim one channel"):
            collect_cases(folders, ["T1w"])

    def test_a_missing_channel_is_named(self, tmp_path):
        series(tmp_path / "in/anna_0001")
        with pytest.raises(DatasetError, match=r"case 'anna': got channels 0001 \(anna_0001\)"):
            collect_cases([tmp_path / "in"], CHANNELS)


class TestParts:
    CASES = dict.fromkeys("abcdefg", ())

    @pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
    def test_together_they_hold_every_case_once(self, count):
        parts = [list(part_of(self.CASES, f"{number + 1}/{count}")) for number in range(count)]
        assert sorted(name for part in parts for name in part) == list(self.CASES)
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1

    def test_without_parts_all_cases_are_taken(self):
        assert part_of(self.CASES, None) == self.CASES

    @pytest.mark.parametrize("part", ["", "1", "0/2", "3/2", "-1/2", "1/2/3", "1/0", "one/two"])
    def test_what_is_no_part_is_refused(self, part):
        with pytest.raises(ConfigError, match="expected i/n with i from 1 to n"):
            part_of(self.CASES, part)
