"""Logits made row by row: every window, axis and store gives what the whole volume gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medseg.infer.predictor import predict_logits
from medseg.infer.rows import (
    Layout,
    LogitRows,
    NotFiniteError,
    StoppedError,
    Volume,
    evaluate_together,
)
from medseg.infer.runner import make_runner
from medseg.infer.sums import FileStore, MemoryStore, Sums


def network(dimensions, seed=0, num_logits=3):
    torch.manual_seed(seed)
    conv = nn.Conv2d if dimensions == 2 else nn.Conv3d
    return nn.Sequential(conv(2, 4, 3, padding=1), nn.ReLU(), conv(4, num_logits, 3, padding=1))


def image(shape, seed=0):
    values = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    return torch.from_numpy(values)


def rows_of(networks, values, tile, layout, *, step=0.5, **options):
    runner = make_runner(networks, num_channels=2, num_logits=3, **options)
    return LogitRows(runner, Volume.of(values, tile), layout, step=step)


def walked(rows, thickness):
    """Take the rows in slabs that overlap by one, and forget those behind."""
    length, parts = rows.shape[rows.axis], []
    for start in range(0, length, thickness):
        stop = min(start + thickness, length)
        low = max(0, start - 1)
        rows.release(low)
        found = rows.rows(low, stop).clone()
        parts.append(found.narrow(rows.axis + 1, start - low, stop - start))
    return torch.cat(parts, dim=rows.axis + 1)


SHAPES = [
    pytest.param((23, 9, 17), (8, 6, 7), id="several-tiles"),
    pytest.param((5, 31, 11), (8, 6, 7), id="one-axis-padded"),
    pytest.param((4, 5, 3), (7, 6, 8), id="smaller-than-the-tile"),
    pytest.param((1, 13, 7), (4, 6, 7), id="one-slice"),
    pytest.param((11, 13, 9), (8, 6), id="2d"),
]


@pytest.mark.parametrize("in_file", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_a_window_gives_what_the_whole_volume_gives(shape, tile, axis, in_file, tmp_path):
    networks, values = [network(len(tile), seed) for seed in (1, 2)], image(shape)
    options = {"mirror_axes": (0, 1)}
    expected = predict_logits(networks, values, tile, num_logits=3, **options)
    padded_tile = (1, *tile)[-3:]
    for batch in (1, 3):
        span = max(padded_tile[axis], batch if len(tile) == 2 and axis == 0 else 0)
        for window in (span + 2 + 3, None):
            layout = Layout(
                axis=axis, window=window, in_file=in_file, scratch=tmp_path, batch=batch
            )
            rows = rows_of(networks, values, tile, layout, **options)
            found = walked(rows, 2)
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert list(tmp_path.iterdir()) == [], "a scratch file has no name"


def test_tiles_are_evaluated_when_their_rows_are_asked_for():
    seen = []

    class Noting(nn.Module):
        def forward(self, x):
            seen.append(x.shape)
            return torch.cat([x, x[:, :1]], dim=1)

    rows = rows_of([Noting()], image((40, 6, 7)), (8, 6, 7), Layout())
    assert not seen
    rows.rows(0, 3)
    assert len(seen) == 1
    rows.release(3)
    rows.rows(3, 5)
    assert len(seen) == 2
    rows.rows(5, 40)
    assert len(seen) == len(range(0, 33, 4)) == rows.num_tiles


def test_a_window_that_is_too_small_is_misuse():
    rows = rows_of([network(3)], image((30, 6, 7)), (8, 6, 7), Layout(window=9))
    with pytest.raises(ValueError, match="not within the window of 9 rows from 0"):
        rows.rows(0, 12)


def test_somebody_may_ask_to_stop():
    asked = iter([False, True])
    runner = make_runner([network(3)], num_channels=2, num_logits=3)
    rows = LogitRows(
        runner, Volume.of(image((30, 6, 7)), (8, 6, 7)), Layout(), should_stop=lambda: next(asked)
    )
    with pytest.raises(StoppedError):
        rows.rows(0, 30)


def test_values_that_are_not_finite_are_noticed_in_the_rows_that_hold_them():
    values = image((30, 6, 7))
    values[:, 25] = 1e38
    rows = rows_of([Exploding()], values, (8, 6, 7), Layout(window=14))
    assert torch.isfinite(rows.rows(0, 4)).all()
    with pytest.raises(NotFiniteError):
        walked(rows, 4)


class Exploding(nn.Module):
    def forward(self, x):
        return torch.cat([x, x[:, :1]], dim=1) * 10


class Full(nn.Module):
    """A GPU that holds two images at most."""

    def __init__(self, most):
        super().__init__()
        self.most, self.sizes = most, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.cat([x, x[:, :1]], dim=1)


def test_a_full_gpu_gets_smaller_batches_and_nothing_is_lost():
    full, values = Full(2), image((30, 6, 7))
    rows = rows_of([full], values, (8, 6, 7), Layout(batch=7))
    found = rows.rows(0, 30)
    expected = torch.cat([values, values[:1]])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert full.sizes[:3] == [7, 4, 2]
    assert max(full.sizes[2:]) == 2
    with pytest.raises(torch.OutOfMemoryError):
        rows_of([Full(0)], values, (8, 6, 7), Layout(batch=4)).rows(0, 30)


def test_other_errors_of_a_network_are_not_taken_for_a_full_gpu():
    class Wrong(nn.Module):
        def forward(self, x):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    rows = rows_of([Wrong()], image((30, 6, 7)), (8, 6, 7), Layout(batch=4))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        rows.rows(0, 30)


@pytest.mark.parametrize("tile", [(8, 6, 7), (6, 7)], ids=["3d", "2d"])
def test_tiles_of_several_images_share_batches(tile):
    """Each image comes out as it does alone."""
    shapes = [(8, 6, 7), (3, 9, 7), (13, 6, 11)]
    networks, options = [network(len(tile), 4)], {"mirror_axes": (1,)}
    images = [image(shape, seed) for seed, shape in enumerate(shapes)]
    alone = [predict_logits(networks, one, tile, num_logits=3, **options) for one in images]
    runner = make_runner(networks, num_channels=2, num_logits=3, **options)
    many = [LogitRows(runner, Volume.of(one, tile), Layout(batch=4)) for one in images]
    evaluate_together(many)
    for rows, expected in zip(many, alone, strict=True):
        torch.testing.assert_close(rows.rows(0, rows.shape[0]), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_mirrored_tiles_share_batches(batch):
    """The network sees the same images however they are batched."""
    full, values = Full(99), image((13, 6, 7))
    options = {"mirror_axes": (0, 1, 2)}
    found = rows_of([full], values, (8, 6, 7), Layout(batch=batch), **options).rows(0, 13)
    torch.testing.assert_close(found, torch.cat([values, values[:1]]), atol=1e-5, rtol=1e-5)
    assert max(full.sizes) <= batch
    assert sum(full.sizes) == 3 * 8


class Voter(nn.Module):
    """Says one channel everywhere, or follows the sign of the image."""

    def __init__(self, choice):
        super().__init__()
        self.choice = choice

    def forward(self, x):
        sign = x[:, :1]
        channels = [torch.zeros_like(sign) for _ in range(3)]
        channels[self.choice] = torch.where(sign > 0, 5.0, 1.0)
        return torch.cat(channels, dim=1)


def test_disagreement_is_the_share_of_networks_that_decide_otherwise():
    values = image((8, 6, 7))
    networks = [Voter(1), Voter(1), Voter(2), Voter(1)]
    found = rows_of(
        networks, values, (8, 6, 7), Layout(), measures_disagreement=True
    ).rows(0, 8)  # fmt: skip
    assert found.shape[0] == 4
    torch.testing.assert_close(found[3], torch.full((8, 6, 7), 0.25))
    plain = rows_of(networks, values, (8, 6, 7), Layout()).rows(0, 8)
    torch.testing.assert_close(found[:3], plain)


def test_with_regions_a_dissent_in_any_region_counts():
    class Regions(nn.Module):
        def __init__(self, signs):
            super().__init__()
            self.signs = torch.tensor(signs).reshape(1, 3, 1, 1, 1)

        def forward(self, x):
            return self.signs.expand(len(x), 3, *x.shape[2:]).clone()

    networks = [Regions(s) for s in ([1.0, -1, -1], [1.0, -1, -1], [1.0, 1, 1], [1.0, -1, -1])]
    found = rows_of(
        networks, image((8, 6, 7)), (8, 6, 7), Layout(), measures_disagreement=True,
        has_regions=True,
    ).rows(0, 8)  # fmt: skip
    assert found[3].unique().tolist() == [0.25]


class TestSums:
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_a_ring_holds_what_a_whole_volume_holds(self, axis):
        shape, window = (12, 10, 11), 5
        rng = np.random.default_rng(axis)
        across = [n for d, n in enumerate(shape) if d != axis]
        sums = Sums(shape, axis, MemoryStore((window, 2, *across), torch.device("cpu")), window)
        total, weights = np.zeros((2, *shape)), np.zeros(shape)
        for start in range(shape[axis] - 2):
            box = [slice(1, 4), slice(2, 6), slice(0, 7)]
            box[axis] = slice(start, start + 3)
            box = tuple(box)
            size = tuple(part.stop - part.start for part in box)
            values, weight = rng.normal(size=(2, *size)), rng.uniform(0.1, 1, size)
            sums.release(start)
            sums.add(box, torch.from_numpy(values).float(), torch.from_numpy(weight).float())
            total[(slice(None), *box)] += values * weight
            weights[box] += weight
            row = [slice(None)] * 3
            row[axis] = slice(start, start + 1)
            with np.errstate(invalid="ignore"):
                expected = (total / weights)[(slice(None), *row)]
            found = sums.mean(start, start + 1).numpy()
            np.testing.assert_allclose(found, expected, atol=1e-5)

    def test_a_file_holds_what_memory_holds(self, tmp_path):
        rng = np.random.default_rng(3)
        shape = (6, 3, 5, 7)
        stores = [FileStore(shape, tmp_path), MemoryStore(shape, torch.device("cpu"))]
        for rows, across in (
            (slice(1, 4), (slice(0, 5), slice(2, 6))), (slice(3, 6), (slice(1, 3), slice(0, 7)))
        ):  # fmt: skip
            size = [rows.stop - rows.start, 3, *(part.stop - part.start for part in across)]
            values = torch.from_numpy(rng.normal(size=size).astype(np.float32))
            for store in stores:
                store.add(rows, across, values)
        for store in stores:
            store.clear(slice(2, 3))
        in_file, in_memory = (store.read(slice(0, 6)) for store in stores)
        assert torch.equal(in_file, in_memory)
        assert in_file[2].abs().max() == 0
        assert in_file[3].abs().max() > 0
