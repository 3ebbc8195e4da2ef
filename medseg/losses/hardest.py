"""The mean of the largest values of a batch, over all processes, without asking for a number.

The smallest value that is among them is found digit by digit from histograms, which add up over
processes; sorting would not. What is equal to it shares the places that are left, so that the
gradient does not depend on an order.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from medseg.losses.sums import Sums, over_processes

_DIGIT_BITS = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class _Threshold:
    """The smallest key among the largest, and how many there are; 0-dimensional integers."""

    key: Tensor
    number: Tensor
    """How many keys are to be kept."""
    num_tied: Tensor
    """How many keys equal `key`."""
    num_tied_kept: Tensor
    """How many of these are to be kept."""


def mean_of_hardest(values: Tensor, counted: Tensor | None, *, percent: float) -> Sums:
    """Return the sums of the mean of the largest values.

    Args:
        values: Any shape, at least 0 up to rounding, float32 or float64.
        counted: Bool that broadcasts to `values`, False where a value is left out; None: all count.
        percent: Share of the values that count, over all processes; rounded down, at least one.
    """
    keys = _keys(values.detach(), counted)
    found = _threshold(keys, Fraction(percent).limit_denominator(10**6) / 100)
    share = found.num_tied_kept.to(values.dtype) / found.num_tied.clamp_min(1)
    above = torch.where(keys > found.key, values, 0).sum()
    total = above + torch.where(keys == found.key, values, 0).sum() * share
    number = found.number.to(values.dtype)
    return Sums((total,), lambda parts: parts[0] / number)


def _keys(values: Tensor, counted: Tensor | None) -> Tensor:
    """Return integers in the order of the values; -1 for those that are left out.

    The bits of a positive floating-point number, read as an integer, are in the order of the
    numbers. (Values a rounding below 0 lose their sign.)
    """
    integer = torch.int32 if values.dtype == torch.float32 else torch.int64
    keys = values.contiguous().view(integer) & torch.iinfo(integer).max
    return keys if counted is None else torch.where(counted, keys, -1)


def _threshold(keys: Tensor, share: Fraction) -> _Threshold:
    """Return the threshold above and at which the given share of the keys lies.

    Args:
        keys: Integers, negative where left out.
        share: Of the keys that are not left out.
    """
    keys = keys.flatten()
    bits = torch.iinfo(keys.dtype).bits - 1
    key = torch.zeros((), dtype=torch.int64, device=keys.device)
    number = wanted = at_digit = key
    for shift in reversed(range(0, bits, _DIGIT_BITS)):
        counts = over_processes(_histogram(keys, key, shift))
        at_least = counts.flip(0).cumsum(0).flip(0)
        if shift + _DIGIT_BITS >= bits:
            number = (at_least[0] * share.numerator // share.denominator).clamp_min(1)
            wanted = number
        digit = ((at_least >= wanted).sum() - 1).clamp_min(0)
        at_digit = counts.gather(0, digit.view(1)).squeeze(0)
        wanted = wanted - (at_least.gather(0, digit.view(1)).squeeze(0) - at_digit)
        key = key | (digit << shift)
    return _Threshold(
        key=key.to(keys.dtype), number=number, num_tied=at_digit, num_tied_kept=wanted
    )


def _histogram(keys: Tensor, prefix: Tensor, shift: int) -> Tensor:
    """Count the digits at `shift` of the keys that agree with `prefix` in all higher ones."""
    above = shift + _DIGIT_BITS
    is_first = above >= torch.iinfo(keys.dtype).bits - 1
    agrees = keys >= 0 if is_first else (keys >> above) == (prefix >> above).to(keys.dtype)
    digits = (keys >> shift) & (2**_DIGIT_BITS - 1)
    counts = torch.zeros(2**_DIGIT_BITS, dtype=torch.int64, device=keys.device)
    return counts.scatter_add(0, digits.long(), agrees.long())
