from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from medseg.augment import morphology
from medseg.augment.morphology import OPERATORS, ball, connected_parts, operate, remove_part

SIZES = (1.0, 1.3, 1.7, 2.0, 3.6, 5.2, 7.9)


def footprint(size, num_axes):
    """Return scikit-image's ball or disk as offsets from the voxel that nnU-Net changes."""
    if num_axes == 3:
        axis = np.linspace(-size, size, int(2 * size + 1))
    else:
        axis = np.arange(-size, size + 1)
    first = -((len(axis) - 1) // 2)
    return [
        tuple(k + first for k in index)
        for index in product(range(len(axis)), repeat=num_axes)
        if sum(axis[k] ** 2 for k in index) <= size**2 + 1e-9
    ]


def slow_dilate(shape, offsets):
    """Look at every offset of every voxel; nothing lies beyond the array."""
    reach = 10
    padded = np.pad(shape, reach)
    result = np.zeros_like(shape)
    for offset in offsets:
        place = tuple(
            slice(reach + o, reach + o + n) for o, n in zip(offset, shape.shape, strict=True)
        )
        result |= padded[place]
    return result


def slow_erode(shape, offsets):
    return ~slow_dilate(~shape, offsets)


SLOW = (
    slow_dilate,
    slow_erode,
    lambda shape, offsets: slow_erode(slow_dilate(shape, offsets), offsets),
    lambda shape, offsets: slow_dilate(slow_erode(shape, offsets), offsets),
)


def blobs(size, share=0.03, seed=0):
    """Return a few boxes and loose voxels, one box at the array's border."""
    rng = np.random.default_rng(seed)
    shape = rng.random(size) < share
    shape[tuple(slice(0, n // 2) for n in size)] = True
    shape[tuple(slice(n // 2 + 1, n // 2 + 5) for n in size)] = True
    return shape


@pytest.mark.parametrize("size", [(19, 14, 23), (31, 24)])
@pytest.mark.parametrize("kind", range(4))
def test_operators_equal_looking_at_every_offset(size, kind):
    assert len(OPERATORS) == 4
    shape = blobs(size)
    for radius in SIZES:
        expected = SLOW[kind](shape, footprint(radius, len(size)))
        found = operate(torch.from_numpy(shape), kind, ball(radius, len(size)))
        np.testing.assert_array_equal(found.numpy(), expected, err_msg=str(radius))
        assert expected.any() or radius > 4


@pytest.mark.parametrize("kind", range(4))
def test_the_box_around_a_shape_is_enough(kind):
    """On the CPU only the box around a small shape is worked on; the result is that of all."""
    shape = torch.zeros(40, 30, 35, dtype=torch.bool)
    shape[17:22, 11:19, 30:34] = True
    for radius in (1.0, 4.6, 7.9):
        element = ball(radius, 3)
        assert torch.equal(operate(shape, kind, element), OPERATORS[kind](shape, element))


def test_nothing_stays_nothing_and_the_argument_stays_as_it_is():
    empty = torch.zeros(5, 6, 7, dtype=torch.bool)
    assert not any(operate(empty, kind, ball(3.0, 3)).any() for kind in range(4))
    shape = torch.from_numpy(blobs((9, 8, 7)))
    before = shape.clone()
    for kind in range(4):
        operate(shape, kind, ball(2.0, 3))
    remove_part(shape, 0.5, largest_share=0.5)
    assert torch.equal(shape, before)


def flood(shape):
    """Return the connected parts as sets of voxels, ordered by their first voxel."""
    left, parts = {tuple(map(int, place)) for place in np.argwhere(shape)}, []
    for place in map(tuple, np.argwhere(shape).tolist()):
        if place not in left:
            continue
        part, front = set(), [place]
        left.discard(place)
        while front:
            here = front.pop()
            part.add(here)
            for step in product((-1, 0, 1), repeat=shape.ndim):
                there = tuple(a + b for a, b in zip(here, step, strict=True))
                if there in left:
                    left.discard(there)
                    front.append(there)
        parts.append(part)
    return parts


def spiral(size):
    """Return a path of one voxel's width that winds inwards."""
    path = np.zeros((size, size), dtype=bool)
    first, last, row = 0, size - 1, 0
    while first < last:
        path[row, max(first - 2, 0) : last + 1] = True
        path[row : last + 1, last] = True
        path[last, first : last + 1] = True
        path[row + 2 : last + 1, first] = True
        first, last, row = first + 2, last - 2, row + 2
    return path


def noise(size, share):
    return np.random.default_rng(3).random(size) < share


SHAPES = {
    "spiral": lambda: spiral(61),
    "flipped": lambda: spiral(60)[::-1].copy(),
    "sparse": lambda: noise((12, 19, 15), 0.05),
    "threshold": lambda: noise((17, 21, 26), 0.1),
    "plane": lambda: noise((70, 61), 0.41),
    "empty": lambda: np.zeros((4, 5, 6), dtype=bool),
    "full": lambda: np.ones((4, 5, 6), dtype=bool),
}


@pytest.mark.parametrize("name", SHAPES)
def test_parts_are_labelled_by_their_first_voxel(name):
    shape = SHAPES[name]()
    expected = np.zeros(shape.shape, dtype=int)
    for part in flood(shape):
        first = min(np.ravel_multi_index(place, shape.shape) for place in part)
        expected[tuple(np.transpose(list(part)))] = first + 1
    found = connected_parts(torch.from_numpy(shape))
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("size", [(11, 14, 9), (23, 31)])
def test_each_small_part_is_removed_in_its_turn_and_no_large_one(size, on_device, monkeypatch):
    if on_device:
        monkeypatch.setattr(morphology, "_parts_on_host", connected_parts)
    shape = noise(size, 0.06)
    shape[tuple(slice(0, n // 2) for n in size)] = True
    parts = flood(shape)
    largest_share = 0.01
    small = [part for part in parts if len(part) < largest_share * shape.size]
    assert len(small) > 5
    assert len(small) < len(parts)
    for number, part in enumerate(small):
        choice = (number + 0.5) / len(small)
        result = remove_part(torch.from_numpy(shape), choice, largest_share=largest_share).numpy()
        removed = set(map(tuple, np.argwhere(shape & ~result).tolist()))
        assert removed == part
        assert not (result & ~shape).any()


def test_without_a_small_part_nothing_is_removed():
    shape = torch.ones(3, 4, 5, dtype=torch.bool)
    assert torch.equal(remove_part(shape, 0.3, largest_share=0.15), shape)
    nothing = torch.zeros(3, 4, 5, dtype=torch.bool)
    assert not remove_part(nothing, 0.9, largest_share=0.15).any()
