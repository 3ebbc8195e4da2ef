"""Reading models of nnU-Net v1: folders as they are published, and what their files mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medseg.errors import BundleError
from medseg.interop.nnunet.torch_file import StoredTensor
from medseg.interop.nnunet.v1 import read_v1
from medseg.labels import LabelScheme
from medseg.models.build import build_network
from medseg.schema.bundle import Resampling
from medseg.schema.postprocessing import KeepLargest
from tests.interop.nnunet.v1_folders import (
    NAME,
    TASK,
    absent,
    as_v1,
    assert_same,
    changed,
    make_architecture,
    make_plans,
    make_stage,
    make_state,
    write_json,
    write_model,
)

SHARED = Path(__file__).parents[4] / "shared/data/nnunet_models"


def configuration_of(model):
    return model.plans.configuration(model.configuration)


class TestWhatIsRead:
    def test_everything_of_a_usual_model(self, tmp_path):
        states = {"fold_0": make_state(seed=0), "fold_1": make_state(seed=5)}
        stored = {fold: as_v1(state) for fold, state in states.items()}
        model = read_v1(write_model(tmp_path / "3d_fullres" / TASK / NAME, states=stored))
        configuration = configuration_of(model)
        assert model.configuration == "3d_fullres"
        assert model.spec.name == model.plans.dataset == TASK
        assert model.plans.name == "nnUNetPlansv2.1"
        assert model.spec.channels == ("CT", "T2")
        assert model.spec.labels == {"background": 0, "label_1": 1, "label_2": 2}
        assert model.plans.original_median_spacing == (2.5, 0.8, 1)
        assert model.plans.original_median_shape == pytest.approx((37.2, 236.25, 225))
        assert model.plans.intensity[0].std == 40.5
        assert (model.plans.intensity[1].min, model.plans.intensity[1].max) == (-5, 300)
        assert configuration.patch_size == (6, 24, 20)
        assert configuration.batch_size == 3
        assert configuration.spacing == (3.0, 0.9, 1.25)
        assert configuration.median_shape == (31, 210, 180)
        assert configuration.normalization == ("ct", "zscore")
        assert configuration.use_mask_for_norm == (False, True)
        assert configuration.batch_dice
        assert configuration.architecture == make_architecture()
        assert model.orientation == "stored_sitk"
        assert model.trainer == "nnUNetTrainerV2"
        assert (model.previous, model.postprocessing, model.notes) == (None, None, ())
        assert model.weights.keys() == {"fold_0", "fold_1"}
        for fold, state in states.items():
            assert_same(model.weights[fold]["final"](), state)

    def test_how_predictions_are_put_together(self, tmp_path):
        semantics = read_v1(write_model(tmp_path)).semantics
        assert semantics.average == "probabilities"
        assert semantics.activation == "softmax"
        assert not semantics.normalise_first
        assert (semantics.accumulator, semantics.gaussian_peak) == ("float32", 1.0)
        assert semantics.label_resize == "argmax"
        assert semantics.mirror_axes == (0, 1, 2)
        assert semantics.least_std == "added"
        assert semantics.separate_by == "image"
        assert semantics.previous == "logits"
        assert not semantics.keeps_slices
        assert semantics.resample_image == Resampling(order=3)
        assert semantics.resample_labels == semantics.resample_result == Resampling(order=1)

    @pytest.mark.parametrize(
        ("forward", "backward", "axes"),
        [
            ([0, 1, 2], [0, 1, 2], (2, 1, 0)),
            ([1, 2, 0], [2, 0, 1], (1, 0, 2)),
            ([2, 0, 1], [1, 2, 0], (0, 2, 1)),
            (None, [2, 0, 1], (2, 1, 0)),
        ],
    )
    def test_network_axes_count_from_the_other_end(self, tmp_path, forward, backward, axes):
        """The original numbers the axes K, J, I of the stored image."""
        plans = make_plans(transpose_forward=forward, transpose_backward=backward)
        assert read_v1(write_model(tmp_path, plans=plans)).plans.network_axes == axes

    def test_a_2d_model(self, tmp_path):
        architecture = make_architecture(2)
        state = make_state(architecture)
        plans = make_plans(make_stage(2))
        model = read_v1(
            write_model(tmp_path, plans=plans, states={"all": as_v1(state, architecture)})
        )
        configuration = configuration_of(model)
        assert model.configuration == "2d"
        assert configuration.patch_size == (24, 20)
        assert configuration.spacing == (0.9, 1.25)
        assert configuration.architecture == architecture
        assert model.semantics.mirror_axes == (0, 1)
        assert not model.semantics.keeps_slices
        assert_same(model.weights["all"]["final"](), state)

    def test_the_folder_of_a_fold_is_enough(self, tmp_path):
        folder = write_model(tmp_path / NAME)
        model = read_v1(folder / "fold_0")
        assert model.folder == folder
        assert tuple(model.weights) == ("fold_0",)

    def test_weights_are_read_when_they_are_asked_for(self, tmp_path, monkeypatch):
        folder = write_model(tmp_path)
        read = []
        original = StoredTensor.read
        monkeypatch.setattr(StoredTensor, "read", lambda s: read.append(s.shape) or original(s))
        model = read_v1(folder)
        assert read == []
        model.weights["fold_0"]["final"]()
        assert len(read) == len(as_v1(make_state()))

    def test_names_of_parallel_training_and_the_old_stream(self, tmp_path):
        state = make_state()
        stored = {f"module.{name}": tensor for name, tensor in as_v1(state).items()}
        model = read_v1(write_model(tmp_path, states={"fold_0": stored}, legacy=True))
        assert_same(model.weights["fold_0"]["final"](), state)


class TestPlansOfEveryAge:
    def test_first_releases_leave_out_most(self, tmp_path):
        """Poolings are counted, kernels are 3, axes as stored, preprocessing by dimension."""
        architecture = make_architecture().model_copy(
            update={"kernel_sizes": ((3, 3, 3),) * 3, "options": {}}
        )
        stage = make_stage()
        del stage["pool_op_kernel_sizes"], stage["conv_kernel_sizes"]
        plans = make_plans(stage)
        for name in ("transpose_forward", "transpose_backward", "conv_per_stage", "modalities"):
            del plans[name]
        del plans["preprocessor_name"]
        state = make_state(architecture)
        stored = {"fold_0": as_v1(state, architecture)}
        model = read_v1(write_model(tmp_path, plans=plans, states=stored))
        assert configuration_of(model).architecture == architecture
        assert model.plans.network_axes == (2, 1, 0)
        assert model.spec.channels == ("channel_0", "channel_1")

    def test_the_first_fold_leads(self, tmp_path):
        write_model(tmp_path, plans=changed(make_plans(), "plans_per_stage.0.batch_size", 5))
        write_model(tmp_path, states={"fold_1": as_v1(make_state(seed=4))}, trainer="Other")
        assert read_v1(tmp_path).trainer == "nnUNetTrainerV2"
        assert configuration_of(read_v1(tmp_path)).batch_size == 5
        assert read_v1(tmp_path, folds=[1]).trainer == "Other"

    def test_no_stage_means_the_only_one(self, tmp_path):
        plans = make_plans(plans_per_stage={4: make_stage()})
        model = read_v1(write_model(tmp_path, plans=plans, stage=None))
        assert model.configuration == "3d_fullres"

    @pytest.mark.parametrize(("stage", "name"), [(0, "3d_lowres"), (1, "3d_fullres")])
    def test_the_stage_is_what_the_trainer_was_made_with(self, tmp_path, stage, name):
        plans = make_plans(make_stage(batch_size=7), make_stage(batch_size=2))
        model = read_v1(write_model(tmp_path, plans=plans, stage=stage))
        assert model.configuration == name
        assert configuration_of(model).batch_size == (7, 2)[stage]

    def test_several_machines_have_the_stage_elsewhere(self, tmp_path):
        init = ("plans.pkl", 0, 1, "results", "data", True, 1, True, False, False, True)
        plans = make_plans(make_stage(batch_size=7), make_stage(batch_size=2))
        folder = write_model(tmp_path, plans=plans, init=init, trainer="nnUNetTrainerV2_DDP")
        assert configuration_of(read_v1(folder)).batch_size == 2

    def test_the_folders_name_the_configuration(self, tmp_path):
        folder = write_model(tmp_path / "3d_lowres" / TASK / NAME)
        assert read_v1(folder).configuration == "3d_lowres"

    def test_a_folder_of_another_kind_does_not(self, tmp_path):
        folder = write_model(tmp_path / "2d" / TASK / NAME)
        assert read_v1(folder).configuration == "3d_fullres"

    @pytest.mark.parametrize(
        ("scheme", "expected"),
        [
            ("CT", "ct"),
            ("CT2", "ct_case"),
            ("noNorm", "none"),
            ("nonCT", "zscore"),
            ("x", "zscore"),
        ],
    )
    def test_normalisation(self, tmp_path, scheme, expected):
        plans = changed(make_plans(), "normalization_schemes.1", scheme)
        model = read_v1(write_model(tmp_path, plans=plans))
        assert configuration_of(model).normalization == ("ct", expected)

    def test_intensities_only_ct_needs(self, tmp_path):
        plans = make_plans(normalization_schemes={0: "nonCT", 1: "noNorm"})
        plans["dataset_properties"]["intensityproperties"] = None
        statistics = read_v1(write_model(tmp_path, plans=plans)).plans.intensity
        assert [(entry.mean, entry.std) for entry in statistics] == [(0, 1), (0, 1)]

    def test_what_only_informs_need_not_make_sense(self, tmp_path):
        stage = make_stage(
            batch_size=-3, original_spacing=None, median_patient_size_in_voxels=[np.nan, 1, 2]
        )
        model = read_v1(write_model(tmp_path, plans=make_plans(stage)))
        assert configuration_of(model).batch_size == 1
        assert configuration_of(model).median_shape == (6, 24, 20)
        assert model.plans.original_median_spacing == (3.0, 0.9, 1.25)

    def test_export_as_the_plans_say(self, tmp_path):
        export = {"force_separate_z": False, "interpolation_order": 3, "interpolation_order_z": 3}
        plans = make_plans(segmentation_export_params=export)
        semantics = read_v1(write_model(tmp_path, plans=plans)).semantics
        assert semantics.resample_result == Resampling(order=3, separate="never")


class TestPreprocessors:
    def read(self, folder, name, **stage):
        plans = make_plans(make_stage(**stage), preprocessor_name=name)
        return read_v1(write_model(folder, plans=plans))

    def test_images_as_they_are(self, tmp_path):
        semantics = self.read(tmp_path, "PreprocessorFor3D_NoResampling").semantics
        assert semantics.resample_image.method == semantics.resample_result.method == "none"

    @pytest.mark.parametrize("first", [None, np.nan])
    def test_slices_as_they_are(self, tmp_path, first):
        name, spacing = "PreprocessorFor3D_LeaveOriginalZSpacing", [first, 0.9, 1.25]
        model = self.read(tmp_path, name, current_spacing=np.array(spacing))
        assert model.semantics.keeps_slices
        assert configuration_of(model).spacing == (2.5, 0.9, 1.25)

    def test_slices_are_resampled_where_the_plans_have_a_number(self, tmp_path):
        model = self.read(tmp_path, "PreprocessorFor3D_LeaveOriginalZSpacing")
        assert not model.semantics.keeps_slices
        assert configuration_of(model).spacing == (3.0, 0.9, 1.25)

    def test_the_one_for_slices_in_3d_keeps_them(self, tmp_path):
        assert self.read(tmp_path, "PreprocessorFor2D").semantics.keeps_slices

    def test_linear(self, tmp_path):
        semantics = self.read(tmp_path, "GenericPreprocessor_linearResampling").semantics
        assert semantics.resample_image == Resampling(order=1)

    def test_never_slice_by_slice(self, tmp_path):
        plans = make_plans(
            preprocessor_name="Preprocessor3DBetterResampling",
            use_mask_for_norm={0: False, 1: False},
        )
        semantics = read_v1(write_model(tmp_path, plans=plans)).semantics
        assert semantics.resample_image == Resampling(order=3, separate="never")
        assert semantics.resample_labels == Resampling(order=1, separate="never")
        assert semantics.resample_result == Resampling(order=1)

    def test_colours(self, tmp_path):
        model = self.read(tmp_path, "GenericPreprocessor_scale_uint8_to_0_1")
        assert configuration_of(model).normalization == ("rgb_0_1", "rgb_0_1")
        assert configuration_of(model).use_mask_for_norm == (False, False)


class TestTrainers:
    @pytest.mark.parametrize(
        ("trainer", "options"),
        [
            ("nnUNetTrainerV2_ReLU_biasInSegOutput", {"activation": "relu"}),
            ("nnUNetTrainerV2_Mish", {"activation": "mish"}),
            ("nnUNetTrainerV2_GeLU", {"activation": "gelu"}),
            ("nnUNetTrainerV2_LReLU_slope_2en1", {"slope": 0.2}),
            ("nnUNetTrainerV2_lReLU_convReLUIN", {"activation_first": True}),
            ("nnUNetTrainerV2_BN", {"norm": "batch"}),
            ("nnUNetTrainerV2_NoNormalization_lr1en3", {"norm": "none"}),
            ("nnUNetTrainerV2_insaneDA", {}),
        ],
    )
    def test_what_a_name_and_its_weights_say(self, tmp_path, trainer, options):
        architecture = make_architecture(**options)
        state = make_state(architecture)
        stored = {"fold_0": as_v1(state, architecture)}
        model = read_v1(write_model(tmp_path, states=stored, trainer=trainer))
        assert configuration_of(model).architecture == architecture
        assert model.semantics.mirror_axes == (0, 1, 2)
        assert model.notes == ()
        assert_same(model.weights["fold_0"]["final"](), state)

    @pytest.mark.parametrize(
        "trainer", ["nnUNetTrainerV2_noMirroring", "nnUNetTrainerV2_noDataAugmentation"]
    )
    def test_some_never_mirror(self, tmp_path, trainer):
        model = read_v1(write_model(tmp_path, trainer=trainer))
        assert model.semantics.mirror_axes == ()
        assert "without mirrored images" in model.notes[0]

    def test_an_unknown_one_is_taken_by_its_weights(self, tmp_path):
        model = read_v1(write_model(tmp_path, trainer="OurTrainer_Wide"))
        assert model.semantics.mirror_axes == (0, 1, 2)
        assert "OurTrainer_Wide is no trainer of nnU-Net 1.7.1" in model.notes[0]

    def test_outputs_with_biases(self, tmp_path):
        state = make_state()
        stored = as_v1(state)
        for step in range(2):
            state[f"decoder.seg_layers.{step}.bias"] = torch.full((3,), 0.5 + step)
            stored[f"seg_outputs.{step}.bias"] = torch.full((3,), 0.5 + step)
        model = read_v1(write_model(tmp_path, states={"fold_0": stored}))
        assert_same(model.weights["fold_0"]["final"](), state)

    @pytest.mark.parametrize("options", [{}, {"norm": "batch"}])
    def test_a_residual_encoder(self, tmp_path, options):
        """Its stem has kernels of 3, its stage plan a stride for every stage."""
        architecture = make_architecture(
            kind="residual_unet", **options, shortcut="strided", kernel_size_stem=[3, 3, 3]
        )
        state = make_state(architecture)
        stage = make_stage(pool_op_kernel_sizes=[[1, 1, 1], [1, 2, 2], [2, 2, 2]])
        stored = {"fold_0": as_v1(state, architecture)}
        trainer = "nnUNetTrainerV2_ResencUNet_DA3"
        model = read_v1(
            write_model(tmp_path, plans=make_plans(stage), states=stored, trainer=trainer)
        )
        assert configuration_of(model).architecture == architecture
        assert_same(model.weights["fold_0"]["final"](), state)

    def test_regions_keep_the_order_of_their_channels(self, tmp_path):
        trainer = "nnUNetTrainerV2BraTSRegions_DA3_BN_BD"
        plans = make_plans(num_classes=3, all_classes=[1, 2, 3])
        model = read_v1(write_model(tmp_path, plans=plans, trainer=trainer))
        scheme = LabelScheme.from_spec(model.spec)
        assert model.semantics.activation == "sigmoid"
        assert scheme.has_regions
        assert scheme.channels == {"whole_tumor": 0, "tumor_core": 1, "enhancing_tumor": 2}
        assert scheme.structures["tumor_core"] == (2, 3)
        assert scheme.regions_order_indices == (1, 2, 3)

    def test_one_has_labels_despite_its_name(self, tmp_path):
        model = read_v1(write_model(tmp_path, trainer="nnUNetTrainerV2BraTSRegions_BN"))
        assert model.semantics.activation == "softmax"
        assert not LabelScheme.from_spec(model.spec).has_regions


class TestLabels:
    def test_a_description_names_them(self, tmp_path):
        described = {"labels": {"0": "background", "2": "tumour", "1": "organ"},
                     "modality": {"0": "CT", "1": "PET"}}  # fmt: skip
        file = write_json(tmp_path / "elsewhere" / "dataset.json", described)
        model = read_v1(write_model(tmp_path / NAME), dataset_json=file)
        assert model.spec.labels == {"background": 0, "organ": 1, "tumour": 2}
        assert model.spec.channels == ("CT", "PET")

    def test_it_is_found_in_the_folder_of_the_task(self, tmp_path):
        folder = write_model(tmp_path / "3d_fullres" / TASK / NAME)
        write_json(folder.parent / "dataset.json", {"labels": {"organ": 1, "tumour": 2}})
        write_json(folder.parents[1] / "dataset.json", {"labels": {"1": "another", "2": "task"}})
        assert tuple(read_v1(folder).spec.labels) == ("background", "organ", "tumour")

    def test_one_of_another_task_is_left_aside(self, tmp_path):
        write_json(tmp_path / "dataset.json", {"labels": {"1": "organ"}})
        model = read_v1(write_model(tmp_path))
        assert tuple(model.spec.labels) == ("background", "label_1", "label_2")
        assert "left aside: it names the labels [1]" in model.notes[0]

    def test_names_that_mean_something_else_are_not_taken(self, tmp_path):
        write_json(tmp_path / "dataset.json", {"labels": {"1": "ignore", "2": "background"}})
        model = read_v1(write_model(tmp_path))
        assert model.spec.labels == {"background": 0, "label_1": 1, "label_2": 2}

    def test_values_are_the_channels_numbers(self, tmp_path):
        """The original writes the number of the channel, whatever the training data had."""
        model = read_v1(write_model(tmp_path, plans=make_plans(all_classes=[1, 4])))
        assert LabelScheme.from_spec(model.spec).values == (0, 1, 2)
        assert "had the labels 1, 4" in model.notes[0]


class TestFolds:
    def write(self, folder, *folds, **changes):
        states = {fold: as_v1(make_state(seed=number)) for number, fold in enumerate(folds)}
        return write_model(folder, states=states, **changes)

    def test_more_than_ten(self, tmp_path):
        folds = [f"fold_{number}" for number in range(12)]
        self.write(tmp_path, *folds, "all")
        assert list(read_v1(tmp_path).weights) == folds

    def test_all_where_it_is_asked_for(self, tmp_path):
        self.write(tmp_path, "fold_0", "all")
        assert tuple(read_v1(tmp_path, folds=["all"]).weights) == ("all",)

    def test_checkpoints_that_all_folds_have(self, tmp_path):
        self.write(tmp_path, "fold_0", "fold_1")
        self.write(tmp_path, "fold_0", file="model_best.model")
        assert set(read_v1(tmp_path).weights["fold_0"]) == {"final"}
        assert set(read_v1(tmp_path, folds=[0]).weights["fold_0"]) == {"final", "best"}
        assert set(read_v1(tmp_path, folds=[0], checkpoints=["best"]).weights["fold_0"]) == {"best"}

    def test_no_checkpoint_for_all_folds_is_refused(self, tmp_path):
        self.write(tmp_path, "fold_0")
        self.write(tmp_path, "fold_1", file="model_best.model")
        with pytest.raises(BundleError, match=r"fold_0: final; fold_1: best"):
            read_v1(tmp_path)


class TestCascade:
    trainer = "nnUNetTrainerV2CascadeFullRes"

    def write(self, root, *, folds=("fold_0", "fold_1"), **changes):
        state = make_state(num_inputs=4)
        plans = make_plans(make_stage(), make_stage())
        return write_model(
            root / "3d_cascade_fullres" / TASK / f"{self.trainer}__nnUNetPlansv2.1",
            plans=plans,
            trainer=self.trainer,
            stage=1,
            states=dict.fromkeys(folds, as_v1(state)),
            **changes,
        )

    def write_low(self, root, trainer="nnUNetTrainerV2", folds=("fold_0", "fold_1")):
        plans = make_plans(make_stage(), make_stage())
        folder = root / "3d_lowres" / TASK / f"{trainer}__nnUNetPlansv2.1"
        states = dict.fromkeys(folds, as_v1(make_state()))
        return write_model(folder, plans=plans, states=states)

    def test_the_stage_before_is_found_by_the_tree(self, tmp_path):
        folder, low = self.write(tmp_path), self.write_low(tmp_path)
        model = read_v1(folder)
        assert model.previous == low
        assert model.configuration == "3d_cascade_fullres"
        assert configuration_of(model).previous_stage == "3d_lowres"
        assert model.semantics.previous == "labels_uncropped"
        assert model.notes == ()
        assert read_v1(low).configuration == "3d_lowres"

    def test_the_trainer_it_was_made_with_comes_first(self, tmp_path):
        init = ("p", 0, "r", "d", True, 1, True, False, "nnUNetTrainerV2_DA3", True)
        folder = self.write(tmp_path, init=init)
        self.write_low(tmp_path)
        low = self.write_low(tmp_path, "nnUNetTrainerV2_DA3")
        assert read_v1(folder).previous == low

    def test_without_the_same_folds_there_is_none(self, tmp_path):
        folder = self.write(tmp_path)
        low = self.write_low(tmp_path, folds=("fold_0",))
        model = read_v1(folder)
        assert model.previous is None
        assert "not with the folds fold_0, fold_1" in model.notes[0]
        assert read_v1(folder, folds=["fold_0"]).previous == low

    def test_alone_it_says_what_it_needs(self, tmp_path):
        model = read_v1(self.write(tmp_path))
        assert model.previous is None
        assert "each case needs the segmentation of that stage" in model.notes[0]


class TestPostprocessing:
    def read(self, folder, **content):
        write_json(folder / "postprocessing.json", content)
        return read_v1(write_model(folder))

    def test_largest_pieces_by_faces(self, tmp_path):
        model = self.read(tmp_path, for_which_classes=[[1, 2], 2], min_valid_object_sizes="None")
        assert model.postprocessing.steps == (
            KeepLargest(structures=(1, 2), connectivity=1),
            KeepLargest(structures=(2,), connectivity=1),
        )

    def test_each_structure_has_its_size(self, tmp_path):
        sizes = "{(1, 2): 456.0, 1: 12.5, 2: 0.0}"
        model = self.read(tmp_path, for_which_classes=[[1, 2], 1, 2], min_valid_object_sizes=sizes)
        assert [step.below_mm3 for step in model.postprocessing.steps] == [456, 12.5]

    def test_nothing_to_do(self, tmp_path):
        assert self.read(tmp_path, for_which_classes=[]).postprocessing is None

    def test_all_labels(self, tmp_path):
        model = self.read(tmp_path, for_which_classes=None)
        assert [step.structures for step in model.postprocessing.steps] == [(1,), (2,)]

    def test_labels_the_model_does_not_have_are_left_out(self, tmp_path):
        model = self.read(tmp_path, for_which_classes=[[1, 3], 7])
        assert [step.structures for step in model.postprocessing.steps] == [(1,)]
        assert "Postprocessing of 3, 7 was left out" in model.notes[0]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/nnunet_models")
class TestWrittenByTheOriginal:
    @pytest.mark.parametrize(
        ("name", "configuration", "patch", "spacing"),
        [
            ("v1_iso", "3d_fullres", (24, 24, 24), (1.0, 1.0, 1.0)),
            ("v1_two", "2d", (32, 24), (1.0, 1.2)),
        ],
    )
    def test_every_tensor_has_its_place(self, name, configuration, patch, spacing):
        model = read_v1(SHARED / name)
        found = configuration_of(model)
        assert (model.configuration, found.patch_size, found.spacing) == (
            configuration, patch, spacing,
        )  # fmt: skip
        network = build_network(found.architecture, num_inputs=2, num_logits=3)
        for fold in ("fold_0", "fold_1"):
            path = SHARED / name / fold / "model_final_checkpoint.model"
            stored = torch.load(path, weights_only=False)["state_dict"]
            weights = model.weights[fold]["final"]()
            network.load_state_dict(weights)
            assert_same(as_v1(weights, found.architecture), stored)
            zeros = absent(weights, "plain_unet")
            assert zeros
            assert not any(weights[name].any() for name in zeros)
