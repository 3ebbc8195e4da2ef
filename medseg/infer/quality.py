"""Quality control: what a person should look at, in words, compared with the training cases.

A number is out of the usual range if no training case had one as far out, and it lies further from
their median than the 5th or 95th percentile does, times a factor. For normally distributed numbers
the factor leaves `FALSE_ALARMS` per healthy case for all numbers of one kind together; fewer cases
know their range less well, which widens it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.data.facts import border_counts, count_values, intensities, rounded
from medseg.geometry import Grid, canonical_axes
from medseg.schema.fingerprint import ChannelIntensities
from medseg.schema.training_cases import ChannelSpread, Spread, TrainingCases

MIN_CASES = 10
"""With fewer training cases nothing is compared with them."""
FALSE_ALARMS = 0.02
"""Flags per healthy case that a kind of comparison may cost, see the module."""
SMALL_SAMPLE = 20.0
"""Added to the factor, divided by the number of training cases."""
SPACING_FACTOR = 1.5
"""A voxel size beyond the training cases' by more than this factor is flagged."""
VOLUME_FACTOR = 1.5
"""A volume within this factor of the training cases' median is never flagged."""
INTENSITY_FACTOR = 1.5
"""The same for intensities far from zero."""
INTENSITY_UNIT = 0.05
"""Below this part of a channel's usual width, intensities differ by steps, above it by ratios."""
BORDER_SHARE = 0.005
"""Less of the foreground at the border is never flagged. A ball of 100 ml in voxels of 1 mm, cut in
half, has 5 %; an organ of 1.5 l about 2 %."""
DISAGREEMENT = 0.2
"""Mean disagreement of the folds within the foreground above which a case is flagged: a choice,
roughly a Dice of 0.8 between a fold and all of them together."""
NOTHING_FOUND = "no structure was found"

_TAIL = NormalDist().inv_cdf(0.95)
_SIDES = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))
_FACTS = {
    "percentile_00_5": "darkest intensities (0.5th percentile)",
    "median": "median intensity",
    "percentile_99_5": "brightest intensities (99.5th percentile)",
}


def image_flags(
    channels: NDArray[np.float32],
    grid: Grid,
    names: Sequence[str],
    training: TrainingCases | None,
) -> tuple[str, ...]:
    """Say what is unusual about an image; apart from a few thousand voxels nothing is copied.

    Args:
        channels: (C, I, J, K), as read.
        grid: Where the image lies.
        names: Channel names, in order.
        training: What the training cases were like; without it channels can only be constant.
    """
    constant = [bool(channel.min() == channel.max()) for channel in channels]
    flags = [
        f"channel {name} has the same value everywhere"
        for name, is_constant in zip(names, constant, strict=True)
        if is_constant
    ]
    if training is None or training.num_cases < MIN_CASES:
        return tuple(flags)
    flags += _spacing_flags(grid, training)
    found = intensities(channels, grid.affine)
    looked_at = [number for number, is_constant in enumerate(constant) if not is_constant]
    if len(training.channels) == len(names):
        flags += _intensity_flags(found, looked_at, names, training)
    return tuple(flags)


def segmentation_flags(
    segmentation: NDArray[np.integer[Any]],
    affine: ArrayLike,
    structures: Mapping[str, tuple[int, ...]],
    volumes_ml: Mapping[str, float],
    training: TrainingCases | None,
) -> tuple[str, ...]:
    """Say what is unusual about a segmentation; nothing as large as it is made.

    Args:
        segmentation: (I, J, K) label map with the values of files.
        affine: (4, 4) voxel index to RAS+ mm.
        structures: Structure -> its values in the segmentation, background left out.
        volumes_ml: Structure -> volume found.
        training: What the training cases were like; without it only an empty result is flagged.
    """
    foreground = {value for values in structures.values() for value in values}
    total = count_values(segmentation, foreground)
    if not total:
        return (NOTHING_FOUND,)
    if training is None or training.num_cases < MIN_CASES:
        return ()
    at_border = border_counts(segmentation, foreground)
    return (
        *_volume_flags(volumes_ml, training),
        *_border_flags(at_border, total, affine, training),
    )


def disagreement_flags(mean_disagreement_foreground: float) -> tuple[str, ...]:
    """Say whether the networks disagree about what they found.

    Args:
        mean_disagreement_foreground: Share of the folds that decide otherwise than all of them
            together, mean over the voxels of the foreground; 0 or NaN with a single fold or without
            foreground.
    """
    if not mean_disagreement_foreground > DISAGREEMENT:
        return ()
    found = f"{100 * mean_disagreement_foreground:.0f}%"
    limit = f"{100 * DISAGREEMENT:.0f}%"
    return (f"the networks disagree by {found} within what was found, usual is less than {limit}",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """How far apart two numbers of a kind are, and how far is never too far."""

    place: Callable[[float], float]
    """Number -> its place on the scale, ascending."""
    least: float
    """Distance from the median that is never flagged."""

    def excess(self, found: float, usual: Spread, factor: float) -> float:
        """Return how far a number lies outside the usual range; 0 inside."""
        found = rounded(found)
        if usual.min <= found <= usual.max:
            return 0.0
        median, here = self.place(usual.median), self.place(found)
        edge = self.place(usual.percentile_05 if found < usual.min else usual.percentile_95)
        return max(0.0, abs(here - median) - max(factor * abs(edge - median), self.least))


def _factor(num_compared: int, num_cases: int) -> float:
    """Return how many times the way from the median to the 5th or 95th percentile is too far."""
    tail = NormalDist().inv_cdf(1 - FALSE_ALARMS / (2 * num_compared))
    return tail / _TAIL + SMALL_SAMPLE / num_cases


def _spacing_flags(grid: Grid, training: TrainingCases) -> list[str]:
    axes, _ = canonical_axes(grid.affine)
    found = [grid.spacing[axis] for axis in axes]
    is_far = [
        not usual.min / SPACING_FACTOR <= value <= usual.max * SPACING_FACTOR
        for value, usual in zip(found, training.spacing, strict=True)
    ]
    if not any(is_far):
        return []
    here = " x ".join(_words(value) for value in found)
    there = " x ".join(_between(usual.min, usual.max) for usual in training.spacing)
    return [f"voxel size (I x J x K) is {here} mm, training cases have {there}"]


def _intensity_flags(
    found: Sequence[ChannelIntensities],
    looked_at: Sequence[int],
    names: Sequence[str],
    training: TrainingCases,
) -> list[str]:
    """Compare each channel with its own past; two that fit each other's are called exchanged."""
    factor = _factor(len(_FACTS) * len(names), training.num_cases)
    flags, exchanged = [], set[int]()
    for number in looked_at:
        if number in exchanged:
            continue
        excess = _excesses(found[number], training.channels[number], factor)
        worst = max(excess, key=excess.__getitem__)
        if not excess[worst]:
            continue
        partner = _partner(number, looked_at, found, training, factor)
        if partner is not None:
            exchanged.add(partner)
            pair = f"channels {names[number]} and {names[partner]}"
            flags.append(f"{pair} seem exchanged: each has the usual intensities of the other")
            continue
        usual = getattr(training.channels[number], worst)
        flags.append(
            f"channel {names[number]}: {_FACTS[worst]} {_words(getattr(found[number], worst))}, "
            f"usually {_usual(usual)}"
        )
    return flags


def _excesses(found: ChannelIntensities, usual: ChannelSpread, factor: float) -> dict[str, float]:
    """Return how far each fact lies outside, on a scale of steps near zero and ratios beyond."""
    width = usual.percentile_99_5.median - usual.percentile_00_5.median
    unit = INTENSITY_UNIT * width if width > 0 else 1.0
    scale = _Scale(place=lambda value: math.asinh(value / unit), least=math.log(INTENSITY_FACTOR))
    return {
        fact: scale.excess(getattr(found, fact), getattr(usual, fact), factor) for fact in _FACTS
    }


def _partner(
    number: int,
    looked_at: Sequence[int],
    found: Sequence[ChannelIntensities],
    training: TrainingCases,
    factor: float,
) -> int | None:
    for other in looked_at:
        crossed = (
            _excesses(found[number], training.channels[other], factor),
            _excesses(found[other], training.channels[number], factor),
        )
        if other != number and not any(value for facts in crossed for value in facts.values()):
            return other
    return None


def _volume_flags(volumes_ml: Mapping[str, float], training: TrainingCases) -> list[str]:
    flags = []
    known = {name: usual for name, usual in training.structures.items() if name in volumes_ml}
    scale = _Scale(place=math.log, least=math.log(VOLUME_FACTOR))
    for name, usual in known.items():
        found, enough = volumes_ml[name], usual.num_annotated >= MIN_CASES
        if found <= 0:
            if enough and usual.num_present == usual.num_annotated:
                cases = f"all {usual.num_annotated} training cases have it"
                flags.append(f"{name} was not found, {cases}")
        elif usual.volume_ml is not None and usual.num_present >= MIN_CASES:
            factor = _factor(len(known), usual.num_present)
            if scale.excess(found, usual.volume_ml, factor):
                flags.append(f"{name}: {_words(found)} ml, usually {_usual(usual.volume_ml)} ml")
    return flags


def _border_flags(
    at_border: Mapping[tuple[int, bool], int],
    total: int,
    affine: ArrayLike,
    training: TrainingCases,
) -> list[str]:
    usual, share = training.border_share, sum(at_border.values()) / total
    if usual is None or share <= usual.median:
        return []
    scale = _Scale(place=lambda value: value, least=BORDER_SHARE)
    if not scale.excess(share, usual, _factor(1, training.num_cases)):
        return []
    side = _side(*max(at_border, key=at_border.__getitem__), affine)
    there = _between(100 * usual.percentile_05, 100 * usual.percentile_95)
    return [
        f"{_words(100 * share)}% of the foreground touches the image border, mostly {side}; "
        f"usually {there}%"
    ]


def _side(axis: int, is_last: bool, affine: ArrayLike) -> str:
    """Return the anatomical direction of one end of an image axis."""
    axes, flips = canonical_axes(affine)
    canonical = axes.index(axis)
    return _SIDES[canonical][is_last != flips[canonical]]


def _usual(spread: Spread) -> str:
    return _between(spread.percentile_05, spread.percentile_95)


def _between(low: float, high: float) -> str:
    first, last = _words(low), _words(high)
    return first if first == last else f"{first} to {last}"


def _words(value: float) -> str:
    """Return a number with three digits, large ones whole.

    Examples:
        >>> _words(0.12345), _words(7.0), _words(481945.0)
        ('0.123', '7', '481945')
    """
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
