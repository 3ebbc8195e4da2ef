"""Load one case: channels and segmentation on one grid, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError, GeometryError, case_context
from medseg.geometry import Grid
from medseg.io.image import Header
from medseg.io.read import read_channels, read_segmentation
from medseg.labels import LabelScheme
from medseg.schema.dataset import DatasetSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One case in memory."""

    case_id: str
    channels: NDArray[np.float32]
    """(C, I, J, K), intensities as stored."""
    segmentation: NDArray[np.unsignedinteger] | None
    """(I, J, K) label map, or None."""
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
            segmentation = _segmentation(spec, segmentation_path, image.grid, paths[0])
        return Case(
            case_id=case_id,
            channels=image.array,
            segmentation=segmentation,
            grid=image.grid,
            header=image.header,
        )


def _segmentation(
    spec: DatasetSpec, path: Path, grid: Grid, image_path: Path
) -> NDArray[np.unsignedinteger]:
    found = read_segmentation(path)
    difference = grid.disagreement(found.grid)
    if difference is not None:
        raise GeometryError(
            f"{path.name} does not lie on the grid of {image_path.name}: {difference}. "
            "Re-export the segmentation on the image's grid."
        )
    labels = LabelScheme.from_spec(spec)
    labels.check(np.unique(found.array), path.name)
    return found.array.astype(labels.dtype, copy=False)
