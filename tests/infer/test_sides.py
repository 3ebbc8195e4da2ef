"""Labels with sides in test-time augmentation, from the image to the result."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.errors import BundleError, ConfigError
from medseg.infer.loading import load
from medseg.schema.plans import LeftRight

LABELS = {"background": 0, "left": 40, "right": 7, "lesion": 300}
INDICES = {"left": 2, "right": 1}
PAIRS = (("left", "right"),)
SHAPE, SPACING = (16, 12, 8), (0.9, 1.2, 2.0)
"""One tile exactly: voxels (I, J, K), network axes (K, I, J)."""


def make_model(make, folder, *, dimensions=3, policy="swap", pairs=PAIRS, swap_axes=()):
    spacing, patch_size = (2.0, 0.9, 1.2)[-dimensions:], (8, 16, 12)[-dimensions:]
    plans = make.plans(spacing=spacing, patch_size=patch_size, network_axes=(2, 0, 1))
    plans = plans.model_copy(update={"left_right": LeftRight(axis=1, policy=policy, pairs=pairs)})
    spec = make.spec(labels=LABELS)
    return load(make.bundle(folder, plans=plans, spec=spec, swap_axes=swap_axes).folder)


def predict(model, channels):
    """Return probabilities (L, I, J, K) and label map of an image on canonical axes."""
    image = (channels, np.diag([*SPACING, 1.0]))
    result = model.predict(image, probabilities=True, tta="flips")
    return result.probabilities, result.segmentation


def exchanged(probabilities):
    """Mirror from left to right, and give each label its partner's probability."""
    result = probabilities[:, ::-1].copy()
    left, right = INDICES["left"], INDICES["right"]
    result[[left, right]] = result[[right, left]]
    return result


@pytest.mark.parametrize(("dimensions", "axis"), [(3, 1), (2, 0)])
def test_the_mirrored_image_has_the_mirrored_labels_with_sides_exchanged(
    make, tmp_path, dimensions, axis
):
    channels = np.random.default_rng(0).normal(50, 40, (2, *SHAPE)).astype(np.float32)
    model = make_model(make, tmp_path / "swap", dimensions=dimensions, swap_axes=(axis,))
    straight, labels = predict(model, channels)
    turned, turned_labels = predict(model, channels[:, ::-1])
    np.testing.assert_allclose(turned, exchanged(straight), atol=1e-4)
    values = {0: 0, 7: 40, 40: 7, 300: 300}
    assert set(np.unique(labels)) >= {7, 40}
    expected = np.vectorize(values.get)(labels[::-1])
    assert (turned_labels == expected).mean() > 0.999
    plain = make_model(make, tmp_path / "plain", dimensions=dimensions)
    straight, turned = (predict(plain, image)[0] for image in (channels, channels[:, ::-1]))
    np.testing.assert_allclose(turned, straight[:, ::-1], atol=1e-4)
    assert np.abs(turned - exchanged(straight)).max() > 0.01


def test_a_bundle_that_swaps_must_say_what(make, tmp_path):
    with pytest.raises(BundleError, match=r"plans\.json has no left_right\.pairs"):
        make_model(make, tmp_path / "none", pairs=(), swap_axes=(1,))
    with pytest.raises(ConfigError, match=r"left_right\.pairs has 'liver'; expected the name of a"):
        make_model(make, tmp_path / "wrong", pairs=(("left", "liver"),), swap_axes=(1,))


def test_pairs_that_are_not_swapped_are_not_looked_at(make, tmp_path):
    make_model(make, tmp_path / "forbid", policy="forbid", pairs=(("left", "liver"),))
