"""What passes through the stages of a prediction: a job, prepared, computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from medseg.geometry import Grid
from medseg.infer.export import Reduced
from medseg.infer.maps import Maps
from medseg.infer.member import Ready
from medseg.infer.rows import Progress
from medseg.infer.source import Case
from medseg.io.image import Header

MapsOf = Callable[["Prepared"], Maps]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Job:
    """One case that is to be predicted."""

    name: str
    case: Case
    previous_stage: Case | None = None
    """Label map of the stage before, in a cascade; None: that stage is run."""
    maps_of: MapsOf | None = None
    """Gives what takes the maps; None: they are returned in memory."""
    size_bytes: float = 0.0
    """Roughly what its image takes in memory."""
    progress: Progress | None = None
    """Called with (tiles done, tiles in total)."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Prepared:
    """A case that only waits for the networks."""

    name: str
    readies: tuple[Ready, ...]
    """One per member."""
    grid: Grid
    header: Header
    """Header of the image."""
    flags: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Computed:
    """A case that the networks are done with."""

    prepared: Prepared
    reduced: Reduced
    maps: Maps
    is_mirrored: bool
    seconds: float
