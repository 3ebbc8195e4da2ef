"""What the plans and labels of nnU-Net v2 say of a model, and what they cannot say."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from medseg.errors import BundleError
from medseg.interop.nnunet.write import write_v2
from medseg.preprocess.normalize import normalize
from medseg.schema.bundle import Resampling, Semantics
from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import Configuration

PLANS_KEYS = {
    "dataset_name", "plans_name", "original_median_spacing_after_transp",
    "original_median_shape_after_transp", "image_reader_writer", "transpose_forward",
    "transpose_backward", "configurations", "experiment_planner_used", "label_manager",
    "foreground_intensity_properties_per_channel",
}  # fmt: skip
CONFIGURATION_KEYS = {
    "data_identifier", "preprocessor_name", "batch_size", "patch_size",
    "median_image_size_in_voxels", "spacing", "normalization_schemes", "use_mask_for_norm",
    "resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_seg",
    "resampling_fn_seg_kwargs", "resampling_fn_probabilities",
    "resampling_fn_probabilities_kwargs", "batch_dice", "architecture",
}  # fmt: skip


@pytest.fixture
def foreign(make):
    return make.foreign


def read(path):
    return json.loads(path.read_text())


class TestPlans:
    @pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
    def test_axes_lead_from_the_readers_order_to_the_networks_and_back(
        self, foreign, make, tmp_path, axes
    ):
        """The reader's arrays run over K, J, I."""
        write_v2(tmp_path / "out", [foreign(plans=make.plans(network_axes=axes))])
        plans = read(tmp_path / "out/plans.json")
        image = np.arange(60).reshape(3, 4, 5)
        network = image.transpose(axes)
        as_read = image.transpose(2, 1, 0)
        assert as_read.transpose(plans["transpose_forward"]).tolist() == network.tolist()
        assert network.transpose(plans["transpose_backward"]).tolist() == as_read.tolist()

    def test_every_key_is_there(self, foreign, make, tmp_path):
        architecture = make.architecture(
            kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 5, 3)), blocks_decoder=(1, 2)
        )
        write_v2(tmp_path / "out", [foreign(plans=make.plans(architecture=architecture))])
        plans = read(tmp_path / "out/plans.json")
        assert set(plans) == PLANS_KEYS
        (configuration,) = plans["configurations"].values()
        assert set(configuration) == CONFIGURATION_KEYS
        assert configuration["patch_size"] == [8, 16, 12]
        assert configuration["spacing"] == [2.0, 0.9, 1.2]
        assert configuration["normalization_schemes"] == ["ZScoreNormalization", "CTNormalization"]
        assert configuration["use_mask_for_norm"] == [True, False]
        assert configuration["architecture"] == {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [4, 6, 8],
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 5, 3]],
                "strides": [[1, 1, 1], [2, 2, 2], [1, 1, 2]],
                "n_conv_per_stage": [1, 2, 1],
                "n_conv_per_stage_decoder": [2, 1],  # bottleneck first
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        }

    @pytest.mark.parametrize(
        ("options", "wanted"),
        [
            (
                {"norm": "batch", "epsilon": 1e-3, "slope": 0.2},
                {
                    "norm_op": "torch.nn.modules.batchnorm.BatchNorm2d",
                    "norm_op_kwargs": {"eps": 1e-3, "affine": True},
                    "nonlin_kwargs": {"inplace": True, "negative_slope": 0.2},
                },
            ),
            (
                {"norm": "none", "activation": "gelu"},
                {"norm_op": None, "norm_op_kwargs": None, "nonlin": "torch.nn.GELU",
                 "nonlin_kwargs": {}},
            ),
            ({"activation": "relu", "activation_first": True},
             {"nonlin": "torch.nn.ReLU", "nonlin_first": True}),
            ({"activation": "mish"}, {"nonlin": "torch.nn.Mish"}),
        ],
        ids=["batch norm", "no norm", "activation first", "mish"],
    )  # fmt: skip
    def test_options_of_a_2d_network(self, foreign, make, tmp_path, options, wanted):
        architecture = make.architecture(dimensions=2, options=options)
        model = foreign(plans=make.plans(patch_size=(16, 12), architecture=architecture))
        write_v2(tmp_path / "out", [model])
        (configuration,) = read(tmp_path / "out/plans.json")["configurations"].values()
        kwargs = configuration["architecture"]["arch_kwargs"]
        assert {name: kwargs[name] for name in wanted} == wanted
        assert kwargs["conv_op"] == "torch.nn.modules.conv.Conv2d"
        assert configuration["spacing"] == [0.9, 1.2]

    def test_resampling(self, foreign, tmp_path):
        semantics = Semantics(
            resample_image=Resampling(order=0, separate="always"),
            resample_labels=Resampling(method="interpolate", separate="never"),
            resample_result=Resampling(method="none"),
            label_resize="threshold",
        )
        write_v2(tmp_path / "out", [foreign(semantics=semantics)])
        (found,) = read(tmp_path / "out/plans.json")["configurations"].values()
        assert found["resampling_fn_data"] == "resample_data_or_seg_to_shape"
        assert found["resampling_fn_data_kwargs"] == {
            "is_seg": False, "order": 0, "order_z": 0, "force_separate_z": True
        }  # fmt: skip
        assert found["resampling_fn_seg"] == "resample_torch_fornnunet"
        assert found["resampling_fn_seg_kwargs"] == {
            "is_seg": True, "force_separate_z": False, "memefficient_seg_resampling": False
        }  # fmt: skip
        assert found["resampling_fn_probabilities"] == "no_resampling_hack"
        assert found["resampling_fn_probabilities_kwargs"] == {}

    def test_usual_resampling(self, foreign, tmp_path):
        write_v2(tmp_path / "out", [foreign()])
        (found,) = read(tmp_path / "out/plans.json")["configurations"].values()
        for what, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
            assert found[f"resampling_fn_{what}_kwargs"] == {
                "is_seg": what == "seg", "order": order, "order_z": 0, "force_separate_z": None
            }  # fmt: skip

    @pytest.mark.parametrize("scheme", ["ct", "quantitative"])
    def test_statistics_do_what_the_normalisation_does(self, foreign, make, tmp_path, scheme):
        plans = make.plans(normalization=("zscore", scheme))
        write_v2(tmp_path / "out", [foreign(plans=plans)])
        written = read(tmp_path / "out/plans.json")
        (configuration,) = written["configurations"].values()
        assert configuration["normalization_schemes"][1] == "CTNormalization"
        told = written["foreground_intensity_properties_per_channel"]["1"]
        image = np.linspace(-200, 300, 997, dtype=np.float32)
        clipped = np.clip(image, told["percentile_00_5"], told["percentile_99_5"])
        wanted = (clipped - np.float32(told["mean"])) / np.float32(max(told["std"], 1e-8))
        found = normalize(
            image[None],
            np.ones(image.shape, bool),
            schemes=[scheme],
            use_mask=[False],
            intensity=plans.intensity[1:],
        )[0]
        np.testing.assert_array_equal(found, wanted)
        assert np.ptp(found) < np.ptp(image) / told["std"], "something is clipped"

    def test_reader_brings_images_to_the_models_orientation(self, foreign, tmp_path):
        for orientation, reader in (
            ("canonical", "NibabelIOWithReorient"),
            ("stored_sitk", "SimpleITKIO"),
        ):
            write_v2(tmp_path / "out", [foreign(orientation=orientation)])
            assert read(tmp_path / "out/plans.json")["image_reader_writer"] == reader
            dataset = read(tmp_path / "out/dataset.json")
            assert dataset.get("overwrite_image_reader_writer", "SimpleITKIO") == reader


class TestLabels:
    def written(self, foreign, make, folder, **changes):
        exported = write_v2(folder, [foreign(spec=make.spec(**changes))], num_training=7)
        return read(folder / "dataset.json"), exported.notes

    def test_labels_and_the_ignore_label_above_them(self, foreign, make, tmp_path):
        labels = {"lesion": 2, "background": 0, "organ": (1,), "ignore": 3}
        found, notes = self.written(foreign, make, tmp_path / "out", labels=labels)
        del found["overwrite_image_reader_writer"]
        assert found == {
            "channel_names": {"0": "T1w", "1": "CT"},
            "labels": {"lesion": 2, "background": 0, "organ": 1, "ignore": 3},
            "numTraining": 7,
            "file_ending": ".nii.gz",
        }
        assert notes == ()

    def test_an_ignore_label_elsewhere_is_left_out_and_it_is_said(self, foreign, make, tmp_path):
        found, notes = self.written(foreign, make, tmp_path / "out", ignore_label=255)
        assert "ignore" not in found["labels"]
        assert "the ignore label (255) is left out" in notes[0]

    def test_regions_keep_their_order(self, foreign, make, tmp_path):
        found, _ = self.written(
            foreign,
            make,
            tmp_path / "out",
            labels={"whole": (1, 2, 4), "background": 0, "core": (2, 4), "enhancing": 4},
            regions_class_order=(1, 2, 4),
            ignore_label=5,
        )
        assert list(found["labels"].items()) == [
            ("whole", [1, 2, 4]), ("background", 0), ("core", [2, 4]), ("enhancing", 4),
            ("ignore", 5),
        ]  # fmt: skip
        assert found["regions_class_order"] == [1, 2, 4]


class TestRefused:
    def refuse(self, model, folder, *parts):
        with pytest.raises(BundleError) as caught:
            write_v2(folder, [model])
        for part in parts:
            assert part in str(caught.value)
        return str(caught.value)

    def test_everything_at_once_and_nothing_is_written(self, foreign, make, tmp_path):
        options = {
            "kernel_sizes_decoder": ((3, 3, 3), (5, 3, 3)), "kernel_size_stem": (5, 3, 3),
            "shortcut": "strided", "activation_first": True,
        }  # fmt: skip
        statistics = make.plans().intensity[1].model_copy(update={"std": 3e-10})
        plans = make.plans(
            architecture=make.architecture("residual_unet", options=options),
            normalization=("ct_case", "quantitative"),
        ).model_copy(update={"intensity": (make.plans().intensity[0], statistics)})
        semantics = Semantics(
            average="probabilities", normalise_first=False, least_std="added", keeps_slices=True,
            separate_by="image", previous="labels_uncropped",
        )  # fmt: skip
        model = foreign(
            spec=make.spec(labels={"background": 0, "left": 1, "right": 7}),
            plans=plans,
            semantics=semantics,
        )
        text = self.refuse(
            model,
            tmp_path / "out",
            "bundle: 13 things that nnU-Net v2 has no counterpart of",
            "semantics.average is 'probabilities', expected 'logits'",
            "semantics.normalise_first is False",
            "semantics.least_std is 'added'",
            "semantics.keeps_slices is True",
            "semantics.separate_by is 'image'",
            "semantics.previous is 'labels_uncropped'",
            "options.kernel_sizes_decoder differs",
            "options.kernel_size_stem differs",
            "options.shortcut is 'strided'",
            "options.activation_first is true",
            "channel 0 (T1w) is 'ct_case'",
            "channel 1 (CT) is 'quantitative' and its standard deviation 3e-10",
            "labels have the values 0, 1, 7, expected 0 to 2",
            "export to ONNX",
        )
        assert len(text.splitlines()) == 13 + 2
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("kind", ["mednext_s", "some_package:Network"])
    def test_networks_it_does_not_have(self, foreign, make, tmp_path, kind):
        plans = make.plans(architecture=make.architecture(kind))
        self.refuse(
            foreign(plans=plans),
            tmp_path / "out",
            f"architecture.kind is '{kind}', expected one of: plain_unet",
        )

    def test_options_no_network_has(self, foreign, make, tmp_path):
        plans = make.plans(architecture=make.architecture(options={"nrom": "batch"}))
        self.refuse(
            foreign(plans=plans),
            tmp_path / "out",
            "1 thing ",
            "contradicts itself: options has 'nrom'",
        )

    @pytest.mark.parametrize(
        ("labels", "order", "match"),
        [
            ({"background": 1, "a": 0}, None, "labels.background is 1, expected 0"),
            ({"background": 0, "a": -1}, None, "labels have the values 0, -1, expected 0 to 1"),
            (
                {"background": 0, "a": (1, 300), "b": 1},
                (300, 1),
                "labels have the values 0, 1, 300, expected 0 to 255",
            ),
            (
                {"background": 0, "ignore": (1, 2), "b": 1},
                (2, 1),
                "labels.ignore is a structure",
            ),
        ],
        ids=["background", "negative", "wide regions", "ignore"],
    )
    def test_labels(self, foreign, make, tmp_path, labels, order, match):
        spec = make.spec(labels=labels, regions_class_order=order)
        self.refuse(foreign(spec=spec), tmp_path / "out", match)


def test_statistics_are_those_of_the_plans_else(foreign, tmp_path):
    write_v2(tmp_path / "out", [foreign()])
    told = read(tmp_path / "out/plans.json")["foreground_intensity_properties_per_channel"]
    plans = foreign().plans
    assert [IntensityStatistics(**told[str(n)]) for n in range(2)] == list(plans.intensity)
    assert isinstance(plans.configuration("tiny"), Configuration)
