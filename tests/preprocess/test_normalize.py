"""Intensity normalisation against the formulas, written out voxel by voxel."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.preprocess.normalize import normalize
from medseg.schema.fingerprint import IntensityStatistics

CT = IntensityStatistics(
    mean=55.0, std=31.0, median=60, min=-900, max=1500, percentile_00_5=-70, percentile_99_5=180
)


@pytest.fixture
def image():
    rng = np.random.default_rng(3)
    return rng.normal(40, 90, size=(6, 7, 5)).astype(np.float32)


@pytest.fixture
def inside(image):
    mask = np.zeros(image.shape, bool)
    mask[1:5, 2:, :4] = True
    mask[0, 0, 0] = True
    return mask


def one(image, inside, scheme, *, use_mask=False, statistics=CT):
    return normalize(
        image[np.newaxis],
        inside,
        schemes=(scheme,),
        use_mask=(use_mask,),
        intensity=(statistics,),
    )[0]


def test_zscore_of_the_whole_image(image, inside):
    values = image.astype(np.float64)
    expected = (values - values.mean()) / values.std()
    np.testing.assert_allclose(one(image, inside, "zscore"), expected, atol=1e-5)


def test_zscore_inside_a_mask_leaves_the_rest_alone(image, inside):
    values = [float(v) for v, keep in zip(image.flat, inside.flat, strict=True) if keep]
    mean = sum(values) / len(values)
    std = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
    found = one(image, inside, "zscore", use_mask=True)
    np.testing.assert_allclose(found[inside], (image[inside] - mean) / std, atol=1e-5)
    np.testing.assert_array_equal(found[~inside], image[~inside])


def test_ct_clips_to_the_percentiles_of_the_dataset(image, inside):
    expected = [(min(max(float(v), -70.0), 180.0) - 55.0) / 31.0 for v in image.flat]
    found = one(image, inside, "ct", use_mask=True)  # CT knows no mask
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-5)


def test_parameter_maps_keep_what_lies_around_the_foreground(image, inside):
    """The range -70 to 180 is 250 wide; clipped is only what lies beyond -320 and 430."""
    image = image * 4
    expected = [(min(max(float(v), -320.0), 430.0) - 55.0) / 31.0 for v in image.flat]
    assert min(expected) == (-320 - 55) / 31
    assert max(expected) == (430 - 55) / 31
    found = one(image, inside, "quantitative", use_mask=True)  # nor does a map know a mask
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-4)


def test_parameter_maps_may_have_any_unit(image, inside):
    """ADC in m^2/s is a thousand million times smaller than in 1e-3 mm^2/s; CT has one unit."""
    tiny = IntensityStatistics(**{k: v * 1e-11 for k, v in CT.model_dump().items()})
    found = one(image * np.float32(1e-11), inside, "quantitative", statistics=tiny)
    np.testing.assert_allclose(found, one(image, inside, "quantitative"), rtol=1e-4, atol=1e-4)


def test_rescaling_to_the_unit_range(image, inside):
    low, high = float(image.min()), float(image.max())
    found = one(image, inside, "rescale_0_1")
    np.testing.assert_allclose(found, (image - low) / (high - low), atol=1e-6)
    assert (found.min(), found.max()) == (0.0, 1.0)


def test_rgb_and_none(image, inside):
    np.testing.assert_allclose(one(image, inside, "rgb_0_1"), image / 255.0, rtol=1e-6)
    np.testing.assert_array_equal(one(image, inside, "none"), image)


@pytest.mark.parametrize(
    "scheme", ["zscore", "ct", "quantitative", "rescale_0_1", "rgb_0_1", "none"]
)
@pytest.mark.parametrize("value", [0.0, 7.5])
def test_constant_images_stay_finite(inside, scheme, value):
    image = np.full(inside.shape, value, np.float32)
    flat = CT.model_copy(update={"std": 0.0, "percentile_00_5": 0.0, "percentile_99_5": 0.0})
    for statistics in (CT, flat) if scheme == "ct" else (CT,):
        for use_mask in (False, True):
            found = one(image, inside, scheme, use_mask=use_mask, statistics=statistics)
            assert np.isfinite(found).all()


def test_empty_mask_leaves_the_channel_as_it_is(image):
    """An all-zero image has no inside: nothing to take a mean of, and no warning."""
    nothing = np.zeros(image.shape, bool)
    np.testing.assert_array_equal(one(image * 0, nothing, "zscore", use_mask=True), image * 0)


def test_each_channel_has_its_own_scheme_and_the_input_is_untouched(image, inside):
    channels = np.stack([image, image + 100, image * 2])
    before = channels.copy()
    other = CT.model_copy(update={"mean": 150.0})
    found = normalize(
        channels,
        inside,
        schemes=("zscore", "ct", "none"),
        use_mask=(True, False, False),
        intensity=(CT, other, CT),
    )
    np.testing.assert_array_equal(channels, before)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0], one(image, inside, "zscore", use_mask=True))
    np.testing.assert_array_equal(found[1], one(image + 100, inside, "ct", statistics=other))
    np.testing.assert_array_equal(found[2], image * 2)
