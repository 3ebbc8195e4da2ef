"""Intensity transforms of one channel, and the drawing of their parameters.

Every transform takes a channel (*spatial) and returns a new one on the same device. Parameters are
plain numbers of the host; statistics of the channel stay on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medseg.augment.streams import between

NOISE_STD = (0.0, 0.1)
"""Standard deviation of the additive noise, in units of the normalised image."""
BLUR_SIGMA = (0.5, 1.0)
"""Gaussian width along each axis, voxels."""
BRIGHTNESS_FACTOR = (0.75, 1.25)
"""Factor of the intensities."""
CONTRAST_FACTOR = (0.75, 1.25)
"""Factor of the distance from the mean."""
LOW_RESOLUTION_FACTOR = (0.5, 1.0)
"""Share of the voxels along each axis that a simulated low resolution keeps."""
GAMMA_EXPONENT = (0.7, 1.5)
"""Exponent of the intensities scaled to [0, 1]."""
CHANNEL_PROBABILITY = 0.5
"""Chance of each channel to take part in a blur or a low resolution."""
_SMALLEST = 1e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class IntensitySettings:
    """The chance of each transform, in the order in which they are applied."""

    noise: float
    """Additive Gaussian noise."""
    blur: float
    """Gaussian blur."""
    brightness: float
    """Multiplication."""
    contrast: float
    """Contrast about the mean, range kept."""
    low_resolution: float
    """Simulated low resolution."""
    inverted_gamma: float
    """Gamma of the negated image."""
    gamma: float
    """Gamma."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelDraw:
    """What happens to one channel of one sample; None: nothing."""

    noise_std: float | None = None
    """Standard deviation, the same for all channels of a sample."""
    blur_sigma: tuple[float, ...] | None = None
    """Gaussian width along each axis, voxels."""
    brightness: float | None = None
    """Factor."""
    contrast: float | None = None
    """Factor."""
    low_resolution: float | None = None
    """Share of the voxels kept along each axis."""
    inverted_gamma: float | None = None
    """Exponent."""
    gamma: float | None = None
    """Exponent."""


def draw_channels(
    settings: IntensitySettings, num_channels: int, num_axes: int, rng: np.random.Generator
) -> tuple[ChannelDraw, ...]:
    """Draw one sample's transforms; all numbers are drawn whether they are used or not.

    Source:
        Parameter distributions of nnU-Net v2 (2.8.1): which transforms happen is drawn per sample;
        noise strength per sample; all else per channel. Factors of brightness and contrast, and
        gamma exponents, lie below 1 in half of the draws and above 1 in the other half.
    """
    uniforms = rng.random((num_channels + 1, 11 + num_axes)).tolist()
    first = uniforms[0]
    happens = IntensitySettings(
        noise=first[0] < settings.noise,
        blur=first[1] < settings.blur,
        brightness=first[2] < settings.brightness,
        contrast=first[3] < settings.contrast,
        low_resolution=first[4] < settings.low_resolution,
        inverted_gamma=first[5] < settings.inverted_gamma,
        gamma=first[6] < settings.gamma,
    )
    noise_std = between(first[7], NOISE_STD) if happens.noise else None
    return tuple(_draw_channel(happens, noise_std, row) for row in uniforms[1:])


def _draw_channel(
    happens: IntensitySettings, noise_std: float | None, u: Sequence[float]
) -> ChannelDraw:
    blurs = happens.blur and u[0] < CHANNEL_PROBABILITY
    coarsens = happens.low_resolution and u[1] < CHANNEL_PROBABILITY
    return ChannelDraw(
        noise_std=noise_std,
        blur_sigma=tuple(between(v, BLUR_SIGMA) for v in u[11:]) if blurs else None,
        brightness=around_one(u[3], u[4], BRIGHTNESS_FACTOR) if happens.brightness else None,
        contrast=around_one(u[5], u[6], CONTRAST_FACTOR) if happens.contrast else None,
        low_resolution=between(u[2], LOW_RESOLUTION_FACTOR) if coarsens else None,
        inverted_gamma=around_one(u[7], u[8], GAMMA_EXPONENT) if happens.inverted_gamma else None,
        gamma=around_one(u[9], u[10], GAMMA_EXPONENT) if happens.gamma else None,
    )


def around_one(side: float, value: float, limits: tuple[float, float]) -> float:
    """Map two uniform draws to a factor: below 1 in half of the draws, above 1 in the others.

    Examples:
        >>> around_one(0.3, 0.5, (0.5, 2.0)), around_one(0.7, 0.5, (0.5, 2.0))
        (0.75, 1.5)
    """
    low, high = limits
    if side < 0.5 and low < 1:
        return between(value, (low, 1.0))
    return between(value, (max(low, 1.0), high))


def transform_channel(
    channel: Tensor,
    draw: ChannelDraw,
    *,
    generator: torch.Generator | None = None,
    kept_axes: Sequence[int] = (),
) -> Tensor:
    """Apply one channel's transforms in order; returns the argument itself if there are none.

    Args:
        channel: Intensities (*spatial).
        draw: What to apply.
        generator: Source of the noise, on the channel's device.
        kept_axes: Axes on which a low resolution is not simulated.
    """
    if draw.noise_std is not None:
        channel = add_noise(channel, draw.noise_std, generator)
    if draw.blur_sigma is not None:
        channel = blur(channel, draw.blur_sigma)
    if draw.brightness is not None:
        channel = channel * draw.brightness
    if draw.contrast is not None:
        channel = change_contrast(channel, draw.contrast)
    if draw.low_resolution is not None:
        channel = lower_resolution(channel, draw.low_resolution, kept_axes=kept_axes)
    if draw.inverted_gamma is not None:
        channel = -change_gamma(-channel, draw.inverted_gamma)
    if draw.gamma is not None:
        channel = change_gamma(channel, draw.gamma)
    return channel


def add_noise(channel: Tensor, std: float, generator: torch.Generator | None) -> Tensor:
    """Add Gaussian noise of standard deviation `std`, independent in every voxel."""
    noise = torch.empty(channel.shape, dtype=channel.dtype, device=channel.device)
    return noise.normal_(0.0, std, generator=generator).add_(channel)


def blur(channel: Tensor, sigma: Sequence[float]) -> Tensor:
    """Smooth with a Gaussian along each axis, the borders reflected about their voxels' centres.

    Args:
        channel: Intensities (*spatial).
        sigma: Gaussian width along each axis, voxels.

    Source:
        Kernel length (the odd number nearest to 6 sigma + 0.5) and border of batchgeneratorsv2.
    """
    for axis, width in enumerate(sigma):
        channel = _blur_axis(channel, axis, width)
    return channel


def blur_radius(sigma: float) -> int:
    """Return the half length of the blur's kernel in voxels.

    Examples:
        >>> [blur_radius(sigma) for sigma in (0.5, 0.75, 1.0)]
        [1, 2, 3]
    """
    return int(3 * sigma + 0.25)


def _blur_axis(channel: Tensor, axis: int, sigma: float) -> Tensor:
    """Add up shifted copies: for kernels this short faster than a convolution on the CPU."""
    size = channel.shape[axis]
    radius = min(blur_radius(sigma), size - 1)
    if radius == 0:
        return channel
    weights = [math.exp(-0.5 * (step / sigma) ** 2) for step in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    lower = channel.narrow(axis, 1, radius).flip(axis)
    upper = channel.narrow(axis, size - 1 - radius, radius).flip(axis)
    padded = torch.cat([lower, channel, upper], axis)
    smooth = channel * (weights[0] / total)
    for step in range(1, radius + 1):
        for start in (radius - step, radius + step):
            smooth.add_(padded.narrow(axis, start, size), alpha=weights[step] / total)
    return smooth


def change_contrast(channel: Tensor, factor: float) -> Tensor:
    """Scale the distance of each voxel from the mean, and clip to the range before."""
    mean = channel.mean()
    low, high = torch.aminmax(channel)
    return ((channel - mean) * factor + mean).clamp(low, high)


def lower_resolution(channel: Tensor, factor: float, *, kept_axes: Sequence[int] = ()) -> Tensor:
    """Down-sample by nearest neighbour and go back linearly, voxel corners aligned.

    Args:
        channel: Intensities (*spatial).
        factor: Share of the voxels that the low resolution has along each axis.
        kept_axes: Axes left alone.

    Source:
        Behaviour of batchgeneratorsv2's SimulateLowResolutionTransform.
    """
    low = channel
    for axis, size in enumerate(channel.shape):
        size_low = max(1, round(size * factor))
        if axis not in kept_axes and size_low != size:
            kept = torch.arange(size_low, device=channel.device)
            places = ((2 * kept + 1) * size).div(2 * size_low, rounding_mode="floor")
            low = low.index_select(axis, places)
    if low is channel:
        return channel
    mode = "trilinear" if channel.ndim == 3 else "bilinear"
    return functional.interpolate(low[None, None], channel.shape, mode=mode)[0, 0]


def change_gamma(channel: Tensor, exponent: float) -> Tensor:
    """Raise the intensities, scaled to [0, 1], to a power; mean and deviation are kept."""
    low, high = torch.aminmax(channel)
    span = high - low
    scaled = (channel - low) / span.clamp(min=_SMALLEST)
    changed = scaled.log_().mul_(exponent).exp_().mul_(span).add_(low)
    mean, norm = _mean_and_norm(channel)
    changed_mean, changed_norm = _mean_and_norm(changed)
    floor = _SMALLEST * math.sqrt(max(channel.numel() - 1, 1))
    return (changed - changed_mean).mul_(norm / changed_norm.clamp(min=floor)).add_(mean)


def _mean_and_norm(channel: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the Euclidean norm of the distances from it."""
    mean = channel.mean()
    return mean, torch.linalg.vector_norm(channel - mean)
