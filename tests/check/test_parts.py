"""The parts of the check, each against a slow and obvious version of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from medseg.check.grids import differences, direction_letters, turn_onto
from medseg.check.intensities import convert, picture_hash
from medseg.check.outliers import apart, minority
from medseg.geometry import Grid, reorient
from medseg.io.image import Header, Stored
from medseg.io.integers import NotIntegers, as_integers

SHAPE = (7, 11, 5)
WAYS = list(
    itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3))
)


@pytest.fixture
def grid(datasets):
    return Grid(SHAPE, datasets.affine((0.9, 1.3, 2.5)))


def stored(array, slope=1.0, inter=0.0):
    header = Header.of_grid(Grid(array.shape[:3], np.eye(4)))
    return Stored(array=array, header=header, slope=slope, inter=inter)


class TestConvert:
    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("kind", ["<i2", ">i2", "<u1", "<f8", ">f4"])
    @pytest.mark.parametrize(("slope", "inter"), [(1.0, 0.0), (0.37, -12.0)])
    def test_one_pass_finds_what_many_find(self, kind, order, slope, inter):
        """More voxels than a block holds, so that blocks are put together."""
        rng = np.random.default_rng(4)
        volume = np.asarray(rng.integers(0, 200, (60, 45, 40)), dtype=kind, order=order)
        out = np.empty(volume.shape[::-1], np.float32).transpose()
        found = convert(volume, out, slope=slope, inter=inter)
        scaled = volume.astype(np.float64) * slope + inter
        expected = scaled.astype(np.float32)
        np.testing.assert_array_equal(out, expected)
        assert (found.facts.min, found.facts.max) == (expected.min(), expected.max())
        assert found.facts.mean == pytest.approx(expected.mean(dtype=np.float64), rel=1e-12)
        assert found.facts.std == pytest.approx(expected.std(dtype=np.float64), rel=1e-9)
        assert found.facts.median == np.median(expected[::2, ::2, ::2])
        assert (found.num_nan, found.num_infinite) == (0, 0)

    def test_rows_first_result_is_filled_too(self):
        volume = np.arange(24.0).reshape(2, 3, 4)
        out = np.empty(volume.shape, np.float32)
        convert(volume, out, slope=1.0, inter=0.0)
        np.testing.assert_array_equal(out, volume)

    def test_gaps_are_counted_and_left_out(self):
        volume = np.arange(60.0).reshape(3, 4, 5)
        volume[0, 0] = np.nan
        volume[1, 1, :2] = (np.inf, -np.inf)
        found = convert(volume, np.empty(volume.shape, np.float32), slope=1.0, inter=0.0)
        finite = volume[np.isfinite(volume)]
        assert (found.num_nan, found.num_infinite) == (5, 2)
        assert (found.facts.min, found.facts.max) == (finite.min(), finite.max())
        assert found.facts.std == pytest.approx(finite.std())

    def test_nothing_but_gaps(self):
        volume = np.full((2, 3, 4), np.nan)
        found = convert(volume, np.empty(volume.shape, np.float32), slope=1.0, inter=0.0)
        assert (found.num_nan, found.facts.max) == (24, 0.0)


class TestPicture:
    def hashed(self, array, grid):
        out = np.empty(array.shape, np.float32)
        measured = convert(array, out, slope=1.0, inter=0.0)
        return picture_hash(out, grid.affine, measured.checksum)

    def test_one_image_has_one_hash_in_all_48_ways_and_types(self, grid):
        image = np.random.default_rng(5).integers(0, 900, SHAPE).astype(np.int16)
        expected = self.hashed(image, grid)
        for axes, flips in WAYS:
            turned = np.flip(image.transpose(axes), tuple(np.flatnonzero(flips)))
            assert self.hashed(turned.astype(np.float64), reorient(grid, axes, flips)) == expected

    def test_one_voxel_makes_another_image_even_off_the_lattice(self):
        image = np.random.default_rng(6).normal(size=(70, 40, 33)).astype(np.float32)
        grid = Grid(image.shape, np.eye(4))
        other = image.copy()
        other[1, 1, 1] += 1
        assert self.hashed(image, grid) != self.hashed(other, grid)


class TestIntegers:
    @pytest.mark.parametrize(
        ("values", "slope", "inter", "kind"),
        [
            ([0, 1, 255], 1.0, 0.0, np.uint8),
            ([0, 1, 256], 1.0, 0.0, np.uint16),
            ([-1, 1, 200], 1.0, 0.0, np.int16),
            ([0, 10, 20], 0.1, 0.0, np.uint8),
            ([0.0, 70000.00001, 3.0], 1.0, 0.0, np.uint32),
            ([0, 2, 4], 0.5, -1.0, np.int8),
        ],
    )
    def test_scaled_or_real_values_become_the_smallest_type(self, values, slope, inter, kind):
        array = np.array(values, dtype=np.float64).reshape(3, 1, 1)
        found = as_integers(stored(array, slope, inter))
        assert found.dtype == kind
        np.testing.assert_array_equal(found, np.rint(array * slope + inter))

    def test_integers_stay_as_they_are(self):
        array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
        assert as_integers(stored(array)) is array
        swapped = as_integers(stored(array.astype(">i4")))
        assert swapped.dtype == np.int32
        assert swapped.dtype.isnative
        np.testing.assert_array_equal(swapped, array)

    def test_other_values_are_counted(self):
        array = np.zeros((4, 5, 6))
        array[0, 0, :4] = (np.nan, np.inf, 0.25, 1e300)
        found = as_integers(stored(array))
        assert isinstance(found, NotIntegers)
        assert (found.num_voxels, found.num_nan, found.num_infinite) == (4, 1, 1)
        assert (found.num_fractions, found.num_beyond, np.isnan(found.example)) == (1, 1, True)

    @pytest.mark.parametrize(
        ("values", "kind", "num_beyond"),
        [
            ([0, 2**32 - 1, 1], np.uint64, 0),
            ([0, 2**32, 2**64 - 1], np.uint64, 2),
            ([-1, 2**31 - 1, -(2**31)], np.int64, 0),
            ([-1, 2**31, 3], np.int64, 1),
            ([-(2**31) - 1, 2**40, 3], np.int64, 2),
            ([-1, 2**31, 0.5], np.float64, 1),
            ([0, 2**32 - 1, 1], np.float64, 0),
        ],
    )
    def test_labels_have_32_bits_however_they_are_stored(self, values, kind, num_beyond):
        array = np.array(values, dtype=kind).reshape(3, 1, 1)
        found = as_integers(stored(array))
        assert isinstance(found, NotIntegers) == bool(num_beyond)
        if isinstance(found, NotIntegers):
            assert found.num_beyond == num_beyond
        else:
            np.testing.assert_array_equal(found, array)


class TestGrids:
    def test_every_way_of_storing_is_recognised_and_turned_back(self, grid):
        for axes, flips in WAYS:
            other = reorient(grid, axes, flips)
            found = differences(grid, other)
            if (axes, flips) == ((0, 1, 2), (False, False, False)):
                assert found == []
                continue
            assert [difference.code for difference in found] == ["orientation"]
            back = reorient(other, *turn_onto(grid, other))
            assert grid.disagreement(back, 1e-9) is None

    def test_letters_name_the_direction_an_axis_points_to(self):
        affine = np.zeros((4, 4))
        affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = -2, 1, -3, 1
        assert direction_letters(Grid(SHAPE, affine)) == "IRP"

    @pytest.mark.parametrize("gap", [1e-5, 2e-5])
    def test_tiny_gaps_are_not_worth_a_word(self, grid, gap):
        affine = np.array(grid.affine)
        affine[:3, 3] += gap
        assert differences(grid, Grid(SHAPE, affine)) == []

    def test_limits_lie_where_they_are_said_to(self):
        """A shift of 0.049 voxel is a warning, of 0.051 an error; in voxels, not in mm."""
        grid = Grid(SHAPE, np.diag([4.0, 2.0, 1.0, 1.0]))
        for axis, step in enumerate((4.0, 2.0, 1.0)):
            for share, is_error in ((0.049, False), (0.051, True)):
                affine = np.array(grid.affine)
                affine[axis, 3] += share * step
                (found,) = differences(grid, Grid(SHAPE, affine))
                assert (found.code, found.is_error) == ("origin", is_error)

    def test_swapped_spacing_and_shape_are_one_problem(self, grid):
        other = Grid((11, 7, 5), np.diag([1.3, 0.9, 2.5, 1.0]))
        (found,) = differences(grid, other)
        assert found.code == "axes-swapped"
        assert "transposing I and J would fit" in found.words


class TestOutliers:
    def test_a_crowd_is_no_outlier(self):
        values = [1.0] * 40 + [5.0] * 9
        assert apart(values, least=1.0) == []
        assert apart([*values, 60.0], least=1.0) == [49]

    def test_wide_spread_widens_the_gap(self):
        values = list(np.random.default_rng(0).normal(0, 10, 50))
        assert apart([*values, 100.0], least=0.1) == [50]
        assert apart([*values, 45.0], least=0.1) == []

    def test_few_cases_say_nothing(self):
        assert apart([1, 1, 1, 1, 1, 1, 99], least=1.0) == []

    def test_majority_must_be_clear(self):
        assert minority(dict.fromkeys("abcd", 1) | {"e": 2}) == (1, ["e"])
        assert minority(dict.fromkeys("abcde", 1) | {"f": 2, "g": 2}) is None
        assert minority(dict.fromkeys("abc", 1) | {"d": 2}) is None
        assert minority(dict.fromkeys("abcdef", 1)) is None
