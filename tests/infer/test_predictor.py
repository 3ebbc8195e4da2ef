"""Sliding-window prediction against a loop written out in numpy."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
import torch
from torch import nn

from medseg.errors import BundleError
from medseg.infer.predictor import predict_logits
from medseg.infer.runner import mirror_subsets
from medseg.infer.tiles import importance, padding, tile_indices


def small_network(dimensions, seed, num_inputs=2, num_logits=3):
    """Return an asymmetric network whose output depends on the whole neighbourhood."""
    torch.manual_seed(seed)
    conv = nn.Conv2d if dimensions == 2 else nn.Conv3d
    norm = nn.InstanceNorm2d if dimensions == 2 else nn.InstanceNorm3d
    return nn.Sequential(
        conv(num_inputs, 4, 3, padding=1),
        norm(4),
        nn.LeakyReLU(),
        conv(4, num_logits, 3, padding=1),
    )


def random_image(shape, channels=2, seed=0):
    values = np.random.default_rng(seed).normal(size=(channels, *shape))
    return torch.from_numpy(values.astype(np.float32))


def slow_prediction(
    networks, image, tile, *, num_logits, mirror_axes=(), swap_axes=(), swaps=(), step=0.5
):
    """Pad, visit tiles one by one, mirror, average; in float64 outside the networks."""
    lacks = padding(image.shape[1:], tile)
    padded = np.pad(image.numpy(), [(0, 0), *lacks])
    total = np.zeros((num_logits, *padded.shape[1:]))
    weights = np.zeros(padded.shape[1:])
    gaussian = importance(tuple(tile)).astype(np.float64)
    subsets = list(chain(*(combinations(mirror_axes, n) for n in range(len(mirror_axes) + 1))))
    for index in tile_indices(padded.shape[1:], tile, step):
        window = padded[(slice(None), *index)]
        mean = np.zeros((num_logits, *tile))
        for network in networks:
            for axes in subsets:
                flipped = np.flip(window, [axis + 1 for axis in axes]).copy()
                with torch.no_grad():
                    output = network.eval()(torch.from_numpy(flipped)[None])[0].numpy()
                output = np.flip(output, [axis + 1 for axis in axes])
                for _ in set(axes) & set(swap_axes):
                    output = exchanged(output, swaps)
                mean += output
        total[(slice(None), *index)] += mean / (len(networks) * len(subsets)) * gaussian
        weights[index] += gaussian
    inner = tuple(slice(a, a + n) for (a, _), n in zip(lacks, image.shape[1:], strict=True))
    return (total / weights)[(slice(None), *inner)]


def exchanged(logits, swaps):
    """Return logits whose channels of each pair have changed places."""
    result = logits.copy()
    for left, right in swaps:
        result[left], result[right] = logits[right], logits[left]
    return result


CASES = [
    pytest.param((13, 9, 11), (8, 6, 7), (0, 1, 2), id="3d"),
    pytest.param((13, 9, 11), (8, 6, 7), (), id="3d-no-mirrors"),
    pytest.param((6, 5, 7), (6, 5, 7), (0, 2), id="3d-single-tile"),
    pytest.param((4, 5, 3), (7, 6, 8), (1,), id="3d-smaller-than-tile"),
    pytest.param((3, 13, 5), (5, 6, 5), (0, 1, 2), id="3d-mixed"),
    pytest.param((4, 13, 9), (8, 6), (0, 1), id="2d"),
    pytest.param((5, 3, 9), (8, 6), (1,), id="2d-padded"),
    pytest.param((5, 8, 6), (8, 6), (0,), id="2d-single-tile-a-slice"),
]


@pytest.mark.parametrize("tile_batch", [1, 3])
@pytest.mark.parametrize(("shape", "tile", "mirror_axes"), CASES)
def test_equals_the_slow_loop(shape, tile, mirror_axes, tile_batch):
    networks = [small_network(len(tile), seed) for seed in (1, 2)]
    image = random_image(shape)
    logits = predict_logits(
        networks, image, tile, num_logits=3, mirror_axes=mirror_axes, tile_batch=tile_batch
    )
    expected = slow_prediction(networks, image, tile, num_logits=3, mirror_axes=mirror_axes)
    assert logits.shape == (3, *shape)
    assert logits.dtype == torch.float32
    assert logits.is_contiguous()
    np.testing.assert_allclose(logits.numpy(), expected, atol=2e-6)


SIDED = [
    pytest.param((13, 9, 11), (8, 6, 7), (0, 1, 2), (2,), id="3d"),
    pytest.param((13, 9, 11), (8, 6, 7), (0, 1), (0, 1), id="3d-two-axes"),
    pytest.param((6, 5, 7), (6, 5, 7), (0, 1, 2), (0, 1, 2), id="3d-three-axes"),
    pytest.param((13, 9, 11), (8, 6, 7), (0, 2), (), id="3d-no-swap"),
    pytest.param((6, 5, 7), (6, 5, 7), (0, 2), (1,), id="3d-axis-not-mirrored"),
    pytest.param((4, 13, 9), (8, 6), (0, 1), (1,), id="2d"),
    pytest.param((4, 13, 9), (8, 6), (0, 1), (0, 1), id="2d-both-axes"),
]


@pytest.mark.parametrize("tile_batch", [1, 3])
@pytest.mark.parametrize(("shape", "tile", "mirror_axes", "swap_axes"), SIDED)
def test_mirrored_sides_equal_the_slow_loop(shape, tile, mirror_axes, swap_axes, tile_batch):
    networks = [small_network(len(tile), seed, num_logits=6) for seed in (1, 2)]
    image, options = random_image(shape), {"num_logits": 6, "mirror_axes": mirror_axes}
    sides = {"swap_axes": swap_axes, "swaps": ((1, 4), (5, 2))}
    logits = predict_logits(networks, image, tile, tile_batch=tile_batch, **options, **sides)
    expected = slow_prediction(networks, image, tile, **options, **sides)
    np.testing.assert_allclose(logits.numpy(), expected, atol=2e-6)
    plain = predict_logits(networks, image, tile, tile_batch=tile_batch, **options)
    changes = bool(set(mirror_axes) & set(swap_axes))
    assert ((logits - plain).abs().max() > 0.01) == changes


class Positional(nn.Module):
    """Says "left" (1) in the first half of an axis and "right" (2) in the second, 0 and 3 before.

    It looks at the place in the tile alone, as a network that has learnt its sides.
    """

    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, x):
        size = x.shape[2 + self.axis]
        place = (torch.arange(size) * 2 / (size - 1) - 1).reshape(
            [-1 if axis == self.axis else 1 for axis in range(x.ndim - 2)]
        )
        place = place.expand(x.shape[0], *x.shape[2:])
        return torch.stack([place.abs() - 0.9, -place, place, 0.1 - place.abs()], dim=1)


@pytest.mark.parametrize(("tile", "axis"), [((5, 6, 8), 2), ((6, 5, 7), 0), ((5, 8), 1)])
def test_a_network_that_knows_its_sides_keeps_them(tile, axis):
    """With the swap mirrorings agree; without it left and right cancel out."""
    network, every = Positional(axis), tuple(range(len(tile)))
    image = random_image(tile if len(tile) == 3 else (3, *tile))
    options = {"num_logits": 4, "mirror_axes": every}
    alone = predict_logits([network], image, tile, num_logits=4)
    swapped = predict_logits([network], image, tile, **options, swap_axes=(axis,), swaps=((1, 2),))
    torch.testing.assert_close(swapped, alone, atol=1e-6, rtol=0)
    plain = predict_logits([network], image, tile, **options)
    torch.testing.assert_close(plain[1], plain[2], atol=1e-6, rtol=0)
    others = tuple(other for other in every if other != axis)
    forbidden = predict_logits([network], image, tile, num_logits=4, mirror_axes=others)
    torch.testing.assert_close(forbidden, alone, atol=1e-6, rtol=0)


def test_step_changes_the_tiles():
    network, image = small_network(3, 1), random_image((14, 9, 11))
    for step in (0.25, 1.0):
        logits = predict_logits([network], image, (8, 6, 7), num_logits=3, step=step)
        expected = slow_prediction([network], image, (8, 6, 7), num_logits=3, step=step)
        np.testing.assert_allclose(logits.numpy(), expected, atol=2e-6)


def test_a_mirrored_image_gives_the_mirrored_prediction():
    network, image = small_network(3, 5), random_image((12, 9, 10))
    options = {"num_logits": 3, "mirror_axes": (0, 1, 2)}
    straight = predict_logits([network], image, (12, 9, 10), **options)
    turned = predict_logits([network], image.flip(1, 3), (12, 9, 10), **options)
    torch.testing.assert_close(turned.flip(1, 3), straight, atol=1e-6, rtol=0)
    single = predict_logits([network], image, (12, 9, 10), num_logits=3)
    assert (single - straight).abs().max() > 0.01


def test_one_tile_is_the_network_itself():
    network, image = small_network(3, 3), random_image((6, 7, 8))
    logits = predict_logits([network], image, (6, 7, 8), num_logits=3)
    with torch.no_grad():
        assert torch.equal(logits, network(image[None])[0])


def test_an_identity_network_returns_the_image():
    image = random_image((9, 14, 5))
    logits = predict_logits([nn.Identity()], image, (4, 8, 8), num_logits=2, mirror_axes=(0, 1))
    torch.testing.assert_close(logits, image, atol=1e-6, rtol=1e-6)


class Listed(nn.Module):
    """Deep supervision: full resolution first."""

    def forward(self, x):
        return [x, x[:, :, ::2]]


def test_of_several_outputs_the_first_counts():
    image = random_image((5, 6, 4))
    logits = predict_logits([Listed()], image, (5, 6, 4), num_logits=2)
    assert torch.equal(logits, image)


def test_networks_are_evaluated_and_then_train_on():
    network = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm3d(2)).train()
    network[1].eval()
    image = random_image((5, 6, 4))
    logits = predict_logits([network], image, (5, 6, 4), num_logits=2)
    torch.testing.assert_close(logits, image, atol=1e-4, rtol=1e-4)
    assert network.training
    assert network[0].training
    assert not network[1].training


def test_the_result_can_take_part_in_a_graph():
    logits = predict_logits([nn.Identity()], random_image((5, 6, 4)), (5, 6, 4), num_logits=2)
    assert not logits.is_inference()
    scale = torch.ones(1, requires_grad=True)
    (logits * scale).sum().backward()


def test_sums_are_float32_under_autocast():
    image = random_image((9, 8, 7))
    network = nn.Conv3d(2, 3, 1)
    logits = predict_logits([network], image, (5, 8, 7), num_logits=3, dtype=torch.bfloat16)
    exact = predict_logits([network], image, (5, 8, 7), num_logits=3)
    assert logits.dtype == torch.float32
    assert 0 < (logits - exact).abs().max() < 0.05


def test_progress_ends_at_the_number_of_tiles():
    seen = []
    predict_logits(
        [nn.Identity()],
        random_image((9, 8, 7)),
        (4, 8, 7),
        num_logits=2,
        tile_batch=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


class Overflowing(nn.Module):
    """Infinite wherever autocast is on, as a network that leaves the range of fp16."""

    def forward(self, x):
        return x / 0 if torch.is_autocast_enabled(x.device.type) else x


def test_an_overflow_is_repeated_in_float32(caplog):
    image = random_image((5, 6, 4))
    logits = predict_logits([Overflowing()], image, (5, 6, 4), num_logits=2, dtype=torch.bfloat16)
    assert torch.equal(logits, image)
    assert "predicting again in float32" in caplog.text


class Broken(nn.Module):
    """Weights that diverged."""

    def forward(self, x):
        return x * float("nan")


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(BundleError, match="not finite"):
        predict_logits([Broken()], random_image((5, 6, 4)), (5, 6, 4), num_logits=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": []}, "at least one network"),
        ({"image": torch.zeros(2, 3, 4)}, "image must be float32"),
        ({"image": torch.zeros(2, 3, 4, 5, dtype=torch.float64)}, "image must be float32"),
        ({"image": torch.full((2, 5, 6, 4), torch.nan)}, "image holds values that are not finite"),
        ({"tile": (4,)}, "tile must have 2 or 3"),
        ({"mirror_axes": (2,), "tile": (4, 4)}, "mirror_axes must be axes of the tile"),
        ({"swap_axes": (2,), "tile": (4, 4)}, "swap_axes must be axes of the tile"),
        ({"swaps": ((0, 2),)}, "swaps must be pairs of the 2 channels"),
        ({"swaps": ((0, 1), (1, 0))}, "swaps must be pairs of the 2 channels, each in one pair"),
        ({"tile_batch": 0}, "tile_batch must be at least 1"),
        ({"num_logits": 5}, "expected \\(B, 5"),
    ],
)
def test_misuse_is_named(changes, message):
    values = {
        "networks": [nn.Identity()],
        "image": random_image((5, 6, 4)),
        "tile": (4, 4, 4),
        "num_logits": 2,
        **changes,
    }
    networks, image, tile = (values.pop(name) for name in ("networks", "image", "tile"))
    with pytest.raises(ValueError, match=message):
        predict_logits(networks, image, tile, **values)


def test_mirror_subsets_of_three_axes():
    assert len(mirror_subsets((0, 1, 2))) == 8
    assert mirror_subsets(()) == ((),)
