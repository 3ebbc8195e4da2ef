"""A store entry in memory whose voxels say where they are."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.data.lesions import find_lesions
from medseg.data.locations import sample_locations
from medseg.data.store import Entry
from medseg.geometry import SpatialRecord


def make_record(shape):
    return SpatialRecord(
        shape_image=(shape[1], shape[2], shape[0]),
        affine_image=tuple(tuple(float(v) for v in row) for row in np.diag([1.5, 2.0, 3.0, 1])),
        axes=(2, 0, 1),
        flips=(True, False, False),
        box=tuple((0, length) for length in shape),
        spacing_cropped=(3.0, 1.5, 2.0),
        shape_network=shape,
        spacing_network=(3.0, 1.5, 2.0),
    )


def make_entry(shape=(9, 14, 11), *, seed=0, labels=None, has_outside=True):
    """Return an entry whose first channel numbers the voxels (from 1) in C order."""
    rng = np.random.default_rng(seed)
    number = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    noise = rng.normal(size=shape).astype(np.float16)  # what the store keeps exactly
    image = np.stack([number, noise.astype(np.float32)])
    if labels is None:
        labels = np.zeros(shape, np.uint8)
        labels[5:7, 8:12, 3:5] = 1
        labels[3:5, 4, 6:9] = 3
    outside = None
    if has_outside:
        outside = np.zeros(shape, bool)
        outside[:, :2] = True
    locations = sample_locations(labels)
    return Entry(
        image=image,
        segmentation=labels,
        outside=outside,
        locations=locations,
        lesions=find_lesions(labels, locations, locations),
        record=make_record(shape),
    )


class Make:
    """The functions above, within reach of every test."""

    record = staticmethod(make_record)
    entry = staticmethod(make_entry)


@pytest.fixture(scope="session")
def make():
    return Make
