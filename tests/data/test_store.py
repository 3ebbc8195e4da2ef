"""The store: what goes in comes out, whole or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.data import store as store_module
from medseg.data.store import ANNOTATED, CaseStore, digest, hash_files, sample_locations
from medseg.errors import DatasetError

KEY = "ab" + "0" * 30


def put(store, entry, key=KEY, chunk=(4, 5, 6)):
    store.put(
        key,
        image=entry.image,
        segmentation=entry.segmentation,
        outside=entry.outside,
        record=entry.record,
        chunk=chunk,
    )


@pytest.mark.parametrize("has_outside", [True, False])
@pytest.mark.parametrize("chunk", [(4, 5, 6), (1, 14, 11), (64, 64, 64)])
def test_an_entry_comes_out_as_it_went_in(tmp_path, make, chunk, has_outside):
    entry, store = make.entry(has_outside=has_outside), CaseStore(tmp_path / "store")
    put(store, entry, chunk=chunk)
    found = store.open(KEY)
    assert found.shape == (9, 14, 11)
    assert found.record == entry.record
    np.testing.assert_array_equal(found.image[...], entry.image)
    np.testing.assert_array_equal(found.segmentation[2:7, 3:], entry.segmentation[2:7, 3:])
    assert found.segmentation[...].dtype == np.uint8
    if has_outside:
        np.testing.assert_array_equal(found.outside[...], entry.outside)
    else:
        assert found.outside is None
    loaded = found.loaded()
    assert isinstance(loaded.image, np.ndarray)
    np.testing.assert_array_equal(loaded.image, entry.image)
    arrays = [entry.image, entry.segmentation, *([entry.outside] if has_outside else [])]
    assert found.memory_bytes == loaded.memory_bytes == sum(array.nbytes for array in arrays)


def test_locations_are_voxels_of_their_label(tmp_path, make):
    entry, store = make.entry(), CaseStore(tmp_path)
    put(store, entry)
    locations = store.open(KEY).locations
    assert sorted(locations) == [1, 3]
    for label, voxels in locations.items():
        assert voxels.dtype == np.int32
        expected = np.argwhere(entry.segmentation == label)  # few enough: all of them
        assert {tuple(v) for v in voxels} == {tuple(v) for v in expected}


def test_many_locations_are_a_sample_without_repeats():
    segmentation = np.zeros((30, 40, 50), np.uint16)
    segmentation[:, :30] = 300
    locations = sample_locations(segmentation)
    assert list(locations) == [300]
    assert len(locations[300]) == 10_000
    assert len(np.unique(locations[300], axis=0)) == 10_000
    assert (segmentation[tuple(locations[300].T)] == 300).all()
    np.testing.assert_array_equal(sample_locations(segmentation)[300], locations[300])


def test_a_failed_write_leaves_nothing(tmp_path, make, monkeypatch):
    store = CaseStore(tmp_path)

    def full(path, values):
        raise OSError("no space left on device")

    monkeypatch.setattr(store_module, "write_json", full)
    with pytest.raises(OSError, match="no space"):
        put(store, make.entry())
    assert not store.has(KEY)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_entry_another_process_finished_first_is_kept(tmp_path, make):
    store = CaseStore(tmp_path)
    put(store, make.entry(seed=0))
    put(store, make.entry(seed=1))
    np.testing.assert_array_equal(store.open(KEY).image[...], make.entry(seed=0).image)
    assert [path.name for path in (tmp_path / "entries/ab").iterdir()] == [KEY]


@pytest.mark.parametrize("file", ["entry.json", "locations.npz", "image.b2nd"])
@pytest.mark.parametrize("damage", ["remove", "empty", "cut"])
def test_a_damaged_entry_is_one_clear_error(tmp_path, make, file, damage):
    store = CaseStore(tmp_path)
    put(store, make.entry())
    path = tmp_path / "entries/ab" / KEY / file
    content = path.read_bytes()
    path.unlink()
    if damage != "remove":
        path.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    with pytest.raises(DatasetError, match="cannot be read") as caught:
        store.open(KEY).loaded()
    assert KEY in str(caught.value)
    assert "medseg preprocess" in str(caught.value)


def test_index(tmp_path):
    store = CaseStore(tmp_path)
    with pytest.raises(DatasetError, match=r"configuration '2d' of plans 'own'.*preprocess"):
        store.read_index("own__2d", "made")
    store.write_index("own__2d", {"b": "2", "a": "1"}, "made")
    assert list(store.read_index("own__2d", "made").items()) == [("a", "1"), ("b", "2")]


def test_key_depends_on_content_and_parameters_only(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc")
    two.write_bytes(b"def")
    content = hash_files([one, two])
    assert content != hash_files([two, one])
    (tmp_path / "three").write_bytes(b"abcdef")
    assert content != hash_files([tmp_path / "three"])
    key = digest([content, {"spacing": (1.0, 2.0), "version": 1}])
    assert key == digest([content, {"version": 1, "spacing": [1.0, 2.0]}])
    assert key != digest([content, {"version": 2, "spacing": (1.0, 2.0)}])
    assert len(key) == 32


def test_index_of_other_plans_is_refused(tmp_path):
    store = CaseStore(tmp_path)
    store.write_index("own__2d", {"a": "1"}, "made with these plans")
    with pytest.raises(DatasetError, match="preprocessed for other plans"):
        store.read_index("own__2d", "made with others")


def test_annotated_voxels_are_located_where_there_is_an_ignore_label():
    segmentation = np.full((3, 4, 5), 2, np.uint8)
    segmentation[0, 1, 2], segmentation[2, 3, 4] = 0, 1
    locations = sample_locations(segmentation, ignore_label=2)
    assert set(locations) == {1, ANNOTATED}
    assert locations[ANNOTATED].tolist() == [[0, 1, 2], [2, 3, 4]]
    assert ANNOTATED not in sample_locations(segmentation)
