"""Exact mode against the loops of the originals, written out."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from skimage.transform import resize as skimage_resize
from torch import nn

from medseg.geometry import SpatialRecord
from medseg.infer.exact import exact_values, on_image_grid
from medseg.infer.export import reduce_parts
from medseg.infer.parts import Held, Part
from medseg.infer.predictor import predict_logits
from medseg.infer.rows import NotFiniteError, StoppedError, Volume
from medseg.infer.runner import make_runner
from medseg.infer.tiles import importance
from medseg.labels import LabelScheme
from medseg.schema.bundle import Resampling, Semantics

V2 = Semantics(accumulator="float16", gaussian_peak=10.0)
V1 = Semantics(average="probabilities")
SHAPE = (9, 13, 7)
TILES = {
    "3d": (4, 6, 5),
    "3d one tile": SHAPE,
    "3d padded": (12, 6, 10),
    "2d": (6, 5),
    "2d padded": (16, 5),
}
NUM_LOGITS = 4


def make_networks(tile, *, inputs=2, folds=2, scale=6.0):
    """Return convolutions whose logits are steep enough for 16 bits to matter."""
    torch.manual_seed(11)
    kind = nn.Conv3d if len(tile) == 3 else nn.Conv2d
    networks = [kind(inputs, NUM_LOGITS, 3, padding=1) for _ in range(folds)]
    for network in networks:
        network.requires_grad_(False)
        network.weight.mul_(scale)
    return networks


def make_image(shape=SHAPE, channels=2):
    rng = np.random.default_rng(4)
    return torch.from_numpy(rng.normal(size=(channels, *shape)).astype(np.float32))


def found_by(networks, image, tile, semantics, *, step=0.5, mirror_axes=None, **options):
    """Return what exact mode gives."""
    axes = tuple(range(len(tile))) if mirror_axes is None else mirror_axes
    runners = [
        make_runner(
            [network],
            num_channels=2,
            num_logits=NUM_LOGITS,
            num_previous=len(image) - 2,
            mirror_axes=axes,
            has_regions=semantics.activation == "sigmoid",
            averages_probabilities=semantics.average == "probabilities",
        )
        for network in networks
    ]
    volume = Volume.of(image, tile)
    return exact_values(runners, volume, semantics=semantics, step=step, **options)


# -- the originals ---------------------------------------------------------------------------------


def starts_of(length, tile, step):
    """Return where tiles begin: as few as the step allows, evenly apart, rounded half to even."""
    count = math.ceil((length - tile) / (tile * step)) + 1
    apart = (length - tile) / (count - 1) if count > 1 else 0
    return [int(np.round(apart * number)) for number in range(count)]


def padded(image, tile):
    """Return the image with zeros around it, and where it lies in them."""
    before = [0] * (3 - len(tile)) + [
        max(size - length, 0) // 2
        for size, length in zip(tile, image.shape[-len(tile) :], strict=True)
    ]
    shape = [*image.shape[1 : 4 - len(tile)], *map(max, tile, image.shape[-len(tile) :])]
    whole = torch.zeros((len(image), *shape))
    inner = (slice(None), *map(lambda a, n: slice(a, a + n), before, image.shape[1:]))
    whole[inner] = image
    return whole, inner


def places(shape, tile, step):
    """Yield the index of every tile, a number for the slice of a 2D one."""
    lead = [range(length) for length in shape[: 3 - len(tile)]]
    own = zip(shape[3 - len(tile) :], tile, strict=True)
    axes = [[slice(s, s + size) for s in starts_of(n, size, step)] for n, size in own]
    yield from product(*lead, *axes)


def second_version(networks, image, tile, *, step=0.5, mirror_axes=None):
    """Sum logits over tiles and folds in 16 bits, as nnU-Net v2 does on the CPU."""
    axes = tuple(range(len(tile))) if mirror_axes is None else mirror_axes
    whole, inner = padded(image, tile)
    gaussian = torch.from_numpy(importance(tile, 10.0, "float16").copy())
    mean = None
    for network in networks:
        total = torch.zeros((NUM_LOGITS, *whole.shape[1:]), dtype=torch.half)
        weights = torch.zeros(whole.shape[1:], dtype=torch.half)
        for place in places(whole.shape[1:], tile, step):
            patch = whole[(slice(None), *place)][None]
            logits = network(patch)
            subsets = [s for n in range(1, len(axes) + 1) for s in combinations(axes, n)]
            for subset in subsets:
                dims = [axis + 2 for axis in subset]
                logits += torch.flip(network(torch.flip(patch, dims)), dims)
            logits /= len(subsets) + 1
            values = logits[0]
            values *= gaussian
            total[(slice(None), *place)] += values
            weights[place] += gaussian
        total /= weights
        mean = total if mean is None else mean + total
    mean /= len(networks)
    return mean[inner]


def first_version(networks, image, tile, *, step=0.5, mirror_axes=None, activate=None):
    """Average the probabilities of each pass, tile and fold, as nnU-Net v1 does."""
    axes = tuple(range(len(tile))) if mirror_axes is None else mirror_axes
    activate = activate or (lambda logits: torch.softmax(logits, dim=1))
    whole, inner = padded(image, tile)
    every = list(places(whole.shape[1:], tile, step))
    is_alone = len(every) == math.prod(whole.shape[1 : 4 - len(tile)])
    gaussian = np.ones(tile, np.float32) if is_alone else importance(tile)
    mean = []
    for network in networks:
        total = np.zeros((NUM_LOGITS, *whole.shape[1:]), np.float32)
        weights = np.zeros(whole.shape[1:], np.float32)
        for place in every:
            patch = whole[(slice(None), *place)][None]
            result = torch.zeros((1, NUM_LOGITS, *tile))
            for bits in product((False, True), repeat=len(axes)):
                dims = [axis + 2 for axis, is_on in zip(axes, bits, strict=True) if is_on]
                found = torch.flip(activate(network(torch.flip(patch, dims))), dims)
                result += 1 / 2 ** len(axes) * found
            total[(slice(None), *place)] += result[0].numpy() * gaussian
            weights[place] += gaussian
        mean.append(total / weights)
    return np.mean(mean, axis=0)[inner]


# -- sums of tiles and folds -----------------------------------------------------------------------


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("folds", [1, 2, 3])
@pytest.mark.parametrize("step", [0.5, 0.8])
def test_sums_in_16_bits_are_those_of_the_second_version_to_the_last_bit(name, folds, step):
    tile, image = TILES[name], make_image()
    networks = make_networks(tile, folds=folds)
    found = found_by(networks, image, tile, V2, step=step)
    expected = second_version(networks, image, tile, step=step)
    assert found.dtype == torch.half
    assert found.shape == (NUM_LOGITS, *SHAPE)
    assert torch.equal(found, expected)
    wide = found_by(networks, image, tile, Semantics(), step=step)
    assert wide.dtype == torch.float32
    assert 0 < (found - wide).abs().mean() < 0.02, "the type of the sums must matter, a little"


@pytest.mark.parametrize("axes", [(), (1,), (0, 2)])
def test_only_the_axes_of_the_model_are_mirrored(axes):
    tile, image = TILES["3d"], make_image()
    networks = make_networks(tile)
    found = found_by(networks, image, tile, V2, mirror_axes=axes)
    assert torch.equal(found, second_version(networks, image, tile, mirror_axes=axes))
    assert not torch.equal(found, second_version(networks, image, tile))


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_probabilities_are_averaged_as_in_the_first_version(name, activation):
    tile, image = TILES[name], make_image()
    networks = make_networks(tile, folds=3, scale=2.0)
    activate = torch.sigmoid if activation == "sigmoid" else None
    semantics = V1.model_copy(update={"activation": activation})
    found = found_by(networks, image, tile, semantics)
    expected = first_version(networks, image, tile, activate=activate)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    logits = found_by(networks, image, tile, Semantics())
    late = torch.sigmoid(logits) if activation == "sigmoid" else torch.softmax(logits, dim=0)
    assert (late - found).abs().max() > 0.01, "it must matter when logits are activated"


@pytest.mark.parametrize("name", TILES)
def test_the_channels_of_the_stage_before_are_cut_with_the_image(name):
    tile, image = TILES[name], make_image()
    told = torch.from_numpy(np.random.default_rng(6).integers(0, 4, SHAPE).astype(np.uint8))
    both = torch.cat([image, *((told == index).float()[None] for index in (1, 2, 3))])
    networks = make_networks(tile, inputs=5)
    runners = [
        make_runner([network], num_channels=2, num_logits=NUM_LOGITS, num_previous=3,
                    mirror_axes=range(len(tile)))
        for network in networks
    ]  # fmt: skip
    found = exact_values(runners, Volume.of(image, tile, told), semantics=V2, step=0.5)
    assert torch.equal(found, second_version(networks, both, tile))


@pytest.mark.parametrize("name", TILES)
def test_sums_in_32_bits_are_those_of_the_engine(name):
    tile, image = TILES[name], make_image()
    networks = make_networks(tile, folds=3)
    axes = tuple(range(len(tile)))
    expected = predict_logits(
        networks, image, tile, num_logits=NUM_LOGITS, mirror_axes=axes, tile_batch=3
    )
    found = found_by(networks, image, tile, Semantics())
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_the_peak_of_the_weights_matters_by_rounding_alone():
    tile, image = TILES["3d"], make_image()
    networks = make_networks(tile)
    low, high = (
        found_by(networks, image, tile, V2.model_copy(update={"gaussian_peak": peak}))
        for peak in (1.0, 10.0)
    )
    assert 0 < (low - high).float().abs().mean() < 0.02
    wide = V2.model_copy(update={"accumulator": "float32"})
    found = found_by(networks, image, tile, wide)
    torch.testing.assert_close(found, found_by(networks, image, tile, Semantics()))


@pytest.mark.parametrize("semantics", [V1, V2], ids=["probabilities", "16 bits"])
def test_the_last_channel_tells_the_share_of_folds_that_decide_otherwise(semantics):
    tile, image = TILES["3d"], make_image()
    networks = make_networks(tile, folds=3)
    found = found_by(networks, image, tile, semantics, measures_disagreement=True)
    mean = found_by(networks, image, tile, semantics)
    assert torch.equal(found[:-1], mean)
    own = [found_by([network], image, tile, semantics).argmax(dim=0) for network in networks]
    votes = torch.stack([vote != mean.argmax(dim=0) for vote in own])
    torch.testing.assert_close(found[-1].float(), votes.float().mean(dim=0), atol=1e-3, rtol=0)
    assert len(found[-1].unique()) >= 3


def test_regions_disagree_where_any_of_them_does():
    tile, image = TILES["3d"], make_image()
    networks = make_networks(tile, folds=2)
    for average, threshold in (("logits", 0.0), ("probabilities", 0.5)):
        semantics = Semantics(average=average, activation="sigmoid")
        found = found_by(networks, image, tile, semantics, measures_disagreement=True)
        whole = found[:-1] > threshold
        own = [found_by([network], image, tile, semantics) > threshold for network in networks]
        expected = torch.stack([(vote != whole).any(dim=0) for vote in own]).float().mean(dim=0)
        torch.testing.assert_close(found[-1], expected)
        assert 0 < expected.mean() < 1


class Constant(nn.Module):
    """Returns one number everywhere, and counts how often it is asked."""

    def __init__(self, value):
        super().__init__()
        self.value, self.calls = value, 0

    def forward(self, tiles):
        self.calls += 1
        return torch.full((len(tiles), NUM_LOGITS, *tiles.shape[2:]), self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_values_that_16_bits_cannot_hold_are_reported(value):
    with pytest.raises(NotFiniteError):
        found_by([Constant(value)], make_image(), TILES["3d"], V2)


def test_32_bits_hold_more():
    found = found_by([Constant(1e5)], make_image(), TILES["3d"], Semantics())
    torch.testing.assert_close(found, torch.full_like(found, 1e5))


def test_steps_are_counted_over_all_tiles_and_folds():
    told, tile = [], TILES["2d"]
    networks = make_networks(tile, folds=2)
    found_by(networks, make_image(), tile, V2, progress=lambda *step: told.append(step))
    count = 2 * len(list(places(SHAPE, tile, 0.5)))
    assert told == [(number, count) for number in range(1, count + 1)]


def test_nothing_more_is_computed_once_somebody_asked_to_stop():
    network = Constant(0.0)
    with pytest.raises(StoppedError):
        found_by([network], make_image(), TILES["3d"], V2, should_stop=lambda: True)
    assert network.calls == 0


def test_a_stop_ends_the_work_in_the_middle():
    network = Constant(0.0)
    with pytest.raises(StoppedError):
        found_by([network, network], make_image(), TILES["3d"], V2, mirror_axes=(),
                 should_stop=lambda: network.calls >= 3)  # fmt: skip
    assert network.calls == 3


def test_networks_are_asked_in_evaluation_mode_and_return_to_training():
    tile = TILES["3d"]
    network = nn.Sequential(*make_networks(tile, folds=1), nn.Dropout(0.5)).train()
    found = found_by([network], make_image(), tile, V2)
    assert torch.equal(found, second_version([network[0]], make_image(), tile))
    assert network[1].training


def test_no_network_is_refused():
    with pytest.raises(ValueError, match="at least one network"):
        found_by([], make_image(), TILES["3d"], V2)


# -- back to the grid of the image -----------------------------------------------------------------

LABELS = LabelScheme(labels={"background": 9, "a": 2, "b": 300, "c": 4})


def record(*, spacing=(2.3, 0.8, 1.1), network=(2.5, 2.0, 1.9), shape=(6, 4, 7)):
    return SpatialRecord(
        shape_image=(14, 12, 9),
        affine_image=tuple(map(tuple, np.diag([0.8, 1.1, 2.3, 1.0]).tolist())),
        axes=(2, 0, 1),
        flips=(True, False, True),
        box=((1, 8), (3, 13), (0, 11)),
        spacing_cropped=spacing,
        shape_network=shape,
        spacing_network=network,
    )


def slow_resize(values, shape, order, axis):
    """Resize each channel whole; or each slice across an axis, of which the nearest are taken."""
    result = np.empty((len(values), *shape))
    for channel, out in zip(values.astype(np.float64), result, strict=True):
        if axis is None:
            out[...] = skimage_resize(channel, shape, order, mode="edge", anti_aliasing=False)
            continue
        across = [length for d, length in enumerate(shape) if d != axis]
        for number in range(shape[axis]):
            nearest = int((number + 0.5) * channel.shape[axis] / shape[axis])
            part = channel.take(nearest, axis)
            index = (slice(None),) * axis + (number,)
            out[index] = skimage_resize(part, across, order, mode="edge", anti_aliasing=False)
    return result


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("when", ["auto", "always", "never"])
@pytest.mark.parametrize("kind", [torch.half, torch.float32])
def test_the_mean_is_resampled_in_its_own_type_and_then_widened(order, when, kind):
    values = torch.from_numpy(np.random.default_rng(5).normal(size=(4, 6, 4, 7)) * 8).to(kind)
    semantics = Semantics(resample_result=Resampling(order=order, separate=when))
    part = Part(source=Held(values, 1), record=record(), weight=0.25, semantics=semantics)
    found = on_image_grid(part)
    axis = 0 if when == "always" else None
    expected = slow_resize(values.numpy(), (7, 10, 11), order, axis)
    rows = found.source.rows(0, 10)
    assert rows.dtype == torch.float32
    expected = expected.astype(values.numpy().dtype).astype(np.float32)
    np.testing.assert_array_equal(rows.numpy(), expected)
    assert (found.source.axis, found.weight, found.semantics) == (1, 0.25, semantics)
    assert found.record.shape_network == found.record.shape_cropped == (7, 10, 11)
    assert found.record.spacing_network == (2.3, 0.8, 1.1)
    assert found.record.box == part.record.box


def test_the_label_map_is_the_largest_of_what_was_resampled():
    """Turned, reversed and put back into the whole image, with the values of files."""
    values = torch.from_numpy(np.random.default_rng(5).normal(size=(4, 6, 4, 7)) * 8).half()
    part = on_image_grid(Part(source=Held(values), record=record(), semantics=V2))
    found = reduce_parts([part], LABELS).segmentation
    resized = slow_resize(values.numpy(), (7, 10, 11), 1, None).astype(np.float16)
    whole = np.full((9, 14, 12), 9, np.uint16)
    whole[1:8, 3:13, 0:11] = np.array([9, 2, 4, 300])[resized.argmax(axis=0)]
    expected = whole[::-1, :, ::-1].transpose(1, 2, 0)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) == 4


@pytest.mark.parametrize("threshold", [0.5, 0.0])
def test_regions_are_there_above_one_half_or_above_zero(threshold):
    """0.5 of a probability, 0 of a logit; exactly so much is too little."""
    labels = LabelScheme(
        labels={"background": 0, "whole": (1, 2), "core": 2}, regions_class_order=(1, 2)
    )
    average = "probabilities" if threshold else "logits"
    semantics = Semantics(average=average, activation="sigmoid")
    own = record(shape=(7, 10, 11), network=(2.3, 0.8, 1.1))
    values = torch.from_numpy(np.random.default_rng(7).choice([-0.25, 0, 0.25], (2, 7, 10, 11)))
    values = values.float() + threshold
    part = Part(source=Held(values), record=own, semantics=semantics)
    assert part.threshold == threshold
    found = reduce_parts([part], labels).segmentation
    inner = found.transpose(2, 0, 1)[::-1, :, ::-1][1:8, 3:13, 0:11]
    expected = np.zeros((7, 10, 11), int)
    expected[values[0].numpy() > threshold] = 1
    expected[values[1].numpy() > threshold] = 2
    np.testing.assert_array_equal(inner, expected)


def test_nothing_happens_to_a_mean_that_has_the_images_shape_or_is_not_resampled():
    values = torch.from_numpy(np.random.default_rng(5).normal(size=(4, 7, 10, 11))).half()
    own = record(shape=(7, 10, 11), network=(2.3, 0.8, 1.1))
    for how in (Resampling(order=3), Resampling(method="none")):
        semantics = Semantics(resample_result=how)
        found = on_image_grid(Part(source=Held(values), record=own, semantics=semantics))
        assert torch.equal(found.source.rows(0, 7), values.float())
