"""Reading models of nnU-Net v2: folders as they are published."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from medseg.errors import BundleError
from medseg.interop.nnunet.torch_file import StoredTensor
from medseg.interop.nnunet.v2 import read_v2
from medseg.labels import LabelScheme
from medseg.models.build import build_network
from medseg.schema.bundle import Resampling
from tests.interop.nnunet.v2_folders import (
    MOMENTUM,
    NAME,
    SPLINE,
    STATISTICS,
    assert_same,
    make_architecture,
    make_configuration,
    make_dataset,
    make_plans,
    make_state,
    with_copies,
    write_model,
)

SHARED = Path(__file__).parents[4] / "shared/data/nnunet_models"


class TestWhatIsRead:
    def test_everything_of_a_usual_model(self, tmp_path):
        states = {"fold_0": make_state(seed=0), "fold_1": make_state(seed=5)}
        model = read_v2(write_model(tmp_path / NAME, states=states))
        configuration = model.plans.configurations["3d_fullres"]
        assert model.configuration == "3d_fullres"
        assert model.spec.name == model.plans.dataset == "Dataset007_Pancreas"
        assert model.spec.channels == ("CT", "T2")
        assert model.spec.labels == {"background": 0, "organ": 1, "tumour": 2}
        assert model.plans.network_axes == (1, 0, 2)
        assert model.plans.original_median_spacing == (2.5, 0.8, 1)
        assert model.plans.intensity[1].std == 40.5
        assert configuration.patch_size == (6, 24, 20)
        assert configuration.spacing == (3.0, 0.9, 1.25)
        assert configuration.median_shape == (31, 210, 180)
        assert configuration.normalization == ("ct", "zscore")
        assert configuration.use_mask_for_norm == (False, True)
        assert configuration.architecture == make_architecture()
        assert model.orientation == "stored_sitk"
        assert model.trainer == "nnUNetTrainer"
        assert (model.previous, model.postprocessing, model.notes) == (None, None, ())
        assert model.weights.keys() == {"fold_0", "fold_1"}
        for fold, state in states.items():
            assert_same(model.weights[fold]["final"](), state)

    def test_the_semantics_are_those_of_version_2(self, tmp_path):
        semantics = read_v2(write_model(tmp_path)).semantics
        assert (semantics.average, semantics.activation) == ("logits", "softmax")
        assert (semantics.accumulator, semantics.gaussian_peak) == ("float16", 10)
        assert semantics.normalise_first
        assert semantics.label_resize == "argmax"
        assert semantics.mirror_axes == (0, 2)
        assert semantics.resample_image == Resampling(order=3)
        assert semantics.resample_labels == semantics.resample_result == Resampling(order=1)

    @pytest.mark.parametrize("kind", ["plain", "residual"])
    def test_two_dimensions(self, tmp_path, kind):
        configuration = make_configuration(2, kind)
        state = make_state(make_architecture(2, kind))
        folder = write_model(
            tmp_path,
            plans=make_plans({"2d": configuration}),
            states={"fold_0": state},
            name="2d",
            inference_allowed_mirroring_axes=(1,),
        )
        model = read_v2(folder)
        assert model.plans.configurations["2d"].architecture == make_architecture(2, kind)
        assert model.plans.configurations["2d"].spacing == (0.9, 1.25)
        assert model.semantics.mirror_axes == (1,)
        assert_same(model.weights["fold_0"]["final"](), state)

    @pytest.mark.parametrize("kind", ["plain", "residual"])
    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_plans_before_they_had_an_architecture(self, tmp_path, kind, dimensions):
        configuration = make_configuration(dimensions)
        arguments = configuration.pop("architecture")["arch_kwargs"]
        configuration |= {
            "UNet_class_name": "PlainConvUNet" if kind == "plain" else "ResidualEncoderUNet",
            "UNet_base_num_features": 4,
            "unet_max_num_features": 7,
            "n_conv_per_stage_encoder": [2, 1, 3],
            "n_conv_per_stage_decoder": [1, 2],
            "num_pool_per_axis": [1, 2, 2],
            "pool_op_kernel_sizes": arguments["strides"],
            "conv_kernel_sizes": arguments["kernel_sizes"],
        }
        plans = make_plans({"3d_fullres": configuration})
        statistics = plans.pop("foreground_intensity_properties_per_channel")
        plans["foreground_intensity_properties_by_modality"] = statistics
        architecture = make_architecture(dimensions, kind)
        architecture = architecture.model_copy(update={"features": (4, 7, 7)})
        state = make_state(architecture)
        folder = write_model(
            tmp_path,
            plans=plans,
            states={"fold_0": state},
            inference_allowed_mirroring_axes=None,
            dataset=make_dataset(channel_names=None, modality={"1": "T2", "0": "CT"}),
        )
        model = read_v2(folder)
        assert model.plans.configurations["3d_fullres"].architecture == architecture
        assert model.plans.intensity[0].mean == 80
        assert model.spec.channels == ("CT", "T2")
        assert model.semantics.mirror_axes == ()
        assert_same(model.weights["fold_0"]["final"](), state)

    def test_configurations_inherit_from_each_other(self, tmp_path):
        configurations = {
            "base": make_configuration(),
            "small": {"inherits_from": "base", "spacing": [4.0, 2.0, 1.5], "batch_size": 9},
            "3d_fullres": {"inherits_from": "small", "batch_size": 3},
        }
        model = read_v2(write_model(tmp_path, plans=make_plans(configurations)))
        (configuration,) = model.plans.configurations.values()
        assert (configuration.batch_size, configuration.spacing) == (3, (4.0, 2.0, 1.5))

    @pytest.mark.parametrize(
        ("arguments", "options"),
        [
            ({"nonlin": "torch.nn.ReLU"}, {"activation": "relu"}),
            ({"nonlin": "torch.nn.GELU", "nonlin_kwargs": None}, {"activation": "gelu"}),
            ({"nonlin": "torch.nn.modules.activation.Mish"}, {"activation": "mish"}),
            ({"nonlin_kwargs": {"negative_slope": 0.2}}, {"slope": 0.2}),
            ({"norm_op_kwargs": {"eps": 1e-3, "affine": True}}, {"epsilon": 1e-3}),
            ({"nonlin_first": True}, {"activation_first": True}),
            ({"norm_op": None, "norm_op_kwargs": None}, {"norm": "none"}),
            (
                {
                    "norm_op": "torch.nn.BatchNorm3d",
                    "norm_op_kwargs": {"eps": 0.01, "momentum": 0.3},
                },
                {"norm": "batch", "epsilon": 0.01},
            ),
            ({"dropout_op": "torch.nn.Dropout3d", "dropout_op_kwargs": {"p": 0.5}}, {}),
            ({"features_per_stage": [4.0, 6, 8]}, {}),
        ],
    )
    def test_variants_of_the_network(self, tmp_path, arguments, options):
        plans = make_plans({"3d_fullres": make_configuration(arguments=arguments)})
        architecture = make_architecture(**options)
        state = make_state(architecture)
        model = read_v2(write_model(tmp_path, plans=plans, states={"fold_0": state}))
        assert model.plans.configurations["3d_fullres"].architecture == architecture
        assert_same(model.weights["fold_0"]["final"](), state)

    def test_a_trainer_that_exchanged_the_norms_is_seen_in_the_weights(self, tmp_path):
        architecture = make_architecture(norm="batch")
        state = make_state(architecture)
        arguments = {"norm_op_kwargs": {"eps": 0.1, "affine": True}}
        folder = write_model(
            tmp_path,
            plans=make_plans({"3d_fullres": make_configuration(arguments=arguments)}),
            states={"fold_0": state},
            trainer_name="nnUNetTrainerBN",
        )
        model = read_v2(folder)
        assert model.plans.configurations["3d_fullres"].architecture == architecture
        assert_same(model.weights["fold_0"]["final"](), state)
        assert "trained by nnUNetTrainerBN" in model.notes[0]

    def test_what_the_original_network_lacks_is_filled(self, tmp_path):
        full = make_state()
        lacking = {
            name: tensor
            for name, tensor in full.items()
            if not re.search(r"\.conv\.bias|\.norm\.|transpconvs\.\d\.bias", name)
        }
        arguments = {"conv_bias": False, "norm_op_kwargs": {"eps": 1e-5}}
        plans = make_plans({"3d_fullres": make_configuration(arguments=arguments)})
        model = read_v2(write_model(tmp_path, plans=plans, states={"fold_0": lacking}))
        found = model.weights["fold_0"]["final"]()
        expected = {
            name: lacking.get(name, (torch.ones if "norm.weight" in name else torch.zeros)(t.shape))
            for name, t in full.items()
        }
        assert_same(found, expected)

    def test_regions_keep_their_order_and_labels_in_lists_are_labels(self, tmp_path):
        labels = {"background": 0, "core": [2, 3], "whole": [1, 2, 3], "edge": [3], "ignore": 4}
        dataset = make_dataset(labels=labels, regions_class_order=[2, 1, 3])
        model = read_v2(write_model(tmp_path, dataset=dataset))
        scheme = LabelScheme.from_spec(model.spec)
        assert scheme.channels == {"core": 0, "whole": 1, "edge": 2}
        assert model.spec.regions_class_order == (2, 1, 3)
        assert scheme.ignore_label == 4
        assert model.semantics.activation == "sigmoid"

    def test_an_order_of_regions_without_regions_means_nothing(self, tmp_path):
        model = read_v2(write_model(tmp_path, dataset=make_dataset(regions_class_order=[1, 2])))
        assert model.spec.regions_class_order is None

    def test_names_that_share_a_value_become_one(self, tmp_path):
        labels = {"background": 0, "organ": 1, "tumour": 2, "lesion": 2}
        model = read_v2(write_model(tmp_path, dataset=make_dataset(labels=labels)))
        assert list(model.spec.labels) == ["background", "organ", "tumour"]
        assert "'tumour' and 'lesion' share the value 2" in model.notes[0]

    @pytest.mark.parametrize(
        ("reader", "overwritten", "orientation"),
        [
            ("NibabelIO", None, "stored_sitk"),
            ("NaturalImage2DIO", None, "stored_sitk"),
            ("Tiff3DIO", "None", "stored_sitk"),
            ("NibabelIOWithReorient", None, "canonical"),
            ("SimpleITKIOWithReorient", None, "canonical"),
            (None, "NibabelIOWithReorient", "canonical"),
            ("SimpleITKIO", "NibabelIOWithReorient", "stored_sitk"),
        ],
    )
    def test_the_reader_tells_the_orientation(self, tmp_path, reader, overwritten, orientation):
        """Where both name one the plans count, as they do when nnU-Net 2.8.1 predicts."""
        folder = write_model(
            tmp_path,
            plans=make_plans(image_reader_writer=reader),
            dataset=make_dataset(overwrite_image_reader_writer=overwritten),
        )
        model = read_v2(folder)
        assert model.orientation == orientation
        assert len(model.notes) == (reader == "SimpleITKIO")

    @pytest.mark.parametrize(
        ("name", "kwargs", "expected"),
        [
            (
                SPLINE,
                {"order": 0, "force_separate_z": True},
                Resampling(order=0, separate="always"),
            ),
            (SPLINE, {}, Resampling(order=3, separate="never")),
            (
                "resample_torch_fornnunet",
                {"force_separate_z": False, "memefficient_seg_resampling": False},
                Resampling(method="interpolate", separate="never"),
            ),
            ("resample_torch_fornnunet", {}, Resampling(method="interpolate", separate="auto")),
        ],
    )
    def test_resampling_functions(self, tmp_path, name, kwargs, expected):
        changes = {}
        for place, is_seg in (("data", False), ("seg", True), ("probabilities", False)):
            changes[f"resampling_fn_{place}"] = name
            changes[f"resampling_fn_{place}_kwargs"] = {**kwargs, "is_seg": is_seg}
        plans = make_plans({"3d_fullres": make_configuration(**changes)})
        semantics = read_v2(write_model(tmp_path, plans=plans)).semantics
        assert semantics.resample_image == expected
        assert semantics.resample_labels == expected
        assert semantics.resample_result == expected

    def test_no_resampling(self, tmp_path):
        configuration = make_configuration(
            resampling_fn_data="no_resampling_hack", resampling_fn_data_kwargs={}
        )
        plans = make_plans({"3d_fullres": configuration})
        assert read_v2(write_model(tmp_path, plans=plans)).semantics.resample_image.method == "none"

    def test_statistics_that_no_channel_needs_may_be_missing(self, tmp_path):
        statistics = {"0": STATISTICS, "1": {"mean": float("nan")}}
        plans = make_plans(foreground_intensity_properties_per_channel=statistics)
        assert read_v2(write_model(tmp_path, plans=plans)).plans.intensity[1].mean == 0

    def test_missing_files_are_taken_from_the_checkpoint(self, tmp_path):
        model = read_v2(write_model(tmp_path, missing=("plans.json", "dataset.json")))
        assert model.spec.channels == ("CT", "T2")
        assert [note.split()[0] for note in model.notes] == ["plans.json", "dataset.json"]

    def test_only_what_is_needed_must_be_in_a_checkpoint(self, tmp_path):
        missing = ("inference_allowed_mirroring_axes", "trainer_name", "init_args", "logging")
        model = read_v2(write_model(tmp_path, missing=missing))
        assert (model.semantics.mirror_axes, model.trainer) == ((), "")
        assert model.configuration == "3d_fullres"

    def test_wrapped_names_half_precision_and_missing_originals(self, tmp_path):
        state = make_state()
        folder = write_model(tmp_path)
        stored = {
            f"module._orig_mod.{name}": tensor.half()
            for name, tensor in with_copies(state).items()
            if not name.startswith("encoder.stages.0.0.convs.0.")
        }
        write_model(folder, network_weights=stored)
        found = read_v2(folder).weights["fold_0"]["final"]()
        assert_same(found, {name: tensor.half().float() for name, tensor in state.items()})


class TestFoldsAndFiles:
    def test_folds_checkpoints_and_mirroring_of_the_first(self, tmp_path):
        write_model(tmp_path, states={"fold_3": make_state(seed=3)})
        write_model(
            tmp_path,
            states={"fold_2": make_state(seed=2)},
            inference_allowed_mirroring_axes=(1,),
            trainer_name="Mine",
        )
        best = make_state(seed=8)
        write_model(tmp_path, states={"fold_3": best}, file="checkpoint_best.pth")
        write_model(tmp_path, states={"fold_all": make_state(seed=9)})
        model = read_v2(tmp_path)
        assert {fold: list(names) for fold, names in model.weights.items()} == {
            "fold_2": ["final"],
            "fold_3": ["final", "best"],
        }
        assert (model.semantics.mirror_axes, model.trainer) == ((1,), "Mine")
        assert_same(model.weights["fold_3"]["best"](), best)
        assert read_v2(tmp_path, folds=["3"]).semantics.mirror_axes == (0, 2)
        assert list(read_v2(tmp_path, folds=["all"]).weights) == ["all"]
        assert list(read_v2(tmp_path / "fold_3", checkpoints=("best",)).weights["fold_3"]) == [
            "best"
        ]
        with pytest.raises(BundleError, match="no weights for fold_0"):
            read_v2(tmp_path, folds=[0])
        with pytest.raises(BundleError, match="fold_2 have no checkpoint 'best'"):
            read_v2(tmp_path, checkpoints=("best",))

    def test_a_training_that_did_not_end_is_said(self, tmp_path):
        model = read_v2(write_model(tmp_path, file="checkpoint_best.pth"))
        assert list(model.weights["fold_0"]) == ["best"]
        assert model.notes == ("The training of fold_0 did not end: only 'best' is there.",)

    def test_reading_a_model_reads_no_tensor(self, tmp_path, monkeypatch):
        folder = write_model(tmp_path)
        read = []
        original = StoredTensor.read
        monkeypatch.setattr(StoredTensor, "read", lambda t: read.append(t.shape) or original(t))
        model = read_v2(folder)
        assert read == []
        model.weights["fold_0"]["final"]()
        assert len(read) == len(with_copies(make_state()))
        assert MOMENTUM not in read

    def test_the_other_configuration_is_not_in_the_folder(self, tmp_path):
        folder = write_model(tmp_path)
        assert read_v2(folder, configuration="3d_fullres").configuration == "3d_fullres"
        with pytest.raises(BundleError, match="holds the configuration '3d_fullres', not '2d'"):
            read_v2(folder, configuration="2d")

    def test_the_stage_before_is_found_beside(self, tmp_path):
        low = {"inherits_from": "3d_fullres"}
        cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        plans = make_plans(
            {"3d_fullres": make_configuration(), "3d_lowres": low, "3d_cascade_fullres": cascade}
        )
        folder = write_model(
            tmp_path / "Mine__nnUNetPlans__3d_cascade_fullres",
            plans=plans,
            states={"fold_1": make_state(num_inputs=4)},
            name="3d_cascade_fullres",
            trainer_name="Mine",
        )
        model = read_v2(folder)
        assert model.semantics.previous == "labels"
        assert model.plans.configurations["3d_cascade_fullres"].previous_stage == "3d_lowres"
        assert model.previous is None
        assert "Mine__nnUNetPlans__3d_lowres (not there)" in model.notes[-1]
        plain = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_lowres"
        write_model(plain, plans=plans, name="3d_lowres")
        assert "3d_lowres (no weights of fold_1)" in read_v2(folder).notes[-1]
        write_model(plain, plans=plans, name="3d_lowres", states={"fold_1": make_state()})
        assert read_v2(folder).previous == plain
        own = tmp_path / "Mine__nnUNetPlans__3d_lowres"
        write_model(own, plans=plans, name="3d_lowres", states={"fold_1": make_state()})
        assert read_v2(folder).previous == own


class TestPostprocessing:
    FUNCTION = "remove_all_but_largest_component_from_segmentation"

    def write(self, folder, folds, given, function=FUNCTION):
        place = folder / f"crossval_results_folds_{folds}"
        place.mkdir(parents=True)
        values = {
            "postprocessing_fns": [function] * len(given),
            "postprocessing_kwargs": [{"labels_or_regions": entry} for entry in given],
            "input_folder": {"foreground_mean": {}},
        }
        (place / "postprocessing.json").write_text(json.dumps(values))
        (place / "postprocessing.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")

    def test_steps_are_taken_over_from_the_json(self, tmp_path):
        self.write(tmp_path, "0_1_2", [[1, 2]])
        self.write(tmp_path, "0", [[[1, 2]], 2])
        model = read_v2(write_model(tmp_path))
        first, second = model.postprocessing.steps
        assert (first.structures, first.together, first.connectivity) == ((1, 2), True, 3)
        assert second.structures == (2,)
        assert first.below_mm3 is None
        assert "crossval_results_folds_0/postprocessing.json" in model.notes[0]

    def test_that_of_most_folds_is_taken_where_none_matches(self, tmp_path):
        self.write(tmp_path, "0_1_2", [1])
        self.write(tmp_path, "1_2", [2])
        model = read_v2(write_model(tmp_path))
        assert model.postprocessing.steps[0].structures == (1,)
        assert "found with the folds fold_0, fold_1, fold_2" in model.notes[0]

    @pytest.mark.parametrize(
        ("given", "function", "reason"),
        [
            ([7], FUNCTION, "labels_or_regions is"),
            ([1], "os.system", "os.system is not known"),
            (["1"], FUNCTION, "got '1'"),
        ],
    )
    def test_what_is_not_understood_is_said_and_left_out(self, tmp_path, given, function, reason):
        self.write(tmp_path, "0", given, function)
        model = read_v2(write_model(tmp_path))
        assert model.postprocessing is None
        assert "postprocessing was not taken over" in model.notes[0]
        assert reason in model.notes[0]

    def test_damaged_files_are_said_and_left_out(self, tmp_path):
        self.write(tmp_path, "0", [1])
        path = tmp_path / "crossval_results_folds_0/postprocessing.json"
        text = path.read_text()
        path.write_text(text.replace('["remove', '["other", "remove'))
        model = read_v2(write_model(tmp_path))
        assert model.postprocessing is None
        assert "has 2 functions, but arguments of 1" in model.notes[0]
        path.write_text("{")
        assert "no valid JSON" in read_v2(tmp_path).notes[0]

    def test_a_search_that_found_nothing(self, tmp_path):
        self.write(tmp_path, "0", [])
        model = read_v2(write_model(tmp_path))
        assert (model.postprocessing, model.notes) == (None, ())


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared data are absent")
class TestFixtures:
    """Models that the original code wrote."""

    @pytest.mark.parametrize("name", ["v2_aniso", "v2_resreg", "v2_casc"])
    def test_they_are_read_whole(self, name):
        model = read_v2(SHARED / name)
        configuration = model.plans.configurations[model.configuration]
        scheme = LabelScheme.from_spec(model.spec)
        num_inputs = len(model.spec.channels) + scheme.num_previous(configuration)
        assert model.plans.network_axes == (1, 2, 0)
        assert model.semantics.mirror_axes == (0, 1, 2)
        assert list(model.weights) == ["fold_0", "fold_1"]
        network = build_network(
            configuration.architecture, num_inputs=num_inputs, num_logits=scheme.num_logits
        )
        for fold in model.weights.values():
            network.load_state_dict(fold["final"](), strict=True)

    def test_what_sets_them_apart(self):
        regions, cascade = read_v2(SHARED / "v2_resreg"), read_v2(SHARED / "v2_casc")
        assert LabelScheme.from_spec(regions.spec).channels == {"whole": 0, "core": 1, "enh": 2}
        assert (regions.spec.ignore_label, regions.semantics.activation) == (4, "sigmoid")
        assert cascade.configuration == "3d_cascade_fullres"
        assert cascade.semantics.previous == "labels"
