"""Intensity normalisation, one scheme per channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import Normalization

_EPSILON = 1e-8
_SMALLEST = float(np.finfo(np.float32).tiny)


def normalize(
    channels: NDArray[np.float32],
    inside: NDArray[np.bool_],
    *,
    schemes: Sequence[Normalization],
    use_mask: Sequence[bool],
    intensity: Sequence[IntensityStatistics],
    least_std: Literal["floor", "added"] = "floor",
    blanks_outside: bool = False,
) -> NDArray[np.float32]:
    """Return normalised intensities.

    Args:
        channels: (C, *spatial) raw intensities.
        inside: (*spatial) mask of the imaged region.
        schemes: Scheme of each channel.
        use_mask: Per channel, whether a z-score is taken from `inside` and applied there only.
        intensity: Dataset statistics of each channel, used by `ct`, `ct_case` and `quantitative`.
        least_std: `floor`: a standard deviation is at least 1e-8; `added`: 1e-8 is added to that of
            a z-score, and nothing to the others.
        blanks_outside: Whether channels with `use_mask` become 0 outside, whatever their scheme.

    Source:
        Normalisation schemes of nnU-Net v2, and with the last two arguments of v1; `quantitative`
        is our own.
    """
    out = np.empty(channels.shape, dtype=np.float32)
    for index, scheme in enumerate(schemes):
        channel, result = channels[index], out[index]
        mask = inside if use_mask[index] else None
        if scheme == "zscore":
            _zscore(channel, mask, result, least_std)
        elif scheme == "ct":
            least = _EPSILON if least_std == "floor" else _SMALLEST
            _by_statistics(channel, intensity[index], result, least_std=least)
        elif scheme == "ct_case":
            _by_case(channel, intensity[index], result)
        elif scheme == "quantitative":
            _by_statistics(channel, intensity[index], result, margin=1)
        elif scheme == "rescale_0_1":
            np.subtract(channel, channel.min(), out=result)
            result /= max(float(result.max()), _EPSILON)
        elif scheme == "rgb_0_1":
            np.divide(channel, np.float32(255), out=result)
        else:
            result[...] = channel
        if blanks_outside and mask is not None and scheme != "none":
            result[~mask] = 0
    return out


def normalize_literal(
    channels: NDArray[np.float32],
    inside: NDArray[np.bool_],
    *,
    schemes: Sequence[Normalization],
    use_mask: Sequence[bool],
    intensity: Sequence[IntensityStatistics],
    least_std: Literal["floor", "added"] = "floor",
    blanks_outside: bool = False,
) -> NDArray[np.float32]:
    """Do what `normalize` does, in place and in the arithmetic of the originals: float32.

    A mean in float32 depends on the order of the sum, so on the memory layout of `channels`, which
    is taken as it is.

    Returns:
        `channels`.

    Source:
        nnU-Net v1 and v2; `quantitative` is our own and has no other arithmetic.
    """
    for index, scheme in enumerate(schemes):
        image, statistics = channels[index], intensity[index]
        mask = inside if use_mask[index] else None
        low, high = statistics.percentile_00_5, statistics.percentile_99_5
        if scheme == "zscore":
            values = image if mask is None else image[mask]
            if values.size:
                std = values.std()
                std = max(std, _EPSILON) if least_std == "floor" else std + _EPSILON
                image[... if mask is None else mask] = (values - values.mean()) / std
        elif scheme == "ct":
            np.clip(image, low, high, out=image)
            image -= statistics.mean
            image /= max(statistics.std, _EPSILON) if least_std == "floor" else statistics.std
        elif scheme == "ct_case":
            _by_case(image, statistics, image)
        elif scheme == "rescale_0_1":
            image -= image.min()
            image /= max(image.max(), np.float32(_EPSILON))
        elif scheme == "rgb_0_1":
            image /= 255.0
        elif scheme == "quantitative":
            _by_statistics(np.array(image), statistics, image, margin=1)
        if blanks_outside and mask is not None and scheme != "none":
            image[~mask] = 0
    return channels


def _by_case(
    channel: NDArray[np.float32], statistics: IntensityStatistics, result: NDArray[np.float32]
) -> None:
    """Clip to the foreground's range, then z-score with what this case has strictly within it."""
    low, high = statistics.percentile_00_5, statistics.percentile_99_5
    values = channel[(channel > low) & (channel < high)]
    np.clip(channel, low, high, out=result)
    if len(values):
        result -= values.mean()
        result /= max(values.std(), np.float32(_SMALLEST))


def _zscore(
    channel: NDArray[np.float32],
    inside: NDArray[np.bool_] | None,
    result: NDArray[np.float32],
    least_std: Literal["floor", "added"],
) -> None:
    def divisor(std: float) -> np.float32:
        return np.float32(max(std, _EPSILON) if least_std == "floor" else std + _EPSILON)

    if inside is None:
        mean, std = moments(channel)
        np.subtract(channel, np.float32(mean), out=result)
        result /= divisor(std)
        return
    result[...] = channel
    values = channel[inside]
    if len(values):
        mean, std = moments(values)
        values -= np.float32(mean)
        values /= divisor(std)
        result[inside] = values


def _by_statistics(
    channel: NDArray[np.float32],
    statistics: IntensityStatistics,
    result: NDArray[np.float32],
    *,
    margin: float = 0,
    least_std: float = _SMALLEST,
) -> None:
    """Clip to the foreground's range, then z-score with the foreground's statistics.

    The range is that of the 0.5th and 99.5th percentile, widened on either side by its length
    times `margin`. CT has no margin. In a parameter map the tissue around a lesion often lies
    outside the lesion's own range (healthy brain around an infarct's low ADC), and the network
    needs to see it; farther out there is little but noise of the fit. Units may be tiny (ADC in
    m^2/s), so a map's standard deviation has no lower limit as CT's has.
    """
    low, high = statistics.percentile_00_5, statistics.percentile_99_5
    wider = margin * (high - low)
    np.clip(channel, low - wider, high + wider, out=result)
    result -= np.float32(statistics.mean)
    result /= np.float32(max(statistics.std, least_std))


def moments(values: NDArray[np.float32]) -> tuple[float, float]:
    """Return mean and population standard deviation, summed in double precision.

    Args:
        values: Any shape, not empty; worked on in parts, so that nothing of its size is made.
    """
    parts = np.array_split(values, max(1, min(len(values), values.size >> 20)))
    mean = math.fsum(float(part.sum(dtype=np.float64)) for part in parts) / values.size
    squares = math.fsum(_squares(part, mean) for part in parts)
    return mean, math.sqrt(squares / values.size)


def _squares(part: NDArray[np.float32], mean: float) -> float:
    apart = part.astype(np.float64).ravel()
    apart -= mean
    return float(np.square(apart, out=apart).sum())  # a product of vectors would start threads
