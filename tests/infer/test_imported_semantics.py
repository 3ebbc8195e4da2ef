"""Predictions put together as imported models want it, beside the slow and obvious way."""

from __future__ import annotations

import itertools
import json
import logging

import numpy as np
import pytest
import torch
from batchgenerators.augmentations.utils import resize_segmentation
from scipy import ndimage
from skimage.transform import resize as skimage_resize
from torch import nn

from medseg.bundles.bundle import PREVIOUS, write_bundle
from medseg.geometry import SpatialRecord
from medseg.infer.exact import on_image_grid
from medseg.infer.export import indices_for_next_stage, probabilities_from_logits, reduce_parts
from medseg.infer.loading import load
from medseg.infer.maps import ArrayMaps
from medseg.infer.member import Member
from medseg.infer.model import Model
from medseg.infer.parts import Held, Part, result_axis
from medseg.infer.segment import decide, segment_slab
from medseg.infer.source import read_case
from medseg.labels import LabelScheme
from medseg.preprocess.pipeline import preprocess_case
from medseg.resample import Slab, resize_slab
from medseg.schema.base import read_json
from medseg.schema.bundle import Resampling, Semantics
from medseg.schema.postprocessing import KeepLargest, Postprocessing

V2 = Semantics(
    accumulator="float16", gaussian_peak=10, label_resize="threshold", previous="labels",
    mirror_axes=(0, 1, 2),
)  # fmt: skip
V1 = Semantics(
    average="probabilities", normalise_first=False, label_resize="threshold", least_std="added",
    separate_by="image", previous="labels_uncropped", mirror_axes=(0, 1, 2),
)  # fmt: skip
REGIONS = {
    "labels": {"background": 0, "whole": (1, 2, 3), "core": (2, 3), "inner": 3},
    "regions_class_order": (1, 2, 3),
}
AFFINE = np.diag([0.85, 1.3, 2.4, 1.0])


def written(folder, make, semantics, *, spec=None, plans=None, folds=2, **options):
    """Write a bundle with random weights and any semantics."""
    plans, spec = plans or make.plans(network_axes=(2, 1, 0)), spec or make.spec()
    if LabelScheme.from_spec(spec).has_regions:
        semantics = semantics.model_copy(update={"activation": "sigmoid"})
    return write_bundle(
        folder,
        spec=spec,
        plans=plans,
        configuration="tiny",
        weights={
            f"fold_{fold}": {"final": make.weights(plans, spec, seed=fold)} for fold in range(folds)
        },
        semantics=semantics,
        orientation="stored_sitk",
        **options,
    )


@pytest.fixture
def in_float32(monkeypatch):
    """Let the engine compute in float32 on every machine."""
    monkeypatch.setattr("medseg.infer.member.autocast_dtype", lambda *_: None)


@pytest.fixture
def in_bfloat16(monkeypatch):
    """Let the engine compute in bfloat16 on every machine, be it emulated."""
    monkeypatch.setattr("medseg.infer.member.autocast_dtype", lambda *_: torch.bfloat16)


# -- the axis whose nearest slices are taken on the way back ---------------------------------------


def record_of(spacing, network, *, axes=(2, 0, 1)):
    """Return the way of an image; voxel sizes are in the order of the network."""
    shape = tuple(5 + n for n in range(3))
    own = tuple(shape[axis] for axis in axes)
    return SpatialRecord(
        shape_image=shape,
        affine_image=tuple(map(tuple, np.eye(4).tolist())),
        axes=axes,
        flips=(False, False, False),
        box=tuple((0, length) for length in own),
        spacing_cropped=spacing,
        shape_network=tuple(2 + length for length in own),
        spacing_network=network,
    )


def slow_axis(record, when):
    """Return the axis, numbered K, J, I, as nnU-Net v1 finds it, or None.

    Its image has the order K, J, I by then, its network's voxel size still that of the plans.
    """
    original = [record.spacing_cropped[record.axes.index(axis)] for axis in (2, 1, 0)]
    after = list(record.spacing_network)
    if when == "never":
        return None
    if when == "always" or max(original) / min(original) > 3:
        chosen = original
    elif max(after) / min(after) > 3:
        chosen = after
    else:
        return None
    coarsest = [number for number in range(3) if chosen[number] == max(chosen)]
    return coarsest[0] if len(coarsest) == 1 else None


SPACINGS = [
    (1.0, 1.5, 2.0),
    (5.0, 1.0, 1.2),
    (1.0, 5.0, 1.2),
    (1.0, 1.2, 5.0),
    (0.3, 1.25, 1.25),
    (2.0, 2.0, 2.0),
    (3.0, 1.0, 1.0),
]


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("when", ["auto", "always", "never"])
def test_the_axis_found_by_the_image_is_that_of_the_first_version(axes, when):
    semantics = V1.model_copy(update={"resample_result": Resampling(separate=when)})
    quirks = 0
    for spacing, network in itertools.product(SPACINGS, repeat=2):
        record = record_of(spacing, network, axes=axes)
        number = slow_axis(record, when)
        expected = None if number is None else axes.index(2 - number)
        assert result_axis(record, spacing, semantics) == expected, (spacing, network)
        quirks += expected != result_axis(record, spacing, V2)
    if when == "auto":
        assert quirks > 0, "the two ways must differ somewhere"


def test_by_default_the_network_tells_first():
    for axes in itertools.permutations(range(3)):
        record = record_of((1.0, 1.2, 5.0), (5.0, 1.0, 1.2), axes=axes)
        assert result_axis(record, record.spacing_cropped, Semantics()) == 0
        record = record_of((1.0, 1.2, 5.0), (1.0, 1.5, 2.0), axes=axes)
        assert result_axis(record, record.spacing_cropped, Semantics()) == 2


@pytest.mark.parametrize("axes", [(2, 1, 0), (0, 2, 1), (1, 0, 2)])
@pytest.mark.parametrize("is_exact", [True, False])
def test_probabilities_come_back_as_in_the_first_version(axes, is_exact):
    """Where only the network's grid is anisotropic, with the wrong axis of a permuted plan."""
    record = record_of((1.0, 1.5, 2.0), (4.0, 1.0, 1.2), axes=axes)
    labels = LabelScheme(labels={"background": 0, "a": 1, "b": 2})
    values = np.random.default_rng(3).random((3, *record.shape_network)).astype(np.float32)
    values /= values.sum(axis=0)
    part = Part(source=Held(torch.from_numpy(values)), record=record, semantics=V1)
    maps = ArrayMaps(frozenset({"probabilities"}), record.shape_image, 3)
    found = reduce_parts([on_image_grid(part) if is_exact else part], labels, maps)
    order = [axes.index(axis) for axis in (2, 1, 0)]
    stored, shape = values.transpose(0, *(1 + d for d in order)), record.shape_image[::-1]
    axis = slow_axis(record, "auto")
    expected = np.stack([slow_resize(channel, shape, 1, axis) for channel in stored])
    expected = expected.transpose(0, 3, 2, 1)
    np.testing.assert_allclose(maps.arrays["probabilities"], expected, atol=1e-6)
    np.testing.assert_array_equal(found.segmentation, expected.argmax(axis=0))


def slow_resize(volume, shape, order, axis):
    """Resize a volume; or every slice across an axis, of which the nearest are taken."""
    volume = volume.astype(np.float64)
    if axis is None:
        return skimage_resize(volume, shape, order, mode="edge", anti_aliasing=False)
    across = [length for d, length in enumerate(shape) if d != axis]
    stack = np.stack([
        skimage_resize(part, across, order, mode="edge", anti_aliasing=False)
        for part in np.moveaxis(volume, axis, 0)
    ])  # fmt: skip
    nearest = [int((n + 0.5) * len(stack) / shape[axis]) for n in range(shape[axis])]
    return np.moveaxis(stack[nearest], 0, axis)


# -- probabilities instead of logits ---------------------------------------------------------------

LABELS = LabelScheme(labels={"background": 0, "left": 40, "right": 7, "lesion": 300})
REGION_LABELS = LabelScheme(**REGIONS)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("after", [(11, 7, 13), (9, 8, 7), (30, 5, 20)])
@pytest.mark.parametrize("is_dense", [True, False])
def test_a_region_is_there_above_the_threshold(monkeypatch, threshold, after, is_dense):
    """Wherever voxels are computed, and in slabs: mixtures of neighbours are compared with it."""
    monkeypatch.setattr("medseg.infer.segment.DENSE_SHARE", -1 if is_dense else 2)
    noise = np.random.default_rng(1).normal(size=(3, 9, 8, 7))
    values = ndimage.gaussian_filter(noise, 1, axes=(1, 2, 3)).astype(np.float32) + threshold
    values = torch.from_numpy(values)
    whole = resize_slab(values, after, 1, 0, after[1])
    expected = np.zeros(after, int)
    for index, region in enumerate(whole.numpy(), start=1):
        expected[region > threshold] = index
    slab = Slab(
        logits=values, shape_in=(9, 8, 7), shape=after, axis=1, held=slice(0, 8),
        rows=slice(1, after[1]),
    )  # fmt: skip
    found = segment_slab(slab, REGION_LABELS, threshold)
    assert (found != expected[:, 1:]).mean() < 1e-3, "only where a mixture rounds to the threshold"
    assert set(np.unique(expected)) == {0, 1, 2, 3}
    codes = decide(iter(values), REGION_LABELS, threshold).numpy()
    assert (codes > 0).mean() == pytest.approx((values > threshold).any(dim=0).float().mean())


def test_labels_have_no_threshold():
    values = torch.randn((4, 9, 8, 7), generator=torch.Generator().manual_seed(3))
    for threshold in (0.0, 0.5):
        codes = decide(iter(values), LABELS, threshold)
        np.testing.assert_array_equal(codes.numpy(), values.argmax(dim=0).numpy())


@pytest.mark.parametrize("labels", [LABELS, REGION_LABELS], ids=["labels", "regions"])
def test_parts_that_hold_probabilities_or_logits_are_averaged_as_probabilities(labels):
    record = record_of((1.0, 1.5, 2.0), (1.0, 1.0, 1.2))
    number = labels.num_logits
    logits = np.random.default_rng(3).normal(size=(number, *record.shape_network)) * 3
    shares = np.random.default_rng(4).random((number, *record.shape_network))
    shares /= 1 if labels.has_regions else shares.sum(axis=0)
    sources = [Held(torch.from_numpy(v.astype(np.float32))) for v in (logits, shares)]
    parts = [
        Part(source=sources[0], record=record, weight=0.3),
        Part(source=sources[1], record=record, weight=0.7, semantics=V1),
    ]
    maps = ArrayMaps(frozenset({"probabilities"}), record.shape_image, number)
    found = reduce_parts(parts, labels, maps).segmentation
    first = np.stack([slow_resize(v, (7, 5, 6), 1, None) for v in logits])
    second = np.stack([slow_resize(v, (7, 5, 6), 1, None) for v in shares])
    activated = 1 / (1 + np.exp(-first))
    if not labels.has_regions:
        activated = np.exp(first) / np.exp(first).sum(axis=0)
    mean = (0.3 * activated + 0.7 * second).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(maps.arrays["probabilities"], mean, atol=1e-5)
    expected = np.array(labels.values)[mean.argmax(axis=0)] if not labels.has_regions else None
    if labels.has_regions:
        expected = np.zeros(mean.shape[1:], int)
        for value, region in zip((1, 2, 3), mean, strict=True):
            expected[region > 0.5] = value
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("labels", [LABELS, REGION_LABELS], ids=["labels", "regions"])
def test_the_next_stage_is_told_what_probabilities_decide(labels):
    first = record_of((1.0, 1.5, 2.0), (1.0, 1.0, 1.2))
    target = record_of((1.0, 1.5, 2.0), (0.8, 1.5, 1.1))
    number = labels.num_logits
    values = torch.from_numpy(np.random.default_rng(4).random((number, *first.shape_network)))
    part = Part(source=Held(values.float()), record=first, semantics=V1)
    found = indices_for_next_stage(part, target, labels)
    np.testing.assert_array_equal(found, expected_codes(values.numpy(), labels))
    other = Part(source=Held(values.float()), record=first)
    told_logits = indices_for_next_stage(other, target, labels)
    assert (told_logits != found).any() == labels.has_regions, "0.5 is the threshold of regions"


def expected_codes(values, labels):
    if not labels.has_regions:
        return values.argmax(axis=0)
    result = np.zeros(values.shape[1:], int)
    for index, region in enumerate(values, start=1):
        result[region > 0.5] = index
    return result


# -- the engine beside exact mode ------------------------------------------------------------------

KINDS = {
    "first version": V1,
    "second version, 32 bits": V2.model_copy(update={"accumulator": "float32"}),
    "probabilities": Semantics(average="probabilities", mirror_axes=(0, 2)),
    "slices kept": V1.model_copy(update={"keeps_slices": True}),
    "separate": Semantics(
        resample_image=Resampling(order=3, separate="always"),
        resample_labels=Resampling(separate="always"),
        resample_result=Resampling(separate="always"),
    ),
    "interpolated": Semantics(
        resample_image=Resampling(method="interpolate", separate="never"),
        resample_labels=Resampling(method="interpolate", separate="never"),
        resample_result=Resampling(method="interpolate", separate="never"),
    ),
    "not resampled": Semantics(
        resample_image=Resampling(method="none"),
        resample_labels=Resampling(method="none"),
        resample_result=Resampling(method="none"),
    ),
}


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_regions", [False, True], ids=["labels", "regions"])
def test_both_modes_find_the_same(make, tmp_path, kind, has_regions):
    spec = make.spec(**(REGIONS if has_regions else {}))
    bundle = written(tmp_path / "bundle", make, KINDS[kind], spec=spec)
    usual, exact = (load(bundle.folder, device="cpu", mode=m) for m in ("default", "exact"))
    case = (make.channels((19, 15, 11)), AFFINE)
    options = {"probabilities": True, "disagreement": True, "tta": "flips"}
    found, expected = (model.predict(case, **options) for model in (usual, exact))
    assert usual.precision == exact.precision == "float32"
    assert len(np.unique(expected.segmentation)) >= 3
    close = np.abs(found.probabilities - expected.probabilities).max(axis=0) < 1e-4
    assert close.mean() > 0.999, "but where a voxel of the mask falls on the other side of a half"
    assert (found.segmentation != expected.segmentation).mean() < 1e-3
    apart = np.abs(found.disagreement - expected.disagreement)
    assert apart.mean() < 0.01, "the engine votes on each tile, exact mode once they are joined"
    assert (expected.disagreement > 0).mean() > 0.02
    without = usual.predict(case, tta="flips").segmentation
    assert (without != found.segmentation).mean() < 1e-4, "with maps or without"


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("has_regions", [False, True], ids=["labels", "regions"])
def test_averaged_probabilities_decide_as_they_are_given(make, tmp_path, has_regions):
    spec = make.spec(**(REGIONS if has_regions else {}))
    bundle = written(tmp_path / "bundle", make, V1, spec=spec)
    for mode in ("default", "exact"):
        model = load(bundle.folder, device="cpu", mode=mode)
        found = model.predict((make.channels((19, 15, 11)), AFFINE), probabilities=True)
        shares = found.probabilities
        assert shares.min() >= 0
        assert shares.max() <= 1 + 1e-6
        if has_regions:
            expected = np.zeros(shares.shape[1:], int)
            for value, region in zip((1, 2, 3), shares, strict=True):
                expected[region > 0.5] = value
        else:
            np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-5)
            expected = shares.argmax(axis=0)
        assert len(np.unique(expected)) >= 3
        np.testing.assert_array_equal(found.segmentation, expected)


def test_sums_in_16_bits_change_hardly_any_label(make, tmp_path):
    bundle = written(tmp_path / "bundle", make, V2)
    case = (make.channels((19, 15, 11)), AFFINE)
    exact = load(bundle.folder, device="cpu", mode="exact")
    assert exact.precision == "float32", "of the networks"
    found = exact.predict(case, probabilities=True, tta="flips")
    wide = written(tmp_path / "wide", make, V2.model_copy(update={"accumulator": "float32"}))
    other = load(wide.folder, device="cpu", mode="exact").predict(
        case, probabilities=True, tta="flips"
    )
    apart = np.abs(found.probabilities - other.probabilities)
    assert 1e-6 < apart.mean() < 1e-3
    assert (found.segmentation != other.segmentation).mean() < 0.005


def test_an_image_taken_as_stored_does_not_care_how_it_lies(make, tmp_path):
    bundle = written(tmp_path / "bundle", make, V2)
    model = load(bundle.folder, device="cpu", mode="exact")
    channels = make.channels((19, 15, 11))
    plain = model.predict((channels, AFFINE), tta="none").segmentation
    turned = AFFINE @ np.diag([-1.0, 1.0, -1.0, 1.0])
    found = model.predict((channels, turned), tta="none").segmentation
    np.testing.assert_array_equal(found, plain)
    assert model.predict((channels, turned), tta="none").record.flips == (False, False, False)


def test_voxel_sizes_are_those_of_the_file_however_it_is_turned(make, tmp_path):
    """A file's sizes are exact, its matrix is rounded to 32 bits."""
    bundle = written(tmp_path / "bundle", make, V2, folds=1)
    member = load(bundle.folder, device="cpu").members[0]
    noisy = 0
    for number in range(12):
        a = np.deg2rad(7.0 * number + 3)
        affine = np.diag([1.0, 1.0, 3.0, 1.0])
        affine[:2, :2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
        affine[:3, :3] = affine[:3, :3][[0, 2, 1]]
        paths = make.case(tmp_path / "turned", f"case_{number}", make.channels(), affine)
        case = read_case([str(path) for path in paths], "case")
        noisy += case.grid.spacing != (1.0, 1.0, 3.0)
        assert member.ready(case).record.spacing_cropped == (3.0, 1.0, 1.0)
    assert noisy > 0


# -- cascades --------------------------------------------------------------------------------------

SECOND = (1.9, 1.1, 0.7)


def stage_plans(make, *, previous, spacing, patch_size=(8, 16, 12)):
    """Return plans of one stage for images as stored; its network axes are J, K, I."""
    plans = make.plans(spacing=spacing, patch_size=patch_size, network_axes=(1, 2, 0))
    entry = plans.configurations["tiny"].model_copy(update={"previous_stage": previous})
    name = "tiny" if previous is None else "second"
    return plans.model_copy(update={"configurations": {name: entry}})


def cascade(folder, make, semantics, *, first=None, has_first=True, patch_size=(8, 16, 12)):
    """Write a cascade of one fold, whose two stages see different grids."""
    spec, before = make.spec(labels=dict(LABELS.labels)), None
    if has_first:
        plans = stage_plans(make, previous=None, spacing=(1.6, 2.6, 1.2), patch_size=(8, 8, 12))
        before = written(
            folder / "first", make, first or semantics, spec=spec, plans=plans, folds=1,
            postprocessing=Postprocessing(steps=(KeepLargest(structures=("left",)),)),
        ).folder  # fmt: skip
    plans = stage_plans(make, previous="tiny", spacing=SECOND, patch_size=patch_size)
    wider = make.spec(channels=("T1w", "CT", "a", "b", "c"))
    weights = make.weights(plans, wider, 70, configuration="second")
    return write_bundle(
        folder / "second",
        spec=spec,
        plans=plans,
        configuration="second",
        weights={"fold_0": {"final": weights}},
        semantics=semantics,
        orientation="stored_sitk",
        previous=before,
    )


def notched(make):
    """Return an image whose imaged region does not fill its box."""
    channels = make.channels((19, 15, 11))
    channels[:, :9, :7] = 0
    channels[:, 12:, 9:, 6:] = 0
    return channels


def told_map(shape=(19, 15, 11), seed=12):
    """Return specks of labels that reach out of the imaged region, with the values of files."""
    specks = np.random.default_rng(seed).choice([0, 0, 7, 40, 300], shape)
    return np.where(np.indices(shape).sum(axis=0) % 7 < 4, specks, 7).astype(np.uint16)


def by_threshold(labels, shape, *, order=1):
    """Resize labels in ascending order: each takes what it has half of; else it is 0."""
    result = np.zeros(shape, labels.dtype)
    for label in np.unique(labels):
        share = skimage_resize((labels == label).astype(float), shape, order, mode="edge",
                               anti_aliasing=False)  # fmt: skip
        result[share >= 0.5] = label
    return result


def slow_told(channels, told, semantics, spacing):
    """Return the label indices in the network frame, (J, K, I), and the shape of that frame."""
    indices = np.searchsorted([0, 7, 40, 300], told).transpose(1, 2, 0).astype(np.int16)
    image = channels.transpose(0, 2, 3, 1)
    mask = ndimage.binary_fill_holes((image != 0).any(axis=0))
    places = np.argwhere(mask)
    pairs = zip(places.min(axis=0), places.max(axis=0) + 1, strict=True)
    box = tuple(slice(int(low), int(high)) for low, high in pairs)
    shape = tuple(
        round(now / wanted * length)
        for now, wanted, length in zip(spacing, SECOND, mask[box].shape, strict=True)
    )
    if semantics.previous == "labels_uncropped":
        return by_threshold(indices, shape), shape
    merged = indices[box].copy()
    merged[(merged == 0) & ~mask[box]] = -1
    if semantics.label_resize == "argmax":
        return np.maximum(resize_segmentation(merged, shape, order=1), 0), shape
    return np.maximum(by_threshold(merged, shape), 0), shape


WAYS = {
    "labels": V2,
    "labels by argmax": V2.model_copy(update={"label_resize": "argmax"}),
    "labels_uncropped": V1,
}


class Witness(nn.Module):
    """Keeps what it was shown; specks of the first channel become labels."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, tiles):
        self.seen.append(tiles.clone())
        image = tiles[:, :1]
        return torch.cat([0 * image, image, -image - 1.2, 2 * image - 1.2], dim=1)


@pytest.mark.parametrize("way", WAYS)
def test_a_label_map_reaches_the_second_stage_cropped_or_as_it_is(make, tmp_path, way):
    """One channel for each label in ascending order, after those of the image, as one tile."""
    bundle = cascade(tmp_path, make, WAYS[way], has_first=False, patch_size=(40, 40, 40))
    channels, told = notched(make), told_map()
    expected, shape = slow_told(channels, told, WAYS[way], (1.3, 2.4, 0.85))
    assert set(np.unique(expected)) == {0, 1, 2, 3}
    witness = Witness()
    member = Member(bundle, [witness], folds=("fold_0",), device=torch.device("cpu"), is_exact=True)
    found = Model([member]).predict((channels, AFFINE), previous_stage=told, tta="none")
    (tile,) = witness.seen
    assert tile.shape == (1, 5, 40, 40, 40)
    before = [(40 - length) // 2 for length in shape]
    inner = tuple(slice(a, a + n) for a, n in zip(before, shape, strict=True))
    for index in (1, 2, 3):
        wanted = np.zeros((40, 40, 40), bool)
        wanted[inner] = expected == index
        np.testing.assert_array_equal(tile[0, 1 + index].numpy(), wanted)
    assert found.record.shape_network == shape
    indices = np.searchsorted([0, 7, 40, 300], told).astype(np.uint8)
    counts = WAYS[way].previous == "labels"
    image, other = (
        preprocess_case(
            channels, AFFINE, plans=bundle.plans, configuration=bundle.configuration,
            segmentation=marked, semantics=WAYS[way], orientation="stored_sitk", is_exact=True,
        ).image for marked in (indices if counts else None, None if counts else indices)
    )  # fmt: skip
    np.testing.assert_array_equal(tile[0, :2][(slice(None), *inner)].numpy(), image)
    assert np.abs(image - other).max() > 0.01, "what is marked counts as imaged, where it is merged"


def test_it_matters_what_a_label_map_is_cropped_to_and_merged_with(make):
    channels, told, own = notched(make), told_map(), (1.3, 2.4, 0.85)
    cropped, shape = slow_told(channels, told, V2, own)
    whole, _ = slow_told(channels, told, V1, own)
    assert cropped.shape == whole.shape == shape
    assert (cropped != whole).mean() > 0.2
    merged, _ = slow_told(channels, told, WAYS["labels by argmax"], own)
    places = np.argwhere(channels.any(axis=0))
    box = tuple(map(slice, places.min(axis=0), places.max(axis=0) + 1))
    indices = np.searchsorted([0, 7, 40, 300], told[box]).transpose(1, 2, 0)
    assert (resize_segmentation(indices, shape, order=1) != merged).any()


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("way", WAYS)
def test_both_modes_tell_the_second_stage_nearly_the_same(make, tmp_path, way):
    bundle = cascade(tmp_path, make, WAYS[way], has_first=False)
    channels, told = notched(make), told_map()
    expected, _ = slow_told(channels, told, WAYS[way], (1.3, 2.4, 0.85))
    for mode in ("default", "exact"):
        member = load(bundle.folder, device="cpu", mode=mode).members[0]
        found = member.ready(source(channels), told).told
        assert (found != expected).mean() < (0.01 if mode == "default" else 1e-9)


def source(channels):
    return read_case((channels, AFFINE), "case")


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["default", "exact"])
@pytest.mark.parametrize("tta", ["none", "flips"])
def test_what_the_first_stage_finds_is_as_good_as_its_file(make, tmp_path, way, mode, tta):
    """Found by itself, postprocessed as the first stage's bundle says, or handed over."""
    loaded = load(cascade(tmp_path, make, WAYS[way]).folder, device="cpu", mode=mode).members[0]
    options = {"folds": ("fold_0",), "device": torch.device("cpu"), "is_exact": mode == "exact"}
    first = Member(loaded.bundle.previous, [Witness()], **options)
    model = Model([Member(loaded.bundle, loaded.networks, previous=first, **options)])
    case = (make.channels((19, 15, 11)), AFFINE)
    before = model.previous.predict(case, tta=tta)
    raw = model.previous.predict(case, tta=tta, postprocess=False).segmentation
    assert before.is_postprocessed
    assert (before.segmentation != raw).any(), "the postprocessing must change something"
    assert len(np.unique(before.segmentation)) >= 3
    found = model.predict(case, tta=tta, probabilities=True)
    given = model.predict(case, previous_stage=before.segmentation, tta=tta, probabilities=True)
    np.testing.assert_array_equal(found.segmentation, given.segmentation)
    np.testing.assert_array_equal(found.probabilities, given.probabilities)
    other = model.predict(case, previous_stage=raw, tta=tta, probabilities=True)
    assert (other.probabilities != found.probabilities).any(), "what it is told must matter"


@pytest.mark.usefixtures("in_float32")
def test_without_a_stage_before_an_image_is_returned_as_it_is(make, tmp_path):
    bundle = written(tmp_path / "bundle", make, V1)
    member = load(bundle.folder, device="cpu").members[0]
    ready = member.ready(source(make.channels()))
    assert member.informed(ready, None, None) is ready
    second = load(cascade(tmp_path, make, V1).folder, device="cpu").members[0]
    told = second.ready(source(make.channels((19, 15, 11))), told_map())
    assert second.informed(told, None, None) is told


def test_a_cascade_holds_the_semantics_of_each_stage(make, tmp_path):
    bundle = cascade(tmp_path, make, V1, first=V2)
    assert bundle.manifest.semantics == V1
    assert bundle.previous.manifest.semantics == V2
    assert read_json(bundle.folder / PREVIOUS / "bundle.json")["orientation"] == "stored_sitk"


# -- arithmetic with 16 bits -----------------------------------------------------------------------


class Weighted(nn.Module):
    """Multiplies the first channel; tells in which arithmetic it was asked."""

    def __init__(self, *weights):
        super().__init__()
        self.layer = nn.Conv3d(1, len(weights), 1, bias=False)
        self.layer.weight.data = torch.tensor(weights).reshape(-1, 1, 1, 1, 1)
        self.layer.requires_grad_(False)
        self.low = []

    def forward(self, tiles):
        found = self.layer(tiles[:, :1])
        self.low.append(found.dtype == torch.bfloat16)
        return found


def steady():
    """Return a network whose labels are the sign of the image, whatever the arithmetic."""
    return Weighted(0.0, 1.0, -1.0, 0.5)


def delicate():
    """Return one whose first two channels are the same number in bfloat16."""
    return Weighted(1.0, 1.001, -1.0, -1.001)


def checked(make, folder, network, *, low_precision="checked"):
    """Return a model of one network, as it will be where 16 bits are faster."""
    bundle = written(folder / "bundle", make, Semantics(low_precision=low_precision), folds=1)
    member = Member(bundle, [network], folds=("fold_0",), device=torch.device("cpu"))
    return Model([member])


@pytest.mark.usefixtures("in_bfloat16")
def test_a_network_whose_labels_change_in_16_bits_computes_in_32(make, tmp_path, caplog):
    network = delicate()
    model = checked(make, tmp_path, network)
    assert model.precision == "bfloat16"
    case = (make.channels((19, 15, 11)), AFFINE)
    with caplog.at_level(logging.INFO):
        found = model.predict(case, tta="none").segmentation
    assert "bfloat16 would change" in caplog.text
    assert "computing in float32" in caplog.text
    assert model.precision == "float32"
    assert network.low[:2] == [False, True], "one tile in either arithmetic"
    assert not any(network.low[2:])
    member = Member(model.bundle, [delicate()], folds=("fold_0",), device=torch.device("cpu"),
                    is_exact=True)  # fmt: skip
    expected = Model([member]).predict(case, tta="none").segmentation
    np.testing.assert_array_equal(found, expected)
    caplog.clear()
    asked = len(network.low)
    again = model.predict(case, tta="none").segmentation
    np.testing.assert_array_equal(again, found)
    assert len(network.low) == 2 * asked - 2, "it is tried once"
    assert "computing in float32" not in caplog.text


@pytest.mark.usefixtures("in_bfloat16")
def test_a_network_whose_labels_stay_keeps_16_bits(make, tmp_path, caplog):
    network = steady()
    model = checked(make, tmp_path, network)
    case = (make.channels((19, 15, 11)), AFFINE)
    with caplog.at_level(logging.INFO):
        model.predict(case, tta="none")
        first = len(network.low)
        model.predict(case, tta="none")
    assert model.precision == "bfloat16"
    assert network.low[0] is False
    assert all(network.low[1:])
    assert len(network.low) == 2 * first - 2, "it is tried once"
    assert "float32" not in caplog.text


@pytest.mark.usefixtures("in_bfloat16")
def test_a_trusted_network_is_not_tried(make, tmp_path):
    network = delicate()
    model = checked(make, tmp_path, network, low_precision="trusted")
    model.predict((make.channels((19, 15, 11)), AFFINE), tta="none")
    assert model.precision == "bfloat16"
    assert all(network.low)


@pytest.mark.usefixtures("in_float32")
def test_there_is_nothing_to_try_where_16_bits_are_not_faster(make, tmp_path):
    network = delicate()
    model = checked(make, tmp_path, network)
    model.predict((make.channels((19, 15, 11)), AFFINE), tta="none")
    asked = len(network.low)
    model.predict((make.channels((19, 15, 11)), AFFINE), tta="none")
    assert len(network.low) == 2 * asked
    assert not any(network.low)


@pytest.mark.usefixtures("in_bfloat16")
def test_exact_mode_never_computes_in_16_bits(make, tmp_path):
    bundle = written(tmp_path / "bundle", make, Semantics(low_precision="checked"), folds=1)
    network = delicate()
    member = Member(bundle, [network], folds=("fold_0",), device=torch.device("cpu"), is_exact=True)
    Model([member]).predict((make.channels((19, 15, 11)), AFFINE), tta="none")
    assert not any(network.low)


@pytest.mark.usefixtures("in_bfloat16")
@pytest.mark.parametrize("makes", [steady, delicate])
def test_the_stage_before_is_tried_for_itself(make, tmp_path, makes):
    network, first = steady(), makes()
    bundle = cascade(tmp_path, make, V2)
    semantics = Semantics(low_precision="checked")
    before = Member(changed(bundle.previous, semantics), [first], folds=("fold_0",),
                    device=torch.device("cpu"))  # fmt: skip
    member = Member(bundle, [network], folds=("fold_0",), device=torch.device("cpu"),
                    previous=before)  # fmt: skip
    model = Model([member])
    model.predict((make.channels((19, 15, 11)), AFFINE), tta="none")
    assert model.precision == "bfloat16"
    assert all(network.low)
    assert first.low[:2] == [False, True]
    assert set(first.low[2:]) == {makes is steady}


@pytest.mark.usefixtures("in_bfloat16")
def test_the_arithmetic_of_the_stage_before_does_not_depend_on_the_cases_before(make, tmp_path):
    """The second stage falls back to float32 while it sees its first case; the first is trusted."""
    network, first = delicate(), steady()
    bundle = cascade(tmp_path, make, V2)
    before = Member(bundle.previous, [first], folds=("fold_0",), device=torch.device("cpu"))
    semantics = V2.model_copy(update={"low_precision": "checked"})
    member = Member(changed(bundle, semantics), [network], folds=("fold_0",),
                    device=torch.device("cpu"), previous=before)  # fmt: skip
    model = Model([member])
    case = (make.channels((19, 15, 11)), AFFINE)
    model.predict(case, tta="none")
    assert model.precision == "float32"
    once = list(first.low)
    assert all(once)
    model.predict(case, tta="none")
    assert first.low[len(once) :] == once


def changed(bundle, semantics):
    """Return the bundle with other semantics."""
    from dataclasses import replace

    manifest = bundle.manifest.model_copy(update={"semantics": semantics})
    return replace(bundle, manifest=manifest)


# -- bundles of medseg's own models ----------------------------------------------------------------


def test_a_bundle_with_the_usual_semantics_is_written_as_before(make, tmp_path):
    bundle = make.bundle(tmp_path / "bundle", mirror_axes=(0, 2))
    values = json.loads((bundle.folder / "bundle.json").read_text())
    assert list(values) == [
        "format_version", "kind", "configuration", "recipe", "orientation", "semantics", "folds",
        "checkpoints", "sha256", "medseg_version",
    ]  # fmt: skip
    assert values["orientation"] == "canonical"
    assert list(values["semantics"].items()) == [
        ("average", "logits"),
        ("activation", "softmax"),
        ("normalise_first", True),
        ("accumulator", "float32"),
        ("gaussian_peak", 1.0),
        ("label_resize", "argmax"),
        ("mirror_axes", [0, 2]),
        ("swap_axes", []),
    ]


def test_logits_without_semantics_are_treated_as_before():
    record = record_of((1.0, 1.5, 2.0), (1.0, 1.0, 1.2))
    logits = torch.randn((4, *record.shape_network), generator=torch.Generator().manual_seed(2))
    part = Part(source=Held(logits), record=record)
    assert part.semantics == Semantics()
    assert not part.holds_probabilities
    assert part.threshold == 0
    found = probabilities_from_logits(logits, record, LABELS)
    resized = np.stack([slow_resize(v.numpy(), (7, 5, 6), 1, None) for v in logits])
    expected = np.exp(resized) / np.exp(resized).sum(axis=0)
    np.testing.assert_allclose(found, expected.transpose(0, 2, 3, 1), atol=1e-5)
