"""Preprocessing as imported models need it, against the steps of the originals written out.

The originals hold arrays as (z, y, x), so K, J, I; their plans permute those axes.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from batchgenerators.augmentations.utils import resize_segmentation
from scipy import ndimage
from skimage.transform import resize as skimage_resize

from medseg.geometry import SpatialRecord
from medseg.preprocess.normalize import normalize, normalize_literal
from medseg.preprocess.pipeline import (
    network_spacing,
    parameters,
    preprocess_case,
    resize_label_map,
)
from medseg.resample import is_anisotropic
from medseg.schema.bundle import Resampling, Semantics
from medseg.schema.fingerprint import IntensityStatistics
from tests.preprocess.small_plans import make_configuration, make_plans

CT = IntensityStatistics(
    mean=61.5, std=23.25, median=60, min=-90, max=300, percentile_00_5=-20, percentile_99_5=110
)
FLAT = CT.model_copy(update={"std": 0.0})
V2 = Semantics(accumulator="float16", gaussian_peak=10, previous="labels")
V1 = Semantics(
    average="probabilities", normalise_first=False, label_resize="threshold", least_std="added",
    separate_by="image", previous="labels_uncropped",
)  # fmt: skip
BOTH = [normalize, normalize_literal]


def make_image(shape=(17, 14, 11), channels=2, seed=5):
    """Return noise in a box off centre with a hole and a notch in it, zeros around."""
    rng = np.random.default_rng(seed)
    values = np.zeros((channels, *shape), np.float32)
    values[:, 2:-1, 1:-2, 1:-1] = rng.normal(50, 30, values[:, 2:-1, 1:-2, 1:-1].shape)
    values[:, 6:9, 5:8, 4:6] = 0
    values[:, :6, :4] = 0
    return values


def run(channels, affine, configuration, semantics, *, transpose=(0, 1, 2), **options):
    """Preprocess an image as stored; `transpose` permutes K, J, I as the originals' plans do."""
    network_axes = tuple(2 - axis for axis in transpose)
    return preprocess_case(
        channels,
        affine,
        plans=make_plans(configuration, network_axes, CT),
        configuration=configuration,
        semantics=semantics,
        orientation="stored_sitk",
        **options,
    )


# -- the originals, step by step -------------------------------------------------------------------


def read(channels, transpose):
    """Return (C, n0, n1, n2) as a view of an array that was read as (z, y, x)."""
    stored = np.ascontiguousarray(channels.transpose(0, 3, 2, 1))
    return stored.transpose(0, *(1 + axis for axis in transpose))


def box_of(data):
    """Return the mask of the imaged region and the box around it."""
    mask = ndimage.binary_fill_holes((data != 0).any(axis=0))
    places = np.argwhere(mask)
    pairs = zip(places.min(axis=0), places.max(axis=0) + 1, strict=True)
    return mask, tuple(slice(int(low), int(high)) for low, high in pairs)


def coarse_axis(*spacings):
    """Return the axis that is resampled alone: of the first grid that is anisotropic."""
    for spacing in spacings:
        if max(spacing) / min(spacing) > 3:
            largest = [axis for axis in range(3) if spacing[axis] == max(spacing)]
            return largest[0] if len(largest) == 1 else None
    return None


def resized(volume, shape, axis, single):
    """Resize a volume by `single`, or every slice across an axis, taking the nearest of them."""
    if volume.shape == tuple(shape):
        return volume
    if axis is None:
        return single(volume, shape)
    across = [length for d, length in enumerate(shape) if d != axis]
    stack = np.stack([single(part, across) for part in np.moveaxis(volume, axis, 0)])
    positions = len(stack) / shape[axis] * (np.arange(shape[axis]) + 0.5) - 0.5
    grid = np.meshgrid(positions, *map(np.arange, across), indexing="ij")
    found = ndimage.map_coordinates(stack.astype(float), grid, order=0, mode="nearest")
    return np.moveaxis(found, 0, axis)


def spline(order):
    return lambda part, shape: skimage_resize(
        part.astype(np.float64), shape, order, mode="edge", anti_aliasing=False, clip=True
    )


def last_half(labels, shape):
    """Resize labels in ascending order: each takes what it has half of; else it is 0."""
    result = np.zeros(shape, labels.dtype)
    for label in np.unique(labels):
        result[spline(1)(labels == label, shape) >= 0.5] = label
    return result


def largest_share(labels, shape):
    return resize_segmentation(labels, shape, order=1)


def rounded(shape, spacing, target):
    return tuple(
        round(now / wanted * n) for n, now, wanted in zip(shape, spacing, target, strict=True)
    )


def spacing_of(affine, transpose):
    """Return the voxel size in the order of the network."""
    stored = np.linalg.norm(affine[:3, :3], axis=0)[::-1]
    return [float(stored[axis]) for axis in transpose]


def second_version(data, inside, schemes, masks):
    """Normalise in place, in float32."""
    for image, scheme, use_mask in zip(data, schemes, masks, strict=True):
        if scheme == "zscore" and use_mask:
            values = image[inside]
            image[inside] = (values - values.mean()) / max(values.std(), 1e-8)
        elif scheme == "zscore":
            mean, std = image.mean(), image.std()
            image -= mean
            image /= max(std, 1e-8)
        elif scheme == "ct":
            np.clip(image, -20, 110, out=image)
            image -= 61.5
            image /= max(23.25, 1e-8)
        elif scheme == "rescale_0_1":
            image -= image.min()
            image /= np.clip(image.max(), 1e-8, None)
        elif scheme == "rgb_0_1":
            image /= 255.0
    return data


def first_version(data, inside, schemes, masks):
    """Normalise in place, in float32, after resampling."""
    for image, scheme, use_mask in zip(data, schemes, masks, strict=True):
        if scheme == "ct":
            image[...] = (np.clip(image, -20, 110) - 61.5) / 23.25
        elif scheme == "ct_case":
            within = (image > -20) & (image < 110)
            clipped = np.clip(image, -20, 110)
            image[...] = (clipped - clipped[within].mean()) / clipped[within].std()
        elif scheme == "zscore" and use_mask:
            values = image[inside]
            image[inside] = (values - values.mean()) / (values.std() + 1e-8)
        elif scheme == "zscore":
            image[...] = (image - image.mean()) / (image.std() + 1e-8)
        if use_mask and scheme != "none":
            image[~inside] = 0
    return data


# -- intensities -----------------------------------------------------------------------------------


@pytest.fixture
def image():
    return np.random.default_rng(3).normal(40, 60, size=(6, 7, 5)).astype(np.float32)


@pytest.fixture
def inside(image):
    mask = np.zeros(image.shape, bool)
    mask[1:5, 2:, :4] = True
    mask[0, 0, 0] = True
    return mask


def one(function, image, inside, scheme, *, use_mask=False, statistics=CT, **options):
    """Normalise one channel; the image that is given stays as it is."""
    return function(
        image[np.newaxis].copy(),
        inside,
        schemes=(scheme,),
        use_mask=(use_mask,),
        intensity=(statistics,),
        **options,
    )[0]


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("use_mask", [False, True])
def test_what_is_added_to_the_deviation_counts_where_it_is_tiny(function, image, inside, use_mask):
    """With a deviation of 1e-8 the sum is twice as much, the floor just as much."""
    tiny = image - image[inside if use_mask else ...].mean()
    tiny *= np.float32(1e-8 / tiny[inside if use_mask else ...].std(dtype=np.float64))
    found = {
        kind: one(function, tiny, inside, "zscore", use_mask=use_mask, least_std=kind)
        for kind in ("floor", "added")
    }
    where = inside if use_mask else ...
    np.testing.assert_allclose(found["floor"][where], tiny[where] / 1e-8, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["added"][where], tiny[where] / 2e-8, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found["added"][~inside] == tiny[~inside], use_mask)


@pytest.mark.parametrize("function", BOTH)
def test_nothing_is_added_to_a_datasets_deviation(function, image, inside):
    tiny = CT.model_copy(update={"std": 1e-9})
    clipped = np.clip(image.astype(float), -20, 110) - 61.5
    added = one(function, image, inside, "ct", statistics=tiny, least_std="added")
    floor = one(function, image, inside, "ct", statistics=tiny, least_std="floor")
    np.testing.assert_allclose(added, clipped / 1e-9, rtol=1e-5)
    np.testing.assert_allclose(floor, clipped / 1e-8, rtol=1e-5)


@pytest.mark.parametrize("function", BOTH)
def test_ct_of_the_case_is_scaled_by_what_lies_strictly_between_the_datasets_bounds(
    function, image, inside
):
    image[2, 3] = [-20, 110, -20, 110, 30]
    within = [float(v) for v in image.flat if -20 < v < 110]
    mean = sum(within) / len(within)
    std = (sum((v - mean) ** 2 for v in within) / len(within)) ** 0.5
    expected = [(min(max(float(v), -20.0), 110.0) - mean) / std for v in image.flat]
    found = one(function, image, inside, "ct_case", least_std="added")
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-5)
    masked = one(function, image, inside, "ct_case", use_mask=True)
    np.testing.assert_array_equal(masked, found)  # a mask only blanks, and where it is asked to


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("value", [-20.0, 110.0, 500.0])
def test_ct_of_a_case_with_nothing_between_the_bounds_is_only_clipped(function, inside, value):
    image = np.full(inside.shape, value, np.float32)
    found = one(function, image, inside, "ct_case")
    np.testing.assert_array_equal(found, np.clip(image, -20, 110))


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("scheme", ["zscore", "ct", "ct_case", "rescale_0_1", "rgb_0_1", "none"])
def test_outside_becomes_zero_whatever_the_scheme_but_none(function, image, inside, scheme):
    whole = one(function, image, inside, scheme, use_mask=True)
    found = one(function, image, inside, scheme, use_mask=True, blanks_outside=True)
    np.testing.assert_array_equal(found[inside], whole[inside])
    assert (whole[~inside] != 0).any()
    wanted = image if scheme == "none" else np.zeros_like(image)
    np.testing.assert_array_equal(found[~inside], wanted[~inside])
    unmasked = one(function, image, inside, scheme)
    np.testing.assert_array_equal(
        one(function, image, inside, scheme, blanks_outside=True), unmasked
    )


SCHEMES = ["zscore", "ct", "ct_case", "quantitative", "rescale_0_1", "rgb_0_1", "none"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("use_mask", [False, True])
@pytest.mark.parametrize("least_std", ["floor", "added"])
def test_both_arithmetics_agree(image, inside, scheme, use_mask, least_std):
    options = {"use_mask": use_mask, "least_std": least_std, "blanks_outside": use_mask}
    slow = one(normalize_literal, image, inside, scheme, **options)
    np.testing.assert_allclose(one(normalize, image, inside, scheme, **options), slow, atol=1e-5)


@pytest.mark.parametrize("use_mask", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_literal_arithmetic_is_the_originals_to_the_last_bit(use_mask, order):
    """Also where the image is a view of another memory layout: sums in float32 depend on it."""
    schemes = ("zscore", "ct", "rescale_0_1", "rgb_0_1", "none")
    whole = np.random.default_rng(1).normal(300, 80, (5, 23, 31, 40)).astype(np.float32)

    def view():
        return whole.copy().transpose(0, *(1 + axis for axis in order))[:, 1:, :-2]

    mask = np.random.default_rng(2).random(view().shape[1:]) > 0.3
    options = {"schemes": schemes, "use_mask": (use_mask,) * 5, "intensity": (CT,) * 5}
    given = view()
    found = normalize_literal(given, mask, **options)
    assert found is given
    np.testing.assert_array_equal(found, second_version(view(), mask, schemes, (use_mask,) * 5))
    schemes = ("zscore", "ct", "ct_case", "zscore", "none")
    found = normalize_literal(view(), mask, **{**options, "schemes": schemes},
                              least_std="added", blanks_outside=True)  # fmt: skip
    expected = first_version(view(), mask, schemes, (use_mask,) * 5)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("function", BOTH)
def test_an_empty_mask_leaves_the_image_and_gives_no_warning(function, image):
    nothing = np.zeros(image.shape, bool)
    for kind in ("floor", "added"):
        found = one(function, image, nothing, "zscore", use_mask=True, least_std=kind)
        np.testing.assert_array_equal(found, image)


# -- the whole way ---------------------------------------------------------------------------------

AFFINES = {
    "fine": np.diag([0.75, 1.25, 1.5, 1.0]),
    "coarse": np.diag([0.75, -1.0, 4.0, 1.0]),
    "tied": np.diag([-1.5, 1.5, 0.25, 1.0]),
}


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("target", [(1.0, 1.25, 0.5), (2.5, 0.625, 0.75)])
def test_normalising_first_is_the_second_version_to_the_last_bit(name, transpose, target):
    """Transposed, cropped, normalised, resampled; sums over the memory as it was read."""
    schemes, masks = ("zscore", "ct", "rescale_0_1", "zscore"), (True, False, False, False)
    channels, affine = make_image(channels=4), AFFINES[name]
    data, spacing = read(channels, transpose), spacing_of(AFFINES[name], transpose)
    mask, box = box_of(data)
    data = second_version(data[(slice(None), *box)], mask[box], schemes, masks)
    shape = rounded(data.shape[1:], spacing, target)
    axis = coarse_axis(spacing, target)
    expected = np.stack([resized(part, shape, axis, spline(3)) for part in data])
    configuration = make_configuration(target, normalization=schemes, use_mask=masks)
    exact = run(channels, affine, configuration, V2, transpose=transpose, is_exact=True)
    np.testing.assert_array_equal(exact.image, expected.astype(np.float32))
    assert exact.record.box == tuple((part.start, part.stop) for part in box)
    assert exact.record.shape_network == shape
    usual = run(channels, affine, configuration, V2, transpose=transpose)
    np.testing.assert_allclose(usual.image, expected, atol=2e-4)
    assert usual.record == exact.record


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("target", [(1.0, 1.25, 0.5), (2.5, 0.625, 0.75)])
def test_resampling_first_is_the_first_version(name, transpose, target):
    """Cropped, transposed, resampled with its mask, then normalised and blanked."""
    schemes, masks = ("zscore", "ct", "ct_case", "none", "zscore"), (True, True, False, True, False)
    channels, affine = make_image(channels=5), AFFINES[name]
    mask, box = box_of(read(channels, (0, 1, 2)))
    order = (0, *(1 + axis for axis in transpose))
    data = read(channels, (0, 1, 2))[(slice(None), *box)].transpose(order)
    outside = np.where(mask[box], 0, -1).transpose(transpose)
    spacing = spacing_of(affine, transpose)
    shape, axis = rounded(data.shape[1:], spacing, target), coarse_axis(spacing, target)
    data = np.stack([resized(part, shape, axis, spline(3)) for part in data])
    data = np.ascontiguousarray(data, dtype=np.float32)
    inside = resized(outside, shape, axis, last_half) >= 0
    assert 0 < (~inside).sum() < inside.size / 2
    expected = first_version(data, inside, schemes, masks)
    configuration = make_configuration(target, normalization=schemes, use_mask=masks)
    exact = run(channels, affine, configuration, V1, transpose=transpose, is_exact=True)
    np.testing.assert_allclose(exact.image, expected, atol=2e-6)
    np.testing.assert_array_equal(exact.image[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])
    usual = run(channels, affine, configuration, V1, transpose=transpose)
    off = np.abs(usual.image - expected) > 2e-4
    assert off.any(axis=0).mean() < 0.01, "only where shares in float64 miss an exact half"
    other = run(channels, affine, configuration, V1.model_copy(update={"normalise_first": True}),
                transpose=transpose)  # fmt: skip
    assert np.abs(other.image - usual.image)[0].max() > 0.1, "the order of the steps matters"


def test_no_resampling_keeps_every_voxel_and_its_size():
    channels, affine = make_image(), AFFINES["coarse"]
    configuration = make_configuration((1.0, 1.0, 1.0))
    nothing = Resampling(method="none")
    for base in (V1, V2):
        semantics = base.model_copy(
            update={"resample_image": nothing, "resample_labels": nothing,
                    "resample_result": nothing}
        )  # fmt: skip
        for is_exact in (False, True):
            found = run(channels, affine, configuration, semantics, is_exact=is_exact)
            assert found.record.spacing_network == found.record.spacing_cropped == (4.0, 1.0, 0.75)
            assert found.record.shape_network == found.record.shape_cropped == found.image.shape[1:]
            data = read(channels, (0, 1, 2))
            mask, box = box_of(data)
            expected = second_version(
                data[(slice(None), *box)], mask[box], ("zscore", "ct"), (True, False)
            )
            np.testing.assert_allclose(found.image, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("spacing", "target", "keeps", "expected"),
    [
        ((4.0, 1.0, 0.75), (1.0, 2.0, 3.0), False, (1.0, 2.0, 3.0)),
        ((4.0, 1.0, 0.75), (1.0, 2.0, 3.0), True, (4.0, 2.0, 3.0)),
        ((4.0, 1.0, 0.75), (2.0, 3.0), False, (4.0, 2.0, 3.0)),
        ((4.0, 1.0, 0.75), (2.0, 3.0), True, (4.0, 2.0, 3.0)),
    ],
)
def test_slices_are_kept_in_two_dimensions_or_where_it_is_said(spacing, target, keeps, expected):
    configuration = make_configuration(target)
    found = network_spacing(spacing, configuration, Semantics(keeps_slices=keeps))
    assert found == expected
    nothing = Semantics(keeps_slices=keeps, resample_image=Resampling(method="none"))
    assert network_spacing(spacing, configuration, nothing) == spacing


def test_kept_slices_are_resized_in_their_plane_alone():
    channels, affine = make_image(), AFFINES["fine"]
    configuration = make_configuration((9.0, 0.625, 0.5))
    found = run(channels, affine, configuration, V2.model_copy(update={"keeps_slices": True}))
    thick = found.record.shape_cropped
    assert found.record.shape_network == (thick[0], *rounded(thick[1:], (1.25, 0.75), (0.625, 0.5)))
    assert found.record.spacing_network == (1.5, 0.625, 0.5)


@pytest.mark.parametrize("when", ["auto", "always", "never"])
def test_an_image_is_resampled_with_its_own_order_and_separate_axis(when):
    channels, affine = make_image(), AFFINES["fine"]
    semantics = V2.model_copy(update={"resample_image": Resampling(order=1, separate=when)})
    configuration = make_configuration((1.0, 0.5, 1.25), normalization=("none", "none"))
    data = read(channels, (0, 1, 2))
    _, box = box_of(data)
    data = data[(slice(None), *box)]
    shape = rounded(data.shape[1:], (1.5, 1.25, 0.75), (1.0, 0.5, 1.25))
    axis = 0 if when == "always" else None
    expected = np.stack([resized(part, shape, axis, spline(1)) for part in data])
    found = run(channels, affine, configuration, semantics, is_exact=True)
    np.testing.assert_array_equal(found.image, expected.astype(np.float32))
    usual = run(channels, affine, configuration, semantics)
    np.testing.assert_allclose(usual.image, expected, atol=1e-3)


def test_an_image_may_be_interpolated_as_torch_does():
    import torch

    channels, affine = make_image(), AFFINES["coarse"]
    how = Resampling(method="interpolate", order=3, separate="never")
    semantics = V2.model_copy(update={"resample_image": how})
    configuration = make_configuration((1.0, 0.5, 1.25), normalization=("none", "none"))
    data = read(channels, (0, 1, 2))
    _, box = box_of(data)
    data = torch.from_numpy(np.ascontiguousarray(data[(slice(None), *box)]))
    shape = rounded(data.shape[1:], (4.0, 1.0, 0.75), (1.0, 0.5, 1.25))
    expected = torch.nn.functional.interpolate(data[None], shape, mode="trilinear")[0].numpy()
    found = run(channels, affine, configuration, semantics, is_exact=True)
    np.testing.assert_array_equal(found.image, expected)
    usual = run(channels, affine, configuration, semantics)
    np.testing.assert_allclose(usual.image, expected, atol=1e-3)


# -- orientation -----------------------------------------------------------------------------------


def test_a_stored_image_is_the_same_however_it_lies_in_the_world():
    channels, configuration = make_image(), make_configuration((1.0, 1.25, 0.5))
    spacing = np.diag([0.75, 1.25, 1.5, 1.0])
    plain = run(channels, spacing, configuration, V2, transpose=(1, 2, 0), is_exact=True)
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            turned = np.eye(4)
            turned[:3, :3] = (np.diag(signs) @ spacing[:3, :3])[list(order)]
            found = run(channels, turned, configuration, V2, transpose=(1, 2, 0), is_exact=True)
            np.testing.assert_array_equal(found.image, plain.image)
            assert found.record.axes == (1, 0, 2)
            assert found.record.flips == (False, False, False)
            whole = np.arange(channels[0].size).reshape(channels[0].shape)
            box = tuple(slice(*limits) for limits in found.record.box)
            back = found.record.restore(found.record.to_network_axes(whole)[box], fill=-1)
            inside = back >= 0
            np.testing.assert_array_equal(back[inside], whole[inside])
            assert (channels[:, ~inside] == 0).all()


def test_a_turned_image_has_the_voxel_size_its_file_says():
    """Three times as thick as wide is the very limit, and common; half a voxel is rounded to even.

    The columns of a turned affine are that long to rounding only, which would decide otherwise.
    """
    channels, configuration = make_image(), make_configuration((2.0, 2.0, 2.0))
    sizes = (1.0, 1.0, 3.0)
    plain = run(channels, np.diag([*sizes, 1.0]), configuration, V2)
    others = []
    for degrees in range(0, 90, 3):
        a, b = np.deg2rad(degrees), np.deg2rad(17 + degrees / 2)
        turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
        affine = np.eye(4)
        affine[:3, :3] = turn @ tilt @ np.diag(sizes)
        found = run(channels, affine, configuration, V2, spacing=sizes)
        assert found.record.spacing_cropped == (3.0, 1.0, 1.0)
        assert found.record.shape_network == plain.record.shape_network
        np.testing.assert_array_equal(found.image, plain.image)
        others.append(
            is_anisotropic(run(channels, affine, configuration, V2).record.spacing_cropped)
        )
    assert any(others), "without it some are anisotropic"


# -- what the stage before found -------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["argmax", "threshold"])
@pytest.mark.parametrize("name", AFFINES)
def test_labels_of_the_stage_before_share_the_images_mask(name, rule):
    """Their zeros outside the image are one more label, the lowest; what they mark is inside."""
    channels, affine, transpose = make_image(), AFFINES[name], (1, 2, 0)
    told = np.random.default_rng(8).choice([0, 0, 0, 1, 2, 4], channels.shape[1:])
    told = np.repeat(np.repeat(told[::3, ::3], 3, axis=0), 3, axis=1).astype(np.uint8)
    told = told[: channels.shape[1], : channels.shape[2]]
    target = (1.0, 1.25, 0.5)
    data, spacing = read(channels, transpose), spacing_of(affine, transpose)
    mask, box = box_of(data)
    merged = told.transpose(2, 1, 0).transpose(transpose)[box].astype(np.int16)
    assert ((merged > 0) & ~mask[box]).any(), "something must be marked outside"
    merged[(merged == 0) & ~mask[box]] = -1
    schemes, masks = ("zscore", "zscore"), (True, False)
    data = second_version(data[(slice(None), *box)], merged >= 0, schemes, masks)
    shape, axis = rounded(data.shape[1:], spacing, target), coarse_axis(spacing, target)
    single = largest_share if rule == "argmax" else last_half
    labels = resized(merged, shape, axis, single)
    expected = np.stack([resized(part, shape, axis, spline(3)) for part in data])
    configuration = make_configuration(target, normalization=schemes, use_mask=masks)
    semantics = V2.model_copy(update={"label_resize": rule})
    found = run(channels, affine, configuration, semantics, transpose=transpose,
                segmentation=told, is_exact=True)  # fmt: skip
    np.testing.assert_array_equal(found.segmentation, np.maximum(labels, 0))
    np.testing.assert_array_equal(found.outside, labels < 0)
    np.testing.assert_array_equal(found.image, expected.astype(np.float32))
    usual = run(channels, affine, configuration, semantics, transpose=transpose, segmentation=told)
    assert (usual.segmentation != found.segmentation).mean() < 0.01
    assert (usual.outside != found.outside).mean() < 0.01
    np.testing.assert_allclose(usual.image, expected, atol=2e-4)


RECORD = SpatialRecord(
    shape_image=(12, 10, 9),
    affine_image=tuple(map(tuple, np.eye(4).tolist())),
    axes=(2, 0, 1),
    flips=(False, False, False),
    box=((0, 9), (0, 12), (0, 10)),
    spacing_cropped=(1.0, 1.0, 1.0),
    shape_network=(6, 17, 13),
    spacing_network=(1.5, 0.7, 0.8),
)


@pytest.mark.parametrize("separate", [None, 1])
@pytest.mark.parametrize("rule", ["argmax", "threshold"])
@pytest.mark.parametrize("order", [0, 1])
def test_a_label_map_is_resized_by_the_rule_of_the_model(rule, order, separate):
    labels = np.random.default_rng(9).choice([1, 2, 5], (9, 12, 10)).astype(np.uint8)
    semantics = Semantics(label_resize=rule, resample_labels=Resampling(order=order))
    exact = resize_label_map(labels, RECORD, semantics, is_exact=True, separate=separate)
    single = last_half if rule == "threshold" and order else largest_share
    if order == 0:
        single = lambda part, shape: resize_segmentation(part, shape, order=0)  # noqa: E731
    np.testing.assert_array_equal(exact, resized(labels, RECORD.shape_network, separate, single))
    usual = resize_label_map(labels, RECORD, semantics, separate=separate)
    assert usual.dtype == exact.dtype == np.uint8
    assert (usual != exact).mean() < 0.01
    if rule == "threshold" and order:
        assert (exact == 0).mean() > 0.05
        found = resize_label_map(labels, RECORD, semantics, separate=separate, otherwise=7)
        np.testing.assert_array_equal(found == 7, usual == 0)


def test_a_label_map_is_left_alone_or_refused():
    labels = np.zeros((9, 12, 10), np.uint8)
    for is_exact in (False, True):
        nothing = Semantics(resample_labels=Resampling(method="none"))
        with pytest.raises(ValueError, match=r"shape \(9, 12, 10\) are not resampled to"):
            resize_label_map(labels, RECORD, nothing, is_exact=is_exact)
        fitting = np.zeros(RECORD.shape_network, np.uint8)
        assert resize_label_map(fitting, RECORD, nothing, is_exact=is_exact) is fitting
        cubic = Semantics(resample_labels=Resampling(order=3))
        with pytest.raises(ValueError, match="order 0 or 1, got 3"):
            resize_label_map(labels, RECORD, cubic, is_exact=is_exact)


# -- the store -------------------------------------------------------------------------------------


def test_a_datasets_bounds_are_part_of_what_a_case_depends_on():
    configuration = make_configuration((1.0, 1.0, 1.0), normalization=("ct_case", "none"))
    plans = make_plans(configuration, (0, 1, 2), CT)
    other = plans.model_copy(update={"intensity": (FLAT, FLAT)})
    assert parameters(plans, configuration) != parameters(other, configuration)
