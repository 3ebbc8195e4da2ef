from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from medseg.augment import warp
from medseg.augment.sample import Sample, centre
from medseg.augment.spare import Spare
from medseg.augment.spatial import (
    Deformation,
    margin,
    patch_offsets,
    rotation_matrix,
    source_positions,
)

CPU = torch.device("cpu")


def deform(image, segmentation, outside, **kwargs):
    result = warp.deform(Sample(image, segmentation, outside), **kwargs)
    return result.image, result.segmentation, result.outside


def _deformation(angles, factor=1.0, elastic=()):
    matrix = rotation_matrix(angles) * factor
    return Deformation(
        matrix=tuple(map(tuple, matrix.tolist())),
        elastic_width=0.1,
        elastic_magnitude=elastic,
        field_seed=11,
    )


CASES = [
    (_deformation((0.3, -0.4, 0.2), 1.2), (9, 14, 11)),
    (_deformation((0.3, -0.4, 0.2), 0.7, (1.0, 1.5, 0.8)), (9, 14, 11)),
    (_deformation((1.1,), 1.3), (13, 18)),
    (_deformation((-2.5,), 1.0, (1.2, 0.9)), (13, 18)),
]


def _source_size(deformation, patch_size):
    return tuple(
        n + 2 * m for n, m in zip(patch_size, margin(deformation, patch_size), strict=True)
    )


def _positions(deformation, patch_size, source_size):
    offsets = patch_offsets(deformation, patch_size, CPU)
    return np.stack([p.numpy() for p in source_positions(deformation.matrix, offsets, source_size)])


def _smooth_labels(shape, values, seed=0):
    """Return blobs of the given labels, in all of which no axis is like another."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, 1, (len(values), len(shape))) * np.array(shape)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    distance = np.linalg.norm(grid[..., None, :] - centres, axis=-1)
    return np.array(values)[distance.argmin(-1)]


@pytest.mark.parametrize(("deformation", "patch_size"), CASES)
def test_images_equal_linear_interpolation_by_scipy(deformation, patch_size):
    size = _source_size(deformation, patch_size)
    image = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    segmentation = torch.zeros(size, dtype=torch.uint8)
    result, _, _ = deform(image, segmentation, None, deformation=deformation, patch_size=patch_size)
    positions = _positions(deformation, patch_size, size)
    for channel, found in zip(image, result, strict=True):
        expected = map_coordinates(channel.numpy().astype(np.float64), positions, order=1)
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize(("deformation", "patch_size"), CASES)
def test_labels_equal_the_argmax_over_interpolated_indicators(deformation, patch_size):
    size = _source_size(deformation, patch_size)
    values = (0, 3, 7, 8, 250)
    labels = _smooth_labels(size, values)
    _, result, _ = deform(
        torch.zeros(1, *size),
        torch.from_numpy(labels.astype(np.uint8)),
        None,
        deformation=deformation,
        patch_size=patch_size,
    )
    positions = _positions(deformation, patch_size, size)
    scores = np.stack(
        [map_coordinates((labels == v).astype(np.float64), positions, order=1) for v in values]
    )
    second, first = np.sort(scores, axis=0)[-2:]
    is_clear = first - second > 2e-3
    assert is_clear.mean() > 0.98
    expected = np.array(values)[scores.argmax(0)]
    np.testing.assert_array_equal(result.numpy()[is_clear], expected[is_clear])
    assert len(np.unique(expected)) >= 3


def test_labels_and_outside_mask_are_one_partition():
    deformation, patch_size = CASES[2]
    size = _source_size(deformation, patch_size)
    four = _smooth_labels(size, (0, 1, 2, 3))
    segmentation = torch.from_numpy(np.where(four == 3, 0, four).astype(np.uint8))
    outside = torch.from_numpy(four == 3)
    _, labels, mask = deform(
        torch.zeros(1, *size), segmentation, outside, deformation=deformation, patch_size=patch_size
    )
    _, joined, _ = deform(
        torch.zeros(1, *size),
        torch.from_numpy(four.astype(np.uint8)),
        None,
        deformation=deformation,
        patch_size=patch_size,
    )
    expected_mask = joined == 3
    same = (mask == expected_mask) & (labels == torch.where(expected_mask, 0, joined))
    assert same.float().mean() > 0.998
    assert mask.any()
    assert not mask.all()


@pytest.mark.parametrize(
    ("dtype", "high"), [(torch.uint8, 255), (torch.uint16, 65535), (torch.int64, 70000)]
)
def test_labels_of_any_type_and_size_are_kept_and_never_invented(dtype, high):
    deformation, patch_size = CASES[0]
    size = _source_size(deformation, patch_size)
    values = (0, 1, high - 1, high)
    segmentation = torch.from_numpy(_smooth_labels(size, values).astype(np.int64)).to(dtype)
    _, labels, mask = deform(
        torch.zeros(1, *size), segmentation, None, deformation=deformation, patch_size=patch_size
    )
    assert labels.dtype == dtype
    assert mask is None
    found = set(labels.to(torch.int64).unique().tolist())
    assert found <= set(values)
    assert {high - 1, high} & found


def _vote(corners, fractions):
    tensors = torch.tensor(fractions)[:, None]
    return warp._vote(torch.tensor(corners, dtype=torch.int32)[:, None], tensors).item()


def test_a_tie_goes_to_the_nearest_voxels_label_if_it_is_among_the_tied():
    assert _vote([1, 4, 3, 4], (0.5, 0.25)) == 3
    assert _vote([3, 4, 1, 4], (0.5, 0.25)) == 1


def test_a_tie_without_the_nearest_voxels_label_goes_to_the_smallest():
    assert _vote([5, 4, 5, 4, 5, 4, 3, 9], (0.5, 0.5, 0.5)) == 4


def test_voting_everywhere_equals_voting_where_corners_differ():
    deformation, patch_size = CASES[0]
    size = _source_size(deformation, patch_size)
    codes = torch.from_numpy(_smooth_labels(size, (0, 1, 5)).astype(np.int32))
    rows = torch.stack([codes, codes.flip(0)])
    positions = torch.from_numpy(_positions(deformation, patch_size, size))
    spare = Spare(CPU)
    cells = warp.locate(size, positions, spare)
    flat = rows.reshape(2, -1)
    corners = torch.stack([flat[:, step:][:, cells.lowest.long()] for step in cells.steps])
    everywhere = warp._vote(corners, cells.fractions)
    assert torch.equal(everywhere, warp._vote_where_mixed(flat, cells, spare))


def test_slabs_do_not_change_the_result(monkeypatch):
    deformation, patch_size = CASES[1]
    size = _source_size(deformation, patch_size)
    image = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    segmentation = torch.from_numpy(_smooth_labels(size, (0, 1, 2)).astype(np.uint8))
    kwargs = {"deformation": deformation, "patch_size": patch_size}
    whole = deform(image, segmentation, None, **kwargs)
    monkeypatch.setattr(warp, "_VOXELS_CPU", 700)
    cut = deform(image, segmentation, None, **kwargs)
    assert torch.equal(whole[0], cut[0])
    assert torch.equal(whole[1], cut[1])


@pytest.mark.parametrize("angles", [(0.5, 0, 0), (0, 0.5, 0), (0, 0, 0.5), (0.3, 0.2, -0.4)])
def test_image_and_labels_turn_the_same_way(angles):
    """An asymmetric solid, as intensity and as label, stays one and the same."""
    deformation, patch_size = _deformation(angles), (14, 20, 17)
    size = _source_size(deformation, patch_size)
    solid = torch.zeros(size, dtype=torch.uint8)
    a, b, c = (n // 2 for n in size)
    solid[a - 5 : a + 1, b - 2 : b + 8, c : c + 3] = 1
    solid[a : a + 4, b - 6 : b, c - 4 : c + 1] = 1
    image, labels, _ = deform(
        solid[None].float(), solid, None, deformation=deformation, patch_size=patch_size
    )
    is_clear = (image[0] - 0.5).abs() > 1e-3
    assert torch.equal((image[0] > 0.5)[is_clear], (labels == 1)[is_clear])
    still = centre(solid, patch_size)
    assert (labels != still).sum() > 50


def test_a_quarter_turn_reads_the_source_turned():
    """Patch axis 0 reads along source axis 1, so the content turns against the matrix."""
    deformation = _deformation((math.pi / 2,))
    source = torch.arange(7 * 7, dtype=torch.float32).reshape(7, 7)
    image, labels, _ = deform(
        source[None], source.to(torch.uint8), None, deformation=deformation, patch_size=(5, 5)
    )
    turned = np.rot90(source[1:6, 1:6].numpy(), k=-1)
    np.testing.assert_allclose(image[0].numpy(), turned, atol=1e-4)
    np.testing.assert_array_equal(labels.numpy(), turned.astype(np.uint8))


def test_slices_deform_alike_in_a_plane():
    deformation, patch_size = _deformation((0.7,), 1.2), (10, 15)
    size = (3, *_source_size(deformation, patch_size))
    image = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    segmentation = torch.from_numpy(_smooth_labels(size, (0, 1, 2)).astype(np.uint8))
    kwargs = {"deformation": deformation, "patch_size": patch_size}
    result, labels, _ = deform(image, segmentation, None, **kwargs)
    assert result.shape == (2, 3, 10, 15)
    for index in range(3):
        one, one_labels, _ = deform(image[:, index], segmentation[index], None, **kwargs)
        assert torch.equal(result[:, index], one)
        assert torch.equal(labels[index], one_labels)


def test_identity_reproduces_the_centre():
    deformation = _deformation((0.0, 0.0, 0.0))
    image = torch.randn(1, 8, 11, 10)
    segmentation = torch.from_numpy(_smooth_labels((8, 11, 10), (0, 1, 2)).astype(np.uint8))
    result, labels, _ = deform(
        image, segmentation, None, deformation=deformation, patch_size=(6, 7, 4)
    )
    np.testing.assert_allclose(result[0], centre(image[0], (6, 7, 4)), atol=1e-6)
    assert torch.equal(labels, centre(segmentation, (6, 7, 4)))


def test_an_axis_of_one_voxel_is_left_alone():
    deformation = _deformation((0.0, 0.0, 0.0))
    image = torch.randn(1, 1, 6, 5)
    segmentation = torch.ones(1, 6, 5, dtype=torch.uint8)
    result, labels, _ = deform(
        image, segmentation, None, deformation=deformation, patch_size=(1, 6, 5)
    )
    np.testing.assert_allclose(result, image, atol=1e-6)
    assert torch.equal(labels, segmentation)


@pytest.mark.parametrize(("length", "wanted"), [(9, 5), (8, 5), (8, 4), (3, 6), (5, 5)])
def test_centre_keeps_the_middle_voxel_in_the_middle(length, wanted):
    marked = torch.zeros(length, 2)
    marked[length // 2] = 1
    result = centre(marked, (wanted, 2), fill=7)
    assert result.shape == (wanted, 2)
    assert result[:, 0].tolist().index(1) == wanted // 2
    assert (result == 7).sum() == 2 * max(0, wanted - length)
