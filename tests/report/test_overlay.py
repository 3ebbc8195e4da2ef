"""Pictures of segmentations: what is where."""

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.image import imread

from medseg.report import overlay
from medseg.report.overlay import PLANES, centre_of_largest, outline, overlay_figure
from medseg.report.palette import COLOURS

SHAPE, SPACING = (14, 20, 8), (2.0, 1.1, 3.5)
NAMES = {0: "background", 1: "core", 2: "right", 3: "front", 4: "top", 5: "not here"}


@pytest.fixture
def cross():
    """A block in the middle with one arm to the right, one to the front and one to the top."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[10:13, 9:12, 3:5] = 2
    labels[6:9, 13:18, 3:5] = 3
    labels[6:9, 9:12, 6:8] = 4
    labels[5:10, 7:13, 2:6] = 1
    return labels


@pytest.fixture
def drawn(monkeypatch):
    def draw(*arguments, **options):
        kept = []
        monkeypatch.setattr(overlay, "save_png", lambda figure, path: kept.append(figure))
        overlay_figure(*arguments, "unused.png", **options)
        return kept[0]

    return draw


@pytest.mark.parametrize(
    ("name", "left", "top"), [("axial", 2, 3), ("coronal", 2, 4), ("sagittal", 3, 4)]
)
def test_patient_right_is_left_and_the_nose_points_left(cross, name, left, top):
    """The side of the picture a structure lies on must be the one the letters promise."""
    plane = next(plane for plane in PLANES if plane.name == name)
    picture = plane.cut(cross, (7, 10, 4))
    middle_row, middle_column = np.argwhere(picture == 1).mean(axis=0)
    assert np.argwhere(picture == left)[:, 1].max() < middle_column
    assert np.argwhere(picture == top)[:, 0].min() > middle_row
    directions = {2: "R", 3: "A", 4: "S"}
    assert (plane.letters[0], plane.letters[2]) == (directions[left], directions[top])
    opposite = {"R": "L", "A": "P", "S": "I"}
    assert plane.letters[1] == opposite[plane.letters[0]]
    assert plane.letters[3] == opposite[plane.letters[2]]


def test_a_millimetre_is_as_long_in_every_direction_and_cell(cross, drawn):
    figure = drawn(cross.astype(np.float32), {"a": cross}, label_names=NAMES, spacing=SPACING)
    assert len(figure.axes) == 6
    scales = []
    for axes in figure.axes:
        box = axes.get_window_extent()
        scales += [box.width / np.ptp(axes.get_xlim()), box.height / np.ptp(axes.get_ylim())]
    np.testing.assert_allclose(scales, scales[0], rtol=1e-6)
    extents = [axes.get_images()[0].get_extent() for axes in figure.axes[:3]]
    sizes = [(extent[1], extent[3]) for extent in extents]
    i, j, k = (length * step for length, step in zip(SHAPE, SPACING, strict=True))
    np.testing.assert_allclose(sizes, [(i, j), (i, k), (j, k)])


def test_each_structure_has_its_colour_and_outline(cross, drawn):
    figure = drawn(cross.astype(np.float32), {"a": cross}, label_names=NAMES, spacing=SPACING)
    plane, axes = PLANES[0], figure.axes[3]
    fill = np.asarray(axes.get_images()[1].get_array())
    picture = plane.cut(cross, centre_of_largest(cross))
    for value in (1, 2, 3):
        red = int(COLOURS[value - 1][1:3], 16) / 255
        np.testing.assert_allclose(fill[picture == value][:, 0], red)
    assert (fill[picture == 0] == 0).all()
    drawn_lines = [c for c in axes.collections if isinstance(c, LineCollection)]
    across = np.concatenate([np.concatenate(c.get_segments()) for c in drawn_lines])
    columns = np.flatnonzero((picture > 0).any(axis=0))
    expected = (columns[0] * SPACING[0], (columns[-1] + 1) * SPACING[0])
    assert (across[:, 0].min(), across[:, 0].max()) == pytest.approx(expected)


def test_legend_names_the_structures_that_occur_and_those_without_a_name(cross, drawn):
    cross[0, 0, 0] = 77
    figure = drawn(cross.astype(np.float32), {"a": cross}, label_names=NAMES, spacing=SPACING)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["core", "right", "front", "top", "77"]


def test_legend_of_many_structures_stays_inside_the_picture(drawn):
    labels = np.arange(64, dtype=np.uint8).reshape(4, 4, 4)
    names = {value: f"a structure with the number {value}" for value in range(64)}
    figure = drawn(labels.astype(np.float32), {"a": labels}, label_names=names, spacing=SPACING)
    figure.canvas.draw()
    box, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    assert whole.y0 <= box.y0
    assert box.y1 <= min(axes.get_window_extent().y0 for axes in figure.axes)


def test_rows_are_the_image_and_the_segmentations(cross, drawn):
    other = np.roll(cross, 1, axis=0)
    figure = drawn(
        cross.astype(np.float32),
        {"reference": cross, "prediction": other},
        label_names=NAMES,
        spacing=SPACING,
        centre=(7, 10, 3),
    )
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["image", "reference", "prediction"]
    assert figure.axes[0].get_title() == "axial, slice 4 of 8"
    filled = [np.asarray(figure.axes[n].get_images()[1].get_array())[..., 3] > 0 for n in (3, 6)]
    np.testing.assert_array_equal(filled[0], PLANES[0].cut(cross, (7, 10, 3)) > 0)
    np.testing.assert_array_equal(filled[1], PLANES[0].cut(other, (7, 10, 3)) > 0)


def test_outline_separates_exactly_the_pixels_that_differ():
    mask = np.random.default_rng(0).random((6, 9)) < 0.4
    found = {tuple(map(tuple, segment)) for segment in outline(mask).astype(int)}
    expected = set()
    padded = np.pad(mask, 1)
    for row in range(7):
        for column in range(10):
            here = padded[row + 1, column + 1]
            if here != padded[row, column + 1]:
                expected.add(((column, row), (column + 1, row)))
            if here != padded[row + 1, column]:
                expected.add(((column, row), (column, row + 1)))
    assert found == expected
    assert len(outline(mask)) == len(found)


def test_planes_go_through_the_largest_structure():
    labels = np.zeros(SHAPE, np.uint8)
    labels[2, 1:4, 1] = 1
    labels[5:10, 6:15, 4:7] = 2
    assert centre_of_largest(labels) == (7, 10, 5)
    pair = np.zeros(SHAPE, np.uint8)
    pair[1:4, 5:12, 2:5] = pair[9:13, 5:12, 2:5] = 1
    assert pair[centre_of_largest(pair)] == 1
    assert centre_of_largest(np.zeros(SHAPE, np.uint8)) == (7, 10, 4)


def test_a_slice_and_a_constant_image_are_drawn(tmp_path):
    labels = np.zeros((20, 12, 1), np.uint8)
    overlay_figure(
        np.full(labels.shape, 3.0, np.float32),
        {"empty": labels},
        tmp_path / "one.png",
        label_names=NAMES,
        spacing=SPACING,
    )
    assert imread(tmp_path / "one.png").ndim == 3
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


def test_shapes_must_agree(cross, tmp_path):
    with pytest.raises(ValueError, match=r"'a' has shape \(14, 20, 7\), the image \(14, 20, 8\)"):
        overlay_figure(
            cross.astype(np.float32),
            {"a": cross[:, :, :7]},
            tmp_path / "x.png",
            label_names=NAMES,
            spacing=SPACING,
        )
