"""Load one case: channels and segmentation on one grid, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError, GeometryError, case_context
from medseg.geometry import Grid
from medseg.io.image import Header
from medseg.io.read import read_channels, read_segmentation
from medseg.labels import LabelScheme
from medseg.schema.dataset import DatasetSpec
from medseg.values import distinct_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One case in memory."""

    case_id: str
    channels: NDArray[np.float32]
    """(C, I, J, K), intensities as stored."""
    segmentation: NDArray[np.unsignedinteger] | None
    """(I, J, K) indices of the dataset's `LabelScheme`, or None."""
    grid: Grid
    header: Header


def case_paths(spec: DatasetSpec, case_id: str) -> tuple[list[Path], Path | None]:
    """Return the channel files and the segmentation file of a case."""
    files, root = spec.cases[case_id], Path(spec.source)
    segmentation = root / files.segmentation if files.segmentation else None
    return [root / name for name in files.channels], segmentation


def load_case(spec: DatasetSpec, case_id: str) -> Case:
    """Read and check one case.

    Raises:
        DatasetError: If a file cannot be read or labels are not those of the dataset.
        GeometryError: If channels and segmentation do not share one grid.
    """
    with case_context(case_id):
        paths, segmentation_path = case_paths(spec, case_id)
        image = read_channels(paths)
        if len(image.array) != len(spec.channels):
            raise DatasetError(
                f"{paths[0]}: holds {len(image.array)} channels, the dataset has "
                f"{len(spec.channels)} ({', '.join(spec.channels)}). Export every channel."
            )
        segmentation = None
        if segmentation_path is not None:
            found = read_segmentation(segmentation_path)
            _check_grid(image.grid, found.grid, segmentation_path, paths[0])
            segmentation = case_indices(spec, case_id, found.array, segmentation_path.name)
        return Case(
            case_id=case_id,
            channels=image.array,
            segmentation=segmentation,
            grid=image.grid,
            header=image.header,
        )


def case_indices(
    spec: DatasetSpec, case_id: str, values: NDArray[np.integer[Any]], where: str
) -> NDArray[np.unsignedinteger[Any]]:
    """Turn the values of a case's segmentation file into indices.

    Args:
        spec: The dataset.
        case_id: The case, which may be annotated in part.
        values: (I, J, K), as read.
        where: What a message names, such as the file.

    Raises:
        DatasetError: If a value is not one of the dataset's, or stands for something that was
            not annotated in this case.
    """
    labels = LabelScheme.from_spec(spec)
    annotated = spec.cases[case_id].annotated_labels
    if annotated is not None:
        labels.check(distinct_values(values).tolist(), where, annotated)
    return labels.to_indices(values, where)


def _check_grid(grid: Grid, found: Grid, path: Path, image_path: Path) -> None:
    difference = grid.disagreement(found)
    if difference is not None:
        raise GeometryError(
            f"{path.name} does not lie on the grid of {image_path.name}: {difference}. "
            "Re-export the segmentation on the image's grid."
        )
