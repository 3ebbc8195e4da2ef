"""Small models of nnU-Net v2 in folders, written without nnU-Net."""

from __future__ import annotations

import copy
import json

import torch

from medseg.models.build import build_network
from medseg.schema.plans import Architecture

NAME = "nnUNetTrainer__nnUNetPlans__3d_fullres"
STATISTICS = {
    "mean": 80, "std": 40.5, "median": 79, "min": -5, "max": 300,
    "percentile_00_5": 10, "percentile_99_5": 180,
}  # fmt: skip
MOMENTUM = (17, 19)
SPLINE = "resample_data_or_seg_to_shape"


def make_arguments(dimensions=3, kind="plain", **changes):
    """Return arguments of a network whose stages, kernels, strides and depths all differ."""
    values = {
        "n_stages": 3,
        "features_per_stage": [4, 6, 8],
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": [[1, 3, 5][-dimensions:], [3] * dimensions, [3] * dimensions],
        "strides": [[1] * dimensions, [1, 2, 2][-dimensions:], [2, 2, 1][-dimensions:]],
        "n_conv_per_stage" if kind == "plain" else "n_blocks_per_stage": [2, 1, 3],
        "n_conv_per_stage_decoder": [1, 2],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {**values, **changes}


def make_configuration(dimensions=3, kind="plain", arguments=None, **changes):
    where = "dynamic_network_architectures.architectures.unet"
    name = "PlainConvUNet" if kind == "plain" else "ResidualEncoderUNet"
    usual = {"order_z": 0, "force_separate_z": None}
    values = {
        "patch_size": [6, 24, 20][-dimensions:],
        "batch_size": 2,
        "spacing": [3.0, 0.9, 1.25][-dimensions:],
        "median_image_size_in_voxels": [31.0, 210.0, 180.0][-dimensions:],
        "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
        "use_mask_for_norm": [False, True],
        "resampling_fn_data": SPLINE,
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **usual},
        "resampling_fn_seg": SPLINE,
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **usual},
        "resampling_fn_probabilities": SPLINE,
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **usual},
        "batch_dice": False,
        "preprocessor_name": "DefaultPreprocessor",
        "architecture": {
            "network_class_name": f"{where}.{name}",
            "arch_kwargs": make_arguments(dimensions, kind, **(arguments or {})),
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return {**values, **changes}


def make_plans(configurations=None, **changes):
    values = {
        "dataset_name": "Dataset007_Pancreas",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.5, 0.8, 1],
        "original_median_shape_after_transp": [40, 300, 280.0],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [1, 2, 0],
        "transpose_backward": [2, 0, 1],
        "configurations": configurations or {"3d_fullres": make_configuration()},
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": STATISTICS, "1": STATISTICS},
    }
    return {**values, **changes}


def make_dataset(**changes):
    values = {
        "channel_names": {"0": "CT", "1": "T2"},
        "labels": {"background": 0, "organ": 1, "tumour": [2]},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    return {**values, **changes}


def make_architecture(dimensions=3, kind="plain", **options):
    """Return, written down by hand, the network of `make_arguments`; its decoder is reversed."""
    return Architecture(
        kind=f"{kind}_unet",
        features=(4, 6, 8),
        kernel_sizes=((1, 3, 5)[-dimensions:], (3,) * dimensions, (3,) * dimensions),
        strides=((1,) * dimensions, (1, 2, 2)[-dimensions:], (2, 2, 1)[-dimensions:]),
        blocks_encoder=(2, 1, 3),
        blocks_decoder=(2, 1),
        options=options,
    )


def make_state(architecture=None, *, seed=0, num_inputs=2, num_logits=3):
    """Return weights as medseg's network names them."""
    network = build_network(
        architecture or make_architecture(),
        num_inputs=num_inputs,
        num_logits=num_logits,
        generator=torch.Generator().manual_seed(seed),
    )
    generator = torch.Generator().manual_seed(seed + 1)
    return {
        name: torch.rand(tensor.shape, generator=generator) + 0.1
        if tensor.is_floating_point()
        else tensor + 7
        for name, tensor in network.state_dict().items()
    }


def with_copies(state):
    """Return weights as nnU-Net stores them: blocks twice, and the encoder in the decoder again."""
    stored = {}
    for name, tensor in state.items():
        stored[name] = tensor
        for part, number in ((".conv.", 0), (".norm.", 1)):
            if part in name:
                stored[name.replace(part, f".all_modules.{number}.")] = tensor
    encoder = {f"decoder.{name}": t for name, t in stored.items() if name.startswith("encoder.")}
    return {**stored, **encoder}


def write_model(
    folder,
    *,
    plans=None,
    dataset=None,
    states=None,
    name="3d_fullres",
    file="checkpoint_final.pth",
    missing=(),
    **changes,
):
    """Write a model's folder; `states` is folder of the fold -> weights without copies."""
    folder.mkdir(parents=True, exist_ok=True)
    plans, dataset = plans or make_plans(), dataset or make_dataset()
    for file_name, values in (("plans.json", plans), ("dataset.json", dataset)):
        if file_name not in missing:
            (folder / file_name).write_text(json.dumps(values))
    for fold, state in (states or {"fold_0": make_state()}).items():
        content = {
            "network_weights": with_copies(state),
            "optimizer_state": {"state": {0: {"momentum_buffer": torch.zeros(MOMENTUM)}}},
            "grad_scaler_state": None,
            "current_epoch": 1000,
            "init_args": {
                "plans": plans,
                "configuration": name,
                "fold": 0,
                "dataset_json": dataset,
                "device": torch.device("cpu"),
            },
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": (0, 2),
            **changes,
        }
        content = {key: value for key, value in content.items() if key not in missing}
        (folder / fold).mkdir(exist_ok=True)
        torch.save(content, folder / fold / file)
    return folder


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def changed(values, path, new):
    """Return nested values with one of them exchanged."""
    values = copy.deepcopy(values)
    *parents, last = path.split(".")
    inner = values
    for part in parents:
        inner = inner[int(part) if isinstance(inner, list) else part]
    inner[int(last) if isinstance(inner, list) else last] = new
    return values
