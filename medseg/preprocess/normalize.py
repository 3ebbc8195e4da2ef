"""Intensity normalisation, one scheme per channel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import Normalization

_EPSILON = 1e-8


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
        intensity: Dataset statistics of each channel, used by CT.

    Source:
        Normalisation schemes of nnU-Net v2.
    """
    out = np.empty_like(channels)
    for index, scheme in enumerate(schemes):
        if scheme == "zscore":
            out[index] = _zscore(channels[index], inside if use_mask[index] else None)
        elif scheme == "ct":
            out[index] = _ct(channels[index], intensity[index])
        elif scheme == "rescale_0_1":
            shifted = channels[index] - channels[index].min()
            out[index] = shifted / max(float(shifted.max()), _EPSILON)
        elif scheme == "rgb_0_1":
            out[index] = channels[index] / 255.0
        else:
            out[index] = channels[index]
    return out


def _zscore(channel: NDArray[np.float32], inside: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    if inside is None:
        mean, std = float(channel.mean(dtype=np.float64)), float(channel.std(dtype=np.float64))
        return ((channel - mean) / max(std, _EPSILON)).astype(np.float32)
    values = channel[inside]
    if not len(values):
        return channel.copy()
    mean, std = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    out = channel.copy()
    out[inside] = (values - mean) / max(std, _EPSILON)
    return out


def _ct(channel: NDArray[np.float32], statistics: IntensityStatistics) -> NDArray[np.float32]:
    clipped = np.clip(channel, statistics.percentile_00_5, statistics.percentile_99_5)
    return ((clipped - statistics.mean) / max(statistics.std, _EPSILON)).astype(np.float32)
