"""Small models of nnU-Net v1 in folders, written without nnU-Net."""

from __future__ import annotations

import copy
import json
import pickle
from collections import OrderedDict

import numpy as np
import torch

from medseg.models.build import build_network
from medseg.schema.plans import Architecture

TRAINER = "nnUNetTrainerV2"
NAME = f"{TRAINER}__nnUNetPlansv2.1"
TASK = "Task007_Pancreas"
STATISTICS = {
    "mean": 80.0, "sd": 40.5, "median": 79.0, "mn": -5.0, "mx": 300.0,
    "percentile_00_5": 10.0, "percentile_99_5": 180.0,
}  # fmt: skip


def make_stage(dimensions=3, **changes):
    """Return a stage of plans whose axes all differ."""
    values = {
        "batch_size": 3,
        "num_pool_per_axis": [1, 2, 2][-dimensions:],
        "patch_size": np.array([6, 24, 20][-dimensions:]),
        "median_patient_size_in_voxels": np.array([31, 210, 180]),
        "current_spacing": np.array([3.0, 0.9, 1.25]),
        "original_spacing": np.array([2.5, 0.8, 1.0]),
        "do_dummy_2D_data_aug": False,
        "pool_op_kernel_sizes": [[1, 2, 2][-dimensions:], [2, 2, 2][-dimensions:]],
        "conv_kernel_sizes": [[1, 3, 3][-dimensions:], [3] * dimensions, [3] * dimensions],
    }
    return {**values, **changes}


def make_plans(*stages, **changes):
    """Return plans of two channels and two labels."""
    stages = stages or (make_stage(),)
    flat = len(stages[0]["patch_size"]) == 2
    values = {
        "num_stages": len(stages),
        "num_modalities": 2,
        "modalities": {0: "CT", 1: "T2"},
        "normalization_schemes": OrderedDict([(0, "CT"), (1, "nonCT")]),
        "use_mask_for_norm": OrderedDict([(0, False), (1, True)]),
        "dataset_properties": {
            "all_classes": [1, 2],
            "intensityproperties": OrderedDict((i, dict(STATISTICS)) for i in range(2)),
        },
        "num_classes": 2,
        "all_classes": [1, 2],
        "base_num_features": 4,
        "keep_only_largest_region": None,
        "min_region_size_per_class": None,
        "transpose_forward": [1, 2, 0],
        "transpose_backward": [2, 0, 1],
        "plans_per_stage": dict(enumerate(stages)),
        "preprocessor_name": "PreprocessorFor2D" if flat else "GenericPreprocessor",
        "conv_per_stage": 2,
    }
    return {**values, **changes}


def make_architecture(dimensions=3, kind="plain_unet", **options):
    """Return the network of the plans: its decoder has the kernels of one stage below."""
    thin = ((1, 3, 3)[-dimensions:], *((3,) * dimensions,) * 2)
    own = {} if kind == "residual_unet" or dimensions == 2 else {"kernel_sizes_decoder": thin[1:]}
    return Architecture(
        kind=kind,
        features=(4, 8, 16),
        kernel_sizes=thin,
        strides=((1,) * dimensions, (1, 2, 2)[-dimensions:], (2,) * dimensions),
        blocks_encoder=(2, 2, 3),
        blocks_decoder=(2, 2),
        options={**{name: [list(k) for k in kernels] for name, kernels in own.items()}, **options},
    )


def make_state(architecture=None, *, seed=0, num_inputs=2, num_logits=3):
    """Return weights as medseg's network names them; biases v1 does not have are 0."""
    architecture = architecture or make_architecture()
    network = build_network(architecture, num_inputs=num_inputs, num_logits=num_logits)
    generator = torch.Generator().manual_seed(seed + 1)
    state = {
        name: torch.rand(tensor.shape, generator=generator) + 0.1
        if tensor.is_floating_point()
        else tensor + 7
        for name, tensor in network.state_dict().items()
    }
    for name in absent(state, architecture.kind):
        state[name].zero_()
    return state


def absent(state, kind):
    """Return the biases that networks of v1 do not have."""
    ends = [".transpconvs."] + ([".seg_layers."] if kind == "plain_unet" else [])
    names = [name for name in state if name.endswith(".bias") and any(end in name for end in ends)]
    convs = [name for name in state if name.endswith(".conv.bias")]
    return names + (convs if kind == "residual_unet" else [])


def as_v1(state, architecture=None):
    """Return weights as v1 names them: the bottleneck and decoder stages in two halves."""
    architecture = architecture or make_architecture()
    name_of = _residual if architecture.kind == "residual_unet" else _plain
    left_out = set(absent(state, architecture.kind))
    stored = OrderedDict()
    for name, tensor in state.items():
        if name not in left_out:
            for theirs in name_of(name.split("."), architecture):
                stored[theirs] = tensor
    return stored


def _plain(parts, architecture):
    bottom = len(architecture.features) - 1
    if parts[1] == "transpconvs":
        return [f"tu.{parts[2]}.{parts[3]}"]
    if parts[1] == "seg_layers":
        return [f"seg_outputs.{parts[2]}.{parts[3]}"]
    stage, end = int(parts[2]), f"{parts[-2].replace('norm', 'instnorm')}.{parts[-1]}"
    conv = int(parts[-3])
    if parts[0] == "encoder":
        group, count = "conv_blocks_context", architecture.blocks_encoder[stage]
    else:
        group, count = "conv_blocks_localization", architecture.blocks_decoder[bottom - 1 - stage]
    if parts[0] == "encoder" and stage < bottom:
        return [f"{group}.{stage}.blocks.{conv}.{end}"]
    half, block = (1, 0) if conv == count - 1 else (0, conv)
    return [f"{group}.{stage}.{half}.blocks.{block}.{end}"]


def _residual(parts, architecture):
    last, end = len(architecture.features) - 2, parts[-1]
    if parts[1] == "stem":
        return [f"encoder.initial_{parts[-2]}.{end}"]
    if parts[0] == "encoder":
        block = f"encoder.stages.{parts[2]}.convs.{parts[4]}"
        if parts[5] == "skip":
            return [f"{block}.downsample_skip.{int(parts[-2] == 'norm')}.{end}"]
        return [f"{block}.{parts[-2]}{parts[5][-1]}.{end}"]
    if parts[1] == "transpconvs":
        return [f"decoder.tus.{parts[2]}.{end}"]
    if parts[1] == "seg_layers":
        deep = f"decoder.deep_supervision_outputs.{parts[2]}.{end}"
        return [f"decoder.segmentation_output.{end}" if int(parts[2]) == last else deep]
    block = f"decoder.stages.{parts[2]}.convs.{parts[4]}"
    return [f"{block}.{parts[-2]}.{end}", f"{block}.all.{2 * (parts[-2] == 'norm')}.{end}"]


def write_model(
    folder,
    *,
    plans=None,
    trainer=TRAINER,
    stage=0,
    init=None,
    states=None,
    file="model_final_checkpoint.model",
    legacy=False,
):
    """Write a model's folder; `states` is folder of the fold -> weights as v1 names them."""
    folder.mkdir(parents=True, exist_ok=True)
    plans = make_plans() if plans is None else plans
    usual = ("plans.pkl", 0, "author/results", "author/data", True, stage, True, False, True)
    described = {
        "init": usual if init is None else init,
        "name": trainer,
        "class": f"<class 'nnunet.{trainer}'>",
        "plans": plans,
    }
    for fold, state in (states or {"fold_0": as_v1(make_state())}).items():
        content = {
            "epoch": 1000,
            "state_dict": state,
            "optimizer_state_dict": {"state": {0: {"momentum_buffer": torch.zeros(17, 19)}}},
            "lr_scheduler_state_dict": None,
            "plot_stuff": ([np.float64(0.5)], [np.float32(0.25)], [], []),
            "best_stuff": (None, np.float64(0.5), np.float64(0.75)),
        }
        (folder / fold).mkdir(exist_ok=True)
        torch.save(content, folder / fold / file, _use_new_zipfile_serialization=not legacy)
        (folder / fold / f"{file}.pkl").write_bytes(pickle.dumps(described))
    return folder


def write_json(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def changed(values, path, new=KeyError):
    """Return nested values with one of them exchanged, or left out."""
    values = copy.deepcopy(values)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner = values
    for part in parents:
        inner = inner[part]
    if new is KeyError:
        del inner[last]
    else:
        inner[last] = new
    return values


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
