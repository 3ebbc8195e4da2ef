"""Splits: scikit-learn's K-fold or dealt by group, made once, honoured and kept up from then on."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from sklearn.model_selection import KFold

from medseg.data.splits import Split, make_splits, propose_splits, read_splits, settle_splits
from medseg.errors import ConfigError
from medseg.schema.dataset import CaseFiles, DatasetSpec


def spec_of(cases, folder="/nowhere"):
    """Return a dataset; `cases` are ids, or ids -> fields of their `CaseFiles`."""
    fields = cases if isinstance(cases, dict) else {case: {} for case in cases}
    return DatasetSpec(
        name="D",
        source=str(folder),
        description=f"{folder}/dataset.json",
        channels=("CT",),
        labels={"background": 0, "a": 1},
        cases={
            case: CaseFiles(**{"channels": (f"{case}.nii",), "segmentation": "s.nii", **more})
            for case, more in fields.items()
        },
    )


def files(**fields):
    return CaseFiles(channels=("a.nii",), segmentation="s.nii", **fields)


def fold_of(splits):
    """Return case -> fold that validates on it."""
    return {case: n for n, split in enumerate(splits) for case in split.validation}


@pytest.mark.parametrize("count", [5, 6, 13, 51, 200])
def test_splits_are_those_of_scikit_learn(count):
    ids = [f"case_{number}" for number in np.random.default_rng(count).permutation(count)]
    expected = np.sort(ids)
    folds = KFold(n_splits=5, shuffle=True, random_state=12345).split(expected)
    splits = make_splits(ids)
    for split, (train, validation) in zip(splits, folds, strict=True):
        assert split.train == tuple(expected[train])
        assert split.validation == tuple(expected[validation])


def test_groups_of_one_change_nothing():
    ids = [f"c{number:02d}" for number in range(17)]
    assert make_splits({case: files(group=f"p{case}") for case in ids}) == make_splits(ids)


def test_every_case_is_validated_once():
    splits = make_splits([f"{number:03d}" for number in range(23)])
    held_out = [case for split in splits for case in split.validation]
    assert sorted(held_out) == [f"{number:03d}" for number in range(23)]


def test_few_cases_give_fewer_folds():
    assert len(make_splits(["a", "b", "c"])) == 3
    with pytest.raises(ConfigError, match="at least 2 cases, got 1"):
        make_splits(["a"])
    with pytest.raises(ConfigError, match="at least 2 groups, got 1"):
        make_splits({"a": files(group="p"), "b": files(group="p")})


def test_groups_stay_together_and_folds_are_balanced():
    rng = np.random.default_rng(5)
    sizes = [1, 1, 2, 3, 7, 2, 4, 1, 1, 5, 2, 2, 6, 3, 1, 1]
    ids = rng.permutation(sum(sizes))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    cases = {f"c{n:02d}": files(group=f"p{g}") for n, g in zip(ids, groups, strict=True)}
    splits = make_splits(cases)
    assert make_splits(dict(reversed(cases.items()))) == splits
    found = fold_of(splits)
    assert sorted(found) == sorted(cases)
    for group in {case.group for case in cases.values()}:
        assert len({found[c] for c, one in cases.items() if one.group == group}) == 1
    counts = Counter(found.values())
    assert max(counts.values()) - min(counts.values()) <= 1
    for split in splits:
        assert sorted((*split.train, *split.validation)) == sorted(cases)


def test_strata_are_spread_evenly():
    strata = {f"c{n:02d}": "rare" if n % 7 == 0 else "common" for n in range(41)}
    splits = make_splits({case: files(stratum=stratum) for case, stratum in strata.items()})
    for stratum in ("rare", "common"):
        counts = [sum(strata[c] == stratum for c in split.validation) for split in splits]
        assert max(counts) - min(counts) <= 1
    sizes = [len(split.validation) for split in splits]
    assert max(sizes) - min(sizes) <= 2


def test_strata_and_groups_together():
    """Patients of two sites, one to four cases each: no patient torn, both sites everywhere."""
    cases = {}
    for patient in range(30):
        site = "north" if patient % 3 == 0 else "south"
        for visit in range(1 + patient % 4):
            cases[f"p{patient:02d}_v{visit}"] = files(group=f"p{patient}", stratum=site)
    splits = make_splits(cases)
    found = fold_of(splits)
    assert all(len({found[c] for c in cases if c.startswith(f"p{p:02d}")}) == 1 for p in range(30))
    for site in ("north", "south"):
        counts = [sum(cases[c].stratum == site for c in split.validation) for split in splits]
        assert max(counts) - min(counts) <= 4
        assert min(counts) >= 3


def test_splits_are_written_once_and_then_left_alone(tmp_path):
    path = tmp_path / "splits.json"
    first, messages = settle_splits(path, spec_of("abcdefg"))
    assert messages == ()
    written = json.loads(path.read_text())
    assert written[0]["train"] == list(first[0].train)
    assert written[0]["validation"] == list(first[0].validation)
    before = path.stat().st_mtime_ns
    assert settle_splits(path, spec_of("abcdefg")) == (first, ())
    assert path.stat().st_mtime_ns == before


def test_proposing_writes_nothing(tmp_path):
    settled = propose_splits(tmp_path / "splits.json", spec_of("abcdefg"))
    assert settled.is_changed
    assert not (tmp_path / "splits.json").exists()


def test_one_case_is_not_split_but_no_error(tmp_path):
    splits, messages = settle_splits(tmp_path / "splits.json", spec_of("a"))
    assert splits == []
    assert messages == ("1 case cannot be split; train the fold 'all'",)
    assert not (tmp_path / "splits.json").exists()


def test_new_cases_join_the_smallest_fold(tmp_path):
    path = tmp_path / "splits.json"
    ids = [f"c{n}" for n in range(7)]
    before, _ = settle_splits(path, spec_of(ids))
    assert [len(split.validation) for split in before] == [2, 2, 1, 1, 1]
    after, (message,) = settle_splits(path, spec_of([*ids, "b_new"]))
    assert fold_of(after) == {**fold_of(before), "b_new": 2}
    assert all("b_new" in split.train for n, split in enumerate(after) if n != 2)
    assert "1 new case joined the validation of a fold: b_new -> fold 2" in message
    assert read_splits(path) == after
    assert settle_splits(path, spec_of([*ids, "b_new"])) == (after, ())


def test_new_cases_join_their_patient(tmp_path):
    path = tmp_path / "splits.json"
    cases = {f"p{n}_a": {"group": f"p{n}"} for n in range(6)}
    cases["p1_b"] = {"group": "p1"}
    before, _ = settle_splits(path, spec_of(cases))
    grown = {**cases, "p1_c": {"group": "p1"}, "q_a": {"group": "q"}, "q_b": {"group": "q"}}
    after, _ = settle_splits(path, spec_of(grown))
    assert fold_of(after)["p1_c"] == fold_of(before)["p1_a"]
    assert fold_of(after)["q_a"] == fold_of(after)["q_b"]
    smallest = min(range(5), key=lambda n: len(before[n].validation))
    assert fold_of(after)["q_a"] == smallest


def test_vanished_cases_are_removed_aloud(tmp_path):
    path = tmp_path / "splits.json"
    settle_splits(path, spec_of("abcdefgh"))
    after, (message,) = settle_splits(path, spec_of("abcdefg"))
    assert message == "1 case no longer there: h"
    assert all("h" not in (*split.train, *split.validation) for split in after)
    back, (message,) = settle_splits(path, spec_of("abcdefgh"))
    assert "h -> fold" in message
    assert sorted(fold_of(back)) == list("abcdefgh")


def test_own_file_is_honoured_and_what_it_leaves_out_stays_out(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps([{"train": ["a", "b"], "validation": ["c"]}]))
    (split,), (message,) = settle_splits(path, spec_of("abcdefg"))
    assert (split.train, split.validation) == (("a", "b"), ("c",))
    assert "4 cases in no fold" in message
    assert settle_splits(path, spec_of("abcdefg"))[1] == ()


@pytest.mark.parametrize("name", ["splits_final.json", "splits.json"])
def test_file_in_the_folder_of_the_data_is_taken_over(tmp_path, name):
    """A file of nnU-Net may name cases that are not here, and leave out some that are."""
    path = tmp_path / "work/splits.json"
    ids = [f"c{n}" for n in range(6)]
    folds = [["c0", "c1", "gone"], ["c2", "c3"], ["c4"]]
    every = {case for fold in folds for case in fold}
    values = [{"train": sorted(every - set(fold)), "val": fold} for fold in folds]
    (tmp_path / name).write_text(json.dumps(values))
    splits, messages = settle_splits(path, spec_of(ids, tmp_path))
    assert [split.validation for split in splits] == [("c0", "c1"), ("c2", "c3"), ("c4",)]
    assert messages[0] == f"splits are those of {tmp_path / name}"
    assert messages[1] == "1 case no longer there: gone"
    assert "1 case in no fold" in messages[2]
    (tmp_path / name).unlink()
    grown, (message,) = settle_splits(path, spec_of([*ids, "c7"], tmp_path))
    assert fold_of(grown) == {**fold_of(splits), "c7": 2}
    assert "c5" not in message


@pytest.mark.parametrize(
    "content",
    ['{"train": ["c0"], "val": ["c1"]}', '[{"train": ["x"], "val": ["y"]}]', "[", "[]"],
    ids=["an object", "other cases", "no JSON", "no fold"],
)
def test_splits_of_another_program_are_passed_over_aloud(tmp_path, content):
    ids = [f"c{n}" for n in range(6)]
    (tmp_path / "splits.json").write_text(content)
    path = tmp_path / "work/splits.json"
    splits, (message,) = settle_splits(path, spec_of(ids, tmp_path))
    assert splits == settle_splits(tmp_path / "other.json", spec_of(ids))[0]
    assert message.startswith(f"{tmp_path / 'splits.json'} is passed over")
    assert settle_splits(path, spec_of(ids, tmp_path))[1] == ()
    (tmp_path / "splits.json").rename(tmp_path / "splits_final.json")
    with pytest.raises(ConfigError, match=r"splits_final\.json"):
        settle_splits(tmp_path / "again/splits.json", spec_of(ids, tmp_path))


def test_given_folds_win(tmp_path):
    path = tmp_path / "splits.json"
    settle_splits(path, spec_of("abcdef"))
    cases = {c: {"fold": n % 3} for n, c in enumerate("abcdef")}
    splits, (message,) = settle_splits(path, spec_of({**cases, "g": {}}))
    assert [split.validation for split in splits] == [("a", "d", "g"), ("b", "e"), ("c", "f")]
    assert message == "the folds given for the cases replace those of splits.json"
    assert settle_splits(path, spec_of({**cases, "g": {}}))[1] == ()


@pytest.mark.parametrize("folds", [(0, 0), (0, 2), (1, 2)])
def test_given_folds_have_no_gaps(tmp_path, folds):
    cases = {f"c{n}": {"fold": fold} for n, fold in enumerate(folds)}
    with pytest.raises(ConfigError, match="without gaps, at least two"):
        settle_splits(tmp_path / "splits.json", spec_of(cases))


def test_same_patient_on_both_sides_is_warned_of(tmp_path):
    path = tmp_path / "splits.json"
    ids = [f"patient{n:02d}_study{v}" for n in range(8) for v in (1, 2)]
    _, (message,) = settle_splits(path, spec_of(ids))
    assert "patient00_study1, patient00_study2 look like the same patient" in message
    known = {case: {"group": case[:9]} for case in ids}
    _, (message,) = settle_splits(path, spec_of(known))
    assert "the splits tear apart group" in message
    path.unlink()
    assert settle_splits(path, spec_of(known))[1] == ()


def test_unlabelled_cases_take_no_part(tmp_path):
    spec = spec_of({**{case: {} for case in "abcdef"}, "g": {"segmentation": None}})
    splits, _ = settle_splits(tmp_path / "splits.json", spec)
    assert sorted(fold_of(splits)) == list("abcdef")


def test_all_problems_are_listed(tmp_path):
    path = tmp_path / "splits.json"
    values = [
        {"train": ["a", "x"], "validation": ["y"]},
        {"train": ["a", "b"], "validation": ["b"]},
        {"train": [], "validation": ["b"]},
    ]
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        settle_splits(path, spec_of("ab"))
    text = str(caught.value)
    assert "fold 0: no validation case of the dataset (it names y)" in text
    assert "fold 1: in train and validation b" in text
    assert "fold 2: no training case of the dataset" in text
    assert json.loads(path.read_text()) == values


@pytest.mark.parametrize("content", ['{"train": []}', '[{"train": ["a"]}]', "[1]"])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "splits.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"expected a list of"):
        read_splits(path)


def test_empty_list_is_refused(tmp_path):
    (tmp_path / "splits.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds no split"):
        read_splits(tmp_path / "splits.json")


def test_a_file_of_nnunet_is_read(tmp_path):
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a"], "val": ["b"]}]))
    assert read_splits(path) == [Split(train=("a",), validation=("b",))]
