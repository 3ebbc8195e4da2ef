"""Splits: scikit-learn's K-fold, written once and honoured from then on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.model_selection import KFold

from medseg.data.splits import make_splits, read_or_make_splits, read_splits
from medseg.errors import ConfigError


@pytest.mark.parametrize("count", [5, 6, 13, 51, 200])
def test_splits_are_those_of_scikit_learn(count):
    ids = [f"case_{number}" for number in np.random.default_rng(count).permutation(count)]
    expected = np.sort(ids)
    folds = KFold(n_splits=5, shuffle=True, random_state=12345).split(expected)
    splits = make_splits(ids)
    for split, (train, validation) in zip(splits, folds, strict=True):
        assert split.train == tuple(expected[train])
        assert split.validation == tuple(expected[validation])


def test_every_case_is_validated_once():
    splits = make_splits([f"{number:03d}" for number in range(23)])
    held_out = [case for split in splits for case in split.validation]
    assert sorted(held_out) == [f"{number:03d}" for number in range(23)]


def test_few_cases_give_fewer_folds():
    assert len(make_splits(["a", "b", "c"])) == 3
    with pytest.raises(ConfigError, match="at least 2 cases, got 1"):
        make_splits(["a"])


def test_splits_are_written_once_and_honoured(tmp_path):
    path = tmp_path / "splits.json"
    ids = list("abcdefg")
    first = read_or_make_splits(path, ids)
    assert json.loads(path.read_text())[0] == {
        "train": list(first[0].train),
        "validation": list(first[0].validation),
    }
    own = [{"train": ["a", "b"], "validation": ["c"]}]
    path.write_text(json.dumps(own))
    assert [s.model_dump(mode="json") for s in read_or_make_splits(path, ids)] == own


def test_a_file_of_nnunet_is_read(tmp_path):
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a"], "val": ["b"]}]))
    assert read_splits(path)[0].validation == ("b",)


def test_all_problems_are_listed(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(
        json.dumps(
            [
                {"train": ["a", "x"], "validation": ["b"]},
                {"train": ["a", "b"], "validation": ["b"]},
                {"train": [], "validation": ["b"]},
            ]
        )
    )
    with pytest.raises(ConfigError) as caught:
        read_or_make_splits(path, ["a", "b"])
    text = str(caught.value)
    assert "fold 0: unknown cases x" in text
    assert "fold 1: in train and validation b" in text
    assert "fold 2: no training case" in text


@pytest.mark.parametrize("content", ['{"train": []}', '[{"train": ["a"]}]', "[1]"])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "splits.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"expected a list of"):
        read_splits(path)
