"""What is written as nnU-Net's is read again as what it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from medseg.interop.nnunet.v2 import read_v2
from medseg.interop.nnunet.write import write_v2
from medseg.labels import LabelScheme
from medseg.schema.bundle import Resampling, Semantics
from medseg.schema.postprocessing import KeepLargest, Postprocessing

SHARED = Path(__file__).parents[4] / "shared/data/nnunet_models"
PLANS_FIELDS = (
    "network_axes",
    "original_median_spacing",
    "original_median_shape",
    "intensity",
    "left_right",
)
ROUNDING = {"accumulator", "gaussian_peak", "label_resize", "previous"}
"""Fields of the semantics in which nnU-Net has its own way, which is no matter of the file."""


def models(make):
    """Return models whose every number differs from the others."""
    regions = make.spec(
        labels={"whole": (1, 2, 4), "background": 0, "core": (2, 4), "enhancing": 4},
        regions_class_order=(1, 4, 2),
        ignore_label=5,
    )
    residual = make.architecture(
        "residual_unet", kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 5, 3)), blocks_decoder=(2, 1)
    )
    options = {"norm": "batch", "epsilon": 1e-3, "slope": 0.2}
    flat = make.architecture(dimensions=2, options=options)
    plain = make.architecture(blocks_encoder=(1, 3, 2), blocks_decoder=(1, 2))
    resampling = {
        "resample_image": Resampling(order=1, separate="never"),
        "resample_labels": Resampling(method="interpolate"),
        "resample_result": Resampling(method="interpolate", separate="always"),
    }
    return {
        "plain": make.foreign(
            folds=("fold_0", "fold_2"),
            plans=make.plans(
                architecture=plain,
                network_axes=(1, 0, 2),
                normalization=("rescale_0_1", "ct"),
                use_mask_for_norm=(False, True),
                median_shape=(21.0, 22.0, 23.5),
                batch_size=5,
                batch_dice=True,
            ),
            semantics=Semantics(mirror_axes=(0, 2)),
            postprocessing=Postprocessing(steps=(KeepLargest(structures=(1, 3)),)),
        ),
        "regions": make.foreign(
            spec=regions,
            plans=make.plans(architecture=residual, network_axes=(2, 1, 0)),
            semantics=Semantics(activation="sigmoid", **resampling),
            orientation="stored_sitk",
            folds=("all",),
        ),
        "2d": make.foreign(
            plans=make.plans(
                patch_size=(16, 12),
                architecture=flat,
                normalization=("none", "rgb_0_1"),
                spacing=(0.7, 0.8),
            ),
            checkpoint="best",
        ),
    }


def check_weights(found, model):
    for fold, entries in model.weights.items():
        for checkpoint, weights in entries.items():
            wanted, tensors = weights(), found.weights[fold][checkpoint]()
            assert set(tensors) == set(wanted)
            assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("name", ["plain", "regions", "2d"])
def test_a_model_comes_back_as_it_was(make, tmp_path, name):
    model = models(make)[name]
    write_v2(tmp_path / "out", [model])
    found = read_v2(tmp_path / "out", folds=list(model.weights))
    assert found.configuration == model.configuration
    assert found.orientation == model.orientation
    assert found.spec.channels == model.spec.channels
    here, there = (LabelScheme.from_spec(one.spec) for one in (model, found))
    assert (there.structures, there.values) == (here.structures, here.values)
    assert list(there.channels) == list(here.channels)
    assert there.regions_order_indices == here.regions_order_indices
    assert found.plans.configurations == model.plans.configurations
    for field in PLANS_FIELDS:
        assert getattr(found.plans, field) == getattr(model.plans, field), field
    for field in set(Semantics.model_fields) - ROUNDING:
        assert getattr(found.semantics, field) == getattr(model.semantics, field), field
    steps = [one.postprocessing.steps if one.postprocessing else () for one in (found, model)]
    assert [step.structures for step in steps[0]] == [step.structures for step in steps[1]]
    check_weights(found, model)


def test_a_cascade_comes_back_with_its_first_stage_beside_it(make, tmp_path):
    fine = make.plans().configurations["tiny"].model_copy(update={"previous_stage": "tiny"})
    plans = make.plans().model_copy(update={"configurations": {"fine": fine}})
    stages = [make.foreign(), make.foreign(plans=plans, configuration="fine")]
    exported = write_v2(tmp_path / "out", stages)
    folders = [tmp_path / "out" / stage.folder for stage in exported.stages]
    found = read_v2(folders[1])
    assert found.previous == folders[0]
    assert found.plans.configurations == plans.configurations
    assert found.semantics.previous == "labels"
    check_weights(found, stages[1])
    check_weights(read_v2(found.previous), stages[0])


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared data are absent")
@pytest.mark.parametrize("name", ["v2_aniso", "v2_resreg", "v2_casc"])
def test_what_nnunet_wrote_is_written_as_it_was(tmp_path, name):
    """Every tensor by every name; plans and labels but for what prediction does not look at."""
    write_v2(tmp_path / "out", [read_v2(SHARED / name)])
    for fold in (0, 1):
        path = f"fold_{fold}/checkpoint_final.pth"
        wanted, found = (
            torch.load(folder / path, weights_only=True)
            for folder in (SHARED / name, tmp_path / "out")
        )
        tensors = found.pop("network_weights")
        originals = wanted.pop("network_weights")
        assert set(tensors) == set(originals)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in originals.items())
        assert (
            found["inference_allowed_mirroring_axes"] == wanted["inference_allowed_mirroring_axes"]
        )
        assert found["init_args"]["configuration"] == wanted["init_args"]["configuration"]
    wanted, found = (read(folder / "plans.json") for folder in (SHARED / name, tmp_path / "out"))
    ((configuration, entry),) = found.pop("configurations").items()
    entries = wanted.pop("configurations")
    original = {**entries["3d_fullres"], **entries[configuration]}
    for values in (entry, original):
        values.pop("data_identifier")
        values.pop("inherits_from", None)
    assert entry == original
    del found["plans_name"], found["dataset_name"]
    assert found == {key: wanted[key] for key in found}
    labels, written = (
        read(folder / "dataset.json") for folder in (SHARED / name, tmp_path / "out")
    )
    for key in ("channel_names", "labels", "regions_class_order", "file_ending"):
        assert written.get(key) == labels.get(key), key


def read(path):
    return json.loads(path.read_text())
