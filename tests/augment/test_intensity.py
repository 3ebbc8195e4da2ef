from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import kstest
from torch.nn import functional

from medseg.augment import intensity
from medseg.augment.intensity import ChannelDraw, IntensitySettings, draw_channels
from medseg.augment.streams import stream

DEFAULT = IntensitySettings(
    noise=0.1,
    blur=0.2,
    brightness=0.15,
    contrast=0.15,
    low_resolution=0.25,
    inverted_gamma=0.1,
    gamma=0.3,
)
ALWAYS = IntensitySettings(**dict.fromkeys(dataclasses.asdict(DEFAULT), 1.0))
FIELDS = {
    "noise": "noise_std",
    "blur": "blur_sigma",
    "brightness": "brightness",
    "contrast": "contrast",
    "low_resolution": "low_resolution",
    "inverted_gamma": "inverted_gamma",
    "gamma": "gamma",
}


@pytest.fixture
def channel():
    """Return a volume of three different lengths, skewed intensities and no symmetry."""
    rng = np.random.default_rng(3)
    ramp = np.linspace(-1, 2, 9)[:, None, None] + np.linspace(0, 1, 13)[None, :, None] ** 2
    return torch.from_numpy((ramp + rng.gamma(2.0, 0.4, (9, 13, 11))).astype(np.float32))


@pytest.mark.parametrize("sigma", [(0.5, 0.75, 1.0), (0.58, 0.6, 0.92)])
def test_blur_equals_scipys_filter_with_mirrored_borders(channel, sigma):
    expected = gaussian_filter(
        channel.numpy().astype(np.float64),
        sigma,
        mode="mirror",
        radius=[intensity.blur_radius(s) for s in sigma],
    )
    np.testing.assert_allclose(intensity.blur(channel, sigma).numpy(), expected, atol=1e-5)


def test_blur_in_2d_and_on_axes_shorter_than_its_kernel():
    image = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    expected = gaussian_filter(image.numpy(), (1.0, 1.0), mode="mirror", radius=(1, 3))
    np.testing.assert_allclose(intensity.blur(image, (1.0, 1.0)).numpy(), expected, atol=1e-5)
    assert torch.equal(intensity.blur(image[:1], (1.0, 0.0001)), image[:1])


def test_contrast_scales_about_the_mean_and_keeps_the_range(channel):
    x = channel.numpy().astype(np.float64)
    for factor in (0.75, 1.25):
        expected = np.clip((x - x.mean()) * factor + x.mean(), x.min(), x.max())
        result = intensity.change_contrast(channel, factor).numpy()
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_gamma_is_a_power_of_the_scaled_intensities_with_statistics_kept(channel):
    x = channel.numpy().astype(np.float64)
    for exponent in (0.7, 1.5):
        span = x.max() - x.min()
        changed = ((x - x.min()) / span) ** exponent * span + x.min()
        expected = (changed - changed.mean()) / changed.std(ddof=1) * x.std(ddof=1) + x.mean()
        result = intensity.change_gamma(channel, exponent).numpy()
        np.testing.assert_allclose(result, expected, atol=2e-5)


def test_gamma_leaves_a_constant_channel_alone():
    constant = torch.full((4, 5, 6), 2.5)
    np.testing.assert_allclose(intensity.change_gamma(constant, 0.8).numpy(), 2.5, atol=1e-6)


def _low_resolution(x, factor, kept_axes):
    """Down-sample by picking, up-sample by interpolation, one axis at a time."""
    for axis in set(range(x.ndim)) - set(kept_axes):
        size = x.shape[axis]
        size_low = round(size * factor)
        picked = [math.floor((2 * i + 1) * size / (2 * size_low)) for i in range(size_low)]
        low = np.moveaxis(x, axis, -1)[..., picked]
        where = (np.arange(size) + 0.5) * size_low / size - 0.5
        flat = [np.interp(where, range(size_low), line) for line in low.reshape(-1, size_low)]
        x = np.moveaxis(np.reshape(flat, (*low.shape[:-1], size)), -1, axis)
    return x


@pytest.mark.parametrize("factor", [0.5, 0.62, 0.87, 1.0])
@pytest.mark.parametrize("kept_axes", [(), (0,)])
def test_low_resolution_picks_voxels_and_interpolates_between_them(channel, factor, kept_axes):
    expected = _low_resolution(channel.numpy().astype(np.float64), factor, kept_axes)
    result = intensity.lower_resolution(channel, factor, kept_axes=kept_axes)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


def test_low_resolution_equals_torchs_interpolation(channel):
    low = functional.interpolate(channel[None, None], (6, 9, 7), mode="nearest-exact")
    expected = functional.interpolate(low, channel.shape, mode="trilinear")[0, 0]
    result = intensity.lower_resolution(channel, 0.66)
    np.testing.assert_allclose(result.numpy(), expected.numpy(), atol=1e-5)


def test_noise_has_the_given_deviation_and_no_mean():
    flat = torch.full((40, 50, 30), 3.0)
    noise = intensity.add_noise(flat, 0.08, torch.Generator().manual_seed(0)) - 3
    assert noise.mean().abs() < 4 * 0.08 / math.sqrt(60000)
    assert noise.std().item() == pytest.approx(0.08, rel=0.02)
    assert kstest(noise.flatten().numpy()[:2000] / 0.08, "norm").pvalue > 0.01


def test_transforms_follow_each_other_in_the_documented_order(channel):
    draw = ChannelDraw(
        noise_std=0.05,
        blur_sigma=(0.6, 0.7, 0.8),
        brightness=1.2,
        contrast=1.1,
        low_resolution=0.7,
        inverted_gamma=1.3,
        gamma=0.8,
    )
    before = channel.clone()
    result = intensity.transform_channel(channel, draw, generator=torch.Generator().manual_seed(9))
    x = intensity.add_noise(channel, 0.05, torch.Generator().manual_seed(9))
    x = intensity.blur(x, (0.6, 0.7, 0.8)) * 1.2
    x = intensity.lower_resolution(intensity.change_contrast(x, 1.1), 0.7)
    x = intensity.change_gamma(-intensity.change_gamma(-x, 1.3), 0.8)
    assert torch.equal(result, x)
    assert torch.equal(channel, before)


def test_nothing_drawn_returns_the_channel_itself(channel):
    assert intensity.transform_channel(channel, ChannelDraw()) is channel


def test_shares_of_the_transforms_are_the_probabilities():
    count = 3000
    draws = [draw_channels(DEFAULT, 2, 3, stream(seed)) for seed in range(count)]
    for name, field in FIELDS.items():
        share = {"blur": 0.5, "low_resolution": 0.5}.get(name, 1.0) * getattr(DEFAULT, name)
        for c in range(2):
            found = np.mean([getattr(d[c], field) is not None for d in draws])
            assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / count), name


def test_channels_take_part_together_or_one_by_one():
    """Per sample: noise, brightness, contrast, gamma. Per channel: blur, low resolution."""
    draws = [draw_channels(DEFAULT, 2, 3, stream(seed)) for seed in range(1500)]
    for name, field in FIELDS.items():
        both = [tuple(getattr(c, field) is not None for c in d) for d in draws]
        differ = any(first != second for first, second in both)
        assert differ == (name in ("blur", "low_resolution")), name
    assert all(first.noise_std == second.noise_std for first, second in draws)
    assert all(a.gamma != b.gamma for a, b in draws if a.gamma is not None)
    assert all(a.brightness != b.brightness for a, b in draws if a.brightness is not None)


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [("noise_std", 0.0, 0.1), ("low_resolution", 0.5, 1.0)],
)
def test_even_parameters_are_uniform(field, low, high):
    draws = [draw_channels(ALWAYS, 1, 3, stream(seed))[0] for seed in range(1500)]
    found = [v for d in draws if (v := getattr(d, field)) is not None]
    assert kstest(found, "uniform", args=(low, high - low)).pvalue > 0.01


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [
        ("brightness", 0.75, 1.25),
        ("contrast", 0.75, 1.25),
        ("inverted_gamma", 0.7, 1.5),
        ("gamma", 0.7, 1.5),
    ],
)
def test_factors_are_below_one_in_half_of_the_draws(field, low, high):
    found = np.array(
        [getattr(draw_channels(ALWAYS, 1, 3, stream(seed))[0], field) for seed in range(1500)]
    )
    assert abs((found < 1).mean() - 0.5) < 4 * 0.5 / math.sqrt(1500)
    assert kstest(found[found < 1], "uniform", args=(low, 1 - low)).pvalue > 0.01
    assert kstest(found[found > 1], "uniform", args=(1, high - 1)).pvalue > 0.01


def test_blur_widths_are_uniform_and_independent_between_axes():
    draws = [draw_channels(ALWAYS, 1, 3, stream(seed))[0].blur_sigma for seed in range(2000)]
    sigma = np.array([d for d in draws if d is not None])
    for axis in range(3):
        assert kstest(sigma[:, axis], "uniform", args=(0.5, 0.5)).pvalue > 0.01
    assert np.abs(np.corrcoef(sigma.T) - np.eye(3)).max() < 0.15


def test_one_probability_does_not_change_the_other_transforms():
    more = dataclasses.replace(DEFAULT, blur=1.0)
    for seed in range(100):
        before, after = (draw_channels(s, 2, 3, stream(seed)) for s in (DEFAULT, more))
        for a, b in zip(before, after, strict=True):
            assert dataclasses.replace(b, blur_sigma=a.blur_sigma) == a
