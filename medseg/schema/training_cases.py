"""What the cases a model was made from were like: `training_cases.json` of a bundle."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt

from medseg.schema.base import FORMAT_VERSION, Schema


class Spread(Schema):
    """One number over the training cases."""

    min: float
    """Smallest value."""
    percentile_05: float
    """5th percentile."""
    median: float
    """Median."""
    percentile_95: float
    """95th percentile."""
    max: float
    """Largest value."""


class StructureSpread(Schema):
    """One structure over the training cases."""

    num_annotated: NonNegativeInt
    """Cases in which the structure would have been drawn."""
    num_present: NonNegativeInt
    """Cases in which it is there."""
    volume_ml: Spread | None = None
    """Its volume where it is there; None if it never is."""


class ChannelSpread(Schema):
    """Intensities of one channel over the training cases, where not zero, as read."""

    percentile_00_5: Spread
    """0.5th percentile of each case."""
    median: Spread
    """Median of each case."""
    percentile_99_5: Spread
    """99.5th percentile of each case."""


class TrainingCases(Schema):
    """What the cases of a dataset are like, without naming any: `training_cases.json`."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    num_cases: PositiveInt
    """Cases that were looked at, those for training and for validation alike."""
    spacing: tuple[Spread, Spread, Spread]
    """Voxel size in mm along the canonical axes (I, J, K)."""
    channels: tuple[ChannelSpread, ...]
    """Intensities, one entry per channel."""
    structures: dict[str, StructureSpread] = Field(default_factory=dict)
    """Structure -> how often it is there, and its volume."""
    border_share: Spread | None = None
    """Share of a case's foreground that lies in the outermost voxels of the image, 0 to 1; None
    where no case has foreground with all labels drawn."""
