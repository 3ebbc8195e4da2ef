from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg.augment.pipeline import Augmenter
from medseg.augment.sample import centre
from medseg.augment.streams import sample_seed
from medseg.schema.recipe import AugmentationRecipe

NEVER = {name: 0.0 for name in AugmentationRecipe.model_fields if name.endswith("_probability")}
ALWAYS = {**dict.fromkeys(NEVER, 1.0), "rotation_max_deg": 25}
SEEDS = [sample_seed(7, index) for index in range(6)]


def make(patch_size=(10, 16, 12), *, channels=2, dummy_2d=False, **fields):
    return Augmenter(
        AugmentationRecipe(**fields),
        patch_size,
        mask_channels=(True, *[False] * (channels - 1)),
        dummy_2d=dummy_2d,
    )


def make_batch(augmenter, count=6, dtype=torch.uint8, seed=0):
    rng = np.random.default_rng(seed)
    size = augmenter.source_size
    images = rng.normal(size=(count, len(augmenter.mask_channels), *size)).astype(np.float32)
    blocks = rng.integers(0, 4, (count, *[-(-n // 5) for n in size]))
    for axis in range(1, blocks.ndim):
        blocks = blocks.repeat(5, axis)
    blocks = blocks[tuple(slice(n) for n in (count, *size))]
    segmentations = torch.from_numpy(np.where(blocks == 3, 0, blocks)).to(dtype)
    return torch.from_numpy(images), segmentations, torch.from_numpy(blocks == 3)


VARIANTS = [
    {},
    dict(ALWAYS),
    {"patch_size": (12, 15)},
    {"patch_size": (12, 15), **ALWAYS, "elastic_probability": 0.0},
    {"patch_size": (4, 18, 15), "dummy_2d": True, **ALWAYS},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_a_samples_result_does_not_depend_on_its_batch(fields):
    augmenter = make(**fields)
    images, segmentations, outside = make_batch(augmenter)
    together = augmenter(images, segmentations, outside, seeds=SEEDS)
    order = [4, 1, 1, 5]
    others = augmenter(
        images[order], segmentations[order], outside[order], seeds=[SEEDS[i] for i in order]
    )
    for first, second in zip(together, others, strict=True):
        assert torch.equal(first[order], second)
    for i, seed in enumerate(SEEDS):
        one = slice(i, i + 1)
        alone = augmenter(images[one], segmentations[one], outside[one], seeds=[seed])
        for first, second in zip(together, alone, strict=True):
            assert torch.equal(first[one], second)


@pytest.mark.parametrize("fields", VARIANTS)
def test_reading_just_the_box_that_is_used_gives_the_same(fields):
    augmenter = make(**fields)
    images, segmentations, outside = make_batch(augmenter)
    expected = augmenter(images, segmentations, outside, seeds=SEEDS)
    sizes = [augmenter.read_size(seed) for seed in SEEDS]
    result = augmenter(
        [centre(x, size) for x, size in zip(images, sizes, strict=True)],
        [centre(x, size) for x, size in zip(segmentations, sizes, strict=True)],
        [centre(x, size) for x, size in zip(outside, sizes, strict=True)],
        seeds=SEEDS,
    )
    for first, second in zip(expected, result, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("fields", VARIANTS)
def test_arguments_are_not_changed_and_types_are_kept(fields):
    augmenter = make(**fields)
    batch = make_batch(augmenter)
    before = [x.clone() for x in batch]
    result = augmenter(*batch, seeds=SEEDS)
    for x, copy, y in zip(batch, before, result, strict=True):
        assert torch.equal(x, copy)
        assert y.dtype == x.dtype
        assert y.device == x.device
        assert y.is_contiguous()
        assert y.shape == (*x.shape[: x.ndim - len(augmenter.patch_size)], *augmenter.patch_size)
        assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert torch.isfinite(result[0]).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int64])
def test_label_types_are_kept_and_labels_never_invented(dtype):
    augmenter = make(**ALWAYS)
    images, segmentations, _ = make_batch(augmenter, dtype=dtype)
    _, labels, outside = augmenter(images, segmentations, None, seeds=SEEDS)
    assert labels.dtype == dtype
    assert outside is None
    assert set(labels.to(torch.int64).unique().tolist()) == {0, 1, 2}


def test_same_seed_same_result_other_seed_another():
    augmenter = make(**ALWAYS)
    images, segmentations, outside = (x[:1].expand(3, *x.shape[1:]) for x in make_batch(augmenter))
    result = augmenter(images, segmentations, outside, seeds=[5, 6, 5])
    for x in result:
        assert torch.equal(x[0], x[2])
        assert not torch.equal(x[0], x[1])


@pytest.mark.parametrize("patch_size", [(10, 16, 12), (9, 7, 11), (13, 8)])
@pytest.mark.parametrize("fields", [{**NEVER, "mirror_axes": ()}, {"backend": "none"}])
def test_without_any_transform_the_result_is_the_centre(patch_size, fields):
    augmenter = make(patch_size, **fields)
    assert augmenter.source_size == patch_size
    larger = make(patch_size, **ALWAYS)
    images, segmentations, _ = make_batch(larger)
    result, labels, _ = augmenter(images, segmentations, None, seeds=SEEDS)
    assert torch.equal(result, centre(images, patch_size))
    assert torch.equal(labels, centre(segmentations, patch_size))


@pytest.mark.parametrize("fields", VARIANTS[1:])
def test_no_deformation_reads_padding(fields):
    """A source without any voxel outside has none afterwards: no corner was padded."""
    augmenter = make(**{"channels": 1, **fields, "scaling_range": (1.35, 1.4)})
    size = augmenter.source_size
    seeds = range(25)
    images = [torch.ones(1, *size)] * len(seeds)
    segmentations = [torch.ones(size, dtype=torch.uint8)] * len(seeds)
    outside = [torch.zeros(size, dtype=torch.bool)] * len(seeds)
    _, labels, mask = augmenter(images, segmentations, outside, seeds=seeds)
    assert (labels == 1).all()
    assert not mask.any()
    assert any(augmenter.read_size(seed) != augmenter.patch_size for seed in seeds)


def test_missing_voxels_count_as_outside():
    augmenter = make(**{**NEVER, "mirror_axes": ()}, channels=1)
    images, segmentations = torch.ones(1, 1, 6, 16, 12), torch.ones(1, 6, 16, 12)
    outside = torch.zeros(1, 6, 16, 12, dtype=torch.bool)
    image, labels, mask = augmenter(images, segmentations, outside, seeds=[0])
    expected = torch.ones(10)
    expected[[0, 1, 8, 9]] = 0
    for found in (image[0, 0], labels[0], 1 - mask[0].float()):
        assert torch.equal(found[:, 3, 5], expected)


def test_only_normalised_channels_are_zero_outside():
    augmenter = make(**ALWAYS, channels=2)
    images, segmentations, outside = make_batch(augmenter)
    result, _, mask = augmenter(images, segmentations, outside, seeds=SEEDS)
    assert mask.any()
    assert (result[:, 0][mask] == 0).all()
    assert (result[:, 0][~mask] != 0).all()
    assert (result[:, 1][mask] != 0).any()


@pytest.mark.parametrize("axes", [None, (1,), (0, 2)])
def test_each_allowed_axis_is_mirrored_in_half_of_the_samples(axes):
    augmenter = make((3, 4, 5), channels=1, **NEVER, mirror_axes=axes)
    image = torch.arange(60.0).reshape(1, 3, 4, 5)
    seeds = range(300)
    images, labels, _ = augmenter(
        [image] * 300, [image[0].to(torch.uint8)] * 300, None, seeds=seeds
    )
    assert torch.equal(images[:, 0].to(torch.uint8), labels)
    corners = images[:, 0, 0, 0, 0].to(torch.int64)
    flips = torch.stack([corners // 20 > 0, corners % 20 // 5 > 0, corners % 5 > 0], 1)
    shares = flips.float().mean(0)
    allowed = range(3) if axes is None else axes
    for axis in range(3):
        assert abs(shares[axis] - 0.5) < 0.12 if axis in allowed else shares[axis] == 0
    assert len(flips.unique(dim=0)) == 2 ** len(allowed)


def test_image_and_labels_undergo_the_same_deformation_and_mirroring():
    chances = ("rotation_probability", "scaling_probability", "elastic_probability")
    augmenter = make((14, 20, 17), channels=1, **{**NEVER, **dict.fromkeys(chances, 1.0)})
    size = augmenter.source_size
    solid = torch.zeros(size, dtype=torch.uint8)
    a, b, c = (n // 2 for n in size)
    solid[a - 5 : a + 1, b - 2 : b + 8, c : c + 3] = 1
    solid[a : a + 4, b - 6 : b, c - 4 : c + 1] = 1
    seeds = range(12)
    images, labels, _ = augmenter([solid[None].float()] * 12, [solid] * 12, None, seeds=seeds)
    is_clear = (images[:, 0] - 0.5).abs() > 1e-3
    assert torch.equal((images[:, 0] > 0.5)[is_clear], (labels == 1)[is_clear])
    assert len({tuple(x.flatten().tolist()) for x in labels}) == 12


def test_a_sample_without_any_draw_is_untouched_beside_others():
    augmenter = make(mirror_axes=())
    seeds = [s for s in range(400) if _is_untouched(augmenter, s)][:2] + SEEDS[:2]
    images, segmentations, _ = make_batch(augmenter, count=4)
    result, labels, _ = augmenter(images, segmentations, None, seeds=seeds)
    assert torch.equal(result[:2], centre(images[:2], augmenter.patch_size))
    assert torch.equal(labels[:2], centre(segmentations[:2], augmenter.patch_size))


def _is_untouched(augmenter, seed):
    draw = augmenter.draw(seed)
    nothing = type(draw.channels[0])()
    return draw.deformation is None and all(channel == nothing for channel in draw.channels)


def test_slices_of_a_thick_patch_stay_where_they_are():
    fields = {**NEVER, "rotation_probability": 1.0, "scaling_probability": 1.0}
    augmenter = make((4, 18, 15), channels=1, dummy_2d=True, **fields, mirror_axes=())
    assert augmenter.source_size[0] == 4
    size = augmenter.source_size
    image = torch.arange(4.0)[:, None, None].expand(1, *size)
    result, labels, _ = augmenter([image] * 5, [image[0].to(torch.uint8)] * 5, None, seeds=range(5))
    expected = torch.arange(4.0)[:, None, None].expand(4, 18, 15)
    for one, label in zip(result, labels, strict=True):
        np.testing.assert_allclose(one[0].numpy(), expected.numpy(), atol=1e-5)
        assert torch.equal(label, expected.to(torch.uint8))


def test_thick_slices_keep_their_resolution_across():
    fields = {**NEVER, "low_resolution_probability": 1.0}
    augmenter = make((6, 18, 15), channels=1, dummy_2d=True, **fields, mirror_axes=())
    image = torch.randn(6, generator=torch.Generator().manual_seed(0))[:, None, None]
    image = image.expand(1, *augmenter.source_size)
    seeds = range(8)
    assert any(augmenter.draw(s).channels[0].low_resolution for s in seeds)
    result, _, _ = augmenter(
        [image] * 8, [torch.zeros(augmenter.source_size, dtype=torch.uint8)] * 8, None, seeds=seeds
    )
    np.testing.assert_allclose(result.numpy(), image.expand(8, 1, 6, 18, 15).numpy(), atol=1e-5)


@pytest.mark.parametrize("patch_size", [(5,), (2, 3, 4, 5)])
def test_wrong_number_of_axes_is_refused(patch_size):
    with pytest.raises(ValueError, match="patch_size must have 2 or 3 axes"):
        make(patch_size)


def test_wrong_batches_are_refused():
    augmenter = make()
    images, segmentations, outside = make_batch(augmenter)
    with pytest.raises(ValueError, match=r"as many images \(6\), segmentations \(6\).*seeds \(2\)"):
        augmenter(images, segmentations, outside, seeds=[1, 2])
    with pytest.raises(ValueError, match="with 2 channels and 3 axes"):
        augmenter(images[:, :1], segmentations, outside, seeds=SEEDS)
    with pytest.raises(ValueError, match="a segmentation has shape"):
        augmenter(images, segmentations[:, 1:], outside, seeds=SEEDS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device():
    augmenter = make(**ALWAYS)
    batch = [x.cuda() for x in make_batch(augmenter)]
    augmenter(*batch, seeds=SEEDS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = augmenter(*batch, seeds=SEEDS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.is_cuda for x in result)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_deformations_on_the_device_equal_those_on_the_host():
    fields = {**NEVER, "rotation_probability": 1.0, "scaling_probability": 1.0}
    augmenter = make((20, 32, 24), **fields)
    batch = make_batch(augmenter)
    host = augmenter(*batch, seeds=SEEDS)
    device = augmenter(*(x.cuda() for x in batch), seeds=SEEDS)
    np.testing.assert_allclose(device[0].cpu().numpy(), host[0].numpy(), atol=1e-4)
    assert (device[1].cpu() == host[1]).float().mean() > 0.999
