"""TotalSegmentator's folders: which tasks are there, and what chain they make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from medseg.errors import BundleError
from medseg.interop.totalsegmentator import Refused, Task, choose_task, read_tasks
from medseg.interop.totalsegmentator_tasks import TASKS
from medseg.labels import LabelScheme
from medseg.schema.postprocessing import KeepLargest, RemoveSmall

SHARED = Path(__file__).parents[3] / "shared/data/nnunet_models"


def names(*spots, count, prefix):
    """Return names of as many labels, some of them at given values."""
    known = dict(spots)
    return [known.get(value, f"{prefix}_{value}") for value in range(1, count + 1)]


TOTAL = {
    291: names((1, "spleen"), (24, "kidney_cyst_right"), count=24, prefix="organ"),
    292: names((1, "sacrum"), (26, "vertebrae_C1"), count=26, prefix="vertebra"),
    293: names((1, "heart"), (18, "iliac_vena_right"), count=18, prefix="vessel"),
    294: names((1, "humerus_left"), (23, "skull"), count=23, prefix="muscle"),
    295: names((1, "rib_left_1"), (26, "costal_cartilages"), count=26, prefix="rib"),
}
"""How many labels each part has, and what the first and last are called."""


def put(
    root,
    number,
    labels,
    *,
    name="part",
    trainer="nnUNetTrainerNoMirroring",
    plans="nnUNetPlans",
    configuration="3d_fullres",
    folds=("fold_0",),
    **dataset,
):
    """Make what is looked at of a model: names of files, and its dataset.json."""
    values = {name: value for value, name in enumerate(["background", *labels])}
    folder = root / f"Dataset{number:03d}_{name}" / f"{trainer}__{plans}__{configuration}"
    for fold in folds:
        (folder / fold).mkdir(parents=True)
        (folder / fold / "checkpoint_final.pth").write_bytes(b"")
    content = {"channel_names": {"0": "CT"}, "labels": values, **dataset}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def only(folder, name=None):
    tasks = read_tasks(folder)
    return choose_task(tasks, name, folder)


@pytest.fixture
def total(tmp_path):
    for number, labels in TOTAL.items():
        put(tmp_path, number, labels, name=f"TotalSegmentator_part{number}")
    return tmp_path


class TestTotal:
    def test_five_parts_make_one_map_of_117_labels(self, total):
        """The numbers are the original's: its parts are counted on, one after the other."""
        task = only(total)
        assert task.name == "total"
        assert list(task.parts) == [f"Dataset{n}_TotalSegmentator_part{n}" for n in TOTAL]
        assert task.spec.channels == ("CT",)
        assert sorted(task.spec.labels.values()) == list(range(118))
        found = {
            "background": 0, "spleen": 1, "kidney_cyst_right": 24, "sacrum": 25,
            "vertebrae_C1": 50, "heart": 51, "iliac_vena_right": 68, "humerus_left": 69,
            "skull": 91, "rib_left_1": 92, "costal_cartilages": 117,
        }  # fmt: skip
        assert {name: task.spec.labels[name] for name in found} == found
        LabelScheme.from_spec(task.spec)

    def test_each_part_is_led_to_its_own_values(self, total):
        parts = only(total).chain.parts
        assert [len(part.values) for part in parts] == [24, 26, 18, 23, 26]
        assert [part.values[1] for part in parts] == [1, 25, 51, 69, 92]
        assert parts[3].values == {value: value + 68 for value in range(1, 24)}

    def test_what_is_done_around_the_networks(self, total):
        chain = only(total).chain
        assert chain.spacing == (1.5, 1.5, 1.5)
        assert (chain.order, chain.truncate, chain.step, chain.mirror) == (1, True, 0.8, False)
        assert only(total).postprocessing is None
        assert only(total).notes == ()

    def test_the_parts_are_folders_of_models(self, total):
        part = only(total).parts["Dataset293_TotalSegmentator_part293"]
        assert part.folder.name == "nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres"
        assert (part.folder / part.folds[0] / "checkpoint_final.pth").is_file()
        assert part.folds == ("fold_0",)

    def test_a_name_of_two_parts_is_one_label(self, total):
        shutil.rmtree(total / "Dataset295_TotalSegmentator_part295")
        put(total, 295, ["rib", "spleen", "sternum"], name="TotalSegmentator_part295")
        task = only(total)
        assert task.chain.parts[4].values == {1: 92, 2: 1, 3: 93}
        assert sorted(task.spec.labels.values()) == list(range(94))

    @pytest.mark.parametrize(
        ("name", "counts", "first"),
        [
            ("total_v3", {831: 24, 832: 26, 833: 18, 834: 23, 835: 26}, [1, 25, 51, 69, 92]),
            ("total_mr", {850: 29, 851: 21}, [1, 30]),
            ("headneck_muscles", {778: 11, 779: 12}, [1, 12]),
        ],
    )
    def test_the_other_tasks_of_several_parts_are_counted_on_too(
        self, tmp_path, name, counts, first
    ):
        configuration = TASKS[name].configuration
        for number, count in counts.items():
            labels = names(count=count, prefix=f"part{number}")
            put(tmp_path, number, labels, configuration=configuration)
        task = only(tmp_path)
        assert task.name == name
        assert [part.values[1] for part in task.chain.parts] == first
        assert max(task.spec.labels.values()) == sum(counts.values())

    def test_what_lacks_is_named(self, total):
        for number in (292, 295):
            shutil.rmtree(total / f"Dataset{number}_TotalSegmentator_part{number}")
        (task,) = read_tasks(total)
        assert task == Refused(
            name="total", reason="it also needs Dataset292, Dataset295, which are not there"
        )
        with pytest.raises(BundleError, match=r"'total' cannot be imported: .*Dataset292"):
            only(total, "total")
        with pytest.raises(BundleError, match=r"0 tasks can be imported(.|\n)*Dataset292"):
            only(total)

    def test_parts_of_other_channels_are_refused(self, total):
        shutil.rmtree(total / "Dataset292_TotalSegmentator_part292")
        put(total, 292, ["a"], name="other", channel_names={"0": "CT", "1": "PET"})
        with pytest.raises(BundleError, match="its channels are CT, PET"):
            only(total, "total")


class TestPlaces:
    @pytest.mark.parametrize("above", ["", "nnunet/results", "unpacked/archive"])
    def test_the_weights_are_found_from_above(self, tmp_path, above):
        put(tmp_path / ".totalsegmentator" / above, 297, ["spleen"])
        assert only(tmp_path / ".totalsegmentator").name == "total_fast"

    def test_a_dataset_or_a_model_is_enough(self, tmp_path):
        folder = put(tmp_path, 300, ["body_trunc", "body_extremities"])
        for place in (folder, folder.parent):
            assert only(place).name == "body_fast"

    def test_nothing_is_described(self, tmp_path):
        with pytest.raises(BundleError, match=r"no models of TotalSegmentator.*nnunet/results"):
            read_tasks(tmp_path)
        (tmp_path / "Dataset297_empty").mkdir()
        with pytest.raises(BundleError, match="no models of TotalSegmentator"):
            read_tasks(tmp_path)

    def test_several_tasks_must_be_told_apart(self, tmp_path):
        put(tmp_path, 297, ["spleen"])
        put(tmp_path, 852, ["spleen"])
        assert {task.name for task in read_tasks(tmp_path)} == {"total_fast", "total_mr_fast"}
        assert only(tmp_path, "total_mr_fast").chain.spacing == (3.0, 3.0, 3.0)
        with pytest.raises(BundleError, match=r"2 tasks can be imported; name one of:\n  total_fa"):
            only(tmp_path)
        with pytest.raises(BundleError, match=r"no task 'total_mr'.*Did you mean 'total_mr_fast'"):
            only(tmp_path, "total_mr")

    def test_a_damaged_model_keeps_no_other_from_being_imported(self, tmp_path):
        folder = put(tmp_path, 852, ["spleen"])
        (folder / "dataset.json").write_text("{")
        put(tmp_path, 297, ["spleen"])
        assert only(tmp_path).name == "total_fast"
        with pytest.raises(BundleError, match=r"total_mr_fast.*dataset\.json: no valid JSON"):
            only(tmp_path, "total_mr_fast")


class TestSingleTasks:
    def test_the_body_is_cleaned(self, tmp_path):
        put(tmp_path, 299, ["body_trunc", "body_extremities"])
        task = only(tmp_path)
        assert task.postprocessing is not None
        assert task.postprocessing.steps == (
            KeepLargest(structures=(1,), connectivity=1),
            RemoveSmall(structures=(2,), connectivity=1, min_ml=50.0),
        )
        assert (task.chain.step, task.chain.spacing) == (0.5, (1.5, 1.5, 1.5))

    def test_labels_that_only_help_in_training_are_dropped(self, tmp_path):
        labels = ["kidney_cyst_left", "kidney_cyst_right", "kidney_left", "kidney_right"]
        put(tmp_path, 789, labels)
        task = only(tmp_path)
        assert task.chain.parts[0].values == {1: 1, 2: 2}
        assert list(task.spec.labels) == ["background", *labels[:2]]

    def test_a_cut_that_is_not_made_is_told(self, tmp_path):
        put(tmp_path, 591, ["liver_lesions"], configuration="3d_fullres_high")
        task = only(tmp_path)
        assert len(task.notes) == 1
        assert "find the liver, and cuts the image" in task.notes[0]
        assert task.chain.spacing == (0.75, 0.75, 1.0)

    def test_images_without_a_size_of_their_own_are_not_resampled(self, tmp_path):
        put(tmp_path, 150, ["bleed"])
        assert only(tmp_path).chain.spacing is None

    def test_folds_are_those_of_the_task(self, tmp_path):
        every = tuple(f"fold_{number}" for number in range(5))
        put(tmp_path, 315, ["a"], folds=every)
        put(tmp_path, 713, ["b"], folds=every, configuration="3d_fullres_high")
        put(tmp_path, 297, ["c"], folds=every)
        found = {task.name: next(iter(task.parts.values())).folds for task in read_tasks(tmp_path)}
        assert found == {
            "pleural_pericard_effusion": every, "aorta_annulus": every, "total_fast": ("fold_0",),
        }  # fmt: skip

    def test_a_fold_that_lacks_is_named(self, tmp_path):
        put(tmp_path, 713, ["b"], folds=("fold_0", "fold_1"), configuration="3d_fullres_high")
        with pytest.raises(BundleError, match="no weights for fold_2, fold_3, fold_4"):
            only(tmp_path, "aorta_annulus")

    def test_a_task_that_needs_anothers_result_is_refused_by_name(self, tmp_path):
        put(tmp_path, 803, ["vertebrae_L5"])
        task = only(tmp_path)
        assert task.name == "vertebrae_pp"
        assert "grow by 3 mm" in task.notes[0]
        with pytest.raises(
            BundleError, match="'vertebrae_pp_refined' cannot be imported: it needs"
        ):
            only(tmp_path, "vertebrae_pp_refined")

    def test_of_several_models_of_a_dataset_the_originals_choice_is_taken_and_told(self, tmp_path):
        put(tmp_path, 297, ["spleen"], plans="nnUNetResEncUNetLPlans_8")
        put(tmp_path, 297, ["spleen"])
        put(tmp_path, 297, ["spleen"], configuration="2d")
        task = only(tmp_path)
        (part,) = task.parts.values()
        assert part.folder.name == "nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres"
        assert "nnUNetPlans__3d_fullres is taken, not " in task.notes[0]
        assert "__2d" in task.notes[0]

    def test_another_configuration_than_expected_is_told(self, tmp_path):
        put(tmp_path, 591, ["liver_lesions"])
        notes = only(tmp_path).notes
        assert any("expected to have the configuration 3d_fullres_high" in note for note in notes)

    def test_regions_stay_regions(self, tmp_path):
        folder = put(tmp_path, 514, [], folds=tuple(f"fold_{number}" for number in range(5)))
        labels = {"background": 0, "whole": [1, 2], "core": 2}
        content = {"channel_names": {"0": "CT"}, "labels": labels, "regions_class_order": [1, 2]}
        (folder / "dataset.json").write_text(json.dumps(content))
        task = only(tmp_path)
        assert task.spec.labels["whole"] == (1, 2)
        assert task.chain.parts[0].values == {1: 1, 2: 2}
        LabelScheme.from_spec(task.spec)


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared data are absent")
def test_an_unknown_dataset_gets_the_voxel_size_of_its_plans(tmp_path):
    """The plans have it in the network's order of axes, the chain in that of the patient's."""
    source = SHARED / "v2_aniso"
    folder = tmp_path / "Dataset999_Mine" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("in", "out"))
    plans = json.loads((source / "plans.json").read_text())
    assert plans["transpose_forward"] == [1, 0, 2]
    assert plans["configurations"]["3d_fullres"]["spacing"] == [5.0, 1.0, 1.2]
    (task,) = read_tasks(tmp_path)
    assert isinstance(task, Task)
    assert task.name == "Dataset999_Mine"
    assert task.chain.spacing == (1.2, 5.0, 1.0)
    assert not task.chain.truncate
    assert "none of the known tasks; images are resampled to 1.2 x 5 x 1 mm" in task.notes[0]
    assert task.parts["Dataset999_Mine"].folds == ("fold_0", "fold_1")


def test_every_known_task_makes_a_chain(tmp_path):
    for name, known in TASKS.items():
        for number in known.datasets:
            folds = known.folds or ("fold_0", "fold_1")
            labels = names(count=20, prefix=f"{number}")
            root = tmp_path / name
            put(root, number, labels, configuration=known.configuration, folds=folds)
        tasks = {task.name: task for task in read_tasks(tmp_path / name)}
        if known.refusal:
            assert isinstance(tasks[name], Refused)
            continue
        task = tasks[name]
        assert isinstance(task, Task)
        assert task.chain.spacing == known.spacing
        assert len(task.parts) == len(known.datasets)
        assert len(task.notes) == bool(known.crop) + bool(known.note)
