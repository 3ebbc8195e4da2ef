"""Statistics of a raw dataset: everything the planner looks at."""

from __future__ import annotations

from pydantic import Field

from medseg.schema.base import FORMAT_VERSION, Schema


class IntensityStatistics(Schema):
    """Foreground intensities of one channel, pooled over all cases."""

    mean: float
    """Arithmetic mean."""
    std: float
    """Population standard deviation."""
    median: float
    """Median."""
    min: float
    """Smallest value."""
    max: float
    """Largest value."""
    percentile_00_5: float
    """0.5th percentile."""
    percentile_99_5: float
    """99.5th percentile."""


class ChannelIntensities(Schema):
    """Intensities of one channel of one case where it is not zero, as read.

    Of voxels on a regular lattice, at most 32 along each axis.
    """

    percentile_00_5: float
    """0.5th percentile."""
    median: float
    """Median."""
    percentile_99_5: float
    """99.5th percentile."""


class CaseFingerprint(Schema):
    """One case, on canonical axes (I, J, K)."""

    shape: tuple[int, int, int]
    """Shape before cropping, in voxels."""
    shape_cropped: tuple[int, int, int]
    """Shape of the non-zero box, in voxels."""
    spacing: tuple[float, float, float]
    """Voxel size in mm."""
    intensities: tuple[ChannelIntensities, ...] = ()
    """Intensities, one entry per channel; empty in files of earlier versions."""
    volumes_ml: dict[str, float] = Field(default_factory=dict)
    """Structure -> volume, of those that were annotated in the case; empty in files of earlier
    versions."""
    border_share: float | None = None
    """Share of the foreground that lies in the outermost voxels of the image, 0 to 1; None without
    foreground, or where not all labels were annotated."""


class Fingerprint(Schema):
    """Statistics of a dataset; `fingerprint.json`."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    cases: dict[str, CaseFingerprint]
    """Case id -> shape and spacing; the rest is for the quality control of predictions."""
    channels: tuple[IntensityStatistics, ...]
    """Foreground intensity statistics, one entry per channel."""
    median_relative_size_after_cropping: float
    """Median over cases of (voxels of the non-zero box / voxels of the image)."""
