"""Plans of nnU-Net and models in its folders, taken over for training here."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch

import medseg
from medseg.api import prepare
from medseg.data.workspace import Workspace
from medseg.errors import BundleError, PlanError
from medseg.schema.base import read_json
from tests.interop.nnunet.v2_folders import (
    make_architecture,
    make_configuration,
    make_dataset,
    make_plans,
    make_state,
    write_model,
)

BATCH_NORM = {"norm_op": "torch.nn.BatchNorm3d", "norm_op_kwargs": {"eps": 1e-4, "affine": True}}
CHANNELS = {"0": "T1w", "1": "FLAIR"}


@pytest.fixture
def folder(workspace):
    """The dataset, with the channels T1w and FLAIR, in a workspace of one's own."""
    return Workspace(workspace).find("4")[0]


def plan(folder, path, **options):
    name, workspace = folder.path.name, folder.path.parents[1]
    return prepare.plan(name, plans="theirs", from_bundle=path, workspace=workspace, **options)


def four_configurations():
    """Return 2d, 3d_fullres, and two that inherit from it."""
    return {
        "2d": make_configuration(2, batch_size=7),
        "3d_fullres": make_configuration(arguments=BATCH_NORM),
        "3d_lowres": {"inherits_from": "3d_fullres", "spacing": [3.0, 1.8, 2.5]},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }


def write_preprocessed(folder, plans=None, name="nnUNetPlans.json", dataset=None):
    """Write what nnU-Net keeps of its plans in a folder of preprocessed data."""
    folder.mkdir(exist_ok=True)
    dataset = dataset or make_dataset(channel_names=CHANNELS)
    others = {
        "dataset.json": dataset,
        "dataset_fingerprint.json": {"spacings": []},
        "splits_final.json": [],
    }
    for file, values in {**others, name: plans or make_plans(four_configurations())}.items():
        (folder / file).write_text(json.dumps(values))
    return folder


class TestPlans:
    @pytest.mark.parametrize("given", ["folder", "file"])
    def test_every_configuration_is_taken_over(self, folder, tmp_path, given):
        source = write_preprocessed(tmp_path / "Dataset007_Pancreas")
        plans = plan(folder, source if given == "folder" else source / "nnUNetPlans.json")
        assert (plans.name, plans.dataset) == ("theirs", folder.path.name)
        assert plans.taken_from == "plans 'nnUNetPlans' of 'Dataset007_Pancreas'"
        assert plans.network_axes == (1, 0, 2)  # 2 - (1, 2, 0)
        assert list(plans.configurations) == list(four_configurations())
        full = plans.configurations["3d_fullres"]
        assert full.spacing == (3.0, 0.9, 1.25)
        assert full.patch_size == (6, 24, 20)
        assert full.normalization == ("ct", "zscore")
        assert full.use_mask_for_norm == (False, True)
        assert not full.batch_dice
        assert full.architecture == make_architecture(norm="batch", epsilon=1e-4)
        flat = plans.configurations["2d"]
        assert (flat.batch_size, flat.spacing, flat.patch_size) == (7, (0.9, 1.25), (24, 20))
        assert flat.architecture == make_architecture(2)
        assert plans.configurations["3d_lowres"].spacing == (3.0, 1.8, 2.5)
        assert plans.configurations["3d_cascade_fullres"].previous_stage == "3d_lowres"
        assert plans.intensity[0].percentile_99_5 == 180
        assert folder.plans("theirs") == plans

    def test_medians_and_sides_are_those_of_the_dataset(self, folder, tmp_path):
        plans = plan(folder, write_preprocessed(tmp_path / "D"))
        cases = folder.fingerprint().cases.values()
        for axis, own in zip(plans.network_axes, plans.original_median_spacing, strict=True):
            ordered = sorted(case.spacing[axis] for case in cases)
            assert ordered[len(ordered) // 2 - 1] <= own <= ordered[len(ordered) // 2]

    def test_what_is_not_taken_over_is_said(self, folder, tmp_path):
        theirs = four_configurations()
        theirs["2d"]["architecture"]["arch_kwargs"]["dropout_op"] = "torch.nn.Dropout2d"
        why = plan(folder, write_preprocessed(tmp_path / "D", make_plans(theirs))).why
        assert "Look at the axes" in why[1]
        assert why[2].endswith("in: what the first stage of a cascade hands over.")
        assert why[3] == "The dropout that is planned for 2d is left out."

    def test_plans_on_canonical_axes_like_medsegs_need_no_remark(self, folder, tmp_path):
        plans = make_plans(image_reader_writer="NibabelIOWithReorient")
        why = plan(folder, write_preprocessed(tmp_path / "D", plans)).why
        assert not any("Look at the axes" in sentence for sentence in why)
        assert not any("own rules" in sentence for sentence in why)

    def test_other_resampling_is_said(self, folder, tmp_path):
        theirs = make_configuration(
            resampling_fn_data="resample_torch_fornnunet",
            resampling_fn_data_kwargs={"is_seg": False, "force_separate_z": False},
        )
        why = plan(folder, write_preprocessed(tmp_path / "D", make_plans({"full": theirs}))).why
        assert why[2].endswith("in: how images are resampled.")

    def test_medsegs_own_plans_of_another_dataset_are_taken_over(self, folder, tmp_path):
        own = folder.plans("nnunet")
        file = tmp_path / "others.json"
        file.write_text(folder.plans_path("nnunet").read_text().replace(own.dataset, "Other"))
        taken = plan(folder, file)
        assert taken.configurations == own.configurations
        assert taken.taken_from == "plans 'nnunet' of 'Other'"

    def test_such_plans_are_kept_like_those_of_a_model(self, folder, tmp_path):
        source = write_preprocessed(tmp_path / "D")
        taken = plan(folder, source)
        with pytest.raises(PlanError, match=r"--from: they are there already"):
            plan(folder, source)
        assert plan(folder, source, replan=True) == taken


class TestRefusals:
    def test_several_plans_in_one_folder(self, folder, tmp_path):
        source = write_preprocessed(tmp_path / "D")
        write_preprocessed(source, name="nnUNetResEncUNetMPlans.json")
        with pytest.raises(PlanError, match=r"nnUNetPlans\.json, nnUNetResEnc.*Name the file"):
            plan(folder, source)
        plan(folder, source / "nnUNetResEncUNetMPlans.json")

    def test_what_cannot_be_trained_is_named_with_every_problem(self, folder, tmp_path):
        theirs = four_configurations()
        theirs["2d"]["architecture"]["network_class_name"] = "my.networks.UMamba"
        theirs["3d_fullres"]["preprocessor_name"] = "MyPreprocessor"
        theirs["alone"] = make_configuration(
            normalization_schemes=["ZScoreNormalization"], use_mask_for_norm=[False]
        )
        theirs["stray"] = make_configuration(previous_stage="3d_nowhere")
        with pytest.raises(PlanError) as caught:
            plan(folder, write_preprocessed(tmp_path / "D", make_plans(theirs)))
        text = str(caught.value)
        assert text.count("UMamba") == 1
        assert "configurations.2d.architecture.network_class_name" in text
        assert "configurations.3d_fullres.preprocessor_name: got 'MyPreprocessor'" in text
        assert "configurations.stray.previous_stage: got '3d_nowhere'" in text
        assert "stray.normalization_schemes: for 2 channels; expected 1, as alone has" in text
        assert not folder.plans_path("theirs").exists()

    def test_a_ct_without_its_statistics_is_told_once(self, folder, tmp_path):
        plans = make_plans(four_configurations(), foreground_intensity_properties_per_channel={})
        with pytest.raises(PlanError, match=r"which CTNormalization needs") as caught:
            plan(folder, write_preprocessed(tmp_path / "D", plans))
        assert str(caught.value).count(".0.mean") == 1
        assert str(caught.value).startswith("4 problems")

    @pytest.mark.parametrize("name", ["../../out", "/etc/out", "", "a\nb"])
    def test_names_that_would_lead_out_of_the_workspace(self, folder, tmp_path, name):
        plans = make_plans({"3d_fullres": make_configuration(), name: make_configuration()})
        with pytest.raises(PlanError, match=r"expected names that folders can have") as caught:
            plan(folder, write_preprocessed(tmp_path / "D", plans))
        assert "3d_fullres" not in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("configurations", [{}, None, [1]])
    def test_plans_without_configurations(self, folder, tmp_path, configurations):
        file = tmp_path / "nnUNetPlans.json"
        file.write_text(json.dumps({**make_plans(), "configurations": configurations}))
        with pytest.raises(PlanError, match=r"configurations: there are none"):
            plan(folder, file)

    @pytest.mark.parametrize("content", ["[]", "3", "{}"])
    def test_a_file_that_is_no_plans(self, folder, tmp_path, content):
        file = tmp_path / "nnUNetPlans.json"
        file.write_text(content)
        with pytest.raises(PlanError, match=r"problems? in the plans .*nnUNetPlans\.json"):
            plan(folder, file)

    def test_damaged_files(self, folder, tmp_path):
        source = write_preprocessed(tmp_path / "D")
        (source / "nnUNetPlans.json").write_text('{"transpose_forward": [0')
        for path in (source, source / "nnUNetPlans.json"):
            with pytest.raises(BundleError, match=r"nnUNetPlans\.json: no valid JSON"):
                plan(folder, path)

    def test_channels_in_another_order(self, folder, tmp_path):
        dataset = make_dataset(channel_names={"0": "FLAIR", "1": "T1w"})
        with pytest.raises(PlanError, match=r"in the order FLAIR, T1w"):
            plan(folder, write_preprocessed(tmp_path / "D", dataset=dataset))

    def test_pickled_plans_of_version_1(self, folder, tmp_path):
        file = tmp_path / "nnUNetPlansv2.1_plans_3D.pkl"
        file.write_bytes(b"\x80\x04N.")
        with pytest.raises(PlanError, match=r"version 1.*folder of a trained one"):
            plan(folder, file)

    def test_a_folder_with_neither_model_nor_plans(self, folder, tmp_path):
        (tmp_path / "empty").mkdir()
        for path in (tmp_path / "empty", tmp_path / "nowhere"):
            with pytest.raises(BundleError, match=path.name):
                plan(folder, path)


@pytest.fixture
def model(tmp_path):
    """A model of nnU-Net for the channels and labels of the dataset."""
    dataset = make_dataset(
        channel_names=CHANNELS, labels={"background": 0, "organ": 1, "lesion": 2}
    )
    plans = make_plans({"3d_fullres": make_configuration(arguments=BATCH_NORM)})
    states = {"fold_0": make_state(make_architecture(norm="batch", epsilon=1e-4))}
    return write_model(tmp_path / "model", plans=plans, dataset=dataset, states=states)


class TestModels:
    def test_a_model_and_its_plans_file_give_the_same(self, folder, model):
        """A model is imported into the workspace; its plans.json is read as it is."""
        of_model = plan(folder, model)
        assert (folder.path.parents[1] / "imported").is_dir()
        assert of_model.configurations["3d_fullres"].architecture.options["norm"] == "batch"
        assert plan(folder, model / "plans.json", replan=True) == of_model

    def test_a_bundle_made_of_it_gives_the_same(self, folder, model, tmp_path):
        from medseg.api.importing import import_nnunet

        bundle = import_nnunet(model, tmp_path / "bundle").folder
        assert plan(folder, bundle) == plan(folder, model, replan=True)

    def test_training_goes_on_from_it(self, folder, model, recipe):
        """Planned by the model, started with its weights, and hardly moved by one still step."""
        name, workspace = folder.path.name, folder.path.parents[1]
        medseg.plan_and_preprocess(
            name, plans="theirs", from_bundle=model, workspace=workspace, workers=1
        )
        still = {
            "optimizer.lr": 1e-12, "optimizer.weight_decay": 0.0, "network.base_features": None,
            "network.max_features": None,
        }  # fmt: skip
        run = medseg.train(
            name, "3d_fullres", 0, plans="theirs", recipe=recipe, set=still, iterations=1,
            init_from=model, workspace=workspace,
        )  # fmt: skip
        fold = run.path / "fold_0"
        assert {row["became"] for row in read_json(fold / "init.json")["tensors"]} == {"taken"}
        weights = safetensors.torch.load_file(fold / "weights/final.safetensors")
        state = make_state(make_architecture(norm="batch", epsilon=1e-4))
        for tensor in state:
            if tensor.endswith("conv.weight"):
                assert (weights[tensor] - state[tensor]).abs().max() < 1e-6

    def test_training_from_nothing_says_what_was_expected(self, folder, recipe):
        with pytest.raises(BundleError, match=r"nowhere: no such file or folder"):
            medseg.train(
                folder.path.name, "3d_fullres", 0, recipe=recipe, iterations=1, name="lost",
                init_from="nowhere", workspace=folder.path.parents[1],
            )  # fmt: skip


def test_plans_are_not_changed_by_reading_them(folder, tmp_path):
    source = write_preprocessed(tmp_path / "D")
    before = copy.copy((source / "nnUNetPlans.json").read_bytes())
    plan(folder, source)
    assert (source / "nnUNetPlans.json").read_bytes() == before
