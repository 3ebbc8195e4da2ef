from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from medseg.augment.pipeline import Augmenter
from medseg.augment.sample import centre
from medseg.schema.recipe import AugmentationRecipe

NEVER = {name: 0.0 for name in AugmentationRecipe.model_fields if name.endswith("_probability")}
ALWAYS = dict.fromkeys(NEVER, 1.0)


def make(patch_size=(8, 13, 10), *, dummy_2d=False, **fields):
    return Augmenter(
        AugmentationRecipe(backend="batchgenerators", **fields),
        patch_size,
        mask_channels=(True, False),
        dummy_2d=dummy_2d,
    )


def make_sample(augmenter, seed=0):
    rng = np.random.default_rng(seed)
    size = augmenter.source_size
    four = np.kron(rng.integers(0, 4, [-(-n // 4) for n in size]), np.ones([4] * len(size)))
    four = torch.from_numpy(four[tuple(slice(n) for n in size)])
    image = torch.from_numpy(rng.normal(size=(2, *size)).astype(np.float32))
    return image, torch.where(four == 3, 0, four).to(torch.uint8), four == 3


@pytest.mark.parametrize(
    ("patch_size", "dummy_2d"), [((8, 13, 10), False), ((3, 13, 10), True), ((12, 9), False)]
)
def test_types_sizes_labels_and_arguments(patch_size, dummy_2d):
    augmenter = make(patch_size, dummy_2d=dummy_2d, **ALWAYS)
    sample = make_sample(augmenter)
    before = [x.clone() for x in sample]
    image, labels, outside = augmenter(*([x, x] for x in sample), seeds=[1, 2])
    for x, copy, y in zip(sample, before, (image, labels, outside), strict=True):
        assert torch.equal(x, copy)
        assert y.dtype == x.dtype
        assert tuple(y.shape[-len(patch_size) :]) == patch_size
    assert set(labels.unique().tolist()) <= {0, 1, 2}
    assert torch.isfinite(image).all()
    assert (image[:, 0][outside] == 0).all()
    assert outside.any()


def test_same_seed_same_result_whatever_the_batch_and_the_global_state():
    augmenter = make(**ALWAYS)
    sample = make_sample(augmenter)
    first = augmenter(*([x] * 3 for x in sample), seeds=[4, 5, 4])
    np.random.random(3)
    random.random()
    second = augmenter(*([x] for x in sample), seeds=[4])
    for many, one in zip(first, second, strict=True):
        assert torch.equal(many[0], one[0])
        assert torch.equal(many[0], many[2])
        assert not torch.equal(many[0], many[1])


def test_global_generators_are_left_as_they_were():
    augmenter = make(**ALWAYS)
    states = np.random.get_state()[1].tolist(), random.getstate()
    augmenter(*([x] for x in make_sample(augmenter)), seeds=[4])
    assert states == (np.random.get_state()[1].tolist(), random.getstate())


def test_without_any_transform_the_result_is_the_centre():
    augmenter = make(**NEVER, mirror_axes=())
    larger = make(**ALWAYS)
    image, segmentation, _ = make_sample(larger)
    result, labels, outside = augmenter([image], [segmentation], None, seeds=[3])
    assert torch.equal(result[0], centre(image, augmenter.patch_size))
    assert torch.equal(labels[0], centre(segmentation, augmenter.patch_size))
    assert outside is None


def test_image_and_labels_undergo_the_same_deformation():
    fields = {**NEVER, "rotation_probability": 1.0, "scaling_probability": 1.0}
    augmenter = make((14, 20, 17), **fields)
    solid = torch.zeros(augmenter.source_size, dtype=torch.uint8)
    a, b, c = (n // 2 for n in augmenter.source_size)
    solid[a - 5 : a + 1, b - 2 : b + 8, c : c + 3] = 1
    solid[a : a + 4, b - 6 : b, c - 4 : c + 1] = 1
    image = torch.stack([solid.float()] * 2)
    images, labels, _ = augmenter([image] * 4, [solid] * 4, None, seeds=range(4))
    agreement = ((images[:, 0] > 0.5) == (labels == 1)).float().mean()
    assert agreement > 0.99


def test_both_backends_change_intensities_alike_on_average():
    """Mean and deviation over many samples: the same transforms with the same chances."""
    fields = {**NEVER, "brightness_probability": 0.5, "noise_probability": 1.0, "mirror_axes": ()}
    reference = make((6, 7, 8), **fields)
    ours = Augmenter(
        AugmentationRecipe(**fields), (6, 7, 8), mask_channels=(False, False), dummy_2d=False
    )
    image = torch.full((2, 6, 7, 8), 2.0)
    segmentation = torch.zeros((6, 7, 8), dtype=torch.uint8)
    count = 300
    means, deviations = [], []
    for augmenter in (reference, ours):
        result, _, _ = augmenter([image] * count, [segmentation] * count, None, seeds=range(count))
        flat = result.reshape(count * 2, -1)
        means.append((flat.mean(1) - 2).abs().mean())
        deviations.append(flat.std(1).mean())
    assert means[0].item() == pytest.approx(means[1].item(), rel=0.2)
    assert deviations[0].item() == pytest.approx(deviations[1].item(), rel=0.1)
