"""Models of nnU-Net v2 that are refused, and the words it is said with."""

from __future__ import annotations

import pytest
import torch

from medseg.errors import BundleError
from medseg.interop.nnunet.v2 import read_v2
from tests.interop.nnunet.v2_folders import (
    NAME,
    changed,
    make_architecture,
    make_arguments,
    make_configuration,
    make_dataset,
    make_plans,
    make_state,
    with_copies,
    write_model,
)

PLANS = "plans.json.configurations.3d_fullres"
ARGUMENTS = "configurations.3d_fullres.architecture.arch_kwargs"


class TestRefusals:
    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("patch_size", [float("nan"), 24, 20], r"patch_size\.0: got nan; .*integer"),
            ("patch_size", [-6, 24, 20], r"patch_size\.0: got -6; .*greater than"),
            ("patch_size", ["6", 24, 20], r"patch_size\.0: got '6'"),
            ("patch_size", [10**6, 24, 20], r"patch_size\.0: got 1000000"),
            ("patch_size", [8192, 8192, 8192], r"expected at most"),
            ("patch_size", [6, 24], r"spacing: .*it has 3 entries; expected 2, as patch_size says"),
            ("patch_size", [6, 25, 20], r"patch_size\.1: got 25; expected a multiple of 4"),
            ("patch_size", None, r"patch_size: got None"),
            ("patch_size", [24], r"patch_size: got \[24\]; expected 2 or 3 numbers"),
            ("spacing", [0, 1, 1], r"spacing\.0: got 0"),
            ("spacing", [float("inf"), 1, 1], r"spacing\.0: got inf"),
            ("spacing", [True, 1, 1], r"spacing\.0: got True"),
            ("spacing", "3,1,1", r"spacing: got '3,1,1'"),
            ("batch_size", 0, r"batch_size: got 0"),
            ("normalization_schemes", ["Foo", "CTNormalisation"], r"\.0: got 'Foo'; expected one"),
            (
                "normalization_schemes",
                ["CTNormalization"],
                r"use_mask_for_norm: .*it has 2 entries",
            ),
            ("use_mask_for_norm", [0, 1], r"use_mask_for_norm\.0: got 0"),
            ("preprocessor_name", "MyPreprocessor", r"expected one of: DefaultPreprocessor"),
            ("resampling_fn_data", "my_fn", r"resampling_fn_data: got 'my_fn'; expected one of"),
            ("resampling_fn_seg_kwargs", {"is_seg": True, "order": 2}, "order=2 is not understood"),
            ("resampling_fn_seg_kwargs", {"is_seg": False}, "is_seg=False is not understood"),
            ("resampling_fn_seg_kwargs", {"order": 1}, "is_seg is missing; expected true"),
            ("resampling_fn_data_kwargs", {"order_z": 1}, "order_z=1 is not understood"),
            ("resampling_fn_data_kwargs", {"foo": 1}, "foo=1 is not understood; expected only"),
            ("previous_stage", 3, r"previous_stage: got 3"),
            ("inherits_from", "3d_fullres", r"inherit in a circle \(3d_fullres -> 3d_fullres\)"),
            ("inherits_from", "none", r"3d_fullres\.inherits_from: got 'none'"),
            ("inherits_from", ["a"], r"3d_fullres\.inherits_from: got \['a'\]"),
        ],
    )
    def test_configurations(self, tmp_path, key, value, message):
        plans = changed(make_plans(), f"configurations.3d_fullres.{key}", value)
        with pytest.raises(BundleError, match=message) as error:
            read_v2(write_model(tmp_path, plans=plans))
        assert PLANS in str(error.value)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("n_stages", 10**6, "n_stages: got 1000000"),
            ("n_stages", 4, r"strides: .*it has 3 entries; expected 4, as n_stages says"),
            ("features_per_stage", [4, 6, 10**9], r"features_per_stage\.2: got 1000000000"),
            ("kernel_sizes", [[1, 3, 3], [3, 3], [3, 3, 3]], "expected 3 numbers for each stage"),
            ("kernel_sizes", [[2, 3, 3], [3, 3, 3], [3, 3, 3]], "expected odd sizes"),
            ("strides", [[2, 2, 2], [1, 2, 2], [1, 2, 2]], "expected ones for the first stage"),
            ("n_conv_per_stage", None, "n_conv_per_stage is missing"),
            ("n_conv_per_stage_decoder", [1, 2, 3], "it has 3 entries; expected 2, as n_stages"),
            ("conv_bias", "yes", "conv_bias: got 'yes'"),
            ("conv_op", "torch.nn.Conv1d", "expected one of: Conv2d, Conv3d"),
            ("norm_op", "torch.nn.GroupNorm", "expected one of: InstanceNorm2d"),
            ("norm_op", "torch.nn.InstanceNorm2d", "expected a norm for 3 axes"),
            ("norm_op_kwargs", {"track_running_stats": True}, "track_running_stats=True is not"),
            ("norm_op_kwargs", {"eps": -1}, "eps=-1 is not understood"),
            ("nonlin", "torch.nn.SiLU", "expected one of: LeakyReLU, ReLU, GELU, Mish"),
            ("nonlin", None, "nonlin: got None"),
            ("nonlin_kwargs", {"negative_slope": float("nan")}, "negative_slope=nan is not"),
            ("stem_channels", 5, "stem_channels: got 5; expected 4"),
            ("block", "x.BottleneckD", "expected one of: BasicBlockD"),
            ("squeeze_excitation", True, "squeeze_excitation: got True; extra inputs"),
        ],
    )
    def test_networks(self, tmp_path, key, value, message):
        plans = changed(make_plans(), f"{ARGUMENTS}.{key}", value)
        with pytest.raises(BundleError, match=message) as error:
            read_v2(write_model(tmp_path, plans=plans))
        assert f"{PLANS}.architecture.arch_kwargs" in str(error.value)

    @pytest.mark.parametrize("name", ["ResidualUNet", "Primus", "a.b.SwinUNETR"])
    def test_other_classes_of_networks(self, tmp_path, name):
        place = "configurations.3d_fullres.architecture.network_class_name"
        with pytest.raises(BundleError, match="No other network of nnU-Net can be taken over"):
            read_v2(write_model(tmp_path, plans=changed(make_plans(), place, name)))

    def test_a_network_for_other_axes_than_the_patch(self, tmp_path):
        place = "configurations.3d_fullres.architecture.arch_kwargs"
        plans = changed(make_plans(), place, make_arguments(2))
        with pytest.raises(BundleError, match=r"conv_op: got Conv2d; patch_size has 3 entries"):
            read_v2(write_model(tmp_path, plans=plans))

    def test_an_order_of_norm_and_activation_that_a_residual_network_has_not(self, tmp_path):
        configuration = make_configuration(kind="residual", arguments={"nonlin_first": True})
        with pytest.raises(BundleError, match=r"nonlin_first: got True; expected false"):
            read_v2(write_model(tmp_path, plans=make_plans({"3d_fullres": configuration})))

    def test_a_configuration_that_nothing_names(self, tmp_path):
        plans = make_plans({"a": make_configuration(), "b": make_configuration()})
        folder = write_model(tmp_path, plans=plans, init_args={})
        with pytest.raises(BundleError, match="says which configuration was trained"):
            read_v2(folder)
        assert read_v2(folder, configuration="b").configuration == "b"

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("transpose_forward", [0, 1, 1], "expected the axes 0, 1 and 2 in some order"),
            ("transpose_backward", [1, 2, 0], "expected the reverse of transpose_forward"),
            ("transpose_backward", [-1, 9, 0], "expected the axes 0, 1 and 2 in some order"),
            ("image_reader_writer", "SimpleITKO", "Did you mean 'SimpleITKIO'"),
            ("label_manager", "Mine", "label_manager: got 'Mine'"),
            ("configurations", [], r"configurations: got \[\]"),
            ("configurations", {"2d": {}}, "'3d_fullres' is missing; expected one of: 2d"),
            ("foreground_intensity_properties_per_channel", {}, r"channel\.0\.mean: got None"),
        ],
    )
    def test_plans(self, tmp_path, key, value, message):
        with pytest.raises(BundleError, match=message) as error:
            read_v2(write_model(tmp_path, plans=changed(make_plans(), key, value)))
        assert f"plans.json.{key}" in str(error.value)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("channel_names", {"0": "CT", "2": "T2"}, "expected the numbers of the channels: 0, 1"),
            ("channel_names", {"0": "CT"}, "it has 2 entries; expected 1, one for each channel"),
            ("channel_names", {}, "channel_names: got {}"),
            ("channel_names", None, "channel_names: it is missing"),
            ("modality", {"0": "CT"}, "expected no other channels"),
            ("labels", {"organ": 1, "tumour": 2}, 'expected "background": 0'),
            ("labels", {"background": [0, 1], "tumour": 2}, 'expected "background": 0'),
            ("labels", {"background": 0, "organ": "1"}, r"labels\.organ: got '1'; expected a num"),
            ("labels", {"background": 0, "organ": []}, r"labels\.organ: got \[\]"),
            ("labels", {"background": 0, "organ": -1}, r"labels\.organ: got -1"),
            ("labels", {"background": 0, "organ": 1, "tumour": 3}, "2 is missing"),
            ("labels", {"background": 0, "organ": 1, "ignore": 3}, "expected 2 for ignore"),
            ("labels", {"background": 0}, "labels have the values 0"),
            ("labels", {"background": 0, "all": [1, 2]}, "regions_class_order is missing"),
        ],
    )
    def test_datasets(self, tmp_path, key, value, message):
        with pytest.raises(BundleError, match=message) as error:
            read_v2(write_model(tmp_path, dataset=make_dataset(**{key: value})))
        assert "dataset.json" in str(error.value)

    def test_all_problems_of_all_files_at_once(self, tmp_path):
        plans = changed(make_plans(), "configurations.3d_fullres.spacing", [0, 1, 1])
        plans["transpose_forward"] = [3, 4, 5]
        plans = changed(plans, f"{ARGUMENTS}.nonlin", "Foo")
        dataset = make_dataset(labels={"background": 0, "organ": "1"})
        with pytest.raises(BundleError, match=r"^4 problems in the model") as error:
            read_v2(write_model(tmp_path, plans=plans, dataset=dataset))
        for place in ("spacing.0", "transpose_forward", "nonlin", "dataset.json.labels.organ"):
            assert place in str(error.value)

    def test_early_plans_with_one_stage(self, tmp_path):
        configuration = make_configuration(
            UNet_class_name="PlainConvUNet",
            UNet_base_num_features="4",
            unet_max_num_features=7,
            n_conv_per_stage_encoder=[2],
            n_conv_per_stage_decoder=[],
            pool_op_kernel_sizes=[[1, 1]],
            conv_kernel_sizes=[[3, 3, 3]],
        )
        del configuration["architecture"]
        plans = make_plans({"3d_fullres": configuration})
        with pytest.raises(BundleError, match=r"^3 problems") as error:
            read_v2(write_model(tmp_path, plans=plans))
        for place in ("UNet_base_num_features: got '4'", "expected 2 to 16 stages"):
            assert place in str(error.value)
        assert "pool_op_kernel_sizes: got [[1, 1]]; expected a number for each axis" in str(
            error.value
        )

    def test_names_cannot_write_into_the_message(self, tmp_path):
        dataset = make_dataset(labels={"background": 0, "organ\n\x1b[2J": "1"})
        with pytest.raises(BundleError, match=r"labels\.organ\?\?\[2J: got '1'") as error:
            read_v2(write_model(tmp_path, dataset=dataset))
        assert "\x1b" not in str(error.value)

    def test_a_stage_before_that_lies_elsewhere_is_none(self, tmp_path):
        """Names from a file lead nowhere but to the folder beside."""
        stage = "x/../../other"
        configurations = {
            "3d_fullres": make_configuration(previous_stage=stage),
            stage: make_configuration(),
        }
        write_model(tmp_path / "other")
        (tmp_path / "task/nnUNetTrainer__nnUNetPlans__x").mkdir(parents=True)
        state = {"fold_0": make_state(num_inputs=4)}
        folder = tmp_path / "task" / NAME
        model = read_v2(write_model(folder, plans=make_plans(configurations), states=state))
        assert (folder.parent / f"nnUNetTrainer__nnUNetPlans__{stage}").is_dir()
        assert model.previous is None

    @pytest.mark.parametrize("axes", [(3,), (0, 0), ("0",), 1, (True,), (-1,)])
    def test_axes_to_mirror(self, tmp_path, axes):
        folder = write_model(tmp_path, inference_allowed_mirroring_axes=axes)
        with pytest.raises(BundleError, match="expected axes from 0 to 2"):
            read_v2(folder)

    @pytest.mark.parametrize(
        "text", ["{", "[1,", "\x00", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"]
    )
    def test_damaged_json(self, tmp_path, text):
        folder = write_model(tmp_path)
        (folder / "plans.json").write_text(text)
        with pytest.raises(BundleError, match=r"plans\.json: no valid JSON"):
            read_v2(folder)

    def test_missing_files_without_a_copy(self, tmp_path):
        folder = write_model(tmp_path, missing=("dataset.json",), init_args={})
        with pytest.raises(BundleError, match=r"dataset\.json: no such file, and the checkpoint"):
            read_v2(folder)

    def test_places_without_a_model(self, tmp_path):
        with pytest.raises(BundleError, match="holds no models of nnU-Net version 2"):
            read_v2(tmp_path)
        write_model(tmp_path / "a")
        write_model(tmp_path / "b")
        with pytest.raises(BundleError, match="holds 2 models of nnU-Net version 2"):
            read_v2(tmp_path)


class TestWeightsThatDoNotFit:
    def refusal(self, folder, state):
        write_model(folder, network_weights=state)
        with pytest.raises(BundleError) as error:
            read_v2(folder).weights["fold_0"]["final"]()
        return str(error.value)

    def test_every_tensor_is_listed(self, tmp_path):
        state = make_state()
        del state["decoder.seg_layers.1.bias"]
        state["decoder.transpconvs.0.weight"] = torch.zeros(8, 6, 1)
        state["attention.weight"] = torch.zeros(3)
        message = self.refusal(tmp_path, with_copies(state))
        assert "3 tensors of" in message
        assert "missing: decoder.seg_layers.1.bias (3,)" in message
        assert "left over: attention.weight (3,)" in message
        assert (
            "decoder.transpconvs.0.weight has shape (8, 6, 1), expected (8, 6, 2, 2, 1)" in message
        )
        assert "fold_0/checkpoint_final.pth" in message

    def test_a_network_without_anything_in_common_is_not_listed_for_pages(self, tmp_path):
        state = {f"eva.blocks.{number}.weight": torch.zeros(2) for number in range(200)}
        message = self.refusal(tmp_path, state)
        assert len(message.splitlines()) < 40
        assert " more" in message

    @pytest.mark.parametrize("prefix", ["", "decoder."])
    def test_copies_of_another_shape(self, tmp_path, prefix):
        state = with_copies(make_state())
        name = f"{prefix}encoder.stages.0.0.convs.1.all_modules.0.bias"
        state[name] = torch.zeros(5)
        message = self.refusal(tmp_path, state)
        assert f"{name} has shape (5,), encoder.stages.0.0.convs.1.conv.bias (4,)" in message

    def test_copies_of_other_values(self, tmp_path):
        state = with_copies(make_state())
        state["decoder.encoder.stages.0.0.convs.1.norm.bias"] = torch.zeros(4)
        assert "1 tensors repeat others under a second name" in self.refusal(tmp_path, state)

    def test_values_that_are_not_numbers(self, tmp_path):
        state = make_state()
        state["decoder.seg_layers.0.bias"][1] = float("nan")
        message = self.refusal(tmp_path, with_copies(state))
        assert "decoder.seg_layers.0.bias holds values that are infinite or not a number" in message

    def test_biases_that_the_plans_promise(self, tmp_path):
        state = {n: t for n, t in make_state().items() if not n.endswith(".conv.bias")}
        assert "missing: encoder.stages.0.0.convs.0.conv.bias" in self.refusal(tmp_path, state)

    def test_names_that_become_one(self, tmp_path):
        state = with_copies(make_state())
        state["module.decoder.seg_layers.0.bias"] = torch.zeros(3)
        assert "holds 'decoder.seg_layers.0.bias' twice" in self.refusal(tmp_path, state)

    @pytest.mark.parametrize("state", [{}, None, [torch.zeros(2)], {"a": 3}])
    def test_no_table_of_weights(self, tmp_path, state):
        assert "Expected the checkpoint of a training" in self.refusal(tmp_path, state)

    def test_a_file_without_weights(self, tmp_path):
        folder = write_model(tmp_path, missing=("network_weights",))
        with pytest.raises(BundleError, match="expected a checkpoint of nnU-Net version 2"):
            read_v2(folder)

    def test_a_later_fold_is_looked_at_when_it_is_read(self, tmp_path):
        states = {"fold_0": make_state(), "fold_1": make_state(make_architecture(kind="residual"))}
        model = read_v2(write_model(tmp_path, states=states))
        model.weights["fold_0"]["final"]()
        with pytest.raises(BundleError, match=r"fold_1/checkpoint_final\.pth: "):
            model.weights["fold_1"]["final"]()
