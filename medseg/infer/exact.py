"""Exact mode: the arithmetic of the references, operation by operation, for whole volumes.

One tile after another, sums in the type and in the order of the original, resampling with scipy in
double precision: slow, and equal to the original to rounding. It is also what the engine is
measured against.

Shape letters: L logit channels, n0 n1 n2 network axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from medseg.infer.parts import Held, Part, result_axis
from medseg.infer.rows import NotFiniteError, Progress, StoppedError, Volume, tile_boxes
from medseg.infer.runner import Runner, disagreement, evaluating
from medseg.infer.tiles import importance
from medseg.resample import resize_literal
from medseg.schema.bundle import Semantics


def exact_values(
    runners: Sequence[Runner],
    volume: Volume,
    *,
    semantics: Semantics,
    step: float,
    measures_disagreement: bool = False,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Return the mean over folds of what each finds in a whole image.

    Args:
        runners: One for each fold.
        volume: The image, padded.
        semantics: What is averaged, and in which arithmetic.
        step: Largest shift between tiles, as a fraction of the tile.
        measures_disagreement: Whether one more channel tells the share of folds that decide
            otherwise than their mean.
        progress: Called with (tiles done, tiles in total).
        should_stop: Asked before every tile.

    Returns:
        (L, n0, n1, n2), or one channel more, of the accumulator's type, on the CPU.

    Raises:
        NotFiniteError: If the networks gave values that are not finite.
        StoppedError: If somebody asked to stop.

    Source:
        Behaviour of nnU-Net v2 (float16) and v1 (float32) on the CPU.
    """
    steps = _Steps(len(tile_boxes(volume, step)) * len(runners), progress, should_stop)
    total: torch.Tensor | None = None
    votes: list[torch.Tensor] = []
    for runner in runners:
        found = _one_fold(runner, volume, semantics, step, steps)
        if measures_disagreement:
            votes.append(runner.decision(found[None], 1))
        total = found if total is None else total.add_(found)
    if total is None:
        raise ValueError("at least one network is needed, got none")
    if len(runners) > 1:
        total /= len(runners)
    if not measures_disagreement:
        return total
    share = disagreement(votes, runners[0].decision(total[None], 1))
    return torch.cat([total, share.to(total.dtype)])


def on_image_grid(part: Part) -> Part:
    """Return what a model says on the grid of the cropped image, resampled as the original does."""
    record, how = part.record, part.semantics.resample_result
    values = part.source.rows(0, part.source.shape[part.source.axis])
    separate = result_axis(record, record.spacing_cropped, part.semantics)
    resized = resize_literal(
        values.numpy(), record.shape_cropped, order=how.order, separate=separate, method=how.method
    )
    return replace(
        part,
        source=Held(torch.from_numpy(resized).float(), part.source.axis),
        record=replace(
            record, shape_network=record.shape_cropped, spacing_network=record.spacing_cropped
        ),
    )


@dataclass(slots=True)
class _Steps:
    """Counts tiles, and stops before the next one when asked to."""

    total: int
    progress: Progress | None
    should_stop: Callable[[], bool]
    done: int = 0

    def check(self) -> None:
        """Raise StoppedError if somebody asked to stop."""
        if self.should_stop():
            raise StoppedError

    def take(self) -> None:
        """Count a tile."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _one_fold(
    runner: Runner,
    volume: Volume,
    semantics: Semantics,
    step: float,
    steps: _Steps,
) -> torch.Tensor:
    """Return (L, n0, n1, n2): the weighted mean over the tiles of one network."""
    kind: torch.dtype = getattr(torch, semantics.accumulator)
    total = torch.zeros((runner.num_logits, *volume.shape), dtype=kind)
    weights = torch.zeros(volume.shape, dtype=kind)
    tile = volume.tile[volume.is_2d :]
    weight = torch.from_numpy(
        importance(tile, semantics.gaussian_peak, semantics.accumulator).copy()
    ).reshape(volume.tile)
    with torch.inference_mode(), evaluating(runner.networks):
        for box in tile_boxes(volume, step):
            steps.check()
            cut = volume.cut([box], runner.device, runner.num_previous)
            values = runner.run(cut, 1)[0].float().cpu().reshape(-1, *volume.tile)
            values *= weight
            total[(slice(None), *box)] += values
            weights[box] += weight
            steps.take()
    total /= weights
    if not torch.isfinite(total).all():
        raise NotFiniteError
    return total[(slice(None), *volume.inner)].contiguous()
