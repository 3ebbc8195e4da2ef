"""Resampling: the matrices equal scikit-image's resize; labels equal the plain argmax."""

from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from batchgenerators.augmentations.utils import resize_segmentation
from scipy import ndimage
from skimage.transform import resize as skimage_resize

from medseg.resample import (
    axis_matrix,
    is_anisotropic,
    new_shape,
    resize,
    resize_labels,
    resize_labels_literal,
    resize_literal,
    resize_slab,
    separate_axis,
)
from medseg.resample.literal import nearest_slices

SHAPES = [
    ((13, 40, 29), (17, 31, 29)),
    ((20, 33, 21), (8, 66, 50)),
    ((1, 24, 31), (5, 40, 10)),
    ((7, 150, 9), (1, 97, 13)),
    ((5, 6, 130), (5, 6, 201)),
]


def image(shape, *, seed=0):
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), 1, axes=(-3, -2, -1))
    return (smooth * 40 + rng.normal(size=shape) + 100).astype(np.float32)


def slow_resize(array, shape, order):
    """Resize (C, *spatial) with scikit-image in float64."""
    return np.stack(
        [
            skimage_resize(
                channel.astype(np.float64), shape, order, mode="edge", anti_aliasing=False
            )
            for channel in array
        ]
    )


def slow_separate(array, shape, order, axis):
    """Resize every slice across `axis`, then sample the stack at the nearest slice."""
    results = []
    for channel in array:
        slices = np.moveaxis(channel, axis, 0)
        flat_shape = [length for d, length in enumerate(shape) if d != axis]
        stack = slow_resize(slices, flat_shape, order)
        scale = len(slices) / shape[axis]
        positions = scale * (np.arange(shape[axis]) + 0.5) - 0.5
        grid = np.meshgrid(positions, *map(np.arange, flat_shape), indexing="ij")
        sampled = ndimage.map_coordinates(stack, grid, order=0, mode="nearest")
        results.append(np.moveaxis(sampled, 0, axis))
    return np.stack(results)


def shares(segmentation, shape, separate=None):
    """Return label -> exact share at every output voxel, one voxel at a time, in fractions."""
    axes = []
    for axis, (length, target) in enumerate(zip(segmentation.shape, shape, strict=True)):
        points = []
        for i in range(target):
            position = Fraction(length, target) * (i + Fraction(1, 2)) - Fraction(1, 2)
            position = min(max(position, Fraction(0)), Fraction(length - 1))
            low = int(position)
            if axis == separate:
                low = min(int(Fraction(length, target) * (i + Fraction(1, 2))), length - 1)
                position = Fraction(low)
            high = min(low + 1, length - 1)
            points.append([(low, 1 - (position - low)), (high, position - low)])
        axes.append(points)
    found = {}
    for point in np.ndindex(*shape):
        totals = {}
        for taps in product(*(axes[axis][i] for axis, i in enumerate(point))):
            label = int(segmentation[tuple(index for index, _ in taps)])
            weight = Fraction(1)
            for _, part in taps:
                weight *= part
            totals[label] = totals.get(label, Fraction(0)) + weight
        found[point] = totals
    return found


def nearest_labels(segmentation, shape):
    zoom = np.divide(shape, segmentation.shape)
    return ndimage.zoom(segmentation, zoom, order=0, mode="nearest", grid_mode=True)


def slow_labels(segmentation, shape, separate=None):
    """Resize labels one voxel at a time; return the labels and where several tied."""
    nearest = nearest_labels(segmentation, shape)
    result = np.zeros(shape, dtype=segmentation.dtype)
    tied = np.zeros(shape, dtype=bool)
    for point, totals in shares(segmentation, shape, separate).items():
        best = max(totals.values())
        winners = sorted(label for label, share in totals.items() if share == best)
        tied[point] = len(winners) > 1
        result[point] = nearest[point] if nearest[point] in winners else winners[0]
    return result, tied


# -- shapes and axes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("current", "target", "axis"),
    [
        ((5.0, 0.7, 0.7), (1.0, 1.0, 1.0), 0),
        ((0.7, 0.8, 5.0), (1.0, 1.0, 1.0), 2),
        ((1.0, 1.0, 1.0), (1.0, 3.5, 1.0), 1),
        ((3.0, 1.0, 1.0), (3.0, 1.0, 1.0), None),
        ((0.24, 1.25, 1.25), (5.0, 1.0, 1.0), None),
        ((1.0, 1.0, 1.0), (0.24, 1.25, 1.25), None),
        ((6.0, 1.0, 1.0), (1.0, 1.0, 6.0), 0),
    ],
)
def test_the_separate_axis_is_the_only_coarsest_of_an_anisotropic_grid(current, target, axis):
    assert separate_axis(current, target) == axis


def test_the_threshold_of_the_separate_axis_can_be_set():
    assert separate_axis((2.5, 1.0, 1.0), (1.0, 1.0, 1.0), threshold=2.0) == 0


def test_new_shape_rounds_half_to_even_and_keeps_a_voxel():
    assert new_shape((5, 7, 9), (1.0, 1.0, 1.0), (2.0, 2.0, 2.0)) == (2, 4, 4)
    assert new_shape((1, 40, 30), (1.0, 0.5, 2.0), (3.0, 1.0, 0.8)) == (1, 20, 75)


def test_matrix_rows_sum_to_one_and_cannot_be_written():
    matrix = axis_matrix(37, 53, 3)
    assert matrix.shape == (53, 37)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = 2


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), SHAPES)
@pytest.mark.parametrize("order", [1, 3])
def test_resize_equals_scikit_image(before, after, order):
    array = image((2, *before))
    result = resize(array, after, order=order)
    expected = slow_resize(array, after, order)
    assert result.dtype == np.float32
    assert result.shape == (2, *after)
    assert np.abs(result - expected).max() < 2e-6 * np.ptp(array)


@pytest.mark.parametrize(("before", "after"), [*SHAPES, ((13, 9, 8), (29, 9, 8))])
@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_resize_with_a_separate_axis_equals_slice_by_slice(before, after, order, axis):
    array = image((1, *before), seed=3)
    result = resize(array, after, order=order, separate=axis)
    expected = slow_separate(array, after, order, axis)
    assert np.abs(result - expected).max() < 2e-6 * np.ptp(array)


def test_every_channel_keeps_its_own_range():
    rng = np.random.default_rng(0)
    array = (rng.random((2, 9, 11, 13)) > 0.5).astype(np.float32)
    array[1] = 500 + 20 * array[1]
    result = resize(array, (17, 15, 16))
    assert result[0].min() == 0
    assert result[0].max() == 1
    assert result[1].min() == 500
    assert result[1].max() == 520


def test_resize_works_on_flat_and_non_contiguous_arrays():
    array = image((2, 12, 30, 21))
    flat = resize(array[:, 5], (41, 19))
    expected = slow_resize(array[:, 5], (41, 19), 3)
    np.testing.assert_allclose(flat, expected, atol=1e-3)
    turned = array.transpose(0, 3, 1, 2)[:, ::-1]
    result = resize(turned, (18, 20, 25))
    np.testing.assert_array_equal(result, resize(np.ascontiguousarray(turned), (18, 20, 25)))


def test_resize_leaves_its_argument_and_equal_shapes_alone():
    array = image((1, 8, 9, 10))
    before = array.copy()
    assert resize(array, (8, 9, 10)) is array
    resize(array, (16, 9, 10), separate=0)
    resize(array, (4, 12, 5))
    np.testing.assert_array_equal(array, before)


def test_unusable_shapes_and_orders_are_refused():
    array = image((1, 8, 9, 10))
    with pytest.raises(ValueError, match=r"\(8, 9, 10\) to \(4, 5\); expected 3 lengths"):
        resize(array, (4, 5))
    with pytest.raises(ValueError, match="at least 1"):
        resize(array, (4, 5, 0))
    with pytest.raises(ValueError, match="order must be 1 or 3, got 2"):
        resize(array, (4, 5, 6), order=2)
    with pytest.raises(ValueError, match="order must be 0 or 1, got 3"):
        resize_labels(np.zeros((4, 5), dtype=np.uint8), (6, 7), order=3)


# -- labels ----------------------------------------------------------------------------------------


def regions(shape, num_labels, *, seed=0, dtype=np.uint8):
    """Return a label map of blobs of unequal size."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(
        rng.normal(size=(num_labels, *shape)), 1.5, axes=tuple(range(1, len(shape) + 1))
    )
    return fields.argmax(axis=0).astype(dtype)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((4, 3, 5), (8, 6, 10)),
        ((8, 6, 10), (4, 3, 5)),
        ((5, 7, 6), (8, 5, 9)),
        ((6, 7, 5), (9, 7, 4)),
        ((1, 5, 9), (3, 8, 7)),
    ],
)
@pytest.mark.parametrize("separate", [None, 0, 2])
def test_labels_equal_the_exact_argmax_ties_included(before, after, separate):
    rng = np.random.default_rng(sum(before))
    segmentation = rng.integers(0, 4, size=before).astype(np.uint8)
    expected, _ = slow_labels(segmentation, after, separate)
    np.testing.assert_array_equal(resize_labels(segmentation, after, separate=separate), expected)


@pytest.mark.parametrize("after", [(8, 3, 5), (6, 4, 15), (2, 6, 25)])
def test_labels_equal_the_exact_argmax_where_many_voxels_tie(after):
    segmentation = np.random.default_rng(2).integers(1, 4, size=(4, 6, 5)).astype(np.uint8)
    expected, tied = slow_labels(segmentation, after)
    assert tied.mean() > 0.05
    np.testing.assert_array_equal(resize_labels(segmentation, after), expected)


def test_a_three_way_corner_falls_to_the_smallest_of_the_tied_labels():
    block = np.array([3, 1, 1, 1, 2, 2, 2, 3], dtype=np.uint8).reshape(2, 2, 2)
    assert resize_labels(block, (1, 1, 1)).item() == 1


def test_a_tie_falls_to_the_nearest_label_whatever_its_value():
    for values in ([7, 2], [2, 7]):
        edge = np.array(values, dtype=np.uint8)
        assert resize_labels(edge, (1,)).item() == nearest_labels(edge, (1,)).item() == values[1]


@pytest.mark.parametrize(
    ("before", "after"), [((16, 24, 12), (32, 48, 24)), ((16, 24, 32), (8, 12, 32))]
)
def test_labels_equal_batchgenerators_where_weights_are_exact_in_binary(before, after):
    segmentation = regions(before, 9)
    expected = resize_segmentation(segmentation, after, order=1)
    np.testing.assert_array_equal(resize_labels(segmentation, after), expected)


@pytest.mark.parametrize("after", [(19, 31, 13), (9, 33, 29)])
def test_labels_differ_from_batchgenerators_only_where_shares_are_equal(after):
    segmentation = regions((14, 22, 17), 6, seed=4, dtype=np.uint16)
    result = resize_labels(segmentation, after)
    expected = resize_segmentation(segmentation, after, order=1)
    assert result.dtype == np.uint16
    scores = np.stack(
        [slow_resize((segmentation == label)[None], after, 1)[0] for label in range(6)]
    )
    points = np.nonzero(result != expected)
    np.testing.assert_allclose(
        scores[(result[points], *points)], scores[(expected[points], *points)], atol=1e-12
    )
    assert len(points[0]) < 0.002 * result.size


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("thick", [5, 23])
def test_labels_with_a_separate_axis_equal_slice_by_slice(axis, thick):
    flat_before, flat_after = (16, 20), (32, 10)
    segmentation = np.moveaxis(regions((11, *flat_before), 5, seed=axis), 0, axis)
    after = tuple(np.insert(flat_after, axis, thick).tolist())
    slices = np.moveaxis(segmentation, axis, 0)
    stack = np.stack([resize_segmentation(part, flat_after, order=1) for part in slices])
    nearest = axis_matrix(11, thick, 0).argmax(axis=1)
    expected = np.moveaxis(stack[nearest], 0, axis)
    np.testing.assert_array_equal(resize_labels(segmentation, after, separate=axis), expected)


def test_order_zero_takes_the_nearest_label():
    segmentation = regions((9, 14, 11), 5)
    result = resize_labels(segmentation, (13, 10, 17), order=0)
    np.testing.assert_array_equal(result, nearest_labels(segmentation, (13, 10, 17)))


def test_labels_of_equal_shape_and_extreme_values_survive():
    segmentation = np.zeros((6, 5, 4), dtype=np.uint16)
    segmentation[2:5, 1:4, 1:3] = 65535
    assert resize_labels(segmentation, (6, 5, 4)) is segmentation
    turned = segmentation[::-1].transpose(2, 0, 1)
    expected = resize_segmentation(turned, (8, 12, 10), order=1)
    assert set(np.unique(expected)) == {0, 65535}
    np.testing.assert_array_equal(resize_labels(turned, (8, 12, 10)), expected)


def test_many_mixed_voxels_are_decided_in_several_chunks():
    rng = np.random.default_rng(8)
    segmentation = rng.integers(0, 200, size=(30, 40, 24)).astype(np.uint8)
    result = resize_labels(segmentation, (36, 46, 30))
    assert np.prod(result.shape) > 2**15
    part = resize_labels(segmentation[:5], (6, 46, 30))
    np.testing.assert_array_equal(result[:5], part[:5])


# -- logits ----------------------------------------------------------------------------------------


def logits_of(shape, *, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("before", "after"), SHAPES)
def test_logits_equal_the_linear_resize(before, after):
    logits = logits_of((3, *before))
    result = resize_slab(logits, after, 0, 0, after[0])
    expected = slow_resize(logits.numpy(), after, 1)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=3e-6)


@pytest.mark.parametrize("separate", [0, 1, 2])
def test_logits_with_a_separate_axis_equal_slice_by_slice(separate):
    logits = logits_of((2, 9, 21, 14))
    result = resize_slab(logits, (23, 16, 30), 1, 0, 16, separate=separate)
    expected = slow_separate(logits.numpy(), (23, 16, 30), 1, separate)
    np.testing.assert_allclose(result.numpy(), expected, atol=3e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("separate", [None, 0])
@pytest.mark.parametrize("after", [(31, 18, 37), (5, 40, 19)])
def test_slabs_equal_the_rows_of_the_whole_bit_for_bit(axis, separate, after):
    logits = logits_of((2, 9, 22, 19))
    whole = resize_slab(logits, after, axis, 0, after[axis], separate=separate)
    for thickness in (1, 3, 4):
        cuts = [*range(0, after[axis], thickness), after[axis]]
        slabs = [
            resize_slab(logits, after, axis, start, stop, separate=separate)
            for start, stop in pairwise(cuts)
        ]
        assert torch.equal(torch.cat(slabs, dim=axis + 1), whole)


def test_a_slab_of_an_unchanged_shape_is_a_copy_of_its_rows():
    logits = logits_of((2, 5, 6, 7))
    slab = resize_slab(logits, (5, 6, 7), 1, 2, 5)
    assert torch.equal(slab, logits[:, :, 2:5])
    slab.zero_()
    assert logits[:, :, 2:5].any()


def test_rows_outside_the_result_are_refused():
    logits = logits_of((2, 5, 6, 7))
    with pytest.raises(ValueError, match="rows 4 to 9 are not within the 8 of axis 1"):
        resize_slab(logits, (5, 8, 7), 1, 4, 9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_slabs_on_a_gpu_equal_the_cpu():
    logits = logits_of((3, 12, 30, 25))
    on_cpu = resize_slab(logits, (17, 40, 20), 0, 5, 11)
    on_gpu = resize_slab(logits.cuda(), (17, 40, 20), 0, 5, 11)
    assert torch.equal(on_gpu.cpu(), on_cpu)


# -- operation by operation ------------------------------------------------------------------------


def values_of(shape, dtype, *, seed=0):
    """Return noise of any type, transposed and reversed in memory."""
    rng = np.random.default_rng(seed)
    backwards = (rng.normal(size=(*shape[::-1], 2)) * 40 + 10).astype(dtype)
    return backwards.transpose()[:, ::-1]


LITERAL_SHAPES = [
    ((13, 20, 9), (17, 11, 9)),
    ((5, 12, 14), (9, 30, 7)),
    ((1, 6, 8), (4, 9, 5)),
    ((7, 4, 6), (1, 4, 13)),
]


@pytest.mark.parametrize(("before", "after"), LITERAL_SHAPES)
@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_literal_resize_is_scikit_images_to_the_last_bit(before, after, order, dtype):
    array = values_of(before, dtype)
    kept = array.copy()
    result = resize_literal(array, after, order=order)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, slow_resize(array, after, order).astype(dtype))
    np.testing.assert_array_equal(array, kept)


@pytest.mark.parametrize(("before", "after"), [*LITERAL_SHAPES, ((6, 9, 8), (15, 9, 8))])
@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_so_it_is_slice_by_slice_along_a_separate_axis(before, after, order, axis, dtype):
    array = values_of(before, dtype, seed=1)
    result = resize_literal(array, after, order=order, separate=axis)
    assert result.dtype == dtype
    expected = slow_separate(array, after, order, axis).astype(dtype)
    np.testing.assert_array_equal(result, expected)


def test_slices_are_clipped_each_to_its_own_range_and_volumes_to_theirs():
    """A step in one slice overshoots; only in the volume does the next slice make room for it."""
    array = np.zeros((1, 2, 4, 12), np.float32)
    array[0, 0, :, 6:] = 10
    array[0, 1] = 40
    alone = resize_literal(array, (2, 4, 31), order=3, separate=0)
    whole = resize_literal(array, (2, 4, 31), order=3)
    assert alone[0, 0].max() == 10
    assert whole[0, 0].max() > 10.1
    assert whole.min() == alone.min() == 0


@pytest.mark.parametrize("method", ["spline", "interpolate", "none"])
def test_the_literal_resize_leaves_an_equal_shape_alone(method):
    array = values_of((4, 5, 6), np.float16)
    assert resize_literal(array, (4, 5, 6), order=3, method=method) is array
    labels = regions((4, 5, 6), 3)
    assert resize_labels_literal(labels, (4, 5, 6), method=method) is labels


def test_nothing_is_resized_by_the_method_none():
    array = values_of((4, 5, 6), np.float32)
    assert resize_literal(array, (8, 5, 3), order=3, method="none") is array
    labels = regions((4, 5, 6), 3)
    assert resize_labels_literal(labels, (8, 5, 3), method="none") is labels


@pytest.mark.parametrize(("before", "after"), LITERAL_SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_interpolation_is_torchs_in_float32(before, after, dtype):
    array = values_of(before, dtype)
    result = resize_literal(array, after, order=3, method="interpolate")
    whole = torch.from_numpy(array.astype(np.float32))
    expected = torch.nn.functional.interpolate(whole[None], after, mode="trilinear")[0]
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected.numpy())


@pytest.mark.parametrize(("before", "after"), [*LITERAL_SHAPES, ((6, 9, 8), (15, 9, 8))])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_interpolation_along_a_separate_axis_takes_the_nearest_slices(before, after, axis):
    array = values_of(before, np.float32)
    result = resize_literal(array, after, order=3, separate=axis, method="interpolate")
    expected = slow_interpolation(array, after, axis)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6 * np.abs(array).max(), rtol=0)


def test_slices_of_all_channels_are_interpolated_at_once_as_torch_rounds_by_number():
    """To the last bit: the reference hands over the slices of all channels as one image."""
    array = values_of((6, 9, 8), np.float32)
    for axis in range(3):
        result = resize_literal(array, (15, 5, 11), order=3, separate=axis, method="interpolate")
        np.testing.assert_array_equal(result, slow_interpolation(array, (15, 5, 11), axis))


def slow_interpolation(array, shape, axis):
    """Interpolate all slices across an axis as channels of one image, then pick the nearest."""
    across = [length for d, length in enumerate(shape) if d != axis]
    parts = [part for channel in array for part in np.moveaxis(channel, axis, 0)]
    stack = torch.from_numpy(np.stack(parts))[None]
    if list(stack.shape[2:]) != across:
        stack = torch.nn.functional.interpolate(stack, across, mode="bilinear")
    slices = stack[0].numpy().reshape(len(array), array.shape[axis + 1], *across)
    scale = Fraction(array.shape[axis + 1], shape[axis])
    nearest = [int((number + Fraction(1, 2)) * scale) for number in range(shape[axis])]
    return np.moveaxis(slices[:, nearest], 1, axis + 1)


def old_rule(segmentation, shape, order=1, otherwise=0):
    """Resize labels as batchgenerators did: in ascending order, each takes what it has half of."""
    result = np.full(shape, otherwise, segmentation.dtype)
    for label in np.unique(segmentation):
        share = slow_resize((segmentation == label)[None], shape, order)[0]
        result[share >= 0.5] = label
    return result


def slices_first(segmentation, shape, axis, resized):
    """Resize every slice across an axis, then take the nearest of them."""
    across = [length for d, length in enumerate(shape) if d != axis]
    stack = np.stack([resized(part, across) for part in np.moveaxis(segmentation, axis, 0)])
    positions = len(stack) / shape[axis] * (np.arange(shape[axis]) + 0.5) - 0.5
    grid = np.meshgrid(positions, *map(np.arange, across), indexing="ij")
    found = ndimage.map_coordinates(stack.astype(float), grid, order=0, mode="nearest")
    return np.moveaxis(found.astype(segmentation.dtype), 0, axis)


LABEL_SHAPES = [((12, 17, 9), (17, 11, 13)), ((9, 14, 10), (6, 21, 10)), ((8, 6, 10), (4, 9, 20))]


@pytest.mark.parametrize(("before", "after"), LABEL_SHAPES)
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_literal_labels_are_those_of_batchgenerators_ties_and_rounding_included(
    before, after, order, dtype
):
    rng = np.random.default_rng(sum(after))
    noise = rng.choice([0, 1, 3, 4, 200], size=before).astype(dtype)
    for segmentation in (regions(before, 6, dtype=dtype) + dtype(3), noise):
        result = resize_labels_literal(segmentation, after, order=order)
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, resize_segmentation(segmentation, after, order=order))


@pytest.mark.parametrize(("before", "after"), LABEL_SHAPES)
@pytest.mark.parametrize("otherwise", [0, 1, 7])
def test_the_literal_threshold_rule_is_the_old_one_of_batchgenerators(before, after, otherwise):
    segmentation = np.random.default_rng(5).choice([1, 3, 4, 200], size=before).astype(np.uint8)
    result = resize_labels_literal(segmentation, after, rule="threshold", otherwise=otherwise)
    expected = old_rule(segmentation, after, otherwise=otherwise)
    np.testing.assert_array_equal(result, expected)
    undecided = old_rule(segmentation, after, otherwise=250) == 250
    assert undecided.mean() > 0.05, "there must be voxels where no label has half"
    assert (result[undecided] == otherwise).all()


@pytest.mark.parametrize(("before", "after"), LABEL_SHAPES)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("rule", ["argmax", "threshold"])
def test_literal_labels_along_a_separate_axis_take_the_nearest_slice(before, after, axis, rule):
    segmentation = np.random.default_rng(6).choice([1, 3, 4, 200], size=before).astype(np.uint8)
    result = resize_labels_literal(segmentation, after, separate=axis, rule=rule, otherwise=1)
    rules = {
        "argmax": lambda part, shape: resize_segmentation(part, shape, order=1),
        "threshold": lambda part, shape: old_rule(part, shape, otherwise=1),
    }
    expected = slices_first(segmentation, after, axis, rules[rule])
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(("before", "after"), LABEL_SHAPES)
@pytest.mark.parametrize("axis", [None, 0, 2])
def test_interpolated_labels_take_a_clear_majority_or_the_largest_share(before, after, axis):
    """Shares of 1000 in float16; more than 700 are clear; ties fall to the smallest label."""
    segmentation = np.random.default_rng(7).choice([0, 2, 5, 130], size=before).astype(np.uint8)
    result = resize_labels_literal(segmentation, after, separate=axis, method="interpolate")
    values = [0, 2, 5, 130]
    masks = np.stack([segmentation == value for value in values]).astype(np.float32) * 1000
    resized = resize_literal(masks, after, order=1, separate=axis, method="interpolate")
    resized = resized.astype(np.float16)
    expected = np.zeros(after, np.uint8)
    for point in np.ndindex(*after):
        own = [float(share[point]) for share in resized]
        clear = [value for value, share in zip(values, own, strict=True) if share > 700]
        expected[point] = clear[0] if clear else values[own.index(max(own))]
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 12])
def test_nearest_slices_round_as_sampling_a_whole_volume_does(length):
    volume = np.broadcast_to(np.arange(length, dtype=float)[:, None, None], (length, 2, 3))
    for target in range(1, 40):
        scale = length / target
        grid = np.mgrid[:target, :2, :3].astype(float)
        grid[0] = scale * (grid[0] + 0.5) - 0.5
        sampled = ndimage.map_coordinates(volume, grid, order=0, mode="nearest")
        np.testing.assert_array_equal(nearest_slices(length, target), sampled[:, 1, 2])


# -- the rule "threshold" --------------------------------------------------------------------------


def slow_threshold(segmentation, shape, separate=None, otherwise=0):
    """Return of each voxel the largest label with at least half, and how many labels have that."""
    result, counts = np.full(shape, otherwise, segmentation.dtype), np.zeros(shape, int)
    for point, totals in shares(segmentation, shape, separate).items():
        half = [label for label, share in totals.items() if share >= Fraction(1, 2)]
        counts[point] = len(half)
        if half:
            result[point] = max(half)
    return result, counts


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((4, 3, 5), (8, 6, 10)),
        ((8, 6, 10), (4, 3, 5)),
        ((5, 7, 6), (8, 5, 9)),
        ((1, 5, 9), (3, 8, 7)),
    ],
)
@pytest.mark.parametrize("separate", [None, 0, 2])
def test_the_threshold_rule_takes_the_last_label_with_exactly_half(before, after, separate):
    rng = np.random.default_rng(sum(before))
    segmentation = rng.integers(1, 5, size=before).astype(np.uint8)
    expected, _ = slow_threshold(segmentation, after, separate, otherwise=9)
    result = resize_labels(segmentation, after, separate=separate, rule="threshold", otherwise=9)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)


def test_two_halves_fall_to_the_larger_label_and_none_to_otherwise():
    segmentation = np.random.default_rng(2).integers(1, 4, size=(4, 6, 5)).astype(np.uint8)
    expected, counts = slow_threshold(segmentation, (8, 3, 5), otherwise=0)
    assert {0, 1, 2} <= set(np.unique(counts)), "no half, one and two must occur"
    result = resize_labels(segmentation, (8, 3, 5), rule="threshold")
    np.testing.assert_array_equal(result, expected)
    assert (result == 0).sum() == (counts == 0).sum()
    for values in ([7, 2], [2, 7]):
        assert resize_labels(np.array(values, np.uint8), (1,), rule="threshold").item() == 7


def test_the_threshold_rule_is_the_literal_one_where_weights_are_exact_in_binary():
    for before, after in [((16, 24, 12), (32, 48, 24)), ((16, 24, 32), (8, 12, 32))]:
        segmentation = regions(before, 9) + np.uint8(2)
        expected = resize_labels_literal(segmentation, after, rule="threshold", otherwise=1)
        result = resize_labels(segmentation, after, rule="threshold", otherwise=1)
        np.testing.assert_array_equal(result, expected)
        assert (result != resize_labels(segmentation, after)).any(), "the rules differ"


def test_order_zero_takes_the_nearest_label_whatever_the_rule():
    segmentation = regions((9, 14, 11), 5) + np.uint8(1)
    result = resize_labels(segmentation, (13, 10, 17), order=0, rule="threshold", otherwise=9)
    np.testing.assert_array_equal(result, nearest_labels(segmentation, (13, 10, 17)))


# -- when an axis is separate ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("current", "target", "when", "axis"),
    [
        ((1.2, 0.7, 0.8), (1.0, 9.0, 1.0), "always", 0),
        ((1.0, 1.0, 1.1), (9.0, 1.0, 1.0), "always", 2),
        ((1.2, 0.7, 1.2), (1.0, 9.0, 1.0), "always", None),
        ((1.0, 1.0, 1.0), (9.0, 1.0, 1.0), "always", None),
        ((5.0, 0.7, 0.7), (1.0, 1.0, 9.0), "never", None),
        ((5.0, 0.7, 0.7), (1.0, 1.0, 9.0), "auto", 0),
    ],
)
def test_an_axis_is_separate_always_never_or_where_a_grid_is_anisotropic(
    current, target, when, axis
):
    assert separate_axis(current, target, when=when) == axis


def test_a_tie_in_an_anisotropic_grid_is_not_settled_by_the_other_grid():
    assert separate_axis((0.3, 1.25, 1.25), (9.0, 1.0, 1.0)) is None


def test_three_times_as_large_is_not_yet_anisotropic():
    assert not is_anisotropic((3.0, 1.0, 1.5))
    assert is_anisotropic((3.01, 1.0, 1.5))
    assert is_anisotropic((1.0, 2.1, 1.5), threshold=2.0)
