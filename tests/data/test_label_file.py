"""Label maps in files of their own: whole, sliced, and made anew when stale or damaged."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.data.label_file import LabelFile, open_labels, write_labels
from medseg.errors import DatasetError

SHAPE = (37, 52, 23)


@pytest.fixture
def labels():
    return np.random.default_rng(3).integers(0, 7, SHAPE).astype(np.uint8)


@pytest.fixture
def path(tmp_path, labels):
    target = tmp_path / "fold_1/next_stage/second/case_1.b2nd"
    write_labels(target, labels, chunk=(16, 24, 12), made_with="a")
    return target


def test_any_window_comes_back(path, labels):
    found = open_labels(path, "a")
    assert isinstance(found, LabelFile)
    assert (found.shape, found.ndim, found.dtype, found.made_with) == (SHAPE, 3, np.uint8, "a")
    assert found.memory_bytes == labels.nbytes
    np.testing.assert_array_equal(found[...], labels)
    window = (slice(3, 30), slice(20, 52), slice(11, 12))
    np.testing.assert_array_equal(found[window], labels[window])


def test_types_wider_than_a_byte_keep_their_values(tmp_path):
    wide = np.arange(24, dtype=np.uint16).reshape(2, 3, 4) * 1000
    write_labels(tmp_path / "wide.b2nd", wide, chunk=(2, 2, 2), made_with="w")
    found = open_labels(tmp_path / "wide.b2nd", "w")
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found[...], wide)


def test_only_what_was_made_from_the_same_is_opened(path, labels):
    assert open_labels(path, "b") is None
    assert open_labels(path.with_name("case_2.b2nd"), "a") is None
    write_labels(path, labels[::-1].copy(), chunk=(16, 24, 12), made_with="b")
    np.testing.assert_array_equal(open_labels(path, "b")[...], labels[::-1])
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_counts_as_none(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert open_labels(path, "a") is None


def test_damage_found_while_reading_says_what_to_do(path):
    content = bytearray(path.read_bytes())
    content[200:3000] = bytes(2800)
    path.write_bytes(content)
    found = open_labels(path, "a")
    with pytest.raises(DatasetError, match=r"case_1\.b2nd: this label map cannot be read"):
        found[...]


def test_a_write_that_fails_leaves_what_was_there(path, labels, monkeypatch):
    def fail(*_args):
        raise OSError("disk full")

    monkeypatch.setattr("medseg.data.label_file.write_array", fail)
    with pytest.raises(OSError, match="disk full"):
        write_labels(path, labels, chunk=(16, 24, 12), made_with="b")
    np.testing.assert_array_equal(open_labels(path, "a")[...], labels)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
