"""Dice and loss over validation patches: for watching a run, not its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from medseg.labels import LabelScheme
from medseg.train.feed import Samples

Judged = tuple[torch.Tensor, torch.Tensor]
"""Full-resolution logits (B, L, *spatial), and the loss of the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchScores:
    """What validation patches say of the present weights."""

    dice: dict[str, float | None]
    """Structure -> Dice pooled over the patches; None where neither side has a voxel."""
    voxels: dict[str, tuple[int, int]]
    """Structure -> voxels in the reference and in the prediction."""
    loss: float | None
    """Mean over the batches; None without any."""


@torch.no_grad()
def judge_patches(
    batches: Iterable[Samples],
    labels: LabelScheme,
    judge: Callable[[Samples], Judged],
    total: Callable[[torch.Tensor], torch.Tensor],
) -> PatchScores:
    """Return the Dice of each structure pooled over patches, and the mean loss.

    A structure is judged in the patches of the cases in which it was annotated. The device is
    waited for once, at the end.

    Args:
        batches: Validation patches; none of them: nothing is known.
        labels: What the logit channels are.
        judge: Runs the network and the loss.
        total: Adds counts up over all processes.
    """
    counts, loss, num_batches = None, None, 0
    for samples in batches:
        logits, found = judge(samples)
        overlap = overlap_counts(logits.float(), samples, labels)
        counts = overlap if counts is None else counts + overlap
        loss = found if loss is None else loss + found
        num_batches += 1
    if counts is None or loss is None:
        return PatchScores(dice=dict.fromkeys(labels.foreground), voxels={}, loss=None)
    found_counts = [tuple(map(int, row)) for row in total(counts).tolist()]
    names = sorted(labels.channels, key=labels.channels.__getitem__)
    by_name = dict(zip(names, found_counts, strict=True))
    by_name = {name: by_name[name] for name in labels.channels}
    return PatchScores(
        dice={name: _dice(*found) for name, found in by_name.items()},
        voxels={name: (found[1], found[2]) for name, found in by_name.items()},
        loss=float(loss) / num_batches,
    )


def _dice(hits: int, reference: int, predicted: int) -> float | None:
    return 2 * hits / (reference + predicted) if reference + predicted else None


def overlap_counts(logits: torch.Tensor, samples: Samples, labels: LabelScheme) -> torch.Tensor:
    """Return (structures, 3): voxels of both, of the reference and of the prediction.

    Args:
        logits: (B, L, *spatial).
        samples: What the logits were computed from.
        labels: What the logit channels are.
    """
    if labels.has_regions:
        predicted, reference = logits > 0, samples.target.bool()
    else:
        classes = torch.arange(1, logits.shape[1], device=logits.device)
        shape = (1, -1, *(1,) * (logits.ndim - 2))
        predicted = logits.argmax(1, keepdim=True) == classes.view(shape)
        reference = samples.target.unsqueeze(1) == classes.view(shape)
    axes = tuple(range(2, logits.ndim))
    if samples.valid is not None:
        predicted = predicted & samples.valid.unsqueeze(1)
        reference = reference & samples.valid.unsqueeze(1)
    each = torch.stack([part.sum(axes) for part in (predicted & reference, reference, predicted)])
    if samples.annotated is not None:
        each = each * samples.annotated[:, -each.shape[2] :]  # labels: without the background
    return each.sum(1).T
