"""Pictures of cases on disk: image, reference and prediction in three planes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.geometry import canonical_axes, reorient
from medseg.io.image import Image
from medseg.io.read import read_image, read_segmentation
from medseg.report.overlay import overlay_figure


def draw_case(
    image: Path,
    segmentations: Mapping[str, Path],
    path: Path,
    *,
    label_names: Mapping[int, str],
) -> None:
    """Draw one channel of a case with label maps over it, on canonical axes.

    Args:
        image: Image file of one channel.
        segmentations: Title -> label map on the image's grid.
        path: PNG file to write.
        label_names: Label value -> name.
    """
    background = read_image(image)
    axes, flips = canonical_axes(background.grid.affine)
    overlay_figure(
        _canonical(background),
        {title: _canonical(read_segmentation(file)) for title, file in segmentations.items()},
        path,
        label_names=label_names,
        spacing=reorient(background.grid, axes, flips).spacing,
    )


def _canonical(image: Image) -> NDArray[Any]:
    axes, flips = canonical_axes(image.grid.affine)
    turned: NDArray[Any] = image.array.transpose(axes)
    return np.flip(turned, tuple(axis for axis in range(3) if flips[axis]))
