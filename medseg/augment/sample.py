"""One patch on its way through the augmentation: its arrays, cut and mirrored alike."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Sample:
    """Arrays of one patch that share their voxels."""

    image: Tensor
    """Intensities (C, *spatial)."""
    segmentation: Tensor
    """Labels (*spatial), any integer type, in [0, 2**20)."""
    outside: Tensor | None = None
    """Voxels outside the body (*spatial), boolean; None: not known."""
    previous: Tensor | None = None
    """Labels (*spatial) that the stage before found, as `segmentation`; None: no such stage."""

    def cut(self, size: Sequence[int]) -> Sample:
        """Return the centred box of `size`; what is missing is intensity 0, label 0, outside."""
        return Sample(
            centre(self.image, size),
            centre(self.segmentation, size),
            None if self.outside is None else centre(self.outside, size, fill=1),
            None if self.previous is None else centre(self.previous, size),
        )

    def mirrored_labels(self, axes: tuple[int, ...]) -> Sample:
        """Return the sample with all arrays but the image reversed along `axes`."""
        return Sample(
            self.image,
            mirror(self.segmentation, axes),
            None if self.outside is None else mirror(self.outside, axes),
            None if self.previous is None else mirror(self.previous, axes),
        )


def centre(array: Tensor, size: Sequence[int], *, fill: float = 0) -> Tensor:
    """Return the centred box of `size` over the last axes; `fill` where the array is smaller.

    Examples:
        >>> centre(torch.arange(5), [3]).tolist(), centre(torch.arange(2), [4]).tolist()
        ([1, 2, 3], [0, 0, 1, 0])
    """
    shape = array.shape[array.ndim - len(size) :]
    pads = [
        (wanted // 2 - n // 2, wanted - n - (wanted // 2 - n // 2)) if n < wanted else (0, 0)
        for wanted, n in zip(size, shape, strict=True)
    ]
    if any(map(any, pads)):
        flat = list(itertools.chain(*reversed(pads)))
        array = functional.pad(array, flat, value=fill)
    for axis, wanted in enumerate(size, start=array.ndim - len(size)):
        array = array.narrow(axis, array.shape[axis] // 2 - wanted // 2, wanted)
    return array


def mirror(array: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Reverse axes, for any type (torch itself does not for unsigned integers of 16 bits)."""
    if array.dtype == torch.uint16:
        return array.view(torch.int16).flip(axes).view(torch.uint16)
    return array.flip(axes)
