"""Segmentations drawn over their image, in the three planes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from medseg.report.canvas import new_figure, save_png
from medseg.report.palette import INK, colour
from medseg.report.planes import PLANES, Labels, Plane, Voxel, centre_of_largest

FILL = 0.35
"""Opacity of the inside of a structure."""
_WIDTH, _MAX_HEIGHT = 9.0, 13.0
_MIN_WIDTH = 4.5
_LEFT, _RIGHT, _TOP, _GAP, _LINE = 0.32, 0.06, 0.28, 0.06, 0.22
"""Margins, gap between cells and height of a line of the legend, inches."""


def overlay_figure(
    image: NDArray[np.floating[Any]],
    segmentations: Mapping[str, Labels],
    path: Path,
    *,
    label_names: Mapping[int, str],
    spacing: tuple[float, float, float],
    centre: Voxel | None = None,
) -> None:
    """Draw an image and, below it, each segmentation over it, in three planes.

    Args:
        image: Intensities on canonical axes, shape (I, J, K).
        segmentations: Title -> label map, same shape; the first one chooses the planes.
        path: PNG file to write.
        label_names: Label value -> name, in the order of the legend; 0 is not drawn.
        spacing: Voxel size in mm.
        centre: Voxel the planes go through; None: the middle of the largest structure.

    Raises:
        ValueError: If a segmentation does not have the shape of the image.
    """
    for title, labels in segmentations.items():
        if labels.shape != image.shape:
            raise ValueError(f"{title!r} has shape {labels.shape}, the image {image.shape}")
    if centre is None:
        centre = centre_of_largest(next(iter(segmentations.values())))
    planes = [p for p in PLANES if image.shape[p.across] > 1 and image.shape[p.up] > 1]
    named = _colours(label_names, segmentations)
    colours = {value: shade for value, (_, shade) in named.items()}
    figure, cells = _layout(
        planes,
        image.shape,
        spacing,
        num_rows=1 + len(segmentations),
        names=[name for name, _ in named.values()],
    )
    limits = _window(image)
    rows: list[tuple[str, Labels | None]] = [("image", None), *segmentations.items()]
    for (title, overlaid), line in zip(rows, cells, strict=True):
        for plane, axes in zip(planes, line, strict=True):
            _show_image(axes, plane.cut(image, centre), limits, plane.steps(spacing))
            if overlaid is not None:
                _show_labels(axes, plane.cut(overlaid, centre), colours, plane.steps(spacing))
        line[0].set_ylabel(title, fontsize=10, color=INK, labelpad=5)
    for plane, axes in zip(planes, cells[0], strict=True):
        where = f"{plane.name}, slice {centre[plane.normal] + 1} of {image.shape[plane.normal]}"
        axes.set_title(where, fontsize=10, color=INK, pad=4)
        _letters(axes, plane)
    _legend(figure, dict(named.values()))
    save_png(figure, path)


def _colours(
    label_names: Mapping[int, str], segmentations: Mapping[str, Labels]
) -> dict[int, tuple[str, str]]:
    """Return value -> (name, colour) of the structures that occur.

    A structure has its colour by its place among the names, whether the others occur or not;
    values without a name are called by their number.
    """
    found = {int(value) for labels in segmentations.values() for value in np.unique(labels)}
    names = {value: name for value, name in label_names.items() if value != 0}
    names |= {value: str(value) for value in sorted(found - {0} - set(names))}
    shades = {value: (name, colour(index)) for index, (value, name) in enumerate(names.items())}
    return {value: shade for value, shade in shades.items() if value in found}


def _layout(
    planes: Sequence[Plane],
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    *,
    num_rows: int,
    names: Sequence[str],
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure with one cell per row and plane, all at one scale, and room for a legend."""
    sizes = [length * step for length, step in zip(shape, spacing, strict=True)]
    widths = [sizes[plane.across] for plane in planes]
    height = max(sizes[plane.up] for plane in planes)
    frame_width = _LEFT + _RIGHT + _GAP * (len(planes) - 1)
    scale = min((_WIDTH - frame_width) / sum(widths), _MAX_HEIGHT / (height * num_rows))
    cell_height = scale * height
    figure_width = max(frame_width + scale * sum(widths), _MIN_WIDTH)
    legend_height = 0.16 + _LINE * -(-len(names) // _num_columns(names, figure_width))
    figure_height = _TOP + num_rows * (cell_height + _GAP) + legend_height
    figure = new_figure(figure_width, figure_height)
    start = _LEFT + (figure_width - frame_width - scale * sum(widths)) / 2
    cells = []
    for row in range(num_rows):
        bottom = legend_height + (num_rows - 1 - row) * (cell_height + _GAP)
        left, line = start, []
        for plane, width in zip(planes, widths, strict=True):
            box = (left / figure_width, bottom / figure_height)
            size = (scale * width / figure_width, cell_height / figure_height)
            line.append(figure.add_axes((*box, *size), facecolor="black"))
            _frame(line[-1], width, (sizes[plane.up], height))
            left += scale * width + _GAP
        cells.append(line)
    return figure, cells


def _num_columns(names: Sequence[str], figure_width: float) -> int:
    """Return how many entries of the legend fit side by side."""
    widths = [0.67 + 0.08 * len(name) for name in names]
    if sum(widths) <= figure_width:
        return max(len(names), 1)
    return max(int(figure_width / max(widths)), 1)


def _frame(axes: Axes, width: float, heights: tuple[float, float]) -> None:
    """Give a cell the scale of mm, the picture in its middle.

    Args:
        axes: The cell.
        width: Width of picture and cell, mm.
        heights: Heights of picture and cell, mm.
    """
    margin = (heights[1] - heights[0]) / 2
    axes.set(xlim=(0, width), ylim=(-margin, heights[0] + margin), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _window(image: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """Return the grey values drawn black and white: robust against a few extreme voxels."""
    inside = image[image != image.flat[0]]
    low, high = np.percentile(inside if inside.size else image, (0.5, 99.5)).tolist()
    return low, high if high > low else low + 1


def _show_image(
    axes: Axes,
    picture: NDArray[Any],
    limits: tuple[float, float],
    steps: tuple[float, float],
) -> None:
    axes.imshow(
        picture,
        cmap="gray",
        vmin=limits[0],
        vmax=limits[1],
        **_placed(picture.shape, steps),
    )


def _placed(shape: tuple[int, ...], steps: tuple[float, float]) -> dict[str, Any]:
    extent = (0, shape[1] * steps[0], 0, shape[0] * steps[1])
    return {"origin": "lower", "extent": extent, "aspect": "auto"}


def _show_labels(
    axes: Axes,
    picture: NDArray[Any],
    colours: Mapping[int, str],
    steps: tuple[float, float],
) -> None:
    """Fill each structure with a translucent colour and draw its outline along the voxels."""
    shades = np.zeros((*picture.shape, 4))
    for value, shade in colours.items():
        shades[picture == value] = (*to_rgb(shade), FILL)
    axes.imshow(shades, interpolation="nearest", **_placed(picture.shape, steps))
    for value, shade in colours.items():
        if value not in picture:
            continue
        lines = outline(picture == value) * np.array(steps)
        axes.add_collection(LineCollection(lines, colors=shade, linewidths=0.9), autolim=False)


def outline(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the edges between the pixels of a structure and others.

    Args:
        mask: Shape (rows, columns).

    Returns:
        Segments ((x, y), (x, y)) in pixels, pixel (row, column) covering x from column to
        column + 1 and y from row to row + 1; shape (N, 2, 2).

    Examples:
        >>> outline(np.array([[True]])).astype(int).tolist()[0]
        [[0, 0], [1, 0]]
    """
    padded = np.pad(mask, 1)
    lying = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])[:, ::-1]
    standing = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])[:, ::-1]
    return np.concatenate(
        [
            np.stack([lying, lying + np.array([1, 0])], axis=1),
            np.stack([standing, standing + np.array([0, 1])], axis=1),
        ]
    ).astype(np.float64)


def _letters(axes: Axes, plane: Plane) -> None:
    places = (
        (0.02, 0.5, "left", "center"),
        (0.98, 0.5, "right", "center"),
        (0.5, 0.98, "center", "top"),
        (0.5, 0.02, "center", "bottom"),
    )
    for letter, (x, y, horizontal, vertical) in zip(plane.letters, places, strict=True):
        text = axes.text(x, y, letter, transform=axes.transAxes, ha=horizontal, va=vertical)
        text.set(color="white", fontsize=10, fontweight="bold")
        text.set_path_effects([withStroke(linewidth=2, foreground="black")])


def _legend(figure: Figure, shades: Mapping[str, str]) -> None:
    handles = [
        Patch(facecolor=(*to_rgb(shade), 0.6), edgecolor=shade, linewidth=1.2, label=name)
        for name, shade in shades.items()
    ]
    if handles:
        columns = _num_columns(list(shades), figure.get_figwidth())
        figure.legend(
            handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=10
        )
