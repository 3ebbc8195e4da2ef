"""Cascades in prediction: what the first stage finds reaches the second, in its frame."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from medseg.bundles.bundle import PREVIOUS, check_supported, read_bundle, write_bundle
from medseg.errors import BundleError, ConfigError
from medseg.geometry import SpatialRecord
from medseg.infer.export import indices_for_next_stage
from medseg.infer.folder import predict_folder
from medseg.infer.loading import load
from medseg.infer.member import Member
from medseg.infer.model import Model
from medseg.infer.parts import Held, Part
from medseg.infer.predictor import predict_logits
from medseg.infer.result import CaseError
from medseg.labels import LabelScheme
from medseg.resample import resize_slab
from medseg.schema.base import read_json, write_json
from medseg.schema.bundle import Semantics
from medseg.schema.plans import LeftRight

LABELS = {"background": 0, "left": 40, "right": 7, "lesion": 300}
PAIRS = (("left", "right"),)
SPACING = (0.9, 1.2, 2.0)
"""Of the image, canonical axes; network axes are (K, I, J)."""
OWN = (2.0, 0.9, 1.2)
"""The image's spacing in network order: a second stage that does not resample."""
COARSE = (2.0, 1.9, 2.1)
AXES = (2, 0, 1)


class Repeat(nn.Module):
    """A second stage that believes the first: the one-hot input becomes its logits."""

    def __init__(self, num_channels):
        super().__init__()
        self.num_channels = num_channels
        self.seen = []

    def forward(self, tiles):
        self.seen.append(tuple(tiles.shape))
        found = tiles[:, self.num_channels :]
        return torch.cat([1 - found.sum(dim=1, keepdim=True), found], dim=1)


class Two:
    """Writes the two stages of a cascade, with random weights."""

    def __init__(self, make):
        self.make = make

    def plans(self, *, spacing=OWN, previous="tiny", patch_size=(8, 16, 12), sides=None):
        plans = self.make.plans(spacing=spacing, patch_size=patch_size, network_axes=AXES)
        entry = plans.configurations["tiny"].model_copy(update={"previous_stage": previous})
        return plans.model_copy(
            update={"configurations": {"tiny" if previous is None else "second": entry}}
        ).model_copy(update={"left_right": sides})

    def first(self, folder, *, folds=2, spacing=COARSE, swap_axes=(), sides=None, **spec):
        plans = self.plans(spacing=spacing, previous=None, patch_size=(4, 16, 8), sides=sides)
        spec = self.make.spec(**{"labels": LABELS, **spec})
        return self.make.bundle(folder, plans=plans, spec=spec, folds=folds, swap_axes=swap_axes)

    def second(self, folder, previous, *, folds=2, spacing=OWN, swap_axes=(), sides=None):
        plans, spec = self.plans(spacing=spacing, sides=sides), self.make.spec(labels=LABELS)
        return write_bundle(
            folder,
            spec=spec,
            plans=plans,
            configuration="second",
            weights={
                f"fold_{fold}": {"final": self._weights(plans, spec, 70 + fold)}
                for fold in range(folds)
            },
            semantics=Semantics(mirror_axes=(0, 1, 2), swap_axes=swap_axes),
            previous=previous,
        )

    def _weights(self, plans, spec, seed):
        labels, stage = LabelScheme.from_spec(spec), plans.configurations["second"]
        extra = tuple(f"first {n}" for n in range(labels.num_previous(stage)))
        wider = self.make.spec(labels=LABELS, channels=(*spec.channels, *extra))
        return self.make.weights(plans, wider, seed, configuration="second")


@pytest.fixture(scope="session")
def two(make):
    return Two(make)


@pytest.fixture(scope="session")
def cascade(two, tmp_path_factory):
    """A cascade whose second stage sees the image as it is, cut into several tiles."""
    root = tmp_path_factory.mktemp("cascade")
    return two.second(root / "second", two.first(root / "first").folder)


def image(shape=(19, 15, 11), seed=0):
    """Return noise in a box off centre, and an affine along canonical axes."""
    rng = np.random.default_rng(seed)
    values = np.zeros((2, *shape), np.float32)
    inner = (slice(None), slice(2, -1), slice(3, -1), slice(1, -2))
    values[inner] = rng.normal(50, 40, values[inner].shape)
    return values, np.diag([*SPACING, 1.0])


def believing(bundle, *, mirror=True):
    """Return a cascade whose second stage only repeats what it is told."""
    loaded = load(bundle.folder, device="cpu", mode="exact")
    repeat = Repeat(len(bundle.spec.channels))
    member = Member(
        bundle,
        [repeat],
        folds=loaded.folds,
        device=torch.device("cpu"),
        is_exact=True,
        previous=loaded.members[0].previous,
    )
    return Model([member]), repeat


class TestWhatTheSecondStageIsTold:
    @pytest.mark.parametrize("tta", ["none", "flips"])
    def test_a_stage_that_repeats_it_gives_the_first_stages_segmentation(self, cascade, tta):
        """Channels, tiles, padding, crop and mirrors all have to fit for that."""
        model, repeat = believing(cascade)
        alone = load(cascade.folder / PREVIOUS, device="cpu", mode="exact")
        case = image((25, 22, 14))
        found, expected = (m.predict(case, tta=tta).segmentation for m in (model, alone))
        assert len(np.unique(expected)) >= 3
        np.testing.assert_array_equal(found, expected)
        assert set(repeat.seen) == {(1, 2 + 3, 8, 16, 12)}
        assert len(repeat.seen) >= 8, "several tiles"

    def test_so_it_does_in_all_48_orientations(self, cascade):
        model, _ = believing(cascade)
        values, affine = image((13, 11, 9))
        expected = model.predict((values, affine), tta="none").segmentation
        assert len(np.unique(expected)) == 4
        for order in itertools.permutations(range(3)):
            for reversed_axes in itertools.product((False, True), repeat=3):
                moved, matrix = stored(values, affine, order, reversed_axes)
                result = model.predict((moved, matrix), tta="none").segmentation
                wanted, _ = stored(expected, affine, order, reversed_axes)
                np.testing.assert_array_equal(result, wanted)

    def test_an_image_smaller_than_both_patches(self, cascade):
        model, repeat = believing(cascade)
        alone = load(cascade.folder / PREVIOUS, device="cpu", mode="exact")
        values = np.random.default_rng(1).normal(50, 40, (2, 7, 9, 5)).astype(np.float32)
        case = (values, np.diag([*SPACING, 1.0]))
        expected = alone.predict(case, tta="flips").segmentation
        assert len(np.unique(expected)) >= 3
        np.testing.assert_array_equal(model.predict(case, tta="flips").segmentation, expected)
        assert set(repeat.seen) == {(1, 5, 8, 16, 12)}

    def test_folds_of_the_first_stage_are_averaged_before_it_decides(self, cascade):
        both = load(cascade.folder, device="cpu", mode="exact").previous
        one = load(cascade.folder, device="cpu", mode="exact", folds=[1]).previous
        assert (both.folds, one.folds) == (("fold_0", "fold_1"), ("fold_1",))
        alone = load(cascade.folder / PREVIOUS, device="cpu", mode="exact", folds=[1])
        case = image()
        np.testing.assert_array_equal(
            one.predict(case, tta="none").segmentation, alone.predict(case, tta="none").segmentation
        )
        assert (both.predict(case).segmentation != one.predict(case).segmentation).any()

    def test_checkpoint_best_still_sees_the_final_first_stage(self, two, tmp_path):
        first = two.first(tmp_path / "first", folds=1)
        second = two.second(tmp_path / "second", first.folder, folds=1)
        with pytest.raises(BundleError, match="no checkpoint 'best' of fold_0"):
            load(second.folder, checkpoint="best")
        wide = write_bundle(
            tmp_path / "wide",
            spec=second.spec,
            plans=second.plans,
            configuration="second",
            weights={"fold_0": dict.fromkeys(("final", "best"), second.weights("fold_0"))},
            semantics=second.manifest.semantics,
            previous=first.folder,
        )
        final, best = (load(wide.folder, device="cpu", checkpoint=c) for c in ("final", "best"))
        case = image()
        np.testing.assert_array_equal(
            final.previous.predict(case).segmentation, best.previous.predict(case).segmentation
        )


def stored(array, affine, order, reversed_axes):
    """Return (..., I, J, K) and its affine, stored in another order and direction of axes."""
    lead, shape = array.ndim - 3, array.shape[-3:]
    moved = array.transpose(*range(lead), *(lead + axis for axis in order))
    flipped = [d for d in range(3) if reversed_axes[d]]
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for d, axis in enumerate(order):
        matrix[axis, d] = -1 if reversed_axes[d] else 1
        matrix[axis, 3] = shape[axis] - 1 if reversed_axes[d] else 0
    return np.ascontiguousarray(np.flip(moved, [lead + d for d in flipped])), affine @ matrix


def exchanged(probabilities):
    """Mirror from left to right (I), and give each label its partner's probability."""
    result = probabilities[:, ::-1].copy()
    result[[1, 2]] = result[[2, 1]]
    return result


def test_the_mirrored_image_has_the_mirrored_labels_with_sides_exchanged(two, tmp_path):
    """With real networks in both stages: the one-hot input changes sides as the logits do.

    One tile and no resampling in either stage, so that mirroring is exact.
    """
    sides = LeftRight(axis=1, policy="swap", pairs=PAIRS)
    options = {"folds": 1, "spacing": OWN, "swap_axes": (1,), "sides": sides}
    first = two.first(tmp_path / "first", **options)
    second = two.second(tmp_path / "second", first.folder, **options)
    model = load(second.folder, device="cpu", mode="exact")
    values = np.random.default_rng(2).normal(50, 40, (2, 16, 8, 4)).astype(np.float32)
    affine = np.diag([*SPACING, 1.0])
    straight, turned = (
        model.predict((v, affine), probabilities=True, tta="flips").probabilities
        for v in (values, values[:, ::-1])
    )
    np.testing.assert_allclose(turned, exchanged(straight), atol=1e-4)
    assert np.abs(turned - straight[:, ::-1]).max() > 0.01
    before = model.previous.predict((values, affine), tta="flips").segmentation
    assert {7, 40} <= set(np.unique(before)), "the first stage must tell of both sides"


class TestPredictor:
    """Tiles with one-hot channels, against whole arrays."""

    SHAPE, TILE = (13, 9, 11), (8, 6, 7)

    def network(self, num_inputs, seed=0, dimensions=3):
        torch.manual_seed(seed)
        conv = nn.Conv3d if dimensions == 3 else nn.Conv2d
        return nn.Sequential(conv(num_inputs, 6, 3, padding=1), nn.ReLU(), conv(6, 4, 3, padding=1))

    def inputs(self, dtype=torch.uint8):
        rng = np.random.default_rng(4)
        values = torch.from_numpy(rng.normal(size=(2, *self.SHAPE)).astype(np.float32))
        return values, torch.from_numpy(rng.integers(0, 4, self.SHAPE)).to(dtype)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
    @pytest.mark.parametrize("tile", [TILE, (16, 5, 12), (6, 7)], ids=["3d", "padded", "2d"])
    def test_equals_an_image_with_further_channels(self, tile, dtype):
        values, previous = self.inputs(dtype)
        network = self.network(5, dimensions=len(tile))
        channels = [(previous == index).float() for index in (1, 2, 3)]
        options = {"num_logits": 4, "mirror_axes": tuple(range(len(tile))), "tile_batch": 2}
        expected = predict_logits([network], torch.cat([values, *(c[None] for c in channels)]),
                                  tile, **options)  # fmt: skip
        found = predict_logits([network], values, tile, previous=previous, num_previous=3,
                               **options)  # fmt: skip
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def test_paired_channels_change_places_where_sides_do(self):
        values, previous = self.inputs()
        values, previous = values[:, :8, :6, :7], previous[:8, :6, :7]
        network = self.network(5)
        found = predict_logits(
            [network], values, self.TILE, num_logits=4, previous=previous, num_previous=3,
            mirror_axes=(0, 2), swap_axes=(2,), swaps=[(1, 3)],
        )  # fmt: skip
        partner = {0: 0, 1: 3, 2: 2, 3: 1}
        total = torch.zeros(found.shape)
        for axes in ((), (0,), (2,), (0, 2)):
            told = previous.clone()
            if 2 in axes:
                told.apply_(partner.get)
            both = torch.cat([values, *((told == n).float()[None] for n in (1, 2, 3))])
            dims = [axis + 1 for axis in axes]
            with torch.no_grad():
                logits = torch.flip(network(torch.flip(both, dims)[None])[0], dims)
            total += logits[[3 * (n == 1) + n * (n in (0, 2)) + (n == 3) for n in range(4)]
                            if 2 in axes else [0, 1, 2, 3]]  # fmt: skip
        torch.testing.assert_close(found, total / 4, atol=1e-5, rtol=1e-5)

    def test_a_label_map_that_does_not_fit_is_refused(self):
        values, previous = self.inputs()
        options = {"num_logits": 4}
        with pytest.raises(ValueError, match="num_previous is 3, the stage before gave nothing"):
            predict_logits([self.network(5)], values, self.TILE, num_previous=3, **options)
        with pytest.raises(ValueError, match="num_previous is 0, the stage before gave a label"):
            predict_logits([self.network(2)], values, self.TILE, previous=previous, **options)
        for wrong in (previous[1:], previous.float()):
            with pytest.raises(ValueError, match=r"previous must hold integers of shape \(13, 9"):
                predict_logits([self.network(5)], values, self.TILE, previous=wrong,
                               num_previous=3, **options)  # fmt: skip


RECORD = {
    "shape_image": (14, 12, 9),
    "affine_image": tuple(tuple(row) for row in np.diag([0.8, 1.1, 2.3, 1.0]).tolist()),
    "axes": (2, 0, 1),
    "flips": (True, False, True),
    "box": ((1, 8), (3, 13), (0, 11)),
    "spacing_cropped": (2.3, 0.8, 1.1),
}
ODD = LabelScheme(labels={"background": 9, "a": 2, "b": 300}, ignore_label=255)


class TestIndicesForNextStage:
    def records(self, spacing=(2.5, 2.0, 1.9)):
        first = SpatialRecord(**RECORD, shape_network=(6, 4, 7), spacing_network=spacing)
        second = SpatialRecord(**RECORD, shape_network=(8, 9, 12), spacing_network=(2.0, 0.9, 1.0))
        return first, second

    def part(self, record):
        return Part(source=Held(self.logits()), record=record)

    def logits(self):
        values = np.random.default_rng(5).normal(size=(3, 6, 4, 7)).astype(np.float32)
        return torch.from_numpy(values)

    @pytest.mark.parametrize(("spacing", "separate"), [((2.5, 2.0, 1.9), None), ((8, 2, 1.9), 0)])
    def test_slabs_equal_the_whole_volume(self, monkeypatch, spacing, separate):
        first, second = self.records(spacing)
        whole = resize_slab(self.logits(), (8, 9, 12), 0, 0, 8, separate=separate)
        monkeypatch.setattr("medseg.infer.export.SLAB_ELEMENTS", 3 * 9 * 12 * 3)
        found = indices_for_next_stage(self.part(first), second, ODD)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, whole.argmax(dim=0).numpy())

    def test_indices_are_those_of_painted_regions(self):
        labels = LabelScheme(
            labels={"background": 0, "whole": (1, 2, 5), "core": (2, 5), "inner": 5},
            regions_class_order=(1, 2, 5),
        )
        first, second = self.records()
        whole = resize_slab(self.logits(), (8, 9, 12), 0, 0, 8).numpy()
        expected = np.zeros((8, 9, 12), int)
        for index, region in enumerate(whole, start=1):
            expected[region > 0] = index
        found = indices_for_next_stage(self.part(first), second, labels)
        np.testing.assert_array_equal(found, expected)

    def test_another_crop_is_refused(self):
        first, _ = self.records()
        other = SpatialRecord(
            **{**RECORD, "box": ((0, 7), (3, 13), (0, 11))},
            shape_network=(8, 9, 12),
            spacing_network=(2.0, 0.9, 1.0),
        )
        with pytest.raises(ValueError, match=r"box is .* expected one image, cropped alike"):
            indices_for_next_stage(self.part(first), other, ODD)


class TestBundle:
    def test_it_holds_the_first_stage_whole(self, cascade):
        assert cascade.manifest.kind == "cascade"
        assert read_bundle(cascade.folder) == cascade
        member = read_bundle(cascade.folder / PREVIOUS)
        assert cascade.previous == member
        assert member.configuration_name == "tiny"
        listed = [name for name in cascade.manifest.sha256 if name.startswith("members")]
        assert listed == ["members/previous/bundle.json"]
        check_supported(cascade)

    def test_only_files_of_the_first_stage_are_taken(self, two, tmp_path):
        first = two.first(tmp_path / "first", folds=1)
        (first.folder / "notes.txt").write_text("mine")
        second = two.second(tmp_path / "second", first.folder, folds=1)
        files = {p.relative_to(second.folder / PREVIOUS).as_posix()
                 for p in (second.folder / PREVIOUS).rglob("*.*")}  # fmt: skip
        assert files == {"bundle.json", *first.manifest.sha256}

    def test_it_outlives_the_first_stages_own_folder(self, two, tmp_path):
        first = two.first(tmp_path / "first", folds=1)
        second = two.second(tmp_path / "second", first.folder, folds=1)
        two.first(tmp_path / "first", folds=1, spacing=(2.0, 1.5, 1.7))
        assert read_bundle(second.folder) == second

    def test_damage_to_the_first_stage_is_found(self, two, tmp_path):
        first = two.first(tmp_path / "first", folds=1)
        second = two.second(tmp_path / "second", first.folder, folds=1)
        path = second.folder / PREVIOUS / "weights/fold_0.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(BundleError, match=r"members/previous: 1 damaged file\n.*fold_0"):
            load(second.folder)
        member = second.folder / PREVIOUS / "bundle.json"
        member.write_text(member.read_text().replace("fast", "slow"))
        with pytest.raises(BundleError, match=r"members/previous/bundle\.json: sha256 is"):
            load(second.folder)

    def test_a_second_stage_alone_asks_for_what_the_first_found(self, two, cascade, tmp_path):
        alone = load(two.second(tmp_path / "second", None).folder, device="cpu")
        with pytest.raises(ConfigError, match=r"'second' needs what 'tiny' finds.*previous_stage"):
            alone.predict(image())
        found = load(cascade.folder.parent / "first", device="cpu").predict(image()).segmentation
        both = load(cascade.folder, device="cpu").predict(image(), previous_stage=found)
        given = alone.predict(image(), previous_stage=found)
        np.testing.assert_array_equal(given.segmentation, both.segmentation)

    def test_a_second_stage_alone_takes_label_maps_from_a_folder(self, two, cascade, tmp_path):
        alone = load(two.second(tmp_path / "second", None).folder, device="cpu")
        channels, affine = image()
        for number, channel in enumerate(channels):
            nib.save(nib.Nifti1Image(channel, affine), tmp_path / f"a_{number:04d}.nii.gz")
        case = [tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz"]
        found = load(cascade.folder.parent / "first", device="cpu").predict(case)
        (tmp_path / "before").mkdir()
        found.save(tmp_path / "before/a.nii.gz")
        rows = predict_folder(alone, case, tmp_path / "out", previous_stage=tmp_path / "before")
        assert [row.status for row in rows] == ["done"]
        expected = alone.predict(case, previous_stage=found.segmentation).segmentation
        written = np.asarray(nib.load(tmp_path / "out/a.nii.gz").dataobj)
        np.testing.assert_array_equal(written, expected)

    def test_a_cascade_that_hides_its_first_stage_is_refused(self, two, tmp_path):
        bundle = two.second(tmp_path / "second", two.first(tmp_path / "first").folder)
        values = read_json(bundle.folder / "bundle.json")
        sums = {k: v for k, v in values["sha256"].items() if not k.startswith("members")}
        write_json(bundle.folder / "bundle.json", {**values, "sha256": sums})
        with pytest.raises(BundleError, match=r"members/previous/bundle\.json: not listed"):
            load(bundle.folder)

    def test_a_first_stage_that_does_not_fit_is_refused_with_every_reason(self, two, tmp_path):
        labels = {"background": 0, "left": 40, "right": 7, "lesion": 301}
        first = two.first(tmp_path / "first", folds=1, labels=labels, channels=("T1w", "PET"))
        with pytest.raises(BundleError) as caught:
            two.second(tmp_path / "second", first.folder, folds=2)
        message = str(caught.value)
        assert "channels is ('T1w', 'PET'), configuration 'second' expects ('T1w', 'CT')" in message
        assert "labels is (0, 7, 40, 301)" in message
        assert "no weights of fold_1" in message

    def test_a_configuration_without_stage_before_takes_none(self, two, make, tmp_path):
        first = two.first(tmp_path / "first", folds=1)
        with pytest.raises(BundleError, match=r"configuration is tiny, .* expects None"):
            write_bundle(
                tmp_path / "second",
                spec=first.spec,
                plans=first.plans,
                configuration="tiny",
                weights={"fold_0": {"final": first.weights("fold_0")}},
                semantics=Semantics(),
                previous=first.folder,
            )


def test_many_cases_and_one_bad_one(cascade):
    model = load(cascade.folder, device="cpu", mode="exact")
    values, affine = image()
    results = list(model.predict_many([(values, affine), (values[:1], affine), (values, affine)],
                                      tta="none"))  # fmt: skip
    assert isinstance(results[1], CaseError)
    assert "got 1 channel, expected 2" in results[1].message
    np.testing.assert_array_equal(results[0].segmentation, results[2].segmentation)
    single = model.predict((values, affine), tta="none")
    np.testing.assert_array_equal(results[0].segmentation, single.segmentation)


class TestForeignCode:
    """A network that does not come along is only imported for those who trust it."""

    def test_it_is_refused_and_named(self, make, tmp_path):
        bundle = make.bundle(tmp_path / "bundle", folds=1)
        plans = read_json(bundle.folder / "plans.json")
        plans["configurations"]["tiny"]["architecture"]["kind"] = "no_such_module:Network"
        write_json(bundle.folder / "plans.json", plans)
        restamp(bundle.folder, "plans.json")
        with pytest.raises(BundleError, match=r"no_such_module:Network.*trust_code=True") as caught:
            load(bundle.folder, device="cpu")
        assert str(bundle.folder) in str(caught.value)


def restamp(folder, name):
    """Correct the checksum of a file that was changed."""
    import hashlib

    values = read_json(folder / "bundle.json")
    values["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    write_json(folder / "bundle.json", values)


@pytest.mark.parametrize("kind", ["window", "file"])
@pytest.mark.parametrize("elements", [1, 700, 2**24])
def test_stages_whose_sums_pass_through_windows_find_the_same(
    cascade, two, tmp_path, monkeypatch, kind, elements
):
    """Slabs of the first stage are of the second stage's grid, which is cropped and finer."""
    from medseg.infer import export, memory

    models = [cascade, two.second(tmp_path / "finer", two.first(tmp_path / "first").folder,
                                  spacing=(1.1, 0.6, 0.8))]  # fmt: skip
    for bundle in models:
        model = load(bundle.folder, device="cpu", mode="exact")
        values, affine = image((33, 22, 29))
        values[:, :9] = values[:, 25:] = 0
        expected = model.predict((values, affine), tta="none").segmentation
        assert len(np.unique(expected)) >= 3
        with monkeypatch.context() as patch:
            patch.setattr(export, "SLAB_ELEMENTS", elements)
            patch.setattr(memory, "KINDS", (kind,))
            for axis in range(3):
                patch.setattr(memory, "_image_axes", lambda *_, axis=axis: [axis])
                found = model.predict((values, affine), tta="none").segmentation
                assert (found != expected).mean() < 1e-4
