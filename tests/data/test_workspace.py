"""Which dataset a path, a name or a number means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medseg.data.workspace import DatasetFolder, Workspace
from medseg.errors import ConfigError, DatasetError
from medseg.schema.base import write
from medseg.schema.dataset import DatasetSpec


def add(root, name, source=""):
    folder = DatasetFolder(root / "datasets" / name)
    labels = {"background": 0, "a": 1}
    write(folder.spec_path, DatasetSpec(name=name, source=source, channels=("T1",), labels=labels))
    return folder


@pytest.fixture
def workspace(tmp_path):
    for name in ("Dataset004_Heart", "Task12_Liver", "Dataset012_Lung", "Mine"):
        add(tmp_path, name)
    (tmp_path / "datasets/unfinished").mkdir()
    return Workspace(tmp_path)


def test_name_and_number(workspace):
    assert workspace.find("Dataset004_Heart")[0].path.name == "Dataset004_Heart"
    assert workspace.find("4") == workspace.find("Dataset004_Heart")
    assert workspace.find("004")[0].path.name == "Dataset004_Heart"
    assert workspace.find("Mine") == (DatasetFolder(workspace.root / "datasets/Mine"), None)


def test_ambiguous_number_is_refused(workspace):
    with pytest.raises(DatasetError, match="12 fits Dataset012_Lung, Task12_Liver"):
        workspace.find("12")


def test_path_of_raw_data(workspace, tmp_path):
    raw = tmp_path / "raw" / "Dataset077_New"
    raw.mkdir(parents=True)
    folder, source = workspace.find(raw)
    assert folder.path == tmp_path / "datasets/Dataset077_New"
    assert source == raw


def test_number_wins_over_a_folder_of_that_name_only_if_known(workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("9").mkdir()
    assert workspace.find("9")[1] == Path("9")


def test_unknown_dataset_names_what_there_is(workspace):
    with pytest.raises(DatasetError, match=r"no dataset 'Dataset004_Hart'") as caught:
        workspace.find("Dataset004_Hart")
    assert "known names: Dataset004_Heart, Dataset012_Lung, Mine, Task12_Liver" in str(caught.value)
    assert "Did you mean 'Dataset004_Heart'?" in str(caught.value)


def test_empty_workspace_says_so(tmp_path):
    with pytest.raises(DatasetError, match="it holds no dataset yet"):
        Workspace(tmp_path / "none").find("3")
    assert not (tmp_path / "none").exists()


def test_same_name_from_another_place_is_refused(tmp_path):
    old, new = tmp_path / "old/Mine", tmp_path / "new/Mine"
    for path in (old, new):
        path.mkdir(parents=True)
    add(tmp_path, "Mine", source=str(old))
    assert Workspace(tmp_path).find(old)[0].path.name == "Mine"
    with pytest.raises(DatasetError, match="already holds a dataset named 'Mine'"):
        Workspace(tmp_path).find(new)
    old.rmdir()
    assert Workspace(tmp_path).find(new)[1] == new  # moved, not another one


@pytest.mark.parametrize("given", [str, Path])
def test_name_that_is_the_path_of_other_data_too_is_refused(tmp_path, monkeypatch, given):
    old, new = tmp_path / "old/Mine", tmp_path / "new/Mine"
    for path in (old, new):
        path.mkdir(parents=True)
    folder, workspace = add(tmp_path, "Mine", source=str(old)), Workspace(tmp_path)
    assert workspace.find(given("Mine")) == (folder, None)
    monkeypatch.chdir(old.parent)
    assert workspace.find(given("Mine")) == (folder, None)  # the very data
    monkeypatch.chdir(tmp_path / "datasets")
    assert workspace.find(given("Mine")) == (folder, None)  # what was made of it
    monkeypatch.chdir(new.parent)
    with pytest.raises(DatasetError, match=r"'Mine' is the dataset 'Mine'.*--workspace") as caught:
        workspace.find(given("Mine"))
    assert f"read from {old}" in str(caught.value)
    assert f"{new} too" in str(caught.value)
    new.rmdir()
    new.write_text("case,image")  # a file of that name
    with pytest.raises(DatasetError, match="another folder"):
        workspace.find(given("Mine"))


def test_number_that_is_a_folder_too_is_refused(workspace, tmp_path, monkeypatch):
    (tmp_path / "here/4").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DatasetError, match="'4' is the dataset 'Dataset004_Heart'"):
        workspace.find("4")
    assert workspace.find("Dataset004_Heart")[0].path.name == "Dataset004_Heart"


def test_name_of_a_folder_described_in_the_workspace(tmp_path, monkeypatch):
    """Its manifest was written; nothing was measured yet."""
    raw, other = tmp_path / "raw/Mine", tmp_path / "other/Mine"
    for path in (raw, other):
        path.mkdir(parents=True)
    workspace = Workspace(tmp_path)
    manifest = describe(workspace.folder_of(raw).manifest_path, folder=str(raw))
    monkeypatch.chdir(raw.parent)
    assert workspace.find("Mine")[1] == manifest
    monkeypatch.chdir(other.parent)
    with pytest.raises(DatasetError, match=r"it is .*other/Mine too"):
        workspace.find("Mine")


def describe(path, **further):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"labels": {}, "cases": {}, **further}))
    return path


def test_manifest_is_named_after_its_folder_or_itself(tmp_path):
    workspace = Workspace(tmp_path / "work")
    for name, expected in (("medseg.json", "Task9_X"), ("old list.csv", "old list")):
        path = describe(tmp_path / "Task9_X" / name)
        folder, source = workspace.find(path)
        assert folder.path == tmp_path / "work/datasets" / expected
        assert source == path


def test_folder_and_its_descriptions_are_one_dataset(tmp_path):
    """What was read from dataset.json and has a manifest now is the same dataset."""
    raw = tmp_path / "raw/Mine"
    describe(raw / "dataset.json")
    workspace = Workspace(tmp_path)
    folder, _ = workspace.find(raw)
    spec = DatasetSpec(
        name="Mine",
        source=str(raw),
        description=str(raw / "dataset.json"),
        channels=("T1",),
        labels={"background": 0, "a": 1},
    )
    write(folder.spec_path, spec)
    manifest = describe(raw / "medseg.json")
    for path in (raw, manifest, raw / "dataset.json"):
        assert workspace.find(path)[0] == folder


def test_manifest_in_the_workspace_stands_for_a_folder(tmp_path):
    raw, other = tmp_path / "raw/Mine", tmp_path / "other/Mine"
    for path in (raw, other):
        path.mkdir(parents=True)
    workspace = Workspace(tmp_path)
    manifest = describe(workspace.folder_of(raw).manifest_path, folder=str(raw))
    assert workspace.find(raw)[1] == manifest
    assert workspace.find("Mine")[1] == manifest
    assert workspace.find(other)[1] == other
    beside = describe(raw / "medseg.csv")
    assert beside.is_file()
    assert workspace.find(raw)[1] == raw


def test_missing_parts_say_which_command_makes_them(workspace):
    folder, _ = workspace.find("4")
    with pytest.raises(DatasetError, match="Run 'medseg fingerprint' first"):
        folder.fingerprint()
    with pytest.raises(ConfigError, match="there are no plans yet"):
        folder.plans("nnunet")
    folder.plans_path("nnunet").parent.mkdir()
    folder.plans_path("nnunet").write_text("{}")
    with pytest.raises(ConfigError, match="expected one of: nnunet"):
        folder.plans("nnunett")


def test_names_of_the_layout(tmp_path):
    folder = DatasetFolder(tmp_path)
    assert folder.run_path("resenc_m", "2d", "mine") == tmp_path / "runs/resenc_m__2d__mine"
    assert folder.plans_path("own") == tmp_path / "plans/own.json"
