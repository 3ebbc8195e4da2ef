"""Cascades: who predicts whom, what is kept, and the whole way to a prediction."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import medseg
from medseg.api import prepare
from medseg.api.cascade import ensure_previous_stage, previous_bundle, previous_segmentations
from medseg.api.fold_run import FoldRun
from medseg.api.lengths import RequestedLength
from medseg.bundles.bundle import read_bundle, write_bundle
from medseg.data.label_file import LabelFile
from medseg.data.splits import SPLIT_FILE, Split, make_splits
from medseg.data.store import CaseStore
from medseg.data.workspace import DatasetFolder
from medseg.errors import BundleError, DatasetError, PlanError
from medseg.infer.export import indices_for_next_stage
from medseg.infer.loading import load
from medseg.infer.member import Member
from medseg.infer.parts import Held, Part
from medseg.infer.result import Options
from medseg.labels import LabelScheme
from medseg.models.build import build_network
from medseg.models.weights import load_weights
from medseg.schema.base import read_json, write, write_json
from medseg.schema.bundle import Semantics
from medseg.schema.recipe import Recipe

FIRST, SECOND = "3d_lowres", "3d_cascade_fullres"
LABELS = {"background": 0, "organ": 5, "lesion": 2}
NUM_FOLDS = 3


def two_stages(plans_path):
    """Write a first stage at a coarser voxel size, and the cascade after it, into plans."""
    plans = read_json(plans_path)
    full = plans["configurations"]["3d_fullres"]
    full["architecture"]["features"] = [4 for _ in full["architecture"]["features"]]
    coarser = [1.4 * size for size in full["spacing"]]
    plans["configurations"][FIRST] = {"inherits_from": "3d_fullres", "spacing": coarser}
    plans["configurations"][SECOND] = {"inherits_from": "3d_fullres", "previous_stage": FIRST}
    write_json(plans_path, plans)


@pytest.fixture(scope="module")
def ready(tmp_path_factory, datasets, few_samples):
    """Raw data, and a workspace whose plans hold a cascade, preprocessed for it."""
    root = tmp_path_factory.mktemp("cascade")

    def relabel(_, segmentation):
        return np.array([0, 5, 2], np.uint8)[segmentation]

    raw = datasets.write(root / "Dataset008_Two", labels=LABELS, relabel=relabel)
    with few_samples():
        options = {"workspace": root / "work", "workers": 1}
        medseg.plan_and_preprocess(raw, configurations=["3d_fullres"], **options)
        folder = root / "work/datasets/Dataset008_Two"
        two_stages(folder / "plans/nnunet.json")
        counts = prepare.preprocess("8", configurations=[SECOND], **options)
    assert counts == {FIRST: 6, SECOND: 6}, "the first stage is prepared with the second"
    cases = DatasetFolder(folder).spec().cases
    write_json(
        folder / "splits.json",
        [split.model_dump(mode="json") for split in make_splits(sorted(cases), NUM_FOLDS)],
    )
    return root


@pytest.fixture
def folder(ready, tmp_path):
    """The dataset's folder in a workspace of one's own."""
    shutil.copytree(ready / "work", tmp_path / "work")
    return DatasetFolder(tmp_path / "work/datasets/Dataset008_Two")


def splits_of(folder):
    return {
        f"fold_{number}": Split(**values)
        for number, values in enumerate(read_json(folder.splits_path))
    }


def second_stage(folder, fold="fold_0", *, name="tiny", split=None):
    plans = folder.plans("nnunet")
    chosen = {SECOND: plans.configuration(SECOND)}
    return FoldRun(
        folder=folder,
        plans=plans.model_copy(update={"configurations": chosen}),
        config=SECOND,
        recipe=Recipe(),
        recipe_name="tiny",
        path=folder.run_path("nnunet", SECOND, name),
        fold=fold,
        split=split or splits_of(folder)[fold],
        seed=None,
        device="cpu",
        length=RequestedLength(),
        started=time.monotonic(),
        progress=False,
    )


def first_stage(folder, *, folds=NUM_FOLDS, seed=0, with_all=False, name="tiny"):
    """Write a run of the first stage whose folds have random weights, each its own."""
    path, plans, spec = (
        folder.run_path("nnunet", FIRST, name),
        folder.plans("nnunet"),
        folder.spec(),
    )
    splits = dict(list(splits_of(folder).items())[:folds])
    if with_all:
        splits["all"] = Split(train=tuple(sorted(spec.cases)), validation=())
    weights = {}
    for number, (fold, split) in enumerate(splits.items()):
        write(path / fold / SPLIT_FILE, split)
        network = build_network(
            plans.configuration(FIRST).architecture,
            num_inputs=len(spec.channels),
            num_logits=LabelScheme.from_spec(spec).num_logits,
            generator=torch.Generator().manual_seed(seed + number),
        )
        weights[fold] = {"final": network.state_dict()}
    return write_bundle(
        path / "bundle",
        spec=spec,
        plans=plans,
        configuration=FIRST,
        weights=weights,
        semantics=Semantics(mirror_axes=(0, 2)),
    )


def expected_of(folder, bundle, fold, case):
    """Predict one preprocessed case with one fold of the first stage."""
    model, store = load(bundle.folder, device="cpu", folds=[fold]), CaseStore(folder.store_path)
    entries = [
        store.open(read_json(folder.store_path / f"index/nnunet__{name}.json")["entries"][case])
        for name in (FIRST, SECOND)
    ]
    image = torch.from_numpy(entries[0].image[...].astype(np.float32))
    logits = model.network_logits(image, entries[0].record, Options(tta="flips"))
    part = Part(source=Held(logits), record=entries[0].record)
    return indices_for_next_stage(part, entries[1].record, model.labels)


def files_of(bundle):
    return {p: p.stat().st_mtime_ns for p in bundle.folder.parent.rglob("next_stage/*/*.b2nd")}


class TestPreviousSegmentations:
    def test_each_case_is_predicted_by_the_fold_that_held_it_out(self, folder):
        bundle, splits = first_stage(folder), splits_of(folder)
        found = previous_segmentations(second_stage(folder, "fold_1"))
        assert sorted(found) == sorted(folder.spec().cases)
        for fold, split in splits.items():
            for case in split.validation:
                wanted = expected_of(folder, bundle, fold, case)
                np.testing.assert_array_equal(found[case], wanted)
                assert len(np.unique(wanted)) > 1
                is_other = (wanted != expected_of(folder, bundle, "fold_1", case)).any()
                assert is_other == (fold != "fold_1")

    def test_they_lie_beside_the_fold_that_made_them_on_the_second_stages_grid(self, folder):
        bundle = first_stage(folder)
        found = previous_segmentations(second_stage(folder))
        store = CaseStore(folder.store_path)
        index = read_json(folder.store_path / f"index/nnunet__{SECOND}.json")["entries"]
        for fold, split in splits_of(folder).items():
            for case in split.validation:
                path = bundle.folder.parent / fold / "next_stage" / SECOND / f"{case}.b2nd"
                np.testing.assert_array_equal(LabelFile(path)[...], found[case])
                assert found[case].shape == store.open(index[case]).shape

    def test_all_folds_of_the_second_stage_share_them(self, folder):
        bundle = first_stage(folder)
        previous_segmentations(second_stage(folder, "fold_0"))
        before = files_of(bundle)
        assert len(before) == 6
        previous_segmentations(second_stage(folder, "fold_2"))
        assert files_of(bundle) == before

    def test_only_what_is_stale_or_damaged_is_made_anew(self, folder):
        bundle, run = first_stage(folder), second_stage(folder)
        previous_segmentations(run)
        before = files_of(bundle)
        damaged = sorted(before)[3]
        damaged.write_bytes(damaged.read_bytes()[:100])
        previous_segmentations(run)
        after = files_of(bundle)
        assert [path for path in before if after[path] != before[path]] == [damaged]
        again = first_stage(folder, seed=NUM_FOLDS - 1)
        found = previous_segmentations(run)
        assert all(files_of(again)[path] != after[path] for path in after)
        case = splits_of(folder)["fold_0"].validation[0]
        np.testing.assert_array_equal(found[case], expected_of(folder, again, "fold_0", case))

    def test_new_weights_of_one_fold_leave_the_others_as_they_are(self, folder):
        bundle, run = first_stage(folder), second_stage(folder)
        previous_segmentations(run)
        before = files_of(bundle)
        paths = {fold: {"final": bundle.weights(fold)} for fold in bundle.manifest.folds}
        paths["fold_2"] = {"final": bundle.weights("fold_0")}
        write_bundle(
            bundle.folder,
            spec=folder.spec(),
            plans=folder.plans("nnunet"),
            configuration=FIRST,
            weights=paths,
            semantics=bundle.manifest.semantics,
        )
        previous_segmentations(run)
        changed = {
            path.parents[2].name for path, t in files_of(bundle).items() if t != before[path]
        }
        assert changed == {"fold_2"}

    def test_they_stay_on_disk_where_memory_is_short(self, folder, monkeypatch):
        first_stage(folder)
        inside = previous_segmentations(second_stage(folder))
        monkeypatch.setattr("medseg.api.cascade.free_memory_bytes", lambda: 1000)
        outside = previous_segmentations(second_stage(folder))
        assert {type(labels) for labels in inside.values()} == {np.ndarray}
        assert {type(labels) for labels in outside.values()} == {LabelFile}
        for case, labels in inside.items():
            np.testing.assert_array_equal(outside[case][...], labels)

    def test_they_are_what_a_prediction_from_the_file_sees(self, folder, ready, monkeypatch):
        """Training and prediction agree, but for the rounding of stored images."""
        bundle, run = first_stage(folder), second_stage(folder)
        found = previous_segmentations(run)
        spec, plans = folder.spec(), run.plans
        labels = LabelScheme.from_spec(spec)
        weights = build_network(
            run.configuration.architecture,
            num_inputs=2 + labels.num_previous(run.configuration),
            num_logits=3,
        ).state_dict()
        cascade = write_bundle(
            run.path / "bundle",
            spec=spec,
            plans=plans,
            configuration=SECOND,
            weights={"fold_0": {"final": weights}},
            semantics=bundle.manifest.semantics,
            previous=previous_bundle(run),
        )
        told = []

        def spy(self, ready, task):
            told.append(ready.told)
            return original(self, ready, task)

        original = Member.rows
        monkeypatch.setattr(Member, "rows", spy)
        model = load(cascade.folder, device="cpu", folds=[0])
        (case, *_) = run.split.validation
        images = ready / "Dataset008_Two/imagesTr"
        model.predict([images / f"{case}_{number:04d}.nii.gz" for number in (0, 1)], tta="flips")
        assert told[0] is None
        assert told[1].shape == found[case].shape
        assert (told[1] == found[case]).mean() > 0.995
        assert len(np.unique(found[case])) > 1

    def test_the_fold_all_predicts_its_own_cases_and_says_so(self, folder, caplog):
        bundle = first_stage(folder, folds=0, with_all=True)
        cases = tuple(sorted(folder.spec().cases))
        run = second_stage(folder, "all", split=Split(train=cases, validation=()))
        found = previous_segmentations(run)
        assert "learns from predictions of 3d_lowres for cases all was trained on (6 cases" in (
            caplog.text
        )
        for case in cases[:2]:
            np.testing.assert_array_equal(found[case], expected_of(folder, bundle, "all", case))

    def test_the_fold_all_learns_from_held_out_predictions_where_there_are_some(
        self, folder, caplog
    ):
        bundle = first_stage(folder, with_all=True)
        cases = tuple(sorted(folder.spec().cases))
        run = second_stage(folder, "all", split=Split(train=cases, validation=()))
        found = previous_segmentations(run)
        assert "learns from predictions" not in caplog.text
        (case, *_) = splits_of(folder)["fold_2"].validation
        np.testing.assert_array_equal(found[case], expected_of(folder, bundle, "fold_2", case))

    def test_cases_that_no_fold_held_out_are_named(self, folder, caplog):
        first = splits_of(folder)["fold_0"]
        write_json(folder.splits_path, [first.model_dump(mode="json")])
        bundle = first_stage(folder, folds=1)
        found = previous_segmentations(second_stage(folder))
        assert f"for cases fold_0 was trained on ({len(first.train)} cases (" in caplog.text
        case = first.train[0]
        np.testing.assert_array_equal(found[case], expected_of(folder, bundle, "fold_0", case))

    def test_a_first_stage_that_knows_the_validation_cases_is_refused(self, folder):
        first_stage(folder)
        splits = splits_of(folder)
        swapped = Split(train=splits["fold_1"].train, validation=splits["fold_1"].validation)
        with pytest.raises(DatasetError, match=r"was trained on 2 cases .*the splits have changed"):
            previous_segmentations(second_stage(folder, "fold_0", split=swapped))

    def test_what_does_not_fit_is_refused(self, folder):
        with pytest.raises(BundleError, match="no model there"):
            previous_segmentations(second_stage(folder))
        bundle = first_stage(folder, folds=1)
        with pytest.raises(BundleError, match="no weights for fold_1; it holds fold_0"):
            previous_segmentations(second_stage(folder, "fold_1"))
        changed = {"labels": {"background": 0, "organ": 5, "other": 3}}
        write_bundle(
            bundle.folder,
            spec=folder.spec().model_copy(update=changed),
            plans=folder.plans("nnunet"),
            configuration=FIRST,
            weights={"fold_0": {"final": bundle.weights("fold_0")}},
            semantics=Semantics(),
        )
        with pytest.raises(BundleError, match=r"labels: trained with \(0, 3, 5\), now \(0, 2, 5\)"):
            previous_segmentations(second_stage(folder))

    def test_cases_preprocessed_before_a_change_are_refused(self, folder):
        first_stage(folder)
        check = read_json(folder.check_path)
        check["cases"]["case_2"]["files"][0]["sha256"] = "f" * 64
        write_json(folder.check_path, check)
        with pytest.raises(DatasetError, match=r"1 case \(case_2\) not preprocessed for '3d_low"):
            previous_segmentations(second_stage(folder))

    def test_outside_cascades_there_is_nothing(self, folder):
        run = second_stage(folder)
        plain = run.configuration.model_copy(update={"previous_stage": None})
        plans = run.plans.model_copy(update={"configurations": {SECOND: plain}})
        single = replace(run, plans=plans)
        assert previous_segmentations(single) is None
        assert previous_bundle(single) is None
        ensure_previous_stage(single, {"fold_0": run.split}, train=pytest.fail)


class TestEnsurePreviousStage:
    def asked(self, run, splits):
        trained = []
        ensure_previous_stage(run, splits, train=trained.append)
        return trained

    def test_one_fold_needs_every_fold_of_the_first_stage(self, folder, caplog):
        caplog.set_level(logging.INFO)
        run = second_stage(folder)
        assert self.asked(run, {"fold_0": run.split}) == ["cv"]
        assert "fold_0, fold_1, fold_2 of 3d_lowres is trained first" in caplog.text
        first_stage(folder, folds=2)
        assert self.asked(run, {"fold_0": run.split}) == ["cv"]
        first_stage(folder)
        assert self.asked(run, splits_of(folder)) == []

    def test_the_fold_all_needs_all(self, folder):
        split = Split(train=tuple(sorted(folder.spec().cases)), validation=())
        run = second_stage(folder, "all", split=split)
        first_stage(folder)
        assert self.asked(run, {"all": split}) == ["all"]
        first_stage(folder, with_all=True)
        assert self.asked(run, {"all": split}) == []

    def test_a_first_stage_of_another_name_does_not_count(self, folder):
        first_stage(folder, name="other")
        assert self.asked(second_stage(folder), splits_of(folder)) == ["cv"]
        assert self.asked(second_stage(folder, name="other"), splits_of(folder)) == []

    def test_nothing_is_trained_for_a_second_stage_that_cannot_start(self, folder):
        (folder.store_path / f"index/nnunet__{SECOND}.json").unlink()
        run = second_stage(folder)
        with pytest.raises(DatasetError, match="has not been preprocessed"):
            ensure_previous_stage(run, splits_of(folder), train=pytest.fail)

    def test_three_stages_are_refused(self, folder):
        path = folder.plans_path("nnunet")
        plans = read_json(path)
        plans["configurations"][FIRST]["previous_stage"] = "3d_fullres"
        write_json(path, plans)
        with pytest.raises(PlanError, match="expected a cascade of two stages"):
            ensure_previous_stage(second_stage(folder), splits_of(folder), train=pytest.fail)


def test_plans_taken_over_from_a_cascade_have_both_stages(folder):
    bundle, run = first_stage(folder), second_stage(folder)
    cascade = write_bundle(
        run.path / "bundle",
        spec=folder.spec(),
        plans=run.plans,
        configuration=SECOND,
        weights={"fold_0": {"final": bundle.weights("fold_0")}},
        semantics=Semantics(),
        previous=bundle.folder,
    )
    before = folder.plans("nnunet")
    plans = prepare.plan(
        "8", plans="tuned", from_bundle=cascade.folder, workspace=folder.path.parents[1]
    )
    assert list(plans.configurations) == [FIRST, SECOND]
    for name in (FIRST, SECOND):
        assert plans.configurations[name].spacing == before.configurations[name].spacing
    assert plans.configurations[SECOND].previous_stage == FIRST


def test_the_whole_way_from_nothing_to_a_prediction(ready, folder, recipe, caplog):
    """The first stage is trained by itself, the cascade on what it finds, and both predict."""
    caplog.set_level(logging.INFO)
    options = {"recipe": recipe, "workspace": folder.path.parents[1], "iterations": 2}
    run = medseg.train("8", SECOND, 0, **options)
    first = folder.run_path("nnunet", FIRST, "tiny")
    assert sorted(path.name for path in first.glob("fold_*")) == ["fold_0", "fold_1", "fold_2"]
    assert caplog.text.count("is trained first, with the same recipe and options") == 1
    assert sorted(run.metrics["fold_0"].cases) == sorted(splits_of(folder)["fold_0"].validation)
    bundle = read_bundle(run.bundle)
    assert (bundle.manifest.kind, bundle.manifest.folds) == ("cascade", ("fold_0",))
    stem = load_weights(bundle.weights("fold_0"))["encoder.stages.0.0.convs.0.conv.weight"]
    assert stem.shape[1] == 2 + 2, "channels and foreground labels"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*.safetensors")}
    medseg.train("8", SECOND, 1, **options)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    model = medseg.load(run.path, device="cpu")
    assert model.folds == model.previous.folds == ("fold_0", "fold_1")
    images = ready / "Dataset008_Two/imagesTr"
    result = model.predict([images / "case_1_0000.nii.gz", images / "case_1_0001.nii.gz"])
    assert set(np.unique(result.segmentation)) <= {0, 2, 5}
    assert list(Path(folder.path).rglob("*.part")) == []
