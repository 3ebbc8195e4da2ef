"""Bring bundles of any kind into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from medseg.bundles.bundle import Bundle, check_supported, find_bundle
from medseg.bundles.members import AnyBundle, Composite, read_any
from medseg.errors import BundleError, ConfigError
from medseg.execute.sizes import read_size
from medseg.infer.chain import load_composite
from medseg.infer.member import Member
from medseg.infer.memory import Limits
from medseg.infer.model import Model
from medseg.labels import LabelScheme
from medseg.models.build import build_network
from medseg.models.precision import pick_device
from medseg.models.weights import load_into, load_weights


def load(  # noqa: PLR0913 - all but the path by keyword
    path: str | Path | Sequence[str | Path],
    *,
    device: str = "auto",
    mode: Literal["default", "exact"] = "default",
    folds: Sequence[str | int] | str | int | None = None,
    checkpoint: str = "final",
    weights: Sequence[float] | None = None,
    max_memory: str | int | None = None,
    max_vram: str | int | None = None,
    trust_code: bool = False,
) -> Model:
    """Load a bundle, or several whose probabilities are averaged, and keep all in memory.

    The first stage of a cascade is loaded with the same folds, and is always its "final" weights,
    on whose findings the second stage was trained.

    Args:
        path: Bundle or run folder, or several.
        device: "auto", "cpu", "cuda:N" or "mps".
        mode: "exact" computes as the references do, see `infer.exact`.
        folds: Folds to average (0, "fold_0", "all" ...); None takes all a bundle has.
        checkpoint: "final" or "best".
        weights: Share of each of several bundles; None: equal ones.
        max_memory: Memory the process may take, such as "4GB"; None: what is free.
        max_vram: Memory of the GPU that may be taken; None: what is free.
        trust_code: Import a network given as "package.module:Name", which runs that code.

    Raises:
        BundleError: If there is no bundle, it is damaged, it lacks the weights asked for, it
            needs code that is not trusted, or bundles do not go together.
        ConfigError: If an option is out of range.
    """
    if mode not in ("default", "exact"):
        raise ConfigError(f"mode is {mode!r}; expected one of: default, exact.")
    limits = Limits(
        memory_bytes=None if max_memory is None else read_size(max_memory, "max_memory"),
        vram_bytes=None if max_vram is None else read_size(max_vram, "max_vram"),
    )
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    folds = [folds] if isinstance(folds, (str, int)) else folds
    if not paths:
        raise ConfigError("no model was given; expected the path of a bundle or run.")
    target = pick_device(device)

    def member(bundle: Bundle) -> Member:
        check_supported(bundle)
        chosen = bundle.select_folds(folds)
        how = Loading(folds=chosen, device=target, mode=mode, trust_code=trust_code)
        return load_member(bundle, how, checkpoint)

    bundles = [read_any(find_bundle(Path(entry))) for entry in paths]
    if len(bundles) == 1 and weights is None and isinstance(bundles[0], Composite):
        return load_composite(bundles[0], member, limits=limits, checkpoint=checkpoint)
    members = [member(_single(bundle)) for bundle in bundles]
    return Model(members, weights=weights, limits=limits, checkpoint=checkpoint)


def _single(bundle: AnyBundle) -> Bundle:
    """Return a bundle of one model; one made of bundles stands alone, with its own weights."""
    if isinstance(bundle, Composite):
        raise ConfigError(
            f"{bundle.folder}: is made of several models (kind {bundle.manifest.kind!r}), and "
            "cannot be averaged with others or given weights. Load it alone."
        )
    return bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How the networks of a bundle, and of the stage before, are brought into memory."""

    folds: tuple[str, ...]
    device: torch.device
    mode: Literal["default", "exact"]
    trust_code: bool


def load_member(bundle: Bundle, how: Loading, checkpoint: str) -> Member:
    """Bring a bundle into memory, with the stage before.

    Args:
        bundle: Verified.
        how: Folds and device.
        checkpoint: "final" or "best"; the stage before is always its "final" weights.

    Raises:
        BundleError: If weights are missing or do not fit, or need code that is not trusted.
    """
    previous = None if bundle.previous is None else load_member(bundle.previous, how, "final")
    networks = [_network(bundle, fold, checkpoint, how) for fold in how.folds]
    return Member(
        bundle,
        networks,
        folds=how.folds,
        device=how.device,
        is_exact=how.mode == "exact",
        previous=previous,
    )


def _network(bundle: Bundle, fold: str, checkpoint: str, how: Loading) -> nn.Module:
    path = bundle.weights(fold, checkpoint)
    configuration, labels = bundle.configuration, LabelScheme.from_spec(bundle.spec)
    try:
        network = build_network(
            configuration.architecture,
            num_inputs=len(bundle.spec.channels) + labels.num_previous(configuration),
            num_logits=labels.num_logits,
            patch_size=configuration.patch_size,
            norm="instance" if how.mode == "exact" else "auto",
            generator=torch.Generator(),  # leaves the caller's random state alone
            trust_code=how.trust_code,
        )
    except BundleError as error:
        raise BundleError(f"{bundle.folder}: {error}") from None
    load_into(network, load_weights(path), str(path))
    network = network.requires_grad_(False).eval().to(how.device)
    return network if how.mode == "exact" else network.use_channels_last()
