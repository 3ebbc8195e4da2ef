"""Logits: linear, any rows of the result from a few rows of the input, channel by channel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from medseg.resample.axis import axis_taps, checked_shape, shrinking_first

if TYPE_CHECKING:
    import torch


def rows_needed(length_in: int, length_out: int, rows: slice, *, linear: bool) -> slice:
    """Return the rows of an axis that some rows of the resized axis are made of.

    Args:
        length_in: Axis length before, in voxels.
        length_out: Axis length after, in voxels.
        rows: Rows of the resized axis, at least one.
        linear: False where the nearest row is taken.

    Examples:
        >>> rows_needed(4, 8, slice(2, 5), linear=True)
        slice(0, 3, None)
    """
    taps = axis_taps(length_in, length_out, linear=linear)
    used = [index[rows] for index, _ in taps]
    return slice(min(int(u.min()) for u in used), max(int(u.max()) for u in used) + 1)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Slab:
    """Some rows of logits, and the rows of the resized volume that are to be made of them."""

    logits: torch.Tensor
    """(L, *spatial) float32, but for the rows `held` along `axis`."""
    shape_in: tuple[int, ...]
    """Spatial shape of all logits."""
    shape: tuple[int, ...]
    """Spatial shape asked for."""
    axis: int
    held: slice
    """Rows of `axis` that `logits` holds."""
    rows: slice
    """Rows of the resized `axis` that are asked for."""
    separate: int | None = None
    """Axis along which the nearest slice is taken."""

    @property
    def shape_out(self) -> tuple[int, ...]:
        """Return the spatial shape of the slab."""
        thickness = self.rows.stop - self.rows.start
        return tuple(thickness if d == self.axis else n for d, n in enumerate(self.shape))

    @property
    def is_resized(self) -> bool:
        """Return whether any axis changes its length."""
        return self.shape_in != self.shape

    @property
    def order(self) -> list[int]:
        """Return the axes in the order they are resized in: the cut one, then the shrinking."""
        others = shrinking_first(self.shape_in, self.shape)
        return [self.axis, *(d for d in others if d != self.axis)]

    def first(self, number: int) -> Slab:
        """Return the same of the first channels alone."""
        return replace(self, logits=self.logits[:number])

    def only(self, channel: int) -> Slab:
        """Return the same of one channel alone."""
        return replace(self, logits=self.logits[channel : channel + 1])

    def taps(self, axis: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return (index into `logits`, weight) of every row of the slab's axis, once or twice."""
        import torch

        rows = self.rows if axis == self.axis else slice(None)
        first = self.held.start if axis == self.axis else 0
        before, after = self.shape_in[axis], self.shape[axis]
        return [
            (
                torch.from_numpy(index[rows] - first).to(self.logits.device),
                torch.from_numpy(weight[rows] / (2 * after)).to(self.logits),
            )
            for index, weight in axis_taps(before, after, linear=axis != self.separate)
        ]

    def channels(self) -> Iterator[torch.Tensor]:
        """Yield each channel of the slab, (*shape_out); linear, nearest along a separate axis.

        Rows do not depend on how the axis is cut: every value comes of the same rounded operations.
        """
        steps = [(d, self.taps(d)) for d in self.order]
        for source in self.logits:
            for d, taps in steps:
                source = _blend(source, d, taps)
            yield source


def resize_slab(
    logits: torch.Tensor,
    shape: Sequence[int],
    axis: int,
    start: int,
    stop: int,
    *,
    separate: int | None = None,
) -> torch.Tensor:
    """Return rows `start` to `stop` along one axis of logits resized linearly to `shape`.

    Args:
        logits: (L, *spatial) float32, on any device.
        shape: Full spatial shape asked for, in voxels.
        axis: Spatial axis that is cut.
        start: First row of the slab.
        stop: End of the slab, exclusive.
        separate: Axis along which the nearest slice is taken.

    Returns:
        (L, *slab) tensor, `shape` but for `stop - start` rows along `axis`.

    Raises:
        ValueError: If the shape or the rows do not fit.
    """
    import torch

    spatial = tuple(logits.shape[1:])
    target = checked_shape(spatial, shape)
    if not 0 <= start < stop <= target[axis]:
        raise ValueError(f"rows {start} to {stop} are not within the {target[axis]} of axis {axis}")
    slab = Slab(
        logits=logits, shape_in=spatial, shape=target, axis=axis, held=slice(0, spatial[axis]),
        rows=slice(start, stop), separate=separate,
    )  # fmt: skip
    return torch.stack(list(slab.channels()))


def _blend(
    values: torch.Tensor, axis: int, taps: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Gather along one axis and add up with weights; products and sums round separately."""
    low = values.index_select(axis, taps[0][0])
    if len(taps) == 1:
        return low
    view = [-1 if d == axis else 1 for d in range(values.ndim)]
    high = values.index_select(axis, taps[1][0])
    return low.mul_(taps[0][1].reshape(view)).add_(high.mul_(taps[1][1].reshape(view)))
