"""Intensity normalisation, one scheme per channel."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
) -> NDArray[np.float32]:
    """Return normalised intensities.

    Args:
        channels: (C, *spatial) raw intensities.
        inside: (*spatial) mask of the imaged region.
        schemes: Scheme of each channel.
        use_mask: Per channel, whether a z-score is taken from `inside` and applied there only.
        intensity: Dataset statistics of each channel, used by `ct` and `quantitative`.

    Source:
        Normalisation schemes of nnU-Net v2; `quantitative` is our own.
    """
    out = np.empty(channels.shape, dtype=np.float32)
    for index, scheme in enumerate(schemes):
        channel, result = channels[index], out[index]
        if scheme == "zscore":
            _zscore(channel, inside if use_mask[index] else None, result)
        elif scheme == "ct":
            _by_statistics(channel, intensity[index], result, least_std=_EPSILON)
        elif scheme == "quantitative":
            _by_statistics(channel, intensity[index], result, margin=1)
        elif scheme == "rescale_0_1":
            np.subtract(channel, channel.min(), out=result)
            result /= max(float(result.max()), _EPSILON)
        elif scheme == "rgb_0_1":
            np.divide(channel, np.float32(255), out=result)
        else:
            result[...] = channel
    return out


def _zscore(
    channel: NDArray[np.float32], inside: NDArray[np.bool_] | None, result: NDArray[np.float32]
) -> None:
    if inside is None:
        mean, std = moments(channel)
        np.subtract(channel, np.float32(mean), out=result)
        result /= np.float32(max(std, _EPSILON))
        return
    result[...] = channel
    values = channel[inside]
    if len(values):
        mean, std = moments(values)
        values -= np.float32(mean)
        values /= np.float32(max(std, _EPSILON))
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
