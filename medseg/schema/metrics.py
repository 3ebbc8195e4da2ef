"""Scores of predictions against references; `metrics.json`. None stands for an undefined value."""

from __future__ import annotations

from pydantic import Field

from medseg.schema.base import FORMAT_VERSION, Schema

MEASURES = ("dice", "iou", "precision", "recall", "hd95_mm", "nsd")
"""The measures that are averaged, by their field names."""


class StructureMetrics(Schema):
    """One structure of one case; voxels with the ignore label are not counted."""

    dice: float | None
    """2 TP / (2 TP + FP + FN); None where prediction and reference are both empty."""
    iou: float | None
    """TP / (TP + FP + FN); None where prediction and reference are both empty."""
    precision: float | None
    """TP / (TP + FP); None where the prediction is empty."""
    recall: float | None
    """TP / (TP + FN); None where the reference is empty."""
    hd95_mm: float | None
    """95th percentile of the surface distance in mm; None where either surface is empty."""
    nsd: float | None
    """Share of both surfaces within the tolerance of the other; None where both are empty."""
    true_positives: int
    """Voxels of the structure in prediction and reference."""
    false_positives: int
    """Voxels of the structure in the prediction only."""
    false_negatives: int
    """Voxels of the structure in the reference only."""
    true_negatives: int
    """Voxels of the structure in neither."""
    volume_prediction_ml: float
    """Predicted volume in ml."""
    volume_reference_ml: float
    """Reference volume in ml."""


class CaseMetrics(Schema):
    """One case."""

    prediction: str = ""
    """File of the prediction."""
    reference: str = ""
    """File of the reference."""
    structures: dict[str, StructureMetrics]
    """Structure name -> values; without those that were not annotated in this case."""


class Statistic(Schema):
    """One measure over the cases in which it is defined."""

    n: int
    """Number of cases."""
    mean: float | None
    """Arithmetic mean; None for no case."""
    std: float | None
    """Sample standard deviation; None for fewer than two cases."""
    min: float | None
    """Smallest value; None for no case."""
    max: float | None
    """Largest value; None for no case."""


class StructureSummary(Schema):
    """One structure over all cases."""

    dice: Statistic
    """Dice."""
    iou: Statistic
    """Intersection over union."""
    precision: Statistic
    """Precision."""
    recall: Statistic
    """Recall."""
    hd95_mm: Statistic
    """95th percentile of the surface distance in mm."""
    nsd: Statistic
    """Normalised surface Dice."""


class ForegroundMean(Schema):
    """Mean over structures of the means over cases."""

    dice: float | None
    """Dice."""
    iou: float | None
    """Intersection over union."""
    precision: float | None
    """Precision."""
    recall: float | None
    """Recall."""
    hd95_mm: float | None
    """95th percentile of the surface distance in mm."""
    nsd: float | None
    """Normalised surface Dice."""


class Metrics(Schema):
    """`metrics.json`."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    structures: dict[str, tuple[int, ...]]
    """Structure name -> the label values it is made of."""
    ignore_label: int | None = None
    """Voxels with this value in the reference are not counted."""
    nsd_tolerance_mm: float
    """Tolerance of the normalised surface Dice in mm."""
    foreground_mean: ForegroundMean
    """Mean over structures of the means over cases."""
    summary: dict[str, StructureSummary]
    """Structure name -> statistics over cases."""
    cases: dict[str, CaseMetrics]
    """Case id -> values."""
    failed: dict[str, str] = Field(default_factory=dict)
    """Case id -> why it could not be evaluated."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers should know, in words."""
