"""Patch and batch size: the limits, one at a time."""

import math

import pytest

from medseg.errors import PlanError
from medseg.plan.memory import feature_map_voxels
from medseg.plan.presets import PRESETS
from medseg.plan.sizing import Budget, size_configuration


def _budget(name="nnunet", *, memory_gb=8.0, num_cases=100, num_logits=2):
    return Budget(
        preset=PRESETS[name], memory_gb=memory_gb, num_logits=num_logits, num_cases=num_cases
    )


def _size(spacing, shape, budget, num_voxels=None):
    num_voxels = math.prod(shape) if num_voxels is None else num_voxels
    return size_configuration(spacing, shape, budget=budget, num_voxels_case=num_voxels)


def test_a_small_image_is_one_patch_and_the_batch_grows():
    sizing = _size((1.0, 1.0, 1.0), (36, 50, 35), _budget(num_cases=200))
    assert sizing.patch_size == (40, 56, 40)
    assert sizing.batch_size == sizing.batch_by_dataset == 7
    assert sizing.batch_by_cost > 7


def test_the_first_patch_has_the_content_of_a_256_cube_of_cubic_aspect():
    """A patch of 256 x 256 x 256 at spacing 4 x 1 x 2 is 128 x 512 x 256 voxels."""
    sizing = _size((4.0, 1.0, 2.0), (1000, 1000, 1000), _budget(memory_gb=1000))
    assert sizing.first_patch == (128, 512, 256)


def test_without_memory_limit_nothing_is_cut_and_the_median_is_the_limit():
    sizing = _size((1.0, 1.0, 1.0), (100, 130, 90), _budget(memory_gb=1e6))
    assert sizing.patch_size == sizing.first_patch == (112, 144, 96)


def test_the_axis_that_covers_most_of_the_image_is_cut_first():
    sizing = _size((1.0, 1.0, 1.0), (120, 500, 240), _budget())
    shares = [p / m for p, m in zip(sizing.patch_size, sizing.median_shape, strict=True)]
    assert max(shares) - min(shares) < 0.35
    assert sizing.patch_size[1] > sizing.patch_size[2] > sizing.patch_size[0]


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"cpu"}))
@pytest.mark.parametrize("spacing", [(2.5, 0.8, 0.9), (0.8, 0.7)])
def test_patch_and_batch_fit_the_memory_as_the_reference_does(name, spacing):
    """A batch of two 3D patches needs no more than the preset's reference network."""
    shape = (180, 510, 494)[: len(spacing)]
    budget = _budget(name, memory_gb=PRESETS[name].memory_gb, num_cases=1000)
    sizing = _size(spacing, shape, budget)
    blocks_encoder, blocks_decoder = budget.preset.blocks(len(sizing.topology.strides))
    needed = feature_map_voxels(
        budget.preset.kind,
        sizing.patch_size,
        features=budget.preset.features(len(blocks_encoder), len(spacing)),
        strides=sizing.topology.strides,
        blocks_encoder=blocks_encoder,
        blocks_decoder=blocks_decoder,
        num_logits=2,
    )
    allowed = budget.preset.reference_voxels[len(spacing)] * {2: 12, 3: 2}[len(spacing)]
    assert sizing.batch_size >= 2
    assert needed * sizing.batch_size < allowed * 1.25
    assert needed * (sizing.batch_size + 1) > allowed * 0.7


def test_more_memory_never_gives_a_smaller_patch():
    patches = [
        _size((1.0, 1.0, 1.0), (300, 310, 320), _budget(memory_gb=gb)).patch_size
        for gb in (3, 8, 24, 80)
    ]
    volumes = [math.prod(patch) for patch in patches]
    assert volumes == sorted(set(volumes))


def test_memory_for_less_than_the_smallest_patch_is_an_error():
    with pytest.raises(PlanError, match=r"no patch fits the memory.*Allow more GPU memory"):
        _size((1.0, 1.0, 1.0), (300, 310, 320), _budget(memory_gb=1e-7))


def test_blocks_of_a_network_deeper_than_any_listed():
    assert PRESETS["resenc_m"].blocks(6) == ((1, 3, 4, 6, 6, 6), (1,) * 5)
    assert PRESETS["nnunet"].blocks(16) == ((2,) * 16, (2,) * 15)
