"""Small bundles with random weights, and images that betray a mixed-up axis."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg.bundles.bundle import write_bundle
from medseg.labels import LabelScheme
from medseg.models.build import build_network
from medseg.schema.bundle import Semantics
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import Architecture, Configuration, Plans

STATISTICS = IntensityStatistics(
    mean=40.0, std=30.0, median=35.0, min=-90.0, max=200.0, percentile_00_5=-60, percentile_99_5=160
)


def make_plans(*, spacing=(2.0, 0.9, 1.2), patch_size=(8, 16, 12), network_axes=(2, 0, 1)):
    """Return plans with one tiny configuration; two spacings make it a 2D one."""
    dimensions = len(patch_size)
    architecture = Architecture(
        kind="plain_unet",
        features=(4, 6, 8),
        kernel_sizes=((3,) * dimensions,) * 3,
        strides=((1,) * dimensions, (2,) * dimensions, (1,) * (dimensions - 1) + (2,)),
        blocks_encoder=(1, 1, 1),
        blocks_decoder=(1, 1),
    )
    configuration = Configuration(
        patch_size=patch_size,
        batch_size=2,
        spacing=spacing[-dimensions:],
        median_shape=(16.0,) * dimensions,
        normalization=("zscore", "ct"),
        use_mask_for_norm=(True, False),
        batch_dice=False,
        architecture=architecture,
    )
    other = configuration.model_copy(update={"batch_size": 9})
    return Plans(
        name="tiny",
        dataset="Dataset999_Tiny",
        network_axes=network_axes,
        original_median_spacing=(2.0, 1.0, 1.0),
        original_median_shape=(16.0, 16.0, 16.0),
        intensity=(STATISTICS, STATISTICS),
        configurations={"tiny": configuration, "other": other},
    )


def make_spec(**changes):
    values = {
        "name": "Dataset999_Tiny",
        "source": "/somewhere/raw",
        "channels": ("T1w", "CT"),
        "labels": {"background": 0, "left": 1, "right": 2, "lesion": 3},
    }
    return DatasetSpec(**{**values, **changes})


def random_weights(plans, spec, seed, *, configuration="tiny"):
    """Return weights of a network whose labels vary from place to place."""
    network = build_network(
        plans.configurations[configuration].architecture,
        num_inputs=len(spec.channels),
        num_logits=LabelScheme.from_spec(spec).num_logits,
        generator=torch.Generator().manual_seed(seed),
    )
    return network.state_dict()


def make_bundle(folder, *, plans=None, spec=None, folds=2, mirror_axes=None, swap_axes=()):
    plans, spec = plans or make_plans(), spec or make_spec()
    dimensions = len(plans.configurations["tiny"].patch_size)
    has_regions = LabelScheme.from_spec(spec).has_regions
    return write_bundle(
        folder,
        spec=spec,
        plans=plans,
        configuration="tiny",
        weights={
            f"fold_{fold}": {
                "final": random_weights(plans, spec, seed=fold),
                "best": random_weights(plans, spec, seed=fold + 50),
            }
            for fold in range(folds)
        },
        semantics=Semantics(
            activation="sigmoid" if has_regions else "softmax",
            mirror_axes=tuple(range(dimensions)) if mirror_axes is None else mirror_axes,
            swap_axes=swap_axes,
        ),
        recipe="fast",
    )


def make_oblique(spacing=(0.85, 1.3, 2.4)):
    """Anisotropic, rotated about two axes, far from the origin."""
    a, b = np.deg2rad(17.0), np.deg2rad(-11.0)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag(spacing)
    affine[:3, 3] = (-31.5, 12.25, 80.0)
    return affine


def make_channels(shape=(19, 15, 11), *, channels=2, seed=0):
    """Return noise in a box off centre, zero around it, so that a crop has something to do."""
    rng = np.random.default_rng(seed)
    values = np.zeros((channels, *shape), np.float32)
    inner = tuple(slice(2 + d, length - 1) for d, length in enumerate(shape))
    noise = rng.normal(50, 40, size=values[(slice(None), *inner)].shape)
    values[(slice(None), *inner)] = np.round(noise) + 0.5
    return values


def write_case(folder, case, channels, affine, *, ending=".nii.gz", codes=(1, 2)):
    """Write CASE_NNNN files with given qform and sform codes, units and a scaled data type."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, channel in enumerate(channels):
        image = nib.Nifti1Image(channel, affine)
        image.set_qform(affine, codes[0])
        image.set_sform(affine, codes[1])
        image.header.set_xyzt_units("mm", "sec")
        paths.append(folder / f"{case}_{number:04d}{ending}")
        nib.save(image, paths[-1])
    return paths


class Make:
    """The functions above, within reach of every test."""

    plans = staticmethod(make_plans)
    spec = staticmethod(make_spec)
    bundle = staticmethod(make_bundle)
    weights = staticmethod(random_weights)
    oblique = staticmethod(make_oblique)
    channels = staticmethod(make_channels)
    case = staticmethod(write_case)


@pytest.fixture(scope="session")
def make():
    return Make


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory):
    """One bundle for the tests that only read it."""
    return make_bundle(tmp_path_factory.mktemp("shared") / "bundle").folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
