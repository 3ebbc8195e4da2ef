"""What a prediction says of itself: `CASE.json` and `summary.json` of an output folder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from medseg.schema.base import FORMAT_VERSION, Schema


def _without_folder(name: str) -> str:
    if "/" in name or "\\" in name:
        raise ValueError("expected a name without a folder: files tell nothing of the machine")
    return name


Name = Annotated[str, AfterValidator(_without_folder)]
"""Name of a file or folder, without where it lies."""


class PredictionRow(Schema):
    """What became of one case."""

    case: str
    """Name of the case."""
    status: Literal["done", "failed", "skipped"]
    """Whether there is a new output, none, or one from before that was left as it is."""
    file: str | None = None
    """Segmentation, relative to the output folder."""
    message: str = ""
    """Why it failed or was skipped."""
    volumes_ml: dict[str, float] = Field(default_factory=dict)
    """Structure -> volume."""
    flags: tuple[str, ...] = ()
    """What a person should look at."""
    seconds: float = 0.0
    """Time since the previous case was finished."""


class PredictionSummary(Schema):
    """`summary.json` of an output folder."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    model: str
    """The bundle used."""
    folds: tuple[str, ...]
    """Folds averaged."""
    tta: str
    """Test-time augmentation asked for."""
    step: float
    """Largest shift between tiles, as a fraction of the tile."""
    cases: tuple[PredictionRow, ...]
    """One row per case, in the order predicted."""


class LabelReport(Schema):
    """One structure of a segmentation."""

    values: tuple[int, ...]
    """Values of the label map it is made of."""
    colour: str = Field(pattern="^#[0-9A-F]{6}$")
    """Its colour, #RRGGBB, as in the header of the segmentation."""


class Provenance(Schema):
    """What a prediction was made with; no path of the machine stands in it."""

    model: str
    """Name of the model."""
    bundle: Name
    """Name of the bundle's folder; of several the first."""
    bundles: tuple[Name, ...] = ()
    """Names of the folders of all bundles, where there are several."""
    weights: tuple[float, ...] = ()
    """Share of each of several bundles."""
    bundle_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Checksum of its `bundle.json`, which holds those of all its other files."""
    folds: tuple[str, ...]
    """Folds averaged."""
    checkpoint: str
    """"final" or "best"."""
    tta: str
    """Test-time augmentation used."""
    step: float
    """Largest shift between tiles, as a fraction of the tile."""
    precision: str
    """Arithmetic of the network, such as "bfloat16"."""
    device: str
    """What it ran on, such as "cpu" or "cuda:0"."""
    medseg_version: str
    """Version of medseg."""
    is_postprocessed: bool = False
    """Whether the bundle's postprocessing was applied."""


class CaseReport(Schema):
    """`CASE.json` of an output folder, written after all other files of the case."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    case: str
    """Name of the case."""
    inputs: tuple[Name, ...]
    """Image files, in the order of the channels; empty where the case was no file."""
    files: dict[str, Name]
    """Kind of output -> file: "segmentation", "probabilities" ..."""
    labels: dict[str, LabelReport]
    """Structure -> its values and colour, background included."""
    volumes_ml: dict[str, float]
    """Structure -> volume."""
    flags: tuple[str, ...] = ()
    """What a person should look at."""
    provenance: Provenance
    """What it was made with."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Stage -> time it took."""
    file_bytes: int | None = None
    """Size of the segmentation's file when it was written."""
    spacing: tuple[float, ...] | None = None
    """Voxel size beside a segmentation whose format has no place for one, as its readers expect
    it: (pages, rows, columns) or (rows, columns) in mm."""
