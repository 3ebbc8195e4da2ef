"""What a prediction is asked for, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.errors import ConfigError, near_names
from medseg.geometry import SpatialRecord
from medseg.io.image import Header
from medseg.io.names import LabelEntry
from medseg.io.write import write_segmentation

Tta = Literal["auto", "none", "flips"]
MAPS = ("probabilities", "entropy", "disagreement")
"""Maps of real numbers that a prediction can give beside the segmentation."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Result:
    """The prediction of one case, on the grid of its image."""

    case: str
    """Name of the case."""
    segmentation: NDArray[np.integer[Any]]
    """(I, J, K) label map with the values of the dataset's files."""
    probabilities: NDArray[np.float32] | None
    """(L, I, J, K), on request: of each label, background first, or of each region."""
    entropy: NDArray[np.float32] | None = None
    """(I, J, K), on request: 0 where the networks are certain, 1 where all is equally likely."""
    disagreement: NDArray[np.float32] | None = None
    """(I, J, K), on request: the share of networks that decide otherwise than their mean."""
    affine: NDArray[np.float64]
    """(4, 4) voxel to RAS+ mm, that of the image."""
    labels: dict[str, int | tuple[int, ...]]
    """Label name -> value, or values of a region."""
    volumes_ml: dict[str, float]
    """Structure -> volume."""
    flags: tuple[str, ...]
    """What a person should look at, in words; empty if nothing."""
    record: SpatialRecord
    """How the (first) network saw the image."""
    header: Header
    """Header of the image; a plain one if the case was an array."""
    entries: tuple[LabelEntry, ...] = ()
    """Names and colours of the label values, for the file's header."""
    is_mirrored: bool = False
    """Whether mirrored images were averaged (of several models: in the first)."""
    is_postprocessed: bool = False
    """Whether the bundle's postprocessing was applied."""
    seconds: dict[str, float]
    """Stage ("prepare", "network", "finish") -> time it took."""

    def save(self, path: str | Path) -> None:
        """Write the segmentation with exactly the geometry of its image, atomically.

        Args:
            path: Target; its ending chooses the format.

        Raises:
            DatasetError: If the ending is unknown.
            GeometryError: If the format cannot hold the image's geometry.
        """
        write_segmentation(path, self.segmentation, self.header, labels=self.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseError:
    """A case that could not be predicted."""

    case: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How predictions are made."""

    maps: frozenset[str] = frozenset()
    """Which of `MAPS` are wanted."""
    tta: Tta = "auto"
    step: float = 0.5
    disagreement: bool = False
    """Whether the disagreement of networks is measured."""
    postprocess: bool = True
    """Whether the bundle's postprocessing is applied."""
    folder: Path | None = None
    """Where maps are written and scratch files lie; None: maps stay in memory, scratch files lie in
    the system's folder for temporary files."""

    @property
    def in_files(self) -> bool:
        """Return whether maps go to files instead of staying in memory."""
        return self.folder is not None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        known = ["auto", "none", "flips"]
        if self.tta not in known:
            raise ConfigError(
                f"tta is {self.tta!r}; expected one of: {', '.join(known)}."
                f"{near_names(str(self.tta), known)}"
            )
        if not isinstance(self.step, (int, float)) or not 0 < self.step <= 1:
            raise ConfigError(f"step is {self.step}; expected a number in (0, 1], usually 0.5.")
        for name in sorted(self.maps - set(MAPS)):
            raise ConfigError(
                f"save holds {name or 'an empty name'!r}; expected any of: {', '.join(MAPS)}."
                f"{near_names(name, list(MAPS))}"
            )
