"""Preparing a dataset twice, growing it, killing it, doing it at once: nothing is done in vain."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from medseg.api import prepare, survey
from medseg.data.store import CaseStore
from medseg.data.workspace import Workspace
from medseg.errors import ConfigError, DatasetError, PlanError
from medseg.io.read import read_image, read_segmentation
from medseg.io.write import write_map, write_nifti
from medseg.schema.base import read_json

CONFIGURATIONS = ("2d", "3d_fullres")


@pytest.fixture
def raw(tmp_path, datasets):
    """Six cases, so that a seventh can join them."""
    return datasets.write(tmp_path / "Dataset003_Six", num_cases=6)


@pytest.fixture(autouse=True)
def _quick(few_samples):
    with few_samples():
        yield


def run(raw, **options):
    options = {"configurations": CONFIGURATIONS, "workers": 1, **options}
    return prepare.plan_and_preprocess(raw, workspace=raw.parent / "work", **options)


def folder_of(raw):
    return Workspace(raw.parent / "work").find(raw)[0]


def add_case(raw, datasets, number=7, *, affine=None, scale=1.0):
    images, labels = datasets.case(number, (21, 23, 16), 2)
    affine = datasets.affine((0.9, 1.2, 1.9)) if affine is None else affine
    for index, image in enumerate(images):
        write_nifti(raw / f"imagesTr/case_{number}_{index:04d}.nii.gz", image * scale, affine)
    write_nifti(raw / f"labelsTr/case_{number}.nii.gz", labels, affine)


class Counter:
    """Counts the cases that are read and preprocessed."""

    def __init__(self, monkeypatch):
        self.looked, self.stored = [], []
        look, store = survey._look_at, prepare._store_case

        def look_at(spec, num_samples, case_id):
            self.looked.append(case_id)
            return look(spec, num_samples, case_id)

        def store_case(spec, plans, configuration, folder, keys, case_id):
            self.stored.append(case_id)
            return store(spec, plans, configuration, folder, keys, case_id)

        monkeypatch.setattr(survey, "_look_at", look_at)
        monkeypatch.setattr(prepare, "_store_case", store_case)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_second_run_reads_and_writes_nothing_it_has(raw, monkeypatch):
    run(raw)
    before, counter = contents(folder_of(raw).path / "store/entries"), Counter(monkeypatch)
    files = {n: c for n, (_, c) in contents(folder_of(raw).path).items()}
    run(raw)
    assert (counter.looked, counter.stored) == ([], [])
    assert contents(folder_of(raw).path / "store/entries") == before
    assert {n: c for n, (_, c) in contents(folder_of(raw).path).items()} == files


def test_one_more_case_costs_one_case(raw, datasets, monkeypatch, caplog):
    run(raw)
    folder = folder_of(raw)
    before = read_json(folder.plans_path("nnunet"))
    splits = read_json(folder.splits_path)
    add_case(raw, datasets)
    counter = Counter(monkeypatch)
    with caplog.at_level(logging.INFO):
        run(raw)
    assert counter.looked == ["case_7"]
    assert counter.stored == ["case_7"]  # both configurations do the same to it
    assert read_json(folder.plans_path("nnunet")) == before
    assert list(folder.fingerprint().cases) == [f"case_{n}" for n in range(1, 8)]
    grown = read_json(folder.splits_path)
    smallest = min(range(len(splits)), key=lambda f: len(splits[f]["validation"]))
    for number, (old, new) in enumerate(zip(splits, grown, strict=True)):
        side = "validation" if number == smallest else "train"
        assert set(new[side]) - set(old[side]) == {"case_7"}
    assert "case_7" in caplog.text


def test_a_new_plan_is_made_only_on_request(raw, datasets, caplog):
    """More cases with twice the spacing: the median moves, the plans stay, a warning says so."""
    old = run(raw)
    for number in range(7, 14):
        add_case(raw, datasets, number, affine=datasets.affine((1.8, 2.4, 3.8)))
    with caplog.at_level(logging.WARNING):
        kept = run(raw)
    assert kept == old
    assert "spacing" in caplog.text
    assert "--replan" in caplog.text
    new = run(raw, replan=True)
    assert new.configurations["3d_fullres"].spacing != old.configurations["3d_fullres"].spacing
    assert folder_of(raw).plans("nnunet") == new


def test_a_small_addition_is_not_worth_a_warning(raw, datasets, caplog):
    run(raw)
    add_case(raw, datasets)
    with caplog.at_level(logging.WARNING):
        run(raw)
    assert "--replan" not in caplog.text


def test_plans_for_another_wish_are_not_silently_kept(raw):
    run(raw)
    with pytest.raises(PlanError, match=r"(?s)--gpu-memory.*none.*11.*--replan") as caught:
        run(raw, gpu_memory="11GB")
    assert "nnunet.json" in str(caught.value)
    run(raw, gpu_memory="11GB", replan=True)
    run(raw, gpu_memory="11GB")
    run(raw)


def test_a_replan_draws_exactly_as_a_first_run(raw, datasets):
    """Grown step by step and then planned anew, or all at once: the same statistics."""
    run(raw)
    add_case(raw, datasets)
    run(raw)
    run(raw, replan=True)
    grown = folder_of(raw).fingerprint()
    shutil.rmtree(raw.parent / "work")
    run(raw)
    assert grown == folder_of(raw).fingerprint()


def test_a_changed_file_is_read_again(raw, datasets, monkeypatch):
    run(raw)
    index = CaseStore(folder_of(raw).store_path)._index("nnunet__3d_fullres")
    before = read_json(index)["entries"]
    images, _ = datasets.case(2, (20, 22, 16), 2)
    affine = datasets.affine((0.9, 1.14, 1.9))
    write_nifti(raw / "imagesTr/case_2_0000.nii.gz", images[0] + 9, affine)
    counter = Counter(monkeypatch)
    run(raw)
    after = read_json(index)["entries"]
    assert counter.looked == ["case_2"]
    assert {case for case in before if before[case] != after[case]} == {"case_2"}


def test_a_touched_file_is_looked_at_but_not_preprocessed(raw, monkeypatch):
    run(raw)
    os.utime(raw / "labelsTr/case_4.nii.gz", (1, 1))
    counter = Counter(monkeypatch)
    run(raw)
    assert (counter.looked, counter.stored) == (["case_4"], [])


def test_a_killed_run_continues(raw, monkeypatch):
    store = prepare._store_case

    def die(spec, plans, configuration, folder, keys, case_id):
        if case_id == "case_4":
            raise KeyboardInterrupt
        return store(spec, plans, configuration, folder, keys, case_id)

    monkeypatch.setattr(prepare, "_store_case", die)
    with pytest.raises(KeyboardInterrupt):
        run(raw)
    monkeypatch.undo()
    counter = Counter(monkeypatch)
    run(raw)
    assert counter.looked == []
    assert counter.stored[:3] == ["case_4", "case_5", "case_6"]


def test_two_runs_at_once_leave_what_one_leaves(raw):
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: _command(raw, raw.parent / "twice"), range(2)))
    alone = _command(raw, raw.parent / "once")
    assert [done.returncode for done in (*both, alone)] == [0, 0, 0], [d.stderr for d in both]
    twice, once = (raw.parent / name / "datasets" / raw.name for name in ("twice", "once"))
    for name in ("dataset.json", "fingerprint.json", "splits.json", "plans/nnunet.json"):
        assert (twice / name).read_bytes() == (once / name).read_bytes(), name
    names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*")) for f in (twice, once)]
    assert names[0] == names[1]
    store = CaseStore(twice / "store")
    for key in read_json(twice / "store/index/nnunet__3d_fullres.json")["entries"].values():
        store.open(key).loaded()


def _command(raw, work):
    code = (
        "import medseg.plan.fingerprint as f; f.NUM_SAMPLES = 100_000\n"
        "from medseg.api.prepare import plan_and_preprocess\n"
        f"plan_and_preprocess({str(raw)!r}, workspace={str(work)!r}, "
        f"configurations={CONFIGURATIONS}, workers=1)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_bad_cases_are_refused_or_left_out_on_record(raw, datasets, caplog):
    labels = raw / "labelsTr/case_5.nii.gz"
    labels.write_bytes(labels.read_bytes()[:100])
    (raw / "imagesTr/case_2_0001.nii.gz").unlink()
    before = datasets.files(raw.parent)
    with pytest.raises(DatasetError, match=r"2 of 6 cases cannot be used") as caught:
        run(raw)
    assert "case_5" in str(caught.value)
    assert str(caught.value).count("case_2_0001.nii.gz is missing") == 1
    assert "--skip-bad" in str(caught.value)
    assert datasets.files(raw.parent) == before
    with caplog.at_level(logging.WARNING):
        run(raw, skip_bad=True)
    assert "case_5" in caplog.text
    folder = folder_of(raw)
    check = read_json(folder.check_path)
    assert check["skipped"] == ["case_2", "case_5"]
    assert check["cases"]["case_5"]["problems"][0]["level"] == "error"
    usable = ["case_1", "case_3", "case_4", "case_6"]
    assert sorted(folder.spec().cases) == sorted(folder.fingerprint().cases) == usable
    splits = read_json(folder.splits_path)
    assert all(sorted([*s["train"], *s["validation"]]) == usable for s in splits)


def test_configurations_that_do_the_same_share_entries(tmp_path, datasets):
    """All voxels of 1 mm: nothing is resampled, slices or not."""
    raw = datasets.write(tmp_path / "Dataset009_Even", num_cases=3)
    for path in [*raw.glob("imagesTr/*"), *raw.glob("labelsTr/*")]:
        number = int(path.name.split("_")[1].split(".")[0])
        images, labels = datasets.case(number, (20, 24, 16), 2)
        array = labels if path.parent.name == "labelsTr" else images[int(path.name[-8])]
        write_nifti(path, array, np.diag([1.0, 1, 1, 1]))
    run(raw)
    store = folder_of(raw).store_path
    two, three = (read_json(store / f"index/nnunet__{c}.json")["entries"] for c in CONFIGURATIONS)
    assert two == three
    assert len(list(store.glob("entries/*/*"))) == 3


def test_preparing_imports_no_torch(raw):
    code = (
        "import sys, medseg.plan.fingerprint as f; f.NUM_SAMPLES = 100_000\n"
        "import medseg\n"
        f"raw, work = {str(raw)!r}, {str(raw.parent / 'w')!r}\n"
        "medseg.plan_and_preprocess(raw, workspace=work, workers=1)\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_record_of_a_survey_is_plain_json(raw):
    run(raw)
    check = json.loads(folder_of(raw).check_path.read_text(encoding="utf-8"))
    facts = check["cases"]["case_1"]
    assert facts["fingerprint"]["shape"]
    assert [Path(file["path"]).name for file in facts["files"]] == [
        "case_1_0000.nii.gz",
        "case_1_0001.nii.gz",
        "case_1.nii.gz",
    ]
    assert all(len(file["sha256"]) == 64 for file in facts["files"])


def test_a_change_in_the_voxels_beside_a_header_is_seen(tmp_path, datasets, monkeypatch):
    """`.mhd` names a `.raw`: the header stays as it is when the voxels change."""
    raw = datasets.write(tmp_path / "Dataset008_Apart", num_cases=3, channels=("T1w",))
    for number in (1, 2, 3):
        old = raw / f"imagesTr/case_{number}_0000.nii.gz"
        image = read_image(old)
        header = old.with_name(f"case_{number}_0000.mhd")
        write_map(header, image.array, image.header)
        lines = [
            line for line in header.read_text().splitlines() if "CompressedDataSize" not in line
        ]
        text = "\n".join(lines).replace("CompressedData = True", "CompressedData = False")
        header.write_text(text.replace(".zraw", ".raw") + "\n")
        header.with_suffix(".raw").write_bytes(image.array.tobytes(order="F"))
        header.with_suffix(".zraw").unlink()
        old.unlink()
    run(raw)
    voxels = raw / "imagesTr/case_2_0000.raw"
    header = (raw / "imagesTr/case_2_0000.mhd").stat()
    content = bytearray(voxels.read_bytes())
    content[:4] = np.float32(42).tobytes()
    voxels.write_bytes(content)
    assert (raw / "imagesTr/case_2_0000.mhd").stat().st_mtime_ns == header.st_mtime_ns
    counter = Counter(monkeypatch)
    run(raw)
    assert (counter.looked, counter.stored) == (["case_2"], ["case_2"])


def test_a_file_exchanged_for_an_older_one_of_the_same_size_is_seen(raw, monkeypatch):
    """As a restored backup, or `cp -p`, leaves it."""
    run(raw)
    target, replacement = raw / "labelsTr/case_1.nii.gz", raw / "labelsTr/new"
    stat = target.stat()
    replacement.write_bytes(target.read_bytes())
    os.utime(replacement, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    replacement.rename(target)
    assert target.stat().st_mtime_ns == stat.st_mtime_ns
    counter = Counter(monkeypatch)
    run(raw)
    assert (counter.looked, counter.stored) == (["case_1"], [])


def test_facts_without_their_draws_are_not_trusted(raw, monkeypatch):
    """A run that was killed between the two files: the intensities are drawn again."""
    run(raw)
    folder = folder_of(raw)
    old_draws, old_mean = folder.statistics_path.read_bytes(), folder.fingerprint().channels[0].mean
    for path in raw.glob("imagesTr/*_0000.nii.gz"):
        image = read_image(path)
        write_nifti(path, image.array + 500, image.affine)
    run(raw)
    folder.statistics_path.write_bytes(old_draws)
    counter = Counter(monkeypatch)
    run(raw)
    assert len(counter.looked) == 6
    assert folder.fingerprint().channels[0].mean == pytest.approx(old_mean + 500, rel=0.01)


def test_preprocessing_alone_refuses_a_dataset_that_has_changed(raw, datasets):
    run(raw)
    options = {"configurations": ["2d"], "workspace": raw.parent / "work", "workers": 1}
    assert prepare.preprocess(raw, **options) == {"2d": 6}
    add_case(raw, datasets)
    for dataset in (raw, raw.name):
        with pytest.raises(DatasetError, match=r"has changed.*case_7.*plan-and-preprocess"):
            prepare.preprocess(dataset, **options)


def test_training_refuses_entries_of_other_labels(raw, tmp_path):
    """Label 7 was index 2, then index 3: entries made before do not mean the same."""
    from medseg.api.training import train

    for path in raw.glob("labelsTr/*"):
        image = read_segmentation(path)
        write_nifti(path, np.array([0, 3, 7], np.uint8)[image.array], image.affine)
    description = json.loads((raw / "dataset.json").read_text())
    for labels in ({"a": 3, "b": 7}, {"a": 3, "c": 5, "b": 7}):
        description["labels"] = {"background": 0, **labels}
        (raw / "dataset.json").write_text(json.dumps(description))
        if len(labels) == 2:
            run(raw)
        else:
            prepare.fingerprint(raw, workspace=raw.parent / "work", workers=1)
    with pytest.raises(DatasetError, match=r"6 cases were preprocessed.*labels.*preprocess' again"):
        train(raw.name, "3d_fullres", 0, workspace=raw.parent / "work", iterations=1)


def test_a_dataset_of_one_patient_is_not_torn_apart(raw):
    from medseg.api.training import train

    cases = [
        {
            "case": f"c{n}",
            "T1w": f"imagesTr/case_{n}_0000.nii.gz",
            "FLAIR": f"imagesTr/case_{n}_0001.nii.gz",
            "segmentation": f"labelsTr/case_{n}.nii.gz",
            "group": "p1",
        }
        for n in range(1, 6)
    ]
    labels = json.loads((raw / "dataset.json").read_text())["labels"]
    manifest = {"channels": ["T1w", "FLAIR"], "labels": labels, "cases": cases}
    (raw / "medseg.json").write_text(json.dumps(manifest))
    run(raw)
    with pytest.raises(ConfigError, match="group"):
        train(raw.name, "3d_fullres", 0, workspace=raw.parent / "work", iterations=1)


def test_a_manifest_without_a_usable_row_lists_what_is_wrong_with_each(tmp_path):
    folder = tmp_path / "typo"
    folder.mkdir()
    rows = [{"case": f"c{n}", "image": "i.nii.gz", "seg": "s.nii.gz"} for n in range(3)]
    manifest = {"channels": ["a"], "labels": {"background": 0, "b": 1}, "cases": rows}
    (folder / "medseg.json").write_text(json.dumps(manifest))
    with pytest.raises((DatasetError, ConfigError), match="seg"):
        prepare.plan_and_preprocess(folder, workspace=tmp_path / "work", workers=1)
    with pytest.raises((DatasetError, ConfigError)):
        prepare.plan_and_preprocess(folder, workspace=tmp_path / "work", workers=1, skip_bad=True)
    assert not (tmp_path / "work").exists()


def test_skipped_cases_stay_on_record(raw):
    labels = raw / "labelsTr/case_5.nii.gz"
    labels.write_bytes(labels.read_bytes()[:100])
    run(raw, skip_bad=True)
    os.utime(raw / "labelsTr/case_4.nii.gz", (1, 1))
    prepare.preprocess(raw, configurations=["2d"], workspace=raw.parent / "work", workers=1)
    assert read_json(folder_of(raw).check_path)["skipped"] == ["case_5"]


def test_training_notices_what_changed_since(raw):
    """Another name for a label; another label map; a validation image that is gone."""
    from medseg.api.training import train

    run(raw)
    options = {"workspace": raw.parent / "work", "iterations": 1}
    description = (raw / "dataset.json").read_text()
    (raw / "dataset.json").write_text(description.replace("lesion", "tumour"))
    with pytest.raises(DatasetError, match=r"has changed.*labels.*plan-and-preprocess"):
        train(raw.name, "3d_fullres", 0, **options)
    (raw / "dataset.json").write_text(description)

    split = read_json(folder_of(raw).splits_path)[0]
    labels = raw / f"labelsTr/{split['train'][0]}.nii.gz"
    image = read_segmentation(labels)
    write_nifti(labels, np.maximum(image.array, 1), image.affine)
    with pytest.raises(DatasetError, match=rf"1 cases.*files.*{split['train'][0]}"):
        train(raw.name, "3d_fullres", 0, **options)
    run(raw)

    gone = raw / f"imagesTr/{split['validation'][0]}_0000.nii.gz"
    gone.rename(raw / "kept")
    with pytest.raises(DatasetError, match=rf"validation cases.*{split['validation'][0]}"):
        train(raw.name, "3d_fullres", 0, **options)


def test_a_misspelt_column_is_named(raw):
    from medseg.data.dataset import scan_dataset

    lines = ["case;T1w;FLAIR;segmentation;gruop"]
    lines += [
        f"c{n};imagesTr/case_{n}_0000.nii.gz;imagesTr/case_{n}_0001.nii.gz;"
        f"labelsTr/case_{n}.nii.gz;p{n % 3}"
        for n in range(1, 7)
    ]
    (raw / "table.csv").write_text("\n".join(lines))
    (raw / "table.json").write_text(
        json.dumps({"channels": ["T1w", "FLAIR"], "labels": {"background": 0, "organ": 1, "x": 2}})
    )
    _, problems = scan_dataset(raw / "table.csv")
    assert any("gruop" in p.message and "group" in p.message for p in problems)
