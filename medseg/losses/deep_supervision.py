"""Deep supervision: the same loss at every resolution the network speaks of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from medseg.errors import ConfigError, near_names
from medseg.losses.compound import LOSSES, Compound, Loss, LossFactory
from medseg.losses.options import check_options
from medseg.losses.sums import settle


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSupervision:
    """A weighted sum of one loss over the logits of several resolutions."""

    loss: Loss
    """What is computed at each resolution."""

    def __call__(
        self,
        logits: Tensor | Sequence[Tensor],
        target: Tensor,
        valid: Tensor | None = None,
        annotated: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, fp32.

        Args:
            logits: Full-resolution (B, L, *spatial) logits, or a list, full resolution first.
            target: At full resolution: labels (B, *spatial) int64 or regions (B, L, *spatial)
                bool; brought to the other resolutions here.
            valid: At full resolution: (B, *spatial) bool, or None if all voxels count.
            annotated: (B, L) bool, False where the structure of a logit channel was not annotated
                in a sample; None if all were, and then the loss is not told of it.
        """
        if isinstance(logits, Tensor):
            logits = [logits]
        weights, given = [], []
        for each, weight in zip(logits, resolution_weights(len(logits)), strict=True):
            if weight:
                shape = each.shape[2:]
                mask = None if valid is None else nearest(valid, shape)
                weights.append(weight)
                given.append((each, nearest(target, shape), mask))
        if isinstance(self.loss, Compound):
            values = settle([self.loss.sums(*each, annotated) for each in given])
        else:
            partial = {} if annotated is None else {"annotated": annotated}
            values = [self.loss(*each, **partial) for each in given]
        terms = [weight * value for weight, value in zip(weights, values, strict=True)]
        return torch.stack(terms).sum()


def resolution_weights(count: int) -> tuple[float, ...]:
    """Return the weight of each resolution, full first: halving, the last 0, the sum 1.

    Source:
        Deep supervision of nnU-Net v2. A single output has weight 1.

    Examples:
        >>> resolution_weights(3)
        (0.6666666666666666, 0.3333333333333333, 0.0)
        >>> resolution_weights(1)
        (1.0,)
    """
    if count == 1:
        return (1.0,)
    raw = [0.5**index for index in range(count - 1)]
    return (*(weight / sum(raw) for weight in raw), 0.0)


def nearest(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Sample the last axes of a tensor of any type at the voxels nearest to a coarser grid.

    Source:
        Same voxels as `torch.nn.functional.interpolate(mode="nearest-exact")`.

    Examples:
        >>> nearest(torch.arange(6), (3,))
        tensor([1, 3, 5])
    """
    for axis, length in enumerate(shape, start=values.ndim - len(shape)):
        full = values.shape[axis]
        if full % length == 0:
            step = full // length
            values = values[(slice(None),) * axis + (slice(step // 2, None, step),)]
        else:
            centres = (torch.arange(length, device=values.device) * 2 + 1) * full
            values = values.index_select(axis, centres // (2 * length))
    return values.contiguous()


def build_loss(
    name: str,
    *,
    batch_dice: bool,
    has_regions: bool,
    is_partial: bool = False,
    options: Mapping[str, Any] | None = None,
) -> DeepSupervision:
    """Build the loss a recipe names.

    Args:
        name: A key of `LOSSES`, or "package.module:Name" of a `LossFactory`.
        batch_dice: Whether overlaps are pooled over the batch.
        has_regions: Whether the logits are regions (sigmoid) rather than labels (softmax).
        is_partial: Whether some cases are annotated in part, which the loss must then know of.
        options: Further arguments of the factory.

    Returns:
        (logits or list of logits, target, valid) -> scalar, fp32; a list is weighted as
        `resolution_weights` says.

    Raises:
        ConfigError: If the name is unknown, does not import, or the loss cannot do what is asked;
            if an option is unknown or has a value it cannot have, all of them at once.
    """
    if name in LOSSES:
        factory = LOSSES[name]
    elif ":" in name:
        factory = _imported(name)
    else:
        known = sorted(LOSSES)
        raise ConfigError(
            f'loss.name is {name!r}; expected one of: {", ".join(known)}, or "package.module:Name".'
            f"{near_names(name, known)}"
        )
    given = dict(options or {})
    check_options(name, factory, given, is_built_in=name in LOSSES)
    try:
        loss = factory(batch_dice=batch_dice, has_regions=has_regions, **given)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"loss.name {name!r} with loss.options {given} cannot be built: {error}. "
            "Change the options."
        ) from error
    if is_partial and not _takes_annotated(loss):
        raise ConfigError(
            f"loss.name is {name!r}, which takes no argument 'annotated', but some cases of the "
            f"dataset have annotated_labels. Take one of: {', '.join(sorted(LOSSES))}, or give "
            "the loss this argument: (B, L) bool, or None."
        )
    return DeepSupervision(loss=loss)


def _takes_annotated(loss: Loss) -> bool:
    """Return whether a loss can be called with the keyword `annotated`."""
    parameters = signature(loss).parameters
    return "annotated" in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def _imported(name: str) -> LossFactory:
    module_name, _, attribute = name.partition(":")
    try:
        factory: LossFactory = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"loss.name is {name!r}, which does not import ({error}); "
            "expected a module on the Python path and a name in it."
        ) from None
    return factory
