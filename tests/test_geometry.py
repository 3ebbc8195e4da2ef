"""Grids, canonical axes and the way back from the network frame."""

import itertools
import json
import pickle

import numpy as np
import pytest

from medseg.errors import GeometryError
from medseg.geometry import Grid, SpatialRecord, canonical_axes, orient, reorient

SHAPE = (5, 6, 7)
SPACING = (0.7, 1.1, 3.0)
MARK = (1, 4, 2)
STORAGES = [
    (axes, flips)
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((False, True), repeat=3)
]


def rotation(*angles_deg):
    """Return a rotation about R, then A, then S."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(angles_deg)):
        turn = np.eye(3)
        i, j = [d for d in range(3) if d != axis]
        turn[[i, i, j, j], [i, j, i, j]] = [
            np.cos(angle),
            -np.sin(angle),
            np.sin(angle),
            np.cos(angle),
        ]
        matrix = turn @ matrix
    return matrix


def affine_of(directions, spacing=SPACING, origin=(-31.5, 12.25, 40.0)):
    affine = np.eye(4)
    affine[:3, :3] = directions * np.asarray(spacing)
    affine[:3, 3] = origin
    return affine


OBLIQUE = affine_of(rotation(12, -17, 23))


def marked():
    """Return an asymmetric array in which no voxel equals another."""
    return np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE)


def stored(grid, array, axes, flips):
    """Return one of the 48 ways of storing an image."""
    view = array.transpose(axes)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    return reorient(grid, axes, flips), view


def canonical(grid, array):
    axes, flips = canonical_axes(grid.affine)
    return stored(grid, array, axes, flips)


def world_of(grid, array, value):
    """Return where the voxel of a value lies, the slow obvious way."""
    (index,) = np.argwhere(array == value)
    return grid.affine[:3, :3] @ index + grid.affine[:3, 3]


DIRECTIONS = {
    "oblique": rotation(12, -17, 23),
    "far oblique": rotation(71, 38, -64),
    "tie of two axes": rotation(0, 0, 45),
    "tie about R": rotation(45, 0, 0),
    "tie after another turn": rotation(0, 0, 45) @ rotation(10, 0, 0),
    "double tie": rotation(45, 45, 45),
    "tie of three axes": rotation(0, 0, 45) @ rotation(np.rad2deg(np.arctan(np.sqrt(2))), 0, 0),
    "sheared": rotation(5, 9, 20) @ np.array([[1, 0.3, 0], [0, 0.95, 0.2], [0, 0, 0.98]]),
    "no cosine on the diagonal": np.array([[0, 0.1, 0.1], [0.7, 0.9, 0.1], [0.7, 0.1, 0.9]]),
}


@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
def test_48_storages_have_one_canonical_image(directions):
    """However an image is stored, its canonical affine and array are the same."""
    grid, array = Grid(SHAPE, affine_of(directions)), marked()
    expected_grid, expected = canonical(grid, array)
    assert sorted(expected_grid.shape) == sorted(SHAPE)
    for axes, flips in STORAGES:
        found_grid, found = canonical(*stored(grid, array, axes, flips))
        np.testing.assert_allclose(found_grid.affine, expected_grid.affine, atol=1e-9)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
def test_48_storages_agree_after_rounding_to_single_precision(directions):
    """Ties are not decided by the rounding of the affine in the file."""
    grid, array = Grid(SHAPE, affine_of(directions)), marked()
    rng = np.random.default_rng(3)
    _, expected = canonical(grid, array)
    for axes, flips in STORAGES:
        found_grid, found = stored(grid, array, axes, flips)
        noisy = found_grid.affine.astype(np.float32).astype(np.float64)
        noisy[:3, :3] *= 1 + rng.uniform(-2e-6, 2e-6, (3, 3))
        _, found = canonical(Grid(found_grid.shape, noisy), found)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
def test_canonical_directions_are_the_closest_to_right_anterior_superior(directions):
    """No other order or direction of the axes has a larger sum of cosines."""
    grid = Grid(SHAPE, affine_of(directions))

    def closeness(candidate):
        return np.trace(candidate.affine[:3, :3] / np.asarray(candidate.spacing))

    best = max(closeness(reorient(grid, axes, flips)) for axes, flips in STORAGES)
    assert closeness(reorient(grid, *canonical_axes(grid.affine))) >= best - 1e-3


@pytest.mark.parametrize(
    ("code", "axes", "flips"),
    [
        ("RAS", (0, 1, 2), (False, False, False)),
        ("LPS", (0, 1, 2), (True, True, False)),
        ("ASR", (2, 0, 1), (False, False, False)),
        ("SLP", (1, 2, 0), (True, True, False)),
        ("PIR", (2, 0, 1), (False, True, True)),
    ],
)
def test_canonical_axes_of_orthogonal_images(code, axes, flips):
    ends = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    directions = np.zeros((3, 3))
    for axis, letter in enumerate(code):
        row, sign = ends[letter]
        directions[row, axis] = sign
    assert canonical_axes(affine_of(directions)) == (axes, flips)


def test_orient_puts_canonical_axes_in_network_order():
    asr = affine_of(np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]]))
    assert orient(asr, (2, 1, 0)) == ((1, 0, 2), (False, False, False))
    lps = np.diag([-1.0, -1.0, 2.0, 1.0])
    assert orient(lps, (2, 0, 1)) == ((2, 0, 1), (False, True, True))
    with pytest.raises(ValueError, match="expected an order of 0, 1, 2"):
        orient(lps, (0, 1, 1))


@pytest.mark.parametrize(("axes", "flips"), STORAGES)
def test_reorient_keeps_every_voxel_in_its_place(axes, flips):
    grid, array = Grid(SHAPE, OBLIQUE), marked()
    found_grid, found = stored(grid, array, axes, flips)
    assert found.shape == found_grid.shape
    for value in (0, 100, array[MARK]):
        expected = world_of(grid, array, value)
        np.testing.assert_allclose(world_of(found_grid, found, value), expected, atol=1e-9)


def test_grid_pins_a_marked_voxel_and_its_spacing():
    grid = Grid([5, 6, 7], OBLIQUE.tolist())
    assert grid.shape == (5, 6, 7)
    np.testing.assert_allclose(grid.spacing, SPACING, rtol=1e-12)
    np.testing.assert_allclose(
        (grid.affine @ (*MARK, 1))[:3], [-30.252331, 16.099934, 46.282622], atol=1e-6
    )


def test_grid_cannot_be_changed():
    affine = OBLIQUE.copy()
    grid = Grid(SHAPE, affine)
    affine[0, 0] = 99
    assert grid.affine[0, 0] == OBLIQUE[0, 0]
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 0] = 1
    copy = pickle.loads(pickle.dumps(grid))
    assert copy.shape == SHAPE
    np.testing.assert_array_equal(copy.affine, OBLIQUE)


def changed(row, column, value):
    affine = OBLIQUE.copy()
    affine[row, column] = value
    return affine


@pytest.mark.parametrize(
    ("shape", "affine", "message"),
    [
        ((5, 6), OBLIQUE, r"shape is \(5, 6\)"),
        ((5, 6, 0), OBLIQUE, r"shape is \(5, 6, 0\)"),
        (SHAPE, OBLIQUE[:3], r"affine has shape \(3, 4\)"),
        (SHAPE, changed(1, 1, np.nan), "not finite"),
        (SHAPE, changed(3, 0, 0.1), "last row"),
        (SHAPE, np.diag([1.0, 0.0, 1.0, 1.0]), "do not span the space"),
        (SHAPE, affine_of(np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]])), "do not span the space"),
    ],
)
def test_grid_refuses_what_is_no_grid(shape, affine, message):
    with pytest.raises(GeometryError, match=message):
        Grid(shape, affine)


def test_disagreement_is_none_within_the_tolerance():
    shifted = OBLIQUE.copy()
    shifted[:3, 3] += OBLIQUE[:3, :3] @ (0.0, 0.04, 0.0)
    grid, other = Grid(SHAPE, OBLIQUE), Grid(SHAPE, shifted)
    assert grid.disagreement(grid) is None
    assert grid.disagreement(other) is None
    assert "0.04 voxels away, allowed 0.01" in grid.disagreement(other, tolerance=0.01)


def test_disagreement_sees_what_only_shows_at_the_far_end():
    """A spacing off by 1 % moves the last of 100 voxels by one."""
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    grid = Grid((100, 4, 4), affine)
    words = grid.disagreement(Grid((100, 4, 4), np.diag([1.01, 2.0, 3.0, 1.0])))
    assert "its voxel (99, 0, 0) lies at (99.99, 0, 0) mm, expected (99, 0, 0) mm" in words
    assert "0.99 voxels away" in words
    assert "its spacing is (1.01, 2, 3) mm, expected (1, 2, 3) mm" in words


def test_disagreement_names_shapes():
    grid = Grid(SHAPE, OBLIQUE)
    words = grid.disagreement(Grid((5, 6, 8), OBLIQUE))
    assert words == "its shape is (5, 6, 8), expected (5, 6, 7)"


def test_disagreement_sees_a_flip():
    grid = Grid(SHAPE, OBLIQUE)
    assert grid.disagreement(reorient(grid, (0, 1, 2), (True, False, False))) is not None


def record(axes, flips, box=None):
    shape = tuple(SHAPE[axis] for axis in axes)
    return SpatialRecord(
        shape_image=SHAPE,
        affine_image=tuple(tuple(row) for row in OBLIQUE.tolist()),
        axes=axes,
        flips=flips,
        box=box or tuple((1, length - 1) for length in shape),
        spacing_cropped=tuple(SPACING[axis] for axis in axes),
        shape_network=(9, 8, 4),
        spacing_network=(1.0, 1.5, 2.0),
    )


@pytest.mark.parametrize(("axes", "flips"), STORAGES)
def test_record_round_trip(axes, flips):
    """Every storage comes back voxel for voxel, also with leading axes, zero outside the box."""
    way, array = record(axes, flips), marked()
    channels = np.stack([array, -array])
    oriented = way.to_network_axes(channels)
    assert oriented.shape == (2, *way.shape_oriented)
    assert np.shares_memory(oriented, channels)
    np.testing.assert_array_equal(oriented[0], stored(Grid(SHAPE, OBLIQUE), array, axes, flips)[1])
    np.testing.assert_array_equal(way.to_image_axes(oriented), channels)
    cropped = oriented[:, 1:-1, 1:-1, 1:-1]
    assert cropped.shape[1:] == way.shape_cropped
    restored = way.restore(cropped, fill=-7)
    assert restored.dtype == array.dtype
    expected = np.full_like(channels, -7)
    expected[:, 1:-1, 1:-1, 1:-1] = channels[:, 1:-1, 1:-1, 1:-1]
    np.testing.assert_array_equal(restored, expected)


def test_record_pins_a_marked_voxel():
    """Image voxel (1, 4, 2) of a 5 x 6 x 7 image, J and K reversed, cut off in front."""
    way = record((2, 0, 1), (True, False, True), box=((2, 7), (0, 4), (1, 4)))
    assert way.shape_oriented == (7, 5, 6)
    assert way.shape_cropped == (5, 4, 3)
    cropped = np.zeros(way.shape_cropped, dtype=np.uint8)
    cropped[4 - 2, 1, 1 - 1] = 3
    restored = way.restore(cropped)
    assert np.argwhere(restored).tolist() == [list(MARK)]
    position = np.array(way.affine_image) @ (*MARK, 1)
    np.testing.assert_allclose(position[:3], [-30.252331, 16.099934, 46.282622], atol=1e-6)


def test_record_asymmetric_box_and_fill():
    way = record((0, 1, 2), (False, False, False), box=((0, 2), (3, 6), (1, 7)))
    whole = way.uncrop(np.ones((2, 3, 6), dtype=np.float32), fill=np.nan)
    assert whole.dtype == np.float32
    assert np.isnan(whole).sum() == 5 * 6 * 7 - 2 * 3 * 6
    assert whole[:2, 3:, 1:].sum() == 36


def test_record_without_crop_copies_nothing():
    way = record((2, 1, 0), (False, True, False), box=((0, 7), (0, 6), (0, 5)))
    array = np.zeros((7, 6, 5), dtype=np.uint8)
    assert way.uncrop(array) is array
    assert np.shares_memory(way.restore(array), array)


def test_record_survives_json():
    way = record((2, 0, 1), (True, False, True))
    again = SpatialRecord.from_json(json.loads(json.dumps(way.to_json())))
    assert again == way
    assert hash(again) == hash(way)


def test_record_refuses_wrong_shapes():
    way = record((2, 0, 1), (True, False, True))
    with pytest.raises(ValueError, match=r"expected its last axes to be \(5, 6, 7\)"):
        way.to_network_axes(np.zeros((7, 5, 6)))
    with pytest.raises(ValueError, match=r"expected its last axes to be \(7, 5, 6\)"):
        way.to_image_axes(np.zeros((5, 6, 7)))
    with pytest.raises(ValueError, match=r"expected its last axes to be \(5, 3, 4\)"):
        way.restore(np.zeros((7, 5, 6)))


@pytest.mark.parametrize(
    "box", [((0, 8), (0, 5), (0, 6)), ((3, 3), (0, 5), (0, 6)), ((-1, 2),) * 3]
)
def test_record_refuses_boxes_outside_the_image(box):
    with pytest.raises(ValueError, match="expected it inside"):
        record((2, 0, 1), (False, False, False), box=box)


def test_record_refuses_axes_that_are_no_order():
    with pytest.raises(ValueError, match="expected an order of 0, 1, 2"):
        record((0, 0, 1), (False, False, False))


# -- images taken as they are stored ---------------------------------------------------------------


@pytest.mark.parametrize("network_axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("storage", STORAGES[::7])
def test_stored_axes_are_taken_in_the_order_of_the_plans_and_never_reversed(storage, network_axes):
    """Whatever the world says: the marked voxel is found by permuting its index alone."""
    grid, array = stored(Grid(SHAPE, OBLIQUE), marked(), *storage)
    axes, flips = orient(grid.affine, network_axes, is_stored=True)
    assert (axes, flips) == (network_axes, (False, False, False))
    box = tuple((0, grid.shape[axis]) for axis in axes)
    spacing = tuple(grid.spacing[axis] for axis in axes)
    way = SpatialRecord(
        shape_image=grid.shape,
        affine_image=tuple(map(tuple, grid.affine.tolist())),
        axes=axes,
        flips=flips,
        box=box,
        spacing_cropped=spacing,
        shape_network=tuple(length for _, length in box),
        spacing_network=spacing,
    )
    view = way.to_network_axes(array)
    place = tuple(np.argwhere(array == marked()[MARK])[0])
    assert view[tuple(place[axis] for axis in network_axes)] == marked()[MARK]
    np.testing.assert_array_equal(way.restore(view), array)


def test_stored_and_canonical_axes_are_the_same_where_the_image_is_canonical():
    plain = np.diag([*SPACING, 1.0])
    for order in itertools.permutations(range(3)):
        assert orient(plain, order, is_stored=True) == orient(plain, order)
    turned = np.diag([-0.7, 1.1, 3.0, 1.0])
    assert orient(turned, (2, 1, 0), is_stored=True) != orient(turned, (2, 1, 0))


def test_stored_axes_too_must_be_an_order():
    with pytest.raises(ValueError, match="expected an order of 0, 1, 2"):
        orient(np.eye(4), (0, 1, 1), is_stored=True)


@pytest.mark.parametrize("flip", [1, -1])
def test_the_volume_of_a_voxel_is_that_of_its_edges_however_they_point(flip):
    expected = 0.7 * 1.1 * 3.0
    affine = OBLIQUE @ np.diag([flip, 1, 1, 1])
    assert Grid(SHAPE, affine).voxel_mm3 == pytest.approx(expected, rel=1e-12)
    sheared = affine.copy()
    sheared[:3, 2] += 2 * sheared[:3, 0]
    assert Grid(SHAPE, sheared).voxel_mm3 == pytest.approx(expected, rel=1e-12)
    assert np.prod(Grid(SHAPE, sheared).spacing) > 1.01 * expected
