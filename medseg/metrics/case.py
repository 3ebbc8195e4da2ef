"""All measures of one case, and their statistics over cases."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.errors import GeometryError
from medseg.metrics.overlap import JointCounts, joint_counts, volume_ml
from medseg.metrics.surface import hd95_mm, nsd, surface_distances
from medseg.schema.metrics import (
    MEASURES,
    CaseMetrics,
    ForegroundMean,
    Metrics,
    Statistic,
    StructureMetrics,
    StructureSummary,
)
from medseg.values import distinct_values, places_in

NSD_TOLERANCE_MM = 1.0
"""Default tolerance of the normalised surface Dice."""

_LARGEST = 1000
"""Label maps with values above this are renumbered before boxes are looked for."""

LabelMap = NDArray[np.integer[Any]]
Box = tuple[slice, ...]


def evaluate_case(
    prediction: LabelMap,
    reference: LabelMap,
    *,
    structures: Mapping[str, tuple[int, ...]],
    affine: NDArray[np.float64],
    ignore_label: int | None = None,
    nsd_tolerance_mm: float = NSD_TOLERANCE_MM,
) -> dict[str, StructureMetrics]:
    """Compare a predicted label map with a reference on the same grid.

    Args:
        prediction: Predicted label map, shape (I, J, K), any integers.
        reference: Reference label map, same shape.
        structures: Structure name -> label values it is made of.
        affine: Voxel indices to mm, shape (4, 4).
        ignore_label: Voxels with this value in the reference are not counted.
        nsd_tolerance_mm: Tolerance of the normalised surface Dice, mm.

    Returns:
        Structure name -> measures.

    Raises:
        GeometryError: If the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise GeometryError(
            f"prediction has shape {prediction.shape}, reference {reference.shape}; they must "
            "share one grid. Predict again from the image the reference was drawn on."
        )
    valid = None if ignore_label is None else reference != ignore_label
    prediction, reference, structures = _renumbered(prediction, reference, structures)
    counts = joint_counts(prediction, reference, valid=valid)
    boxes = (ndimage.find_objects(prediction), ndimage.find_objects(reference))
    results = {}
    for name, values in structures.items():
        box = _box(boxes, values, reference.shape)
        results[name] = _structure(
            (prediction[box], reference[box], None if valid is None else valid[box]),
            values,
            counts,
            affine=affine,
            nsd_tolerance_mm=nsd_tolerance_mm,
        )
    return results


def _renumbered(
    prediction: LabelMap, reference: LabelMap, structures: Mapping[str, tuple[int, ...]]
) -> tuple[LabelMap, LabelMap, Mapping[str, tuple[int, ...]]]:
    """Return label maps whose values are small and positive, and structures to match.

    What is so already is returned as it is: boxes are found by value, and 0 has none.
    """
    wanted = {value for values in structures.values() for value in values}
    low = min(int(prediction.min(initial=1)), int(reference.min(initial=1)))
    high = max(int(prediction.max(initial=0)), int(reference.max(initial=0)))
    if low >= 0 and high <= _LARGEST and 0 not in wanted:
        return prediction, reference, structures
    present = np.union1d(distinct_values(prediction), distinct_values(reference)).tolist()
    number = {value: place for place, value in enumerate(present)}
    kind = np.min_scalar_type(len(present) + 1)
    return (
        places_in(present, prediction, kind) + kind.type(1),
        places_in(present, reference, kind) + kind.type(1),
        {
            name: tuple(number[value] + 1 for value in values if value in number)
            for name, values in structures.items()
        },
    )


def _box(
    boxes: Sequence[Sequence[Box | None]], values: Iterable[int], shape: tuple[int, ...]
) -> Box:
    """Return the box around some labels in both maps, with one voxel around it."""
    found = [
        box[value - 1]
        for value in values
        for box in boxes
        if 0 < value <= len(box) and box[value - 1] is not None
    ]
    kept = [box for box in found if box is not None]
    if not kept:
        return tuple(slice(0, 0) for _ in shape)
    return tuple(
        slice(
            max(min(box[axis].start for box in kept) - 1, 0),
            min(max(box[axis].stop for box in kept) + 1, length),
        )
        for axis, length in enumerate(shape)
    )


def _structure(
    maps: tuple[LabelMap, LabelMap, NDArray[np.bool_] | None],
    values: tuple[int, ...],
    counts: JointCounts,
    *,
    affine: NDArray[np.float64],
    nsd_tolerance_mm: float,
) -> StructureMetrics:
    overlap = counts.overlap(values)
    prediction, reference, valid = maps
    distances = surface_distances(
        np.isin(prediction, values),
        np.isin(reference, values),
        spacing=tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist()),
        valid=valid,
    )
    return StructureMetrics(
        dice=overlap.dice,
        iou=overlap.iou,
        precision=overlap.precision,
        recall=overlap.recall,
        hd95_mm=hd95_mm(distances),
        nsd=nsd(distances, nsd_tolerance_mm),
        true_positives=overlap.true_positives,
        false_positives=overlap.false_positives,
        false_negatives=overlap.false_negatives,
        true_negatives=overlap.true_negatives,
        volume_prediction_ml=volume_ml(overlap.num_predicted, affine),
        volume_reference_ml=volume_ml(overlap.num_reference, affine),
    )


def summarize(
    cases: Mapping[str, CaseMetrics],
    *,
    structures: Mapping[str, tuple[int, ...]],
    ignore_label: int | None = None,
    nsd_tolerance_mm: float = NSD_TOLERANCE_MM,
    failed: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Metrics:
    """Put the measures of cases together with their statistics.

    A structure's mean goes over the cases in which the measure is defined (so a case where
    prediction and reference are both empty is left out, and one in which the structure was not
    annotated), the foreground mean over structures.

    Args:
        cases: Case id -> measures; structures that were not annotated in a case are missing there.
        structures: Structure name -> label values it is made of.
        ignore_label: Label that was not counted.
        nsd_tolerance_mm: Tolerance that was used, mm.
        failed: Case id -> why the case could not be evaluated.
        notes: Remarks for whoever reads the numbers.
    """
    summary = {}
    for name in structures:
        of_cases = [case.structures[name] for case in cases.values() if name in case.structures]
        columns = {measure: [getattr(one, measure) for one in of_cases] for measure in MEASURES}
        summary[name] = StructureSummary(**{key: _statistic(v) for key, v in columns.items()})
    foreground = {
        measure: _statistic([getattr(one, measure).mean for one in summary.values()]).mean
        for measure in MEASURES
    }
    return Metrics(
        structures=dict(structures),
        ignore_label=ignore_label,
        nsd_tolerance_mm=nsd_tolerance_mm,
        foreground_mean=ForegroundMean(**foreground),
        summary=summary,
        cases=dict(sorted(cases.items())),
        failed=dict(sorted((failed or {}).items())),
        notes=tuple(notes),
    )


def _statistic(values: Iterable[float | None]) -> Statistic:
    defined = [value for value in values if value is not None]
    if not defined:
        return Statistic(n=0, mean=None, std=None, min=None, max=None)
    return Statistic(
        n=len(defined),
        mean=statistics.fmean(defined),
        std=statistics.stdev(defined) if len(defined) > 1 else None,
        min=min(defined),
        max=max(defined),
    )
