"""Memory for intermediate results that is used again and again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Spare:
    """Named pieces of memory on one device.

    On the CPU a fresh piece of some megabytes is mapped and zeroed by the system at each use, which
    takes longer than most computations in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pieces: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(
        self, name: str, shape: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return a contiguous tensor of any content; valid until the name is taken again."""
        count = math.prod(shape)
        piece = self._pieces.get((name, dtype))
        if piece is None or len(piece) < count:
            piece = torch.empty(count, dtype=dtype, device=self._device)
            self._pieces[name, dtype] = piece
        return piece[:count].view(list(shape))
