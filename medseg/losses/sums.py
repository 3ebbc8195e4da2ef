"""Sums over samples and voxels that span every process of a run.

A loss is a function of such sums. Its gradient in one process is that of the whole batch times the
number of processes, for what this process's samples have to do with it; the mean that data-parallel
training takes of the gradients is then the gradient of the whole batch, however it was divided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over this process's samples, and the loss that follows from those of all processes."""

    parts: tuple[Tensor, ...]
    """Sums of any shape, of one type."""
    finish: Callable[[Sequence[Tensor]], Tensor]
    """(parts, added up over all processes) -> scalar."""


def over_processes(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, which can be differentiated.

    In a single process, or without a process group, the tensor itself comes back. All processes
    must call this equally often, with tensors of one shape and type.
    """
    if not _are_several():
        return values
    summed: Tensor = _SumOverProcesses.apply(values)  # type: ignore[no-untyped-call]
    return summed


def settle(pending: Sequence[Sums]) -> list[Tensor]:
    """Return the losses; the sums of all of them travel between processes together."""
    if not _are_several():
        return [each.finish(each.parts) for each in pending]
    parts = [part for each in pending for part in each.parts]
    together = over_processes(torch.cat([part.flatten() for part in parts]))
    cut = torch.split(together, [part.numel() for part in parts])
    summed = iter([flat.view(part.shape) for flat, part in zip(cut, parts, strict=True)])
    return [each.finish([next(summed) for _ in each.parts]) for each in pending]


def weighted(terms: Sequence[tuple[float, Sums]]) -> Sums:
    """Return the sums of a loss that is a weighted sum of losses."""
    lengths = [len(sums.parts) for _, sums in terms]

    def finish(parts: Sequence[Tensor]) -> Tensor:
        rest, values = list(parts), []
        for (weight, sums), length in zip(terms, lengths, strict=True):
            values.append(weight * sums.finish(rest[:length]))
            rest = rest[length:]
        return torch.stack(values).sum()

    return Sums(tuple(part for _, sums in terms for part in sums.parts), finish)


def quotient(total: Tensor, number: Tensor) -> Sums:
    """Return the sums of a mean: a total, and how many it is of; the mean of none is 0."""

    def finish(parts: Sequence[Tensor]) -> Tensor:
        summed, count = parts
        return summed / torch.where(count > 0, count, 1)

    return Sums((total, number), finish)


def _are_several() -> bool:
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


class _SumOverProcesses(torch.autograd.Function):
    """Adds up values on the way forward, and their gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _all_reduced(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduced(gradient)


def _all_reduced(values: Tensor) -> Tensor:
    summed = values.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(summed)
    return summed
