from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg.augment import previous as module
from medseg.augment.morphology import OPERATORS, ball, operate, remove_part
from medseg.augment.pipeline import Augmenter
from medseg.augment.previous import (
    OperatorDraw,
    PreviousDraw,
    PreviousSettings,
    RemovalDraw,
    corrupted,
    draw_previous,
    one_hot,
)
from medseg.augment.settings import Mirroring
from medseg.augment.streams import sample_seed, stream
from medseg.schema.recipe import AugmentationRecipe

NEVER = {name: 0.0 for name in AugmentationRecipe.model_fields if name.endswith("_probability")}
UNCORRUPTED = {"previous_operator_probability": 0.0, "previous_removal_probability": 0.0}
ALWAYS = {**dict.fromkeys(NEVER, 1.0), **UNCORRUPTED, "rotation_max_deg": 25}
SEEDS = [sample_seed(5, index) for index in range(4)]
VARIANTS = [
    {},
    {"patch_size": (18, 13)},
    {"patch_size": (4, 18, 13), "dummy_2d": True},
    {"backend": "none"},
    {"backend": "batchgenerators"},
    {"backend": "batchgenerators", "patch_size": (18, 13)},
    {"backend": "batchgenerators", "patch_size": (4, 18, 13), "dummy_2d": True},
]


def make(patch_size=(9, 14, 11), *, num_previous=3, dummy_2d=False, swaps=(), **fields):
    mirroring = Mirroring(axes=tuple(range(len(patch_size))), swap_axes=(1,)) if swaps else None
    return Augmenter(
        AugmentationRecipe(**fields),
        patch_size,
        mask_channels=(False, True),
        dummy_2d=dummy_2d,
        mirroring=mirroring,
        swaps=swaps,
        num_previous=num_previous,
    )


def make_batch(augmenter, count=4, seed=0):
    """Return noise and blocks of labels 0 to 3; the first block of each axis is outside."""
    rng = np.random.default_rng(seed)
    size = augmenter.source_size
    images = torch.from_numpy(rng.normal(size=(count, 2, *size)).astype(np.float32))
    blocks = rng.integers(0, 4, (count, *[-(-n // 4) for n in size]))
    for axis in range(1, blocks.ndim):
        blocks = blocks.repeat(4, axis)
    labels = torch.from_numpy(blocks[tuple(slice(n) for n in (count, *size))]).to(torch.uint8)
    outside = torch.zeros(labels.shape, dtype=torch.bool)
    outside[:, size[0] // 2 :] = True
    return images, labels, outside


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64])
def test_each_label_but_the_background_becomes_a_channel(dtype):
    labels = torch.tensor([[0, 3, 1], [2, 2, 0]]).to(dtype)
    found = one_hot(labels[None], 3)
    assert found.dtype == torch.float32
    assert found.tolist() == [
        [[[0, 0, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0]], [[0, 1, 0], [0] * 3]]
    ]


@pytest.mark.parametrize("swaps", [(), ((1, 3),)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_deformed_mirrored_and_swapped_as_the_segmentation(variant, swaps):
    """What the stage before found is here the segmentation itself, of another type."""
    augmenter = make(**{**ALWAYS, **variant}, swaps=swaps)
    images, labels, _ = make_batch(augmenter)
    before = labels.to(torch.int32)
    result, found, _ = augmenter(images, labels, None, seeds=SEEDS, previous=before)
    assert result.shape == (4, 5, *augmenter.patch_size)
    assert torch.equal(result[:, 2:], one_hot(found, 3))
    assert set(found.unique().tolist()) == {0, 1, 2, 3}
    if swaps and augmenter.backend != "none":
        assert {augmenter.swaps_sides(seed) for seed in range(20)} == {True, False}


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_labels_and_outside_are_those_without_a_stage_before(variant):
    fields = {**ALWAYS, "previous_operator_probability": 1.0, **variant}
    augmenter, plain = make(**fields), make(**fields, num_previous=0)
    images, labels, outside = make_batch(augmenter)
    expected = plain(images, labels, outside, seeds=SEEDS)
    arguments = images, labels, outside, labels.flip(0).contiguous()
    copies = [x.clone() for x in arguments]
    found = augmenter(*arguments[:3], seeds=SEEDS, previous=arguments[3])
    assert torch.equal(found[0][:, :2], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])
    assert all(torch.equal(x, copy) for x, copy in zip(arguments, copies, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_corruption_comes_after_all_else_and_differs_between_samples(variant):
    """The corrupted channels are those of a run without corruption, corrupted."""
    chances = {"previous_operator_probability": 0.8, "previous_removal_probability": 0.8}
    clean, augmenter = make(**{**ALWAYS, **variant}), make(**{**ALWAYS, **chances, **variant})
    images, labels, outside = make_batch(augmenter, count=1)
    labels = labels.expand(8, *labels.shape[1:])
    batch = images.expand(8, *images.shape[1:]), labels, outside.expand(labels.shape)
    seeds = range(8)
    before, _, _ = clean(*batch, seeds=seeds, previous=labels)
    after, _, _ = augmenter(*batch, seeds=seeds, previous=labels)
    assert set(after[:, 2:].unique().tolist()) <= {0.0, 1.0}
    changed = 0
    values = torch.arange(1, 4).reshape(3, *[1] * len(augmenter.patch_size))
    for seed, one, other in zip(seeds, before, after, strict=True):
        expected = corrupted(
            (one[2:] * values).sum(0).to(torch.uint8), 3, augmenter.draw(seed).previous
        )
        assert torch.equal(expected.float(), other[2:])
        changed += int(not torch.equal(one[2:], other[2:]))
    assert changed > 2 if augmenter.backend != "none" else changed == 0


def test_what_a_growing_structure_takes_the_others_lose():
    labels = torch.zeros(9, 12, 7, dtype=torch.uint8)
    labels[2:5, 3:6, 2:5] = 1
    labels[5:8, 3:6, 2:5] = 2
    labels[2:5, 6:9, 2:5] = 3
    draw = PreviousDraw((OperatorDraw(1, 0, 2.0), OperatorDraw(0, 1, 1.0)))
    found = corrupted(labels, 3, draw)
    first, second, third = (labels == k for k in (1, 2, 3))
    grown = operate(second, 0, ball(2.0, 3))
    assert torch.equal(found[1], grown)
    assert torch.equal(found[0], operate(first & ~grown, 1, ball(1.0, 3)))
    assert torch.equal(found[2], third & ~grown)
    assert (third & grown).any()
    assert (first & grown).any()


def test_parts_are_removed_after_the_operators():
    labels = torch.zeros(20, 21, 22, dtype=torch.uint8)
    labels[3:6, 3:6, 3:6] = 1
    labels[3:6, 3:6, 8:11] = 1
    labels[14:17, 14:17, 14:17] = 1
    joined = corrupted(labels, 1, PreviousDraw((OperatorDraw(0, 0, 2.0),), (RemovalDraw(0, 0.2),)))
    grown = operate(labels == 1, 0, ball(2.0, 3))
    assert torch.equal(joined[0], remove_part(grown, 0.2, largest_share=0.15))
    assert not joined[0, :10].any()
    assert joined[0, 12:].any()


def draws(count=4000, operator=0.4, removal=0.2, num_previous=3):
    settings = PreviousSettings(num_previous=num_previous, operator=operator, removal=removal)
    return [draw_previous(settings, stream(seed)) for seed in range(count)]


def test_draws_have_nnunets_chances_sizes_and_orders():
    found = draws()
    operators = [one for draw in found for one in draw.operators]
    removals = [one for draw in found for one in draw.removals]
    assert len(operators) / len(found) == pytest.approx(0.4 * 0.5 * 3, rel=0.07)
    assert len(removals) / len(found) == pytest.approx(0.2 * 0.5 * 3, rel=0.09)
    nothing = np.mean([not draw.operators for draw in found])
    assert nothing == pytest.approx(1 - 0.4 * (1 - 0.5**3), abs=0.03)
    kinds = np.bincount([one.operator for one in operators], minlength=4) / len(operators)
    assert kinds == pytest.approx([0.25] * 4, abs=0.04)
    sizes = np.array([one.size for one in operators])
    assert np.quantile(sizes, [0.001, 0.5, 0.999]) == pytest.approx([1, 4.5, 8], abs=0.2)
    assert len(OPERATORS) == 4
    for lists in ([d.operators for d in found], [d.removals for d in found]):
        orders = [tuple(one.structure for one in ones) for ones in lists if len(ones) == 3]
        assert len(set(orders)) == 6


def test_one_chance_does_not_change_the_draws_of_the_other():
    for both, first, second in zip(
        draws(200, 1.0, 1.0), draws(200, 1.0, 0.0), draws(200, 0.0, 1.0), strict=True
    ):
        assert both.operators == first.operators
        assert both.removals == second.removals
        assert first.removals == second.operators == ()


def test_without_a_stage_before_none_may_be_given_and_with_one_it_must():
    augmenter = make(num_previous=0)
    images, labels, outside = make_batch(augmenter)
    with pytest.raises(ValueError, match="num_previous=0, so `previous` must not be given"):
        augmenter(images, labels, outside, seeds=SEEDS, previous=labels)
    with pytest.raises(ValueError, match="num_previous=3, so `previous` must be given"):
        make()(images, labels, outside, seeds=SEEDS)
    with pytest.raises(ValueError, match="has shape"):
        make()(images, labels, outside, seeds=SEEDS, previous=labels[:, 1:])
    assert module.BALL_SIZE == (1.0, 8.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_neither_waits_nor_finds_anything_else():
    fields = {**NEVER, "previous_operator_probability": 1.0, "previous_removal_probability": 1.0}
    augmenter = make((24, 37, 30), **fields)
    batch = make_batch(augmenter)
    host = augmenter(*batch, seeds=SEEDS, previous=batch[1])
    images, labels, outside = (x.cuda() for x in batch)
    augmenter(images, labels, outside, seeds=SEEDS, previous=labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        device = augmenter(images, labels, outside, seeds=SEEDS, previous=labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(host[0], device[0].cpu())
