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
    new_shape,
    resize,
    resize_labels,
    resize_slab,
    separate_axis,
)

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
