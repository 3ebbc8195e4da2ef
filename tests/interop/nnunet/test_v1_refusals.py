"""Models of nnU-Net v1 that cannot be taken over: each ends with one error that says why."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from medseg.errors import BundleError
from medseg.interop.nnunet.v1 import read_v1
from tests.interop.nnunet.v1_folders import (
    as_v1,
    changed,
    make_architecture,
    make_plans,
    make_stage,
    make_state,
    write_json,
    write_model,
)

STAGE = "plans_per_stage.0"
STATISTICS = "dataset_properties.intensityproperties.0"
EXPORT = {"force_separate_z": None, "interpolation_order": 1, "interpolation_order_z": 0}


def refused(folder, match, **changes):
    write_model(folder, **changes)
    with pytest.raises(BundleError, match=match) as caught:
        read_v1(folder)
    return str(caught.value)


class TestPlans:
    @pytest.mark.parametrize(
        ("path", "value", "match"),
        [
            (f"{STAGE}.patch_size", np.array([np.nan, 24, 20]), r"patch_size: got \[nan, 24.0, 2"),
            (f"{STAGE}.patch_size", [6.5, 24, 20], "2 or 3 whole numbers from 1 to 2048"),
            (f"{STAGE}.patch_size", [24], "2 or 3 whole numbers"),
            (f"{STAGE}.patch_size", [2048, 2048, 2048], "at most 268435456 voxels"),
            (f"{STAGE}.patch_size", [2**62, 24, 20], "2 or 3 whole numbers from 1 to 2048"),
            (f"{STAGE}.current_spacing", [3.0, np.inf, 1.0], "3 numbers from 1e-06"),
            (f"{STAGE}.current_spacing", [3.0, 0.0, 1.0], "3 numbers from 1e-06"),
            (f"{STAGE}.current_spacing", [None, 0.9, 1.0], "3 numbers from 1e-06"),
            (f"{STAGE}.current_spacing", "wide", "current_spacing: got 'wide'"),
            (f"{STAGE}.pool_op_kernel_sizes", [[1, 2]], r"pool_op_kernel_sizes.0: got \[1, 2\]"),
            (f"{STAGE}.pool_op_kernel_sizes", [[2, 2, 2]] * 13, "1 to 12 strides"),
            (f"{STAGE}.pool_op_kernel_sizes", 7, "1 to 12 strides"),
            (STAGE, [], "plans_per_stage.0: got"),
            (STAGE, {}, "plans_per_stage.0: got"),
            ("plans_per_stage", {}, "plans_per_stage: got"),
            ("plans_per_stage", {"first": {}}, "stages by their numbers"),
            ("num_modalities", 0, "num_modalities: got 0; expected a whole number from 1"),
            ("num_modalities", True, "num_modalities: got True"),
            ("num_classes", 2.5, "num_classes: got 2.5"),
            ("num_classes", 100_000, "a whole number from 1 to 255"),
            ("transpose_forward", [0, 1, 1], "the axes 0, 1 and 2 in some order"),
            ("transpose_forward", [0, 1, 3], "the axes 0, 1 and 2 in some order"),
            ("transpose_backward", [1, 2, 0], "the reverse of transpose_forward"),
            ("normalization_schemes", None, "normalization_schemes: got None"),
            ("normalization_schemes.1", 5, "normalization_schemes.1: got 5"),
            ("use_mask_for_norm", KeyError, "use_mask_for_norm: got None"),
            ("use_mask_for_norm.0", "no", "use_mask_for_norm.0: got 'no'; expected True or False"),
            (f"{STATISTICS}.sd", 0.0, "a number above 0, CT is divided by it"),
            (f"{STATISTICS}.sd", np.nan, "sd: got nan; expected a number"),
            (f"{STATISTICS}.mean", KeyError, "mean: got None; expected a number"),
            (f"{STATISTICS}.percentile_00_5", 500.0, "a 0.5th percentile below the 99.5th"),
            ("dataset_properties", KeyError, "intensityproperties.0: got None"),
            ("preprocessor_name", "PreprocessorFor2D_edgeLength512", "edge of 512 pixels"),
            ("preprocessor_name", "Preprocessor3DDifferentResampling", "across thick slices"),
            ("preprocessor_name", "GenericPreproc", "Did you mean 'GenericPreprocessor'"),
            ("preprocessor_name", 3, "preprocessor_name: got 3"),
            ("segmentation_export_params", 3, "segmentation_export_params: got 3"),
            (
                "segmentation_export_params",
                {**EXPORT, "interpolation_order": 2},
                "interpolation_order: got 2; expected 0, 1 or 3",
            ),
            (
                "segmentation_export_params",
                {**EXPORT, "interpolation_order_z": 1},
                "interpolation_order_z: got 1; expected 0, the nearest slice",
            ),
            (
                "segmentation_export_params",
                {**EXPORT, "force_separate_z": "z"},
                "force_separate_z: got 'z'",
            ),
        ],
    )
    def test_one_wrong_value(self, tmp_path, path, value, match):
        message = refused(tmp_path, match, plans=changed(make_plans(), path, value))
        assert message.startswith("1 problem in the plans in ")

    def test_all_problems_at_once(self, tmp_path):
        plans = changed(make_plans(), f"{STAGE}.patch_size", [0, -1, 2])
        plans = changed(plans, f"{STAGE}.current_spacing", ["a", "b", "c"])
        plans = changed(plans, "transpose_forward", [2, 2, 2])
        message = refused(tmp_path, "3 problems in the plans", plans=plans)
        for name in ("patch_size", "current_spacing", "transpose_forward"):
            assert name in message

    @pytest.mark.parametrize("plans", [None, [], "plans", {1: 2}])
    def test_no_plans_at_all(self, tmp_path, plans):
        folder = write_model(tmp_path)
        described = {"init": (), "name": "nnUNetTrainerV2", "plans": plans}
        file = folder / "fold_0/model_final_checkpoint.model.pkl"
        file.write_bytes(pickle.dumps(described))
        with pytest.raises(BundleError, match="in the plans in"):
            read_v1(folder)

    @pytest.mark.parametrize("stage", [2, -1, True, "0", 0.0, None])
    def test_a_stage_there_is_not(self, tmp_path, stage):
        plans = make_plans(make_stage(), make_stage())
        refused(tmp_path, "the trainer's stage: got .* 0, 1", plans=plans, stage=stage)

    def test_3d_preprocessing_of_a_2d_network(self, tmp_path):
        plans = make_plans(make_stage(2), preprocessor_name="GenericPreprocessor")
        refused(tmp_path, "one for a 2D network, which leaves slices alone", plans=plans)

    def test_masks_resized_by_splines(self, tmp_path):
        plans = make_plans(preprocessor_name="Preprocessor3DBetterResampling")
        refused(tmp_path, "no channel with a mask, which it resizes by cubic splines", plans=plans)

    def test_long_values_are_cut_short(self, tmp_path):
        plans = changed(make_plans(), f"{STAGE}.patch_size", list(range(100_000)))
        assert len(refused(tmp_path, "patch_size", plans=plans)) < 1000


class TestDescriptions:
    def test_no_model(self, tmp_path):
        with pytest.raises(BundleError, match="holds no models of nnU-Net version 1"):
            read_v1(tmp_path)

    def test_several_models(self, tmp_path):
        write_model(tmp_path / "one")
        write_model(tmp_path / "two")
        with pytest.raises(BundleError, match="holds 2 models"):
            read_v1(tmp_path)

    def test_a_fold_there_is_not(self, tmp_path):
        write_model(tmp_path)
        with pytest.raises(BundleError, match="no weights for fold_3; it holds fold_0"):
            read_v1(tmp_path, folds=[3])

    def test_without_its_description(self, tmp_path):
        write_model(tmp_path)
        (tmp_path / "fold_0/model_final_checkpoint.model.pkl").unlink()
        with pytest.raises(BundleError, match=r"model\.pkl: cannot be read"):
            read_v1(tmp_path)

    @pytest.mark.parametrize("name", ["", "no name", "x" * 300])
    def test_a_trainer_without_a_name(self, tmp_path, name):
        refused(tmp_path, "expected the name of the trainer's class", trainer=name)

    def test_arguments_that_are_none(self, tmp_path):
        refused(tmp_path, "init: got 'all'; expected the trainer's arguments", init="all")

    @pytest.mark.parametrize(
        ("trainer", "norm"),
        [("nnUNetTrainerV2_GN", "group norm"), ("nnUNetTrainerV2_FRN", "filter response norm")],
    )
    def test_norms_medseg_does_not_have(self, tmp_path, trainer, norm):
        refused(tmp_path, f"trained by {trainer}, whose network has {norm}", trainer=trainer)

    def test_a_description_of_another_task(self, tmp_path):
        file = write_json(tmp_path / "dataset.json", {"modality": {"0": "CT"}})
        write_model(tmp_path / "model")
        with pytest.raises(BundleError, match=r"names the channels \[0\], the model has 0 to 1"):
            read_v1(tmp_path / "model", dataset_json=file)

    @pytest.mark.parametrize(
        ("text", "match"), [("[1]", "no names with values"), ("{", "not valid JSON")]
    )
    def test_a_description_that_is_none(self, tmp_path, text, match):
        file = tmp_path / "dataset.json"
        file.write_text(text)
        write_model(tmp_path / "model")
        with pytest.raises(BundleError, match=match):
            read_v1(tmp_path / "model", dataset_json=file)


class TestWeights:
    def stored(self, **changes):
        return {**as_v1(make_state()), **changes}

    def test_one_is_missing(self, tmp_path):
        state = self.stored()
        del state["conv_blocks_context.1.blocks.1.instnorm.weight"]
        match = r"missing: encoder\.stages\.1\.0\.convs\.1\.norm\.weight \(8,\)"
        refused(tmp_path, match, states={"fold_0": state})

    def test_a_bias_is_missing_that_others_have(self, tmp_path):
        state = self.stored()
        del state["conv_blocks_context.0.blocks.0.conv.bias"]
        refused(tmp_path, r"missing: .*0\.convs\.0\.conv\.bias", states={"fold_0": state})

    def test_one_is_left_over(self, tmp_path):
        state = self.stored(**{"attention.weight": torch.zeros(3)})
        match = r"attention\.weight \(3,\): the network has no such part"
        refused(tmp_path, match, states={"fold_0": state})

    def test_one_has_another_shape(self, tmp_path):
        name = "conv_blocks_context.0.blocks.0.instnorm.bias"
        state = self.stored(**{name: torch.zeros(5)})
        refused(tmp_path, r"norm\.bias has shape \(5,\), expected \(4,\)", states={"fold_0": state})

    @pytest.mark.parametrize("size", [2, 5])
    def test_kernels_the_original_does_not_pad(self, tmp_path, size):
        name = "conv_blocks_context.1.blocks.0.conv.weight"
        state = self.stored()
        state[name] = torch.zeros(8, 4, size, size, size)
        state["conv_blocks_context.1.blocks.1.conv.weight"] = torch.zeros(8, 8, size, size, size)
        refused(tmp_path, "expected sizes of 1 or 3", states={"fold_0": state})

    def test_a_stage_of_two_minds(self, tmp_path):
        state = self.stored(
            **{"conv_blocks_context.0.blocks.1.conv.weight": torch.zeros(4, 4, 3, 3, 3)}
        )
        refused(tmp_path, r"convs\.\*\.conv\.weight has the shapes", states={"fold_0": state})

    def test_without_steps_up(self, tmp_path):
        """Networks that upsample without weights are older than version 2 of the trainer."""
        state = {name: tensor for name, tensor in self.stored().items() if "tu." not in name}
        refused(tmp_path, "3 encoder stages and 0 steps up", states={"fold_0": state})

    def test_of_another_network(self, tmp_path):
        state = {"swin.weight": torch.zeros(3)}
        refused(tmp_path, "expected a Generic_UNet", states={"fold_0": state})

    def test_no_weights(self, tmp_path):
        refused(tmp_path, "holds no table of weights", states={"fold_0": {}})

    def test_a_fold_of_another_network(self, tmp_path):
        other = make_architecture(norm="batch")
        states = {"fold_0": self.stored(), "fold_1": as_v1(make_state(other), other)}
        message = refused(tmp_path, "left over: .*running_mean", states=states)
        assert "fold_1" in message

    def test_values_that_are_no_numbers(self, tmp_path):
        name = "conv_blocks_context.0.blocks.0.instnorm.bias"
        folder = write_model(
            tmp_path, states={"fold_0": self.stored(**{name: torch.full((4,), np.nan)})}
        )
        model = read_v1(folder)
        with pytest.raises(BundleError, match=r"norm\.bias holds values that are infinite or not"):
            model.weights["fold_0"]["final"]()

    def test_files_that_change_after_they_were_read(self, tmp_path):
        model = read_v1(write_model(tmp_path))
        other = make_architecture(norm="none")
        write_model(tmp_path, states={"fold_0": as_v1(make_state(other), other)})
        with pytest.raises(BundleError, match=r"missing: .*norm"):
            model.weights["fold_0"]["final"]()


class TestWeightsAgainstPlans:
    def test_other_labels(self, tmp_path):
        plans = make_plans(num_classes=4, all_classes=[1, 2, 3, 4])
        refused(tmp_path, "has 3 outputs; expected 5", plans=plans)

    def test_other_regions(self, tmp_path):
        state = as_v1(make_state(num_logits=2))
        refused(
            tmp_path,
            "has 2 outputs; expected 3, one for each of the regions",
            states={"fold_0": state},
            trainer="nnUNetTrainerV2BraTSRegions",
        )

    def test_other_channels(self, tmp_path):
        state = as_v1(make_state(num_inputs=3))
        refused(tmp_path, "has 3 inputs; expected 2", states={"fold_0": state})

    def test_other_strides(self, tmp_path):
        plans = make_plans(make_stage(pool_op_kernel_sizes=[[2, 2, 2], [1, 2, 2]]))
        refused(tmp_path, "the plans have the strides", plans=plans)

    def test_other_axes(self, tmp_path):
        architecture = make_architecture(2)
        state = as_v1(make_state(architecture), architecture)
        refused(tmp_path, "whose weights and plans disagree", states={"fold_0": state})

    def test_a_patch_that_the_strides_do_not_divide(self, tmp_path):
        plans = make_plans(make_stage(patch_size=[6, 26, 20]))
        refused(tmp_path, r"expected multiples of \(2, 4, 4\)", plans=plans)

    def test_all_at_once(self, tmp_path):
        plans = make_plans(make_stage(patch_size=[6, 26, 20]), num_classes=4)
        message = refused(tmp_path, "2 problems in", plans=plans)
        assert "outputs" in message
        assert "multiples" in message


class TestPostprocessing:
    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ({}, "for_which_classes is missing"),
            ({"for_which_classes": 1}, "for_which_classes: got 1; expected a list of labels"),
            ({"for_which_classes": [0]}, "for_which_classes.0: got 0; expected a label from 1"),
            ({"for_which_classes": [[]]}, r"for_which_classes.0: got \[\]"),
            ({"for_which_classes": [1, "2"]}, "for_which_classes.1: got '2'"),
            (
                {"for_which_classes": [1, 2], "min_valid_object_sizes": "{1: 5.0}"},
                "got None for 2; expected a size in mm",
            ),
            (
                {"for_which_classes": [1], "min_valid_object_sizes": "{1: 'big'}"},
                "got 'big' for 1",
            ),
            (
                {"for_which_classes": [1], "min_valid_object_sizes": "__import__('os')"},
                "expected None or sizes by labels",
            ),
            (
                {"for_which_classes": [1], "min_valid_object_sizes": "(" * 20_000},
                "expected None or sizes by labels",
            ),
            ({"for_which_classes": [1], "min_valid_object_sizes": "[1]"}, "expected None or sizes"),
        ],
    )
    def test_what_makes_no_sense(self, tmp_path, content, match):
        write_json(tmp_path / "postprocessing.json", content)
        refused(tmp_path, match)

    def test_what_is_no_json(self, tmp_path):
        (tmp_path / "postprocessing.json").write_text("{1: 2}")
        refused(tmp_path, "not valid JSON")
