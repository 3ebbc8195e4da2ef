"""What a model of nnU-Net is in medseg's own terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.schema.bundle import Orientation, Semantics
from medseg.schema.dataset import DatasetSpec
from medseg.schema.plans import Plans
from medseg.schema.postprocessing import Postprocessing

if TYPE_CHECKING:
    import torch

Weights = Callable[[], dict[str, "torch.Tensor"]]
"""Reads the weights of one fold, by the names of medseg's networks; nothing is read before."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ForeignModel:
    """One configuration of a trained model, all that a bundle says of it."""

    folder: Path
    """Folder of the trained model, the one with the plans."""
    spec: DatasetSpec
    """Channels and labels."""
    plans: Plans
    """With exactly one configuration."""
    configuration: str
    """Its name."""
    semantics: Semantics
    """How its predictions are put together."""
    orientation: Orientation
    """Frame its images are brought to."""
    weights: Mapping[str, Mapping[str, Weights]]
    """Fold ("fold_0" ... or "all") -> checkpoint ("final", "best") -> what reads it."""
    trainer: str = ""
    """Name of the class that trained it."""
    postprocessing: Postprocessing | None = None
    """What the model's owner chose to do after the network."""
    previous: Path | None = None
    """Folder of the stage before, in a cascade, where it was found."""
    notes: tuple[str, ...] = ()
    """What a user should know, each a sentence."""
