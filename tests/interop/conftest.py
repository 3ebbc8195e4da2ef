"""Small bundles with random weights, their exports, and images that betray a mixed-up axis."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg.api.export import export
from medseg.bundles.bundle import write_bundle
from medseg.interop import onnx as onnx_module
from medseg.interop.nnunet.foreign import ForeignModel
from medseg.labels import LabelScheme
from medseg.models.build import build_network
from medseg.schema.bundle import Semantics
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import Architecture, Configuration, Plans

STATISTICS = (
    IntensityStatistics(mean=40, std=30, median=35, min=-90, max=200,
                        percentile_00_5=-60, percentile_99_5=160),
    IntensityStatistics(mean=55, std=21, median=50, min=-10, max=140,
                        percentile_00_5=12, percentile_99_5=90),
)  # fmt: skip


def make_architecture(kind="plain_unet", dimensions=3, **changes):
    values = {
        "kind": kind,
        "features": (4, 6, 8),
        "kernel_sizes": ((3,) * dimensions,) * 3,
        "strides": ((1,) * dimensions, (2,) * dimensions, (1,) * (dimensions - 1) + (2,)),
        "blocks_encoder": (1, 2, 1),
        "blocks_decoder": (1, 1),
    }
    return Architecture(**{**values, **changes})


def make_plans(*, patch_size=(8, 16, 12), architecture=None, left_right=None, **changes):
    """Return plans with one configuration; a patch of two axes makes it a 2D one."""
    dimensions = len(patch_size)
    values = {
        "patch_size": patch_size,
        "batch_size": 2,
        "spacing": (2.0, 0.9, 1.2)[-dimensions:],
        "median_shape": (16.0,) * dimensions,
        "normalization": ("zscore", "ct"),
        "use_mask_for_norm": (True, False),
        "batch_dice": False,
        "architecture": architecture or make_architecture(dimensions=dimensions),
    }
    return Plans(
        name="tiny",
        dataset="Dataset999_Tiny",
        network_axes=changes.pop("network_axes", (2, 0, 1)),
        original_median_spacing=(2.0, 1.0, 1.0),
        original_median_shape=(16.0, 16.0, 16.0),
        intensity=STATISTICS,
        configurations={"tiny": Configuration(**{**values, **changes})},
        left_right=left_right,
    )


def make_spec(**changes):
    values = {
        "name": "Dataset999_Tiny",
        "channels": ("T1w", "CT"),
        "labels": {"background": 0, "left": 1, "right": 2, "lesion": 3},
    }
    return DatasetSpec(**{**values, **changes})


def random_weights(plans, spec, seed):
    """Return weights of a network whose labels vary from place to place."""
    network = build_network(
        plans.configurations["tiny"].architecture,
        num_inputs=len(spec.channels),
        num_logits=LabelScheme.from_spec(spec).num_logits,
        patch_size=plans.configurations["tiny"].patch_size,
        generator=torch.Generator().manual_seed(seed),
    )
    return network.state_dict()


def make_bundle(folder, *, plans=None, spec=None, folds=1, mirror_axes=(), swap_axes=()):
    plans, spec = plans or make_plans(), spec or make_spec()
    has_regions = LabelScheme.from_spec(spec).has_regions
    return write_bundle(
        folder,
        spec=spec,
        plans=plans,
        configuration="tiny",
        weights={
            f"fold_{fold}": {"final": random_weights(plans, spec, fold)} for fold in range(folds)
        },
        semantics=Semantics(
            activation="sigmoid" if has_regions else "softmax",
            mirror_axes=mirror_axes,
            swap_axes=swap_axes,
        ),
    ).folder


def make_foreign(*, folds=("fold_0",), checkpoint="final", spec=None, plans=None, **changes):
    """Return a model as it is read from elsewhere, with random weights, each fold its own."""
    spec, plans = spec or make_spec(), plans or make_plans()
    name = changes.get("configuration", "tiny")
    labels, configuration = LabelScheme.from_spec(spec), plans.configuration(name)

    def weights(seed):
        return lambda: build_network(
            configuration.architecture,
            num_inputs=len(spec.channels) + labels.num_previous(configuration),
            num_logits=labels.num_logits,
            generator=torch.Generator().manual_seed(seed),
        ).state_dict()

    values = {
        "folder": Path("bundle"),
        "spec": spec,
        "plans": plans,
        "configuration": name,
        "semantics": Semantics(),
        "orientation": "canonical",
        "weights": {fold: {checkpoint: weights(number)} for number, fold in enumerate(folds)},
    }
    return ForeignModel(**{**values, **changes})


def make_affine(spacing=(0.85, 1.3, 2.4)):
    """Anisotropic, rotated about two axes, far from the origin."""
    a, b = np.deg2rad(17.0), np.deg2rad(-11.0)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag(spacing)
    affine[:3, 3] = (-31.5, 12.25, 80.0)
    return affine


def make_channels(shape=(27, 21, 15), *, channels=2, seed=0):
    """Return noise in a box off centre that lacks a corner and has a hole, zero around it."""
    rng = np.random.default_rng(seed)
    values = np.zeros((channels, *shape), np.float32)
    inner = tuple(slice(min(2 + d, n // 4), n - (n > 4)) for d, n in enumerate(shape))
    noise = rng.normal(50, 40, size=values[(slice(None), *inner)].shape)
    values[(slice(None), *inner)] = np.round(noise) + 0.5
    if min(shape) > 8:
        for part in ([(n // 2, n // 2 + 3) for n in shape], [(0, n // 3 + 2) for n in shape]):
            values[(slice(None), *(slice(*ends) for ends in part))] = 0
    return values


def write_case(folder, channels, affine, *, codes=(1, 2), units=("mm", "sec"), kind=None):
    """Write one file for each channel with given qform and sform codes and units."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, channel in enumerate(channels):
        image = (kind or nib.Nifti1Image)(channel, affine)
        image.set_qform(affine, codes[0])
        image.set_sform(affine, codes[1])
        image.header.set_xyzt_units(*units)
        paths.append(str(folder / f"anna_{number:04d}.nii.gz"))
        nib.save(image, paths[-1])
    return paths


def load_runtime(folder):
    """Return the runtime of an exported folder as a module."""
    spec = importlib.util.spec_from_file_location(f"predict_{id(folder)}", folder / "predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Make:
    """The functions above, within reach of every test."""

    architecture = staticmethod(make_architecture)
    plans = staticmethod(make_plans)
    spec = staticmethod(make_spec)
    bundle = staticmethod(make_bundle)
    foreign = staticmethod(make_foreign)
    affine = staticmethod(make_affine)
    channels = staticmethod(make_channels)
    case = staticmethod(write_case)
    runtime = staticmethod(load_runtime)

    @staticmethod
    def exported(bundle, folder):
        export(bundle, folder, format="onnx")
        return folder


@pytest.fixture(scope="session")
def make():
    return Make


@pytest.fixture(scope="session", autouse=True)
def _each_network_is_translated_once():
    """Networks of equal weights are the same file: only the first one takes its seconds."""
    done, original = {}, onnx_module.to_onnx

    def remembered(network, *, num_inputs, tile):
        weights = b"".join(tensor.numpy().tobytes() for tensor in network.state_dict().values())
        key = (hashlib.sha256(weights + repr(network).encode()).hexdigest(), num_inputs, tile)
        if key not in done:
            done[key] = original(network, num_inputs=num_inputs, tile=tile)
        return done[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_module, "to_onnx", remembered)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
