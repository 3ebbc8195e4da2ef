"""Logits and target as rows of voxels, with what several terms of a loss need of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, kw_only=True)
class Voxels:
    """A batch as a loss sees it; what is derived is computed once, when it is first asked for.

    Samples may be annotated in part. Their background voxels then say "none of the labels that
    were drawn", so there the chance of the background is that of the background or of any label
    that was not drawn; regions that were not drawn are left out.

    Source:
        Marginal loss of learning from partially labelled data: classes that were not annotated are
        merged with the background by adding their chances.
    """

    logits: Tensor
    """(B, L, voxels), at least fp32."""
    target: Tensor
    """Labels (B, voxels) int64, or regions (B, L, voxels) bool."""
    valid: Tensor | None
    """(B, voxels) bool, False at voxels to be left out; None if all count."""
    annotated: Tensor | None
    """(B, L) bool, False where the structure of a logit channel was not annotated; None: all."""
    has_regions: bool
    """Whether the logits are regions (sigmoid) rather than labels (softmax)."""

    @classmethod
    def of(
        cls,
        logits: Tensor,
        target: Tensor,
        valid: Tensor | None,
        annotated: Tensor | None,
        *,
        has_regions: bool,
    ) -> Voxels:
        """Take a batch as the network and the loader give it.

        Channels-last logits are copied to contiguous memory, where the sums over voxels are faster
        by more than the copy costs.

        Args:
            logits: (B, L, *spatial), any precision.
            target: Labels (B, *spatial) int64, or regions (B, L, *spatial) bool.
            valid: (B, *spatial) bool or None.
            annotated: (B, L) bool or None.
            has_regions: Whether the logits are regions rather than labels.
        """
        exact = torch.promote_types(logits.dtype, torch.float32)
        return cls(
            logits=logits.to(exact).flatten(2).contiguous(),
            target=target.flatten(2 if has_regions else 1),
            valid=None if valid is None else valid.flatten(1),
            annotated=annotated,
            has_regions=has_regions,
        )

    @cached_property
    def chances(self) -> Tensor:
        """Chance of each label or region, (B, L, voxels)."""
        return torch.sigmoid(self.logits) if self.has_regions else self._of_labels[0]

    @property
    def log_of_target(self) -> Tensor:
        """Log of the chance of what each voxel is said to be, (B, voxels); labels only.

        The background of a sample stands for every label that was not annotated there, too: their
        chances add up.
        """
        return self._of_labels[1]

    @cached_property
    def _of_labels(self) -> tuple[Tensor, Tensor]:
        """Chances, and the log of that of the target."""
        if self.annotated is None:
            chances, log_of_target = _SoftmaxAtTarget.apply(  # type: ignore[no-untyped-call]
                self.logits, self.target
            )
            return chances, log_of_target
        logs = torch.log_softmax(self.logits, 1)
        drawn = logs.gather(1, self.target.unsqueeze(1)).squeeze(1)
        apart = self.annotated.clone()
        apart[:, 0] = False
        merged = logs.masked_fill(apart.unsqueeze(2), -torch.inf).logsumexp(1)
        return logs.exp(), torch.where(self.target == 0, merged, drawn)

    @cached_property
    def counted_regions(self) -> Tensor | None:
        """Pairs of a voxel and a region that count: (B, L or 1, voxels or 1) bool; None: all."""
        valid = None if self.valid is None else self.valid.unsqueeze(1)
        if self.annotated is None:
            return valid
        annotated = self.annotated.unsqueeze(2)
        return annotated if valid is None else annotated & valid


class _SoftmaxAtTarget(torch.autograd.Function):
    """Softmax, and its log at one label of each voxel: (B, L, voxels) and (B, voxels).

    The same numbers as of `log_softmax`, `exp` and `gather`; their gradients are taken in one go,
    from the chances that are there already, with one new volume instead of four.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logs = torch.log_softmax(logits, 1)
        log_of_target = logs.gather(1, target.unsqueeze(1)).squeeze(1)
        chances = logs.exp_()
        ctx.save_for_backward(chances, target)
        ctx.set_materialize_grads(False)
        return chances, log_of_target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_chances: Tensor | None, of_log: Tensor | None) -> tuple[Tensor, None]:
        """Return chances * (g - sum over labels of g * chances - h), and h more at the target.

        g is the gradient of the chances, h that of the log of the target's.
        """
        chances, target = ctx.saved_tensors
        gradient = torch.zeros_like(chances) if of_chances is None else of_chances * chances
        taken = gradient.sum(1, keepdim=True)
        if of_log is not None:
            taken += of_log.unsqueeze(1)
            gradient.scatter_add_(1, target.unsqueeze(1), of_log.unsqueeze(1))
        return gradient.addcmul_(chances, taken, value=-1), None
