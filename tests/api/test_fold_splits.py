"""The split of a fold: settled when it is started, kept from then on."""

from __future__ import annotations

import pytest

from medseg.api.training import _kept, _splits
from medseg.data.splits import Split
from medseg.data.workspace import DatasetFolder
from medseg.errors import ConfigError, DatasetError
from medseg.schema.base import write
from medseg.schema.dataset import CaseFiles, DatasetSpec


@pytest.fixture
def folder(tmp_path):
    folder = DatasetFolder(tmp_path / "D")
    cases = {c: CaseFiles(channels=(f"{c}.nii",), segmentation="s.nii") for c in "abcdef"}
    spec = DatasetSpec(name="D", channels=("CT",), labels={"background": 0, "x": 1}, cases=cases)
    write(folder.spec_path, spec)
    return folder


def shrink(folder, *gone):
    spec = folder.spec()
    cases = {case: files for case, files in spec.cases.items() if case not in gone}
    write(folder.spec_path, spec.model_copy(update={"cases": cases}))


def test_splits_are_proposed_but_not_written(folder):
    assert list(_splits(folder, "cv")) == [f"fold_{n}" for n in range(5)]
    assert list(_splits(folder, 3)) == ["fold_3"]
    assert _splits(folder, "all") == {"all": Split(train=tuple("abcdef"), validation=())}
    assert not folder.splits_path.exists()


def test_one_case_trains_only_all(folder):
    shrink(folder, *"bcdef")
    assert _splits(folder, "all")["all"].train == ("a",)
    with pytest.raises(ConfigError, match="at least 2 cases, got 1"):
        _splits(folder, 0)


def test_messages_about_splits_are_told(folder, caplog):
    folder.splits_path.write_text('[{"train": ["a"], "validation": ["b"]}]')
    _splits(folder, 0)
    assert "4 cases in no fold" in caplog.text


def test_started_fold_keeps_its_split(folder, tmp_path):
    fresh, started = Split(train=("a",), validation=("b",)), Split(train=("c",), validation=("d",))
    assert _kept(tmp_path / "fold_0", fresh, folder) == fresh
    write(tmp_path / "fold_0/split.json", started)
    assert _kept(tmp_path / "fold_0", fresh, folder) == started


def test_unfinished_fold_whose_case_is_gone_is_refused(folder, tmp_path):
    split = Split(train=("a", "b"), validation=("c",))
    write(tmp_path / "fold_0/split.json", split)
    shrink(folder, "b")
    with pytest.raises(DatasetError, match=r"1 case the dataset no longer has \(b\)"):
        _kept(tmp_path / "fold_0", split, folder)
    (tmp_path / "fold_0/weights").mkdir()
    (tmp_path / "fold_0/weights/final.safetensors").write_bytes(b"")
    assert _kept(tmp_path / "fold_0", split, folder) == split
