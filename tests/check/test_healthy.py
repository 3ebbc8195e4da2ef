"""Healthy data raise no alarm; what is known of real data is found."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from medseg.check.case import inspect_case
from medseg.data.case import load_case
from medseg.data.dataset import scan_dataset
from medseg.geometry import reorient
from medseg.io.image import Header
from medseg.io.read import read_segmentation, read_stored
from medseg.io.write import write_image
from tests.check.conftest import look

DATA = Path(__file__).parents[3] / "shared/data"


def test_healthy_dataset_is_silent(healthy):
    assert look(healthy)[2] == []


def test_facts_are_those_of_the_files(healthy):
    """Statistics, counts, shape and spacing against plain numpy on whole arrays."""
    spec, facts, _ = look(healthy)
    for case, entry in facts.items():
        loaded = load_case(spec, case)
        assert entry.shape == loaded.grid.shape
        assert entry.spacing == pytest.approx(loaded.grid.spacing)
        assert entry.orientation == "RAS"
        for channel, found in zip(loaded.channels, entry.channels, strict=True):
            assert (found.min, found.max) == (channel.min(), channel.max())
            exact = channel.astype(np.float64)
            assert found.mean == pytest.approx(exact.mean(), rel=1e-12)
            assert found.std == pytest.approx(exact.std(), rel=1e-9)
            assert found.median == np.median(channel)
        labels = read_segmentation(healthy / f"labelsTr/{case}.nii.gz").array
        assert entry.labels == {v: int((labels == v).sum()) for v in (0, 1, 2)}
        assert [file.path for file in entry.files] == [
            f"imagesTr/{case}_0000.nii.gz",
            f"imagesTr/{case}_0001.nii.gz",
            f"labelsTr/{case}.nii.gz",
        ]
        assert all(
            file.stamps[0][0] == (healthy / file.path).stat().st_size
            and file.stamps[0][1] == (healthy / file.path).stat().st_mtime_ns
            for file in entry.files
        )


def test_inspected_case_is_the_loaded_case(healthy):
    """Callers need not read again: arrays, types, memory order, grid and header are equal."""
    spec, _ = scan_dataset(healthy)
    for case in spec.cases:
        ours, theirs = inspect_case(spec, case).case, load_case(spec, case)
        np.testing.assert_array_equal(ours.channels, theirs.channels)
        np.testing.assert_array_equal(ours.segmentation, theirs.segmentation)
        assert ours.channels.strides == theirs.channels.strides
        assert (ours.channels.dtype, ours.segmentation.dtype) == (np.float32, np.uint8)
        assert ours.segmentation.dtype == theirs.segmentation.dtype
        np.testing.assert_array_equal(ours.grid.affine, theirs.grid.affine)
        assert ours.header == theirs.header


def test_all_48_orientations_mixed_are_silent(tmp_path, datasets):
    """Where no orientation is usual none is unusual."""
    folder = datasets.write(tmp_path / "Dataset048_Turned", num_cases=48)
    ways = itertools.product(
        itertools.permutations(range(3)), itertools.product((False, True), repeat=3)
    )
    for number, (axes, flips) in enumerate(ways, start=1):
        for path in sorted(folder.glob(f"*Tr/case_{number}[._]*")):
            stored = read_stored(path)
            array = np.flip(stored.array.transpose(axes), tuple(np.flatnonzero(flips)))
            header = Header.of_grid(reorient(stored.header.grid, axes, flips))
            write_image(path, np.ascontiguousarray(array), header)
    _, facts, problems = look(folder)
    assert len({entry.orientation for entry in facts.values()}) == 48
    assert problems == []


@pytest.mark.parametrize("kind", ["<i2", "<u2", "<f8", "<i4"])
def test_other_types_of_images_within_a_dataset_are_silent(raw, kind):
    raw.change(raw.channel(), lambda values: np.rint(values).astype(kind))
    assert look(raw.folder)[2] == []


def test_rounding_of_32_bit_headers_is_silent(raw):
    """A quaternion in 32 bits moves the corners by less than anyone needs to know."""
    path = raw.segmentation()
    raw.patch(path, 254, "<h", 0)
    assert look(raw.folder)[2] == []
    image, labels = (read_stored(p).header.affine for p in (raw.channel(), path))
    assert image != labels


def test_case_without_one_of_the_labels_is_silent(raw):
    raw.change(raw.segmentation(), lambda values: np.minimum(values, 1))
    assert look(raw.folder)[2] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Task04_Hippocampus", {("float-label", "hippocampus_243")}),
        ("sunnybrook_sax3d", set()),
        ("nuclei_he_rgb", set()),
        ("openms_3ch_brain", {("same-patient", None)}),
    ],
)
def test_real_data_raise_no_false_alarm(name, expected):
    """What is said of them is true: one float label map, two patients with two studies each."""
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not there")
    _, _, problems = look(DATA / name)
    assert {(problem.code, problem.case) for problem in problems} == expected
