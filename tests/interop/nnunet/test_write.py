"""A model as a folder of nnU-Net v2: names, plans, labels, checkpoints; what cannot be said."""

from __future__ import annotations

import json

import pytest
import torch

from medseg.errors import BundleError, ConfigError
from medseg.interop.nnunet.write import MARK, require_place, write_v2
from medseg.schema.bundle import Semantics
from medseg.schema.plans import LeftRight
from medseg.schema.postprocessing import FillHoles, KeepLargest, Postprocessing


@pytest.fixture
def foreign(make):
    return make.foreign


def read(path):
    return json.loads(path.read_text())


def stored(folder, fold="0", checkpoint="final"):
    """Return a checkpoint, read without running any code."""
    return torch.load(folder / f"fold_{fold}/checkpoint_{checkpoint}.pth", weights_only=True)


def block(prefix, *, bias=True, norm=("weight", "bias"), place=1):
    """Return the names of a block: each module by its own name, and by its place."""
    own = {"conv": ["weight", *(["bias"] if bias else [])], "norm": norm}
    for number, (part, tensors) in enumerate(own.items()):
        for tensor in tensors:
            yield f"{prefix}.{part}.{tensor}"
            yield f"{prefix}.all_modules.{number and place}.{tensor}"


def decoder(num_convs, **style):
    """Return the names of a decoder with (bottleneck first) so many convolutions a stage."""
    for step, count in enumerate(num_convs):
        for layer in ("transpconvs", "seg_layers"):
            yield from (f"decoder.{layer}.{step}.{tensor}" for tensor in ("weight", "bias"))
        for conv in range(count):
            yield from block(f"decoder.stages.{step}.convs.{conv}", **style)


def with_encoder(names):
    """Return the names of an encoder, and again as the decoder's."""
    names = list(names)
    return [*names, *(f"decoder.{name}" for name in names)]


def plain_encoder(num_convs, **style):
    for stage, count in enumerate(num_convs):
        for conv in range(count):
            yield from block(f"encoder.stages.{stage}.0.convs.{conv}", **style)


class TestNames:
    """Loading is strict there, so names are neither missing nor too many."""

    @pytest.mark.parametrize(
        ("options", "style"),
        [
            ({}, {}),
            ({"activation_first": True}, {"place": 2}),
            ({"norm": "none"}, {"norm": ()}),
            (
                {"norm": "batch"},
                {"norm": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")},
            ),
        ],
        ids=["usual", "activation first", "no norm", "batch norm"],
    )
    def test_of_a_plain_network(self, foreign, make, tmp_path, options, style):
        architecture = make.architecture(options=options, blocks_decoder=(1, 2))
        model = foreign(plans=make.plans(architecture=architecture))
        write_v2(tmp_path / "out", [model])
        found = stored(tmp_path / "out")["network_weights"]
        wanted = with_encoder(plain_encoder((1, 2, 1), **style))
        wanted += decoder((2, 1), **style)
        assert sorted(found) == sorted(wanted)

    def test_of_a_residual_network_with_every_kind_of_shortcut(self, foreign, make, tmp_path):
        architecture = make.architecture(
            "residual_unet",
            features=(4, 4, 6, 8),
            kernel_sizes=((3, 3, 3),) * 4,
            strides=((1, 1, 1), (2, 2, 2), (1, 1, 1), (1, 2, 1)),
            blocks_encoder=(1, 2, 1, 1),
            blocks_decoder=(1, 1, 1),
        )
        write_v2(tmp_path / "out", [foreign(plans=make.plans(architecture=architecture))])
        found = stored(tmp_path / "out")["network_weights"]
        wanted = [*block("encoder.stem.convs.0")]
        for stage, count in enumerate(architecture.blocks_encoder):
            for number in range(count):
                prefix = f"encoder.stages.{stage}.blocks.{number}"
                wanted += [*block(f"{prefix}.conv1"), *block(f"{prefix}.conv2")]
        wanted += block("encoder.stages.2.blocks.0.skip.0", bias=False)  # channels change
        wanted += block("encoder.stages.3.blocks.0.skip.1", bias=False)  # behind a pooling
        assert sorted(found) == sorted([*with_encoder(wanted), *decoder((1, 1, 1))])

    def test_each_tensor_stands_under_all_its_names_and_once_in_the_file(self, foreign, tmp_path):
        model = foreign()
        write_v2(tmp_path / "out", [model])
        found, own = stored(tmp_path / "out")["network_weights"], model.weights["fold_0"]["final"]()
        for name, tensor in own.items():
            assert torch.equal(found[name], tensor)
            assert found[name].dtype == torch.float32
        for name, tensor in found.items():
            plain = name.removeprefix("decoder.") if "decoder.encoder" in name else name
            plain = plain.replace("all_modules.0", "conv").replace("all_modules.1", "norm")
            assert torch.equal(tensor, own[plain])
            assert tensor.data_ptr() == found[plain].data_ptr()
        assert len(found) > 2 * len(own)


def test_a_checkpoint_is_read_without_code_and_has_what_prediction_needs(foreign, tmp_path):
    semantics = Semantics(mirror_axes=(0, 2))
    model = foreign(folds=("fold_0", "fold_3", "all"), semantics=semantics, checkpoint="best")
    exported = write_v2(tmp_path / "out", [model])
    assert exported.stages[0].folds == ("0", "3", "all")
    assert exported.stages[0].checkpoint == "checkpoint_best.pth"
    for number, fold in enumerate(("0", "3", "all")):
        found = stored(tmp_path / "out", fold, "best")
        own = list(model.weights.values())[number]["best"]()
        assert torch.equal(found["network_weights"]["decoder.seg_layers.1.weight"],
                           own["decoder.seg_layers.1.weight"])  # fmt: skip
        del found["network_weights"]
        assert found == {
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": "tiny", "fold": fold},
            "inference_allowed_mirroring_axes": (0, 2),
        }


def test_left_and_right_are_not_mirrored_and_it_is_said(foreign, make, tmp_path):
    sides = LeftRight(axis=1, policy="swap", pairs=(("left", "right"),))
    semantics = Semantics(mirror_axes=(0, 1), swap_axes=(1,))
    exported = write_v2(
        tmp_path / "out", [foreign(plans=make.plans(left_right=sides), semantics=semantics)]
    )
    assert stored(tmp_path / "out")["inference_allowed_mirroring_axes"] == (0,)
    assert "axis 1 is not mirrored there" in exported.notes[0]
    write_v2(tmp_path / "out", [foreign(semantics=Semantics(mirror_axes=(1,), swap_axes=(1,)))])
    assert stored(tmp_path / "out")["inference_allowed_mirroring_axes"] is None


class TestCascade:
    @pytest.fixture
    def stages(self, foreign, make):
        plans = make.plans()
        tiny = plans.configurations["tiny"]
        fine = tiny.model_copy(update={"previous_stage": "tiny", "spacing": (1.0, 0.5, 0.6)})
        second = plans.model_copy(update={"configurations": {"fine": fine}})
        return [foreign(), foreign(plans=second, configuration="fine")]

    def test_stages_lie_side_by_side_and_know_each_other(self, stages, tmp_path):
        exported = write_v2(tmp_path / "out", stages)
        folders = [stage.folder for stage in exported.stages]
        assert folders == ["nnUNetTrainer__tiny__tiny", "nnUNetTrainer__tiny__fine"]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
            [*folders, MARK]
        )
        for folder, name in zip(folders, ("tiny", "fine"), strict=True):
            configurations = read(tmp_path / "out" / folder / "plans.json")["configurations"]
            assert set(configurations) == {"tiny", "fine"}
            assert configurations["tiny"]["next_stage"] == "fine"
            assert configurations["fine"]["previous_stage"] == "tiny"
            assert configurations["fine"]["spacing"] == [1.0, 0.5, 0.6]
            checkpoint = stored(tmp_path / "out" / folder)
            assert checkpoint["init_args"]["configuration"] == name
            first = checkpoint["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"]
            assert first.shape[1] == {"tiny": 2, "fine": 2 + 3}[name]
        assert "hands the label map of tiny over, medseg its logits" in exported.notes[0]

    def test_a_second_stage_that_takes_label_maps_is_as_in_nnunet(self, stages, foreign, tmp_path):
        second = foreign(
            plans=stages[1].plans, configuration="fine", semantics=Semantics(previous="labels")
        )
        exported = write_v2(tmp_path / "out", [second])
        assert exported.notes == ()
        assert exported.stages[0].previous_stage == "tiny"
        assert exported.stages[0].folder == "."


class TestPostprocessing:
    def test_what_nnunet_has_is_written_and_the_rest_is_named(self, foreign, tmp_path):
        steps = (
            KeepLargest(structures=("left", 3)),
            KeepLargest(structures=("right", "lesion"), together=False),
            KeepLargest(structures=("left",), connectivity=1),
            FillHoles(structures=("left",)),
            KeepLargest(structures=("left",), below_mm3=4.0),
        )
        model = foreign(folds=("fold_1", "fold_4"), postprocessing=Postprocessing(steps=steps))
        exported = write_v2(tmp_path / "out", [model])
        found = read(tmp_path / "out/crossval_results_folds_1_4/postprocessing.json")
        assert found == {
            "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"] * 3,
            "postprocessing_kwargs": [
                {"labels_or_regions": [1, 3]},
                {"labels_or_regions": 2},
                {"labels_or_regions": 3},
            ],
        }
        said = " ".join(exported.notes)
        assert "by itself (2 of 5 steps, in postprocessing.json)" in said
        assert "cannot do keep_largest, fill_holes, keep_largest; left out" in said

    def test_without_any_there_is_no_file(self, foreign, tmp_path):
        steps = Postprocessing(steps=(FillHoles(structures=("left",)),))
        exported = write_v2(tmp_path / "out", [foreign(postprocessing=steps)])
        assert not list((tmp_path / "out").glob("crossval*"))
        assert exported.notes == ("postprocessing: nnU-Net cannot do fill_holes; left out.",)


class TestWhole:
    def test_a_failure_in_the_second_fold_leaves_what_was_there(self, foreign, tmp_path):
        out = tmp_path / "out"
        write_v2(out, [foreign()])
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        good = foreign()

        def fails():
            raise BundleError("fold_1 is damaged")

        bad = foreign(weights={**good.weights, "fold_1": {"final": fails}})
        with pytest.raises(BundleError, match="fold_1 is damaged"):
            write_v2(out, [bad])
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_an_export_is_replaced_a_trained_model_or_results_are_not(self, foreign, tmp_path):
        out = tmp_path / "out"
        write_v2(out, [foreign(folds=("fold_0", "fold_1"))])
        write_v2(out, [foreign(folds=("fold_1",))])
        assert sorted(path.name for path in out.iterdir()) == [
            "dataset.json", "fold_1", MARK, "plans.json",
        ]  # fmt: skip
        (out / "fold_1/validation").mkdir()
        (out / "fold_1/validation/anna.nii.gz").write_bytes(b"a result")
        with pytest.raises(ConfigError, match=r"holds more than an earlier export \(fold_1\)"):
            require_place(out)
        (out / MARK).unlink()
        with pytest.raises(ConfigError, match="is not an earlier export"):
            write_v2(out, [foreign()])
        assert (out / "fold_1/validation/anna.nii.gz").is_file()
