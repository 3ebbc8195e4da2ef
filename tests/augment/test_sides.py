"""Labels with sides under mirroring, against labels that are a function of position alone."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from medseg.augment.pipeline import Augmenter
from medseg.augment.settings import Mirroring, is_anisotropic, mirroring
from medseg.schema.plans import LeftRight
from medseg.schema.recipe import AugmentationRecipe

NEVER = {name: 0.0 for name in AugmentationRecipe.model_fields if name.endswith("_probability")}
BACKENDS = ["torch", "batchgenerators"]
SEEDS = list(range(40))
SWAPS = ((1, 3), (2, 5))


def sides(axis, policy="swap"):
    return LeftRight(axis=axis, policy=policy)


def make(size, axis, policy, backend="torch", swaps=SWAPS):
    """Return an augmenter that does nothing but mirror; `axis` is one of the network's three."""
    recipe = AugmentationRecipe(backend=backend, **NEVER)
    chosen = mirroring(recipe, size, dummy_2d=False, left_right=sides(axis, policy))
    return Augmenter(
        recipe, size, mask_channels=(False,), dummy_2d=False, mirroring=chosen, swaps=swaps
    )


def labels_by_position(size, axis, dtype=torch.uint8):
    """Label by the distance from the middle: 1 and 3, 2 and 5 are left and right, 0 and 4 both."""
    position = torch.arange(size[axis])
    outwards = torch.minimum(position, size[axis] - 1 - position)
    left = torch.tensor([4, 0, 1, 2])[outwards.clamp(max=3)]
    right = torch.tensor([4, 0, 3, 5])[outwards.clamp(max=3)]
    row = torch.where(position < size[axis] // 2, left, right)
    shape = [-1 if other == axis else 1 for other in range(len(size))]
    return row.reshape(shape).expand(size).to(dtype)


def numbered(size):
    """Return an image (1, *size) without two equal voxels."""
    return torch.arange(math.prod(size), dtype=torch.float32).reshape(1, *size)


CASES = [
    pytest.param((6, 9, 8), 2, 2, id="3d-last"),
    pytest.param((8, 5, 6), 0, 0, id="3d-first"),
    pytest.param((9, 10), 2, 1, id="2d-last"),
    pytest.param((10, 7), 1, 0, id="2d-first"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "axis", "patch_axis"), CASES)
def test_swapped_labels_stay_a_function_of_position(size, axis, patch_axis, backend):
    augmenter = make(size, axis, "swap", backend)
    image, labels = numbered(size), labels_by_position(size, patch_axis)
    images, result, _ = augmenter([image] * 40, [labels] * 40, None, seeds=SEEDS)
    mirrored = 0
    for seed, one, label in zip(SEEDS, images, result, strict=True):
        assert torch.equal(label, labels)
        first, last = (one[0].select(patch_axis, end).mean() for end in (0, -1))
        assert augmenter.swaps_sides(seed) == (first > last)
        mirrored += int(first > last)
    assert 8 < mirrored < 32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "axis", "patch_axis"), CASES)
def test_a_forbidden_axis_is_never_mirrored_and_the_others_are(size, axis, patch_axis, backend):
    augmenter = make(size, axis, "forbid", backend)
    image, labels = numbered(size), labels_by_position(size, patch_axis)
    images, result, _ = augmenter([image] * 40, [labels] * 40, None, seeds=SEEDS)
    assert all(torch.equal(label, labels) for label in result)
    others = [other for other in range(len(size)) if other != patch_axis]
    wanted = {
        tuple(np.flip(image[0].numpy(), flips).ravel().tolist())
        for count in product((0, 1), repeat=len(others))
        for flips in [tuple(o for o, on in zip(others, count, strict=True) if on)]
    }
    assert {tuple(one[0].ravel().tolist()) for one in images} == wanted
    assert not any(augmenter.swaps_sides(seed) for seed in SEEDS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_across_the_left_right_axis_are_mirrored_without_a_swap(backend):
    size = (8, 10)
    for policy in ("swap", "forbid"):
        augmenter = make(size, 0, policy, backend)
        labels = labels_by_position(size, 1)
        images, result, _ = augmenter([labels[None].float()] * 40, [labels] * 40, None, seeds=SEEDS)
        assert torch.equal(images[:, 0], result.float())
        assert not all(torch.equal(label, labels) for label in result)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_table_equals_a_slow_exchange(backend, dtype):
    """Labels above 255 too, and the arguments stay as they are."""
    high = 0 if dtype == torch.uint8 else 1000
    swaps = ((1, 3 + high), (2, 5 + high))
    partner = {a: b for pair in swaps for a, b in (pair, pair[::-1])}
    augmenter = make((4, 5, 6), 1, "swap", backend, swaps)
    values = np.array([0, 1, 2, 4, 3 + high, 5 + high, 7 + high])
    array = np.random.default_rng(0).choice(values, (4, 5, 6))
    labels = torch.from_numpy(array).to(dtype)
    image = torch.from_numpy(array[None].astype(np.float32))
    images, result, _ = augmenter([image] * 9, [labels] * 9, None, seeds=range(9))
    assert result.dtype == dtype
    assert torch.equal(labels, torch.from_numpy(array).to(dtype))
    exchanged = [augmenter.swaps_sides(seed) for seed in range(9)]
    assert True in exchanged
    assert False in exchanged
    for one, label, is_exchanged in zip(images[:, 0], result, exchanged, strict=True):
        slow = [partner.get(int(v), int(v)) if is_exchanged else int(v) for v in one.ravel()]
        assert label.to(torch.int64).ravel().tolist() == slow


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_above_255_pass_every_transform_whole(backend):
    """Deformation codes of 16-bit labels do not overflow, and no label is invented."""
    fields = {**dict.fromkeys(NEVER, 0.0), "rotation_probability": 1.0, "scaling_probability": 1.0}
    recipe = AugmentationRecipe(backend=backend, **fields)
    augmenter = Augmenter(recipe, (6, 9, 8), mask_channels=(False,), dummy_2d=False)
    coarse = np.random.default_rng(1).choice([0, 255, 256, 300, 65535], (4, 4, 4))
    labels = torch.from_numpy(np.kron(coarse, np.ones((8, 8, 8), np.int64)))
    image = labels[None].float()
    for dtype in (torch.uint16, torch.int32):
        _, result, _ = augmenter([image] * 3, [labels.to(dtype)] * 3, None, seeds=range(3))
        found = set(result.to(torch.int64).unique().tolist())
        assert found <= {0, 255, 256, 300, 65535}
        assert max(found) > 255


def test_small_patches_of_wide_labels_are_padded():
    augmenter = make((6, 9, 8), 2, "swap")
    labels = torch.full((4, 5, 6), 300, dtype=torch.uint16)
    _, result, _ = augmenter([torch.zeros(1, 4, 5, 6)], [labels], None, seeds=[1])
    assert set(result.to(torch.int64).unique().tolist()) == {0, 300}


def test_without_sides_nothing_changes():
    """The same draws as ever: a plan without sides trains as it did."""
    recipe = AugmentationRecipe()
    size = (10, 16, 12)
    plain = Augmenter(recipe, size, mask_channels=(True, False), dummy_2d=False)
    asked = mirroring(recipe, size, dummy_2d=False, left_right=None)
    other = Augmenter(
        recipe, size, mask_channels=(True, False), dummy_2d=False, mirroring=asked, swaps=()
    )
    assert [plain.draw(seed) for seed in SEEDS] == [other.draw(seed) for seed in SEEDS]


ISOTROPIC, FLAT, PLANE = (40, 36, 44), (6, 60, 50), (60, 50)


@pytest.mark.parametrize(
    ("patch_size", "axis", "fields", "sided"),
    [
        pytest.param(ISOTROPIC, 2, {}, (2,), id="3d"),
        pytest.param(ISOTROPIC, 0, {"rotation_max_deg": 90}, (0,), id="3d-right-angle"),
        pytest.param(ISOTROPIC, 0, {"rotation_max_deg": 120}, (0, 1, 2), id="3d-half-turns"),
        pytest.param(FLAT, 2, {}, (1, 2), id="flat-half-turns"),
        pytest.param(FLAT, 0, {}, (0,), id="flat-across-slices"),
        pytest.param(FLAT, 2, {"rotation_max_deg": 30}, (2,), id="flat-small-turns"),
        pytest.param(FLAT, 2, {"rotation_probability": 0.0}, (2,), id="flat-no-turns"),
        pytest.param(PLANE, 2, {}, (0, 1), id="2d-half-turns"),
        pytest.param((60, 30), 1, {}, (0,), id="2d-elongated"),
        pytest.param(PLANE, 0, {}, (), id="2d-across-slices"),
    ],
)
def test_half_turns_count_every_axis_of_their_plane(patch_size, axis, fields, sided):
    """Half a turn is two mirrorings: with it, mirroring the other axis exchanges sides as well."""
    recipe = AugmentationRecipe(**fields)
    options = {"dummy_2d": is_anisotropic(patch_size)}
    every = tuple(range(len(patch_size)))
    swap = mirroring(recipe, patch_size, left_right=sides(axis), **options)
    assert swap == Mirroring(axes=every, swap_axes=sided)
    forbid = mirroring(recipe, patch_size, left_right=sides(axis, "forbid"), **options)
    assert forbid == Mirroring(axes=tuple(a for a in every if a not in sided))


def test_half_turns_and_mirrorings_agree_about_sides():
    """Turn and mirror in all ways: what looks the same has the same labels."""
    plane = torch.tensor([[0, 1, 2], [0, 4, 4], [9, 0, 3]])
    chosen = mirroring(AugmentationRecipe(), PLANE, dummy_2d=False, left_right=sides(2))
    seen = {}
    for turned, axes in product((False, True), ((), (0,), (1,), (0, 1))):
        image = plane.rot90(2) if turned else plane
        image = image.flip(axes)
        looks = tuple(image.ravel().tolist())
        assert seen.setdefault(looks, chosen.exchanges(axes)) == chosen.exchanges(axes)
    assert set(seen.values()) == {True, False}


def test_a_recipe_restricts_further_and_is_not_extended():
    recipe = AugmentationRecipe(mirror_axes=(0, 2))
    options = {"dummy_2d": False}
    assert mirroring(recipe, ISOTROPIC, left_right=None, **options).axes == (0, 2)
    assert mirroring(recipe, ISOTROPIC, left_right=sides(1), **options) == Mirroring(axes=(0, 2))
    forbidden = mirroring(recipe, ISOTROPIC, left_right=sides(2, "forbid"), **options)
    assert forbidden == Mirroring(axes=(0,))
    nothing = AugmentationRecipe(backend="none")
    assert mirroring(nothing, ISOTROPIC, left_right=sides(1), **options) == Mirroring(axes=())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_change_places_on_the_device_without_waiting_for_it(dtype):
    size = (6, 9, 8)
    augmenter = make(size, 2, "swap")
    image, labels = numbered(size).cuda(), labels_by_position(size, 2, dtype).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, result, _ = augmenter([image] * 40, [labels] * 40, None, seeds=SEEDS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(label, labels) for label in result)
