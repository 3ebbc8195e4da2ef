"""Statistics of a raw dataset: everything the planner looks at."""

from __future__ import annotations

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


class CaseFingerprint(Schema):
    """One case, on canonical axes (I, J, K)."""

    shape: tuple[int, int, int]
    """Shape before cropping, in voxels."""
    shape_cropped: tuple[int, int, int]
    """Shape of the non-zero box, in voxels."""
    spacing: tuple[float, float, float]
    """Voxel size in mm."""


class Fingerprint(Schema):
    """Statistics of a dataset; `fingerprint.json`."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    cases: dict[str, CaseFingerprint]
    """Case id -> shape and spacing."""
    channels: tuple[IntensityStatistics, ...]
    """Foreground intensity statistics, one entry per channel."""
    median_relative_size_after_cropping: float
    """Median over cases of (voxels of the non-zero box / voxels of the image)."""
