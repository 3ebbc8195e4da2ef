"""Take over the weights of another network: whole, adapted, or not, and say which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.models.unet import UNet

_MODES = {2: "bilinear", 3: "trilinear"}
_Found: TypeAlias = tuple[Tensor | None, str]
"""A tensor that fits, and how it came about; or None, and why there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover:
    """What became of every tensor of the file and of the network."""

    taken: tuple[str, ...]
    """Copied as they are."""
    adapted: Mapping[str, str]
    """Changed to fit: name -> how."""
    skipped: Mapping[str, str]
    """In the file, but not used: name -> why."""
    missing: tuple[str, ...]
    """In the network, but not in the file; these keep the network's own values, as do those of the
    skipped ones that it has."""

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (tensor, what became of it, how or why), for a table."""
        return [
            *((name, "taken", "") for name in self.taken),
            *((name, "adapted", how) for name, how in self.adapted.items()),
            *((name, "skipped", why) for name, why in self.skipped.items()),
            *((name, "missing", "not in the file; starts anew") for name in self.missing),
        ]

    def summary(self) -> str:
        """Return the numbers, in words."""
        parts = ("taken", "adapted", "skipped", "missing")
        return ", ".join(f"{len(getattr(self, part))} {part}" for part in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What the inputs and logits of a network stand for; None where it is not known."""

    channels: tuple[str, ...] | None = None
    """Names of the input channels, in order."""
    logits: tuple[str, ...] | None = None
    """Names of the logit channels, in order."""


@torch.no_grad()
def take_over(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    before: Meaning | None = None,
    now: Meaning | None = None,
) -> Takeover:
    """Copy into a network what another network has learned, as far as it fits.

    - A tensor of the same name and shape is taken.
    - The first convolution: an input channel that was there before keeps its weights (names are
      compared without case). Any other gets the mean over the former inputs, times their number
      over that of the present ones, so that sums over alike inputs stay. Where no name is in
      common or names are not known, an equal number of channels is taken in order.
    - Logit layers: a label or region that was there before keeps its row, the others start anew.
      Where names are not known, only layers of the same shape are taken.
    - Depthwise convolutions whose kernel grows are interpolated linearly.
    - Everything else keeps the network's own values.

    Args:
        network: Receives the tensors; its layout, device and precision stay.
        tensors: Name -> tensor, as the other network's `state_dict()` names them.
        before: Channels and logits of the network that the tensors come from.
        now: Channels and logits of this network.

    Source:
        Roy et al. 2023 (UpKern) for kernels that grow.
    """
    before, now = before or Meaning(), now or Meaning()
    own = network.state_dict()
    taken, adapted, skipped = [], {}, {}
    roles = _roles(network)
    for name, tensor in tensors.items():
        if name not in own:
            skipped[name] = "the network has no such tensor"
            continue
        role = roles.get(name, _as_it_is)
        fitting, note = role(tensor, own[name], before, now)
        if fitting is None:
            skipped[name] = note
            continue
        own[name].copy_(fitting)
        if note:
            adapted[name] = note
        else:
            taken.append(name)
    missing = tuple(name for name in own if name not in tensors)
    return Takeover(taken=tuple(taken), adapted=adapted, skipped=skipped, missing=missing)


def grown_kernel(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Return (C, 1, *kernel) depthwise weights on a larger kernel, interpolated linearly.

    Source:
        UpKern (Roy et al. 2023): cell centres, not corners, are aligned.
    """
    mode = _MODES[len(size)]
    return functional.interpolate(weight.float(), tuple(size), mode=mode, align_corners=False)


_Role: TypeAlias = Callable[[Tensor, Tensor, Meaning, Meaning], _Found]


def _roles(network: nn.Module) -> dict[str, _Role]:
    """Return what is special about some tensors: name -> function that adapts it."""
    roles: dict[str, _Role] = {}
    convolutions = (nn.Conv2d, nn.Conv3d)
    modules = dict(network.named_modules())
    for name, module in modules.items():
        groups = getattr(module, "groups", 1)
        if groups > 1 and groups == getattr(module, "in_channels", 0):
            roles[f"{name}.weight"] = _depthwise
    if not isinstance(network, UNet):
        return roles
    encoder = network.encoder.named_modules(prefix="encoder")
    first = next(name for name, module in encoder if isinstance(module, convolutions))
    roles[f"{first}.weight"] = _first
    for name in modules:
        if name.startswith("decoder.seg_layers."):
            roles |= {f"{name}.weight": _logits, f"{name}.bias": _logits}
    return roles


def _as_it_is(tensor: Tensor, own: Tensor, before: Meaning, now: Meaning) -> _Found:
    if tensor.shape == own.shape:
        return tensor, ""
    return None, f"has shape {tuple(tensor.shape)}, the network's {tuple(own.shape)}"


def _depthwise(tensor: Tensor, own: Tensor, before: Meaning, now: Meaning) -> _Found:
    old, new = tensor.shape[2:], own.shape[2:]
    grows = tensor.ndim == own.ndim and all(a <= b for a, b in zip(old, new, strict=True))
    if tensor.shape == own.shape or tensor.shape[:2] != own.shape[:2] or not grows:
        return _as_it_is(tensor, own, before, now)
    return grown_kernel(tensor, new), f"kernel {_by(old)} interpolated to {_by(new)}"


def _first(tensor: Tensor, own: Tensor, before: Meaning, now: Meaning) -> _Found:
    """Adapt (F, C, *kernel) weights to other input channels."""
    if tensor.shape[:1] + tensor.shape[2:] != own.shape[:1] + own.shape[2:]:
        return _as_it_is(tensor, own, before, now)
    num_before, num_now = tensor.shape[1], own.shape[1]
    known = _places(before.channels, num_before)
    names = now.channels if now.channels and len(now.channels) == num_now else ("",) * num_now
    places = [known.get(name.lower()) for name in names]
    if num_before == num_now and (places == [*range(num_now)] or set(places) == {None}):
        return tensor, ""
    mean = tensor.mean(1) * (num_before / num_now)
    columns = [mean if place is None else tensor[:, place] for place in places]
    by_name, by_mean = num_now - places.count(None), places.count(None)
    note = f"{num_before} input channels to {num_now}: {by_name} by name, {by_mean} from the mean"
    return torch.stack(columns, 1), note


def _logits(tensor: Tensor, own: Tensor, before: Meaning, now: Meaning) -> _Found:
    """Adapt (L, ...) weights or biases to other labels."""
    same_rows = tensor.shape[1:] == own.shape[1:]
    known = _places(before.logits, tensor.shape[0])
    names = now.logits or ()
    if not same_rows or not known or len(names) != own.shape[0]:
        return _as_it_is(tensor, own, before, now)
    places = [known.get(name.lower()) for name in names]
    if places == [*range(tensor.shape[0])]:
        return tensor, ""
    kept = [name for name, place in zip(names, places, strict=True) if place is not None]
    if not kept:
        return None, "no label in common"
    rows = [own[row] if place is None else tensor[place] for row, place in enumerate(places)]
    others = f", {len(names) - len(kept)} anew" if len(kept) < len(names) else ""
    return torch.stack([row.to(own) for row in rows]), f"rows of {', '.join(kept)}{others}"


def _places(names: Sequence[str] | None, count: int) -> dict[str, int]:
    """Return name -> place; empty if the names are not known."""
    if names is None or len(names) != count:
        return {}
    return {name.lower(): place for place, name in enumerate(names)}


def _by(sizes: Sequence[int]) -> str:
    return "x".join(str(size) for size in sizes)
