"""Labels of a slab: only voxels near borders are computed, and none comes out otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from medseg.infer import segment
from medseg.infer.segment import segment_slab
from medseg.labels import LabelScheme
from medseg.resample import Slab, resize_slab, rows_needed

LABELS = LabelScheme(labels={"background": 0, "a": 7, "b": 3, "c": 12, "d": 90})
REGIONS = LabelScheme(
    labels={"background": 0, "whole": (1, 2, 3), "core": (2, 3), "tip": 3, "rim": 4, "x": 5},
    regions_class_order=(1, 2, 3, 2, 5),
)
MANY = LabelScheme(labels={"background": 0} | {f"label {n}": n for n in range(1, 301)})


def smooth(shape, channels, seed=0, coarse=4):
    """Return logits with large plain parts and borders between them."""
    rng = np.random.default_rng(seed)
    small = torch.from_numpy(rng.normal(size=(1, channels, coarse, coarse, coarse)) * 3).float()
    return functional.interpolate(small, size=shape, mode="trilinear")[0].contiguous()


def slab_of(logits, shape, axis, rows, separate=None):
    length = logits.shape[axis + 1]
    held = rows_needed(length, shape[axis], rows, linear=axis != separate)
    return Slab(
        logits=logits.narrow(axis + 1, held.start, held.stop - held.start),
        shape_in=tuple(logits.shape[1:]),
        shape=shape,
        axis=axis,
        held=held,
        rows=rows,
        separate=separate,
    )


def oracle(logits, shape, labels, separate):
    """Resize every class, then decide."""
    whole = resize_slab(logits, shape, 0, 0, shape[0], separate=separate).numpy()
    first, second = np.sort(whole, axis=0)[:-3:-1] if len(whole) > 1 else (whole[0], whole[0] - 1)
    close = np.abs(whole).min(axis=0) if labels.has_regions else first - second
    return labels.segment(whole), close


VARIANTS = [
    pytest.param((23, 31, 29), (11, 13, 12), None, id="upsampled"),
    pytest.param((9, 8, 10), (19, 21, 17), None, id="downsampled"),
    pytest.param((13, 20, 7), (13, 11, 15), None, id="mixed"),
    pytest.param((17, 30, 29), (5, 13, 14), 0, id="separate-first"),
    pytest.param((20, 31, 11), (11, 13, 5), 2, id="separate-last"),
    pytest.param((12, 13, 11), (12, 13, 11), None, id="as-it-is"),
    pytest.param((1, 13, 29), (1, 7, 11), None, id="one-slice"),
]


@pytest.mark.parametrize("share", [-1.0, 0.1, 1.0], ids=["dense", "either", "sparse"])
@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize(("shape", "before", "separate"), VARIANTS)
def test_slabs_equal_the_whole_volume(shape, before, separate, labels, share, monkeypatch):
    monkeypatch.setattr(segment, "DENSE_SHARE", share)
    monkeypatch.setattr(segment, "CHUNK", 97)
    logits = smooth(before, labels.num_logits)
    expected, close = oracle(logits, shape, labels, separate)
    assert len(np.unique(expected)) >= 3
    for axis in range(3):
        for thickness in (5, 99):
            for start in range(0, shape[axis], thickness):
                rows = slice(start, min(start + thickness, shape[axis]))
                found = segment_slab(slab_of(logits, shape, axis, rows, separate), labels)
                own = [slice(None)] * 3
                own[axis] = rows
                differs = found != expected[tuple(own)]
                assert (close[tuple(own)][differs] < 1e-5).all()
                assert differs.mean() < 0.01
                assert found.dtype == labels.index_dtype


def test_more_labels_than_fit_into_a_byte():
    logits = smooth((9, 8, 7), 301)
    expected, close = oracle(logits, (13, 11, 9), MANY, None)
    found = segment_slab(slab_of(logits, (13, 11, 9), 0, slice(0, 13)), MANY)
    assert found.dtype == np.uint16
    assert found.max() > 255
    assert (close[found != expected] < 1e-5).all()


def test_plain_parts_are_not_computed(monkeypatch):
    """Two halves: only the three voxels between the centres of the last and the first are."""
    logits = torch.zeros((5, 10, 10, 10))
    logits[1, :, :, :5] = 3
    logits[2, :, :, 5:] = 3
    computed = []

    def noted(slab, points):
        computed.append(len(points))
        return mixtures(slab, points)

    mixtures = segment._mixtures
    monkeypatch.setattr(segment, "_mixtures", noted)
    segment_slab(slab_of(logits, (30, 30, 30), 0, slice(0, 30)), LABELS)
    assert computed == [30 * 30 * 3]


def test_equal_logits_go_to_the_smallest_index():
    logits = torch.zeros((5, 4, 4, 4))
    assert not segment_slab(slab_of(logits, (9, 9, 9), 0, slice(0, 9)), LABELS).any()


def test_regions_painted_alike_are_told_apart():
    """Neighbours that are painted alike for different regions may have a voxel of none between."""
    logits = torch.full((5, 2, 1, 1), -1.0)
    logits[1, 0], logits[3, 1] = 0.5, 0.5  # core and rim are both painted 2
    found = segment_slab(slab_of(logits, (6, 1, 1), 0, slice(0, 6)), REGIONS)
    assert found[0, 0, 0] == found[-1, 0, 0] != 0
    assert found[2, 0, 0] == found[3, 0, 0] == 0


def test_the_number_of_channels_is_checked():
    with pytest.raises(ValueError, match="expected 5 logit channels, got 4"):
        segment_slab(slab_of(torch.zeros((4, 3, 3, 3)), (5, 5, 5), 0, slice(0, 5)), LABELS)
