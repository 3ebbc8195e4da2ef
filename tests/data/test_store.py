"""The store: what goes in comes out, whole or not at all."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from medseg.data import locations as locations_module
from medseg.data import store as store_module
from medseg.data.locations import ANNOTATED, sample_locations
from medseg.data.patches import cut
from medseg.data.store import CaseStore, digest, storage_type
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
    half = entry.image.nbytes // 2  # the image is stored as float16
    assert found.memory_bytes == loaded.memory_bytes == sum(a.nbytes for a in arrays) - half


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

    def full(values):
        raise OSError("no space left on device")

    monkeypatch.setattr(store_module, "format_json", full)
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


@pytest.mark.parametrize("file", ["locations.npz", "image.b2nd", "segmentation.b2nd"])
@pytest.mark.parametrize("damage", ["remove", "empty", "cut", "grow"])
def test_an_entry_with_a_file_of_another_size_is_not_there_and_is_replaced(
    tmp_path, make, file, damage
):
    """As a power cut may leave it."""
    store = CaseStore(tmp_path)
    put(store, make.entry(seed=0))
    assert store.has(KEY)
    path = tmp_path / "entries/ab" / KEY / file
    content = path.read_bytes()
    path.unlink()
    kept = {"empty": b"", "cut": content[: len(content) // 2], "grow": content + b"x"}
    if damage != "remove":
        path.write_bytes(kept[damage])
    assert not store.has(KEY)
    with pytest.raises(DatasetError, match=f"cannot be read .*{file}"):
        store.open(KEY)
    put(store, make.entry(seed=1))
    assert store.has(KEY)
    np.testing.assert_array_equal(store.open(KEY).image[...], make.entry(seed=1).image)
    assert [path.name for path in (tmp_path / "entries/ab").iterdir()] == [KEY]


def test_several_that_replace_a_damaged_entry_at_once_leave_one(tmp_path, make):
    store, entry = CaseStore(tmp_path), make.entry()
    for _ in range(5):
        put(store, entry)
        (tmp_path / "entries/ab" / KEY / "image.b2nd").write_bytes(b"")
        with ThreadPoolExecutor(6) as pool:
            for done in [pool.submit(put, store, entry) for _ in range(6)]:
                done.result()
        assert store.has(KEY)
        np.testing.assert_array_equal(store.open(KEY).image[...], entry.image)
        assert [path.name for path in (tmp_path / "entries/ab").iterdir()] == [KEY]


@pytest.mark.parametrize("text", ["", "[1, 2", "[]", "{}", '{"files": 3}', '{"files": {"a": "b"}}'])
def test_an_entry_whose_record_says_nothing_is_not_there_and_is_replaced(tmp_path, make, text):
    store = CaseStore(tmp_path)
    put(store, make.entry())
    path = tmp_path / "entries/ab" / KEY / "entry.json"
    path.write_text(text)
    assert not store.has(KEY)
    put(store, make.entry())
    assert store.open(KEY).record == make.entry().record


def overwrite(path, number, seed):
    """Write noise over a part of a file, whose size stays."""
    content, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
    start = int(rng.integers(len(content) - number))
    content[start : start + number] = rng.bytes(number)
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["image", "segmentation"])
def test_overwritten_bytes_are_a_clear_error_or_go_unseen(tmp_path, make, file):
    """Headers, tables and compressed blocks; voxels that are stored as they are have no sum."""
    store, shape = CaseStore(tmp_path), (20, 30, 26)
    put(store, make.entry(shape), chunk=(8, 8, 8))
    path = tmp_path / "entries/ab" / KEY / f"{file}.b2nd"
    whole, errors = path.read_bytes(), []
    for seed in range(60):
        path.write_bytes(whole)
        overwrite(path, 64, seed)
        try:
            entry = store.open(KEY)
            entry.loaded()
            array = getattr(entry, file)
            assert array[..., 3:7, :5, :4].shape[-3:] == (4, 5, 4)
        except DatasetError as error:
            errors.append(str(error))
    assert errors
    assert all(KEY in text and "Delete this folder" in text for text in errors)


def test_overwritten_bytes_are_named_where_a_patch_is_cut(tmp_path, make):
    store = CaseStore(tmp_path)
    put(store, make.entry())
    path = tmp_path / "entries/ab" / KEY / "segmentation.b2nd"
    content = path.read_bytes()
    start = content.index(bytes.fromhex("28b52ffd"))  # a block that Zstandard packed
    path.write_bytes(content[:start] + bytes(8) + content[start + 8 :])
    assert store.has(KEY)
    array = store.open(KEY).segmentation
    with pytest.raises(DatasetError, match=r"segmentation\.b2nd.*medseg preprocess"):
        cut(array, [-1, 2, 3], [9, 5, 5])


def test_arrays_on_disk_tell_their_form_without_being_read(tmp_path, make):
    store, entry = CaseStore(tmp_path), make.entry()
    put(store, entry)
    found = store.open(KEY)
    assert (found.image.shape, found.image.ndim, found.image.dtype) == (
        (2, 9, 14, 11),
        4,
        "float16",
    )
    assert (found.outside.shape, found.outside.dtype) == ((9, 14, 11), bool)
    for start, size in (([2, -3, 4], [3, 8, 20]), ([0, 0, 0], [9, 14, 11])):
        np.testing.assert_array_equal(cut(found.image, start, size), cut(entry.image, start, size))


def test_index(tmp_path):
    store = CaseStore(tmp_path)
    with pytest.raises(DatasetError, match=r"configuration '2d' of plans 'own'.*preprocess"):
        store.read_index("own__2d", "made")
    store.write_index("own__2d", {"b": "2", "a": "1"}, "made")
    assert list(store.read_index("own__2d", "made").items()) == [("a", "1"), ("b", "2")]


def test_key_depends_on_values_only():
    key = digest([["a", "b"], {"spacing": (1.0, 2.0), "version": 1}])
    assert key == digest([["a", "b"], {"version": 1, "spacing": [1.0, 2.0]}])
    assert key != digest([["a", "b"], {"version": 2, "spacing": (1.0, 2.0)}])
    assert key != digest([["b", "a"], {"spacing": (1.0, 2.0), "version": 1}])
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


def slow_type(image):
    """The rule, voxel by voxel."""
    for channel in image.astype(np.float64):
        with np.errstate(over="ignore"):
            half = channel.astype(np.float16).astype(np.float64)
        apart = np.nan_to_num(np.abs(channel - half), posinf=np.inf).max()
        if np.abs(channel).max() > 6e4 or apart > 1e-3 * channel.std():
            return np.float32
    return np.float16


def images():
    rng = np.random.default_rng(3)
    normal = rng.normal(size=(2, 7, 9, 11)).astype(np.float32)
    yield "within two deviations", np.clip(normal, -1.9, 1.9)
    yield "a bright voxel", np.where(normal == normal.max(), np.float32(9.37), normal)
    yield (
        "a bright voxel that is a half",
        np.where(normal > 2, np.float32(8), np.clip(normal, -2, 2)),
    )
    yield "small steps on a large value", 1000 + np.clip(normal, -1, 1)
    yield "beyond the range of halves", normal * 40000
    yield "integers", np.rint(normal * 300)
    yield "one channel is harder", np.stack([np.clip(normal[0], -1, 1), normal[1] + 500])
    yield "constant", np.full((1, 3, 4, 5), 0.1, np.float32)
    yield "nothing but zeros", np.zeros((1, 3, 4, 5), np.float32)


@pytest.mark.parametrize(("name", "image"), list(images()))
def test_images_are_stored_in_half_the_space_where_that_keeps_them(tmp_path, make, name, image):
    assert storage_type(image) is slow_type(image), name


def test_both_types_occur_among_the_examples():
    assert {storage_type(image) for _, image in images()} == {np.float16, np.float32}


def test_a_stored_image_is_within_a_thousandth_of_a_deviation(tmp_path, make):
    rng = np.random.default_rng(8)
    entry, store = make.entry(), CaseStore(tmp_path)
    for number, scale in enumerate((0.3, 1.0, 30.0, 3e4)):
        key = f"{number:02d}" + "0" * 30
        image = rng.normal(scale * number, scale, size=entry.image.shape).astype(np.float32)
        store.put(
            key,
            image=image,
            segmentation=entry.segmentation,
            outside=None,
            record=entry.record,
            chunk=(4, 5, 6),
        )
        apart = np.abs(store.open(key).image[...].astype(np.float64) - image).max()
        assert apart <= 1e-3 * image[0].std()


def slow_locations(segmentation, ignore_label=None):
    """All voxels of a label at once, and a choice of them."""
    rng = np.random.default_rng(1234)
    groups = {int(v): segmentation == v for v in np.unique(segmentation) if v != ignore_label}
    groups.pop(0, None)
    if ignore_label is not None:
        groups[ANNOTATED] = segmentation != ignore_label
    found = {}
    for label, mask in groups.items():
        voxels = np.argwhere(mask)
        count = min(len(voxels), max(10_000, -(-len(voxels) // 100)))
        found[label] = voxels[np.sort(rng.choice(len(voxels), count, replace=False))]
    return found


@pytest.mark.parametrize("ignore_label", [None, 330])
@pytest.mark.parametrize("step", [1, 11])
def test_locations_are_those_of_the_slow_way(monkeypatch, step, ignore_label):
    """Looked for part by part; parts end in the middle of a label."""
    monkeypatch.setattr(locations_module, "_PART", 5000)
    rng = np.random.default_rng(2)
    segmentation = (rng.integers(0, 31, size=(29, 32, 37)) * step).astype(np.uint16)
    segmentation[20:] = 3 * step  # a large label, of which a sample is taken
    found, expected = (
        function(segmentation, ignore_label) for function in (sample_locations, slow_locations)
    )
    assert list(found) == list(expected)
    for label, voxels in found.items():
        np.testing.assert_array_equal(voxels, expected[label])


def test_leftovers_of_killed_runs_are_swept_up(tmp_path, make):
    """Only old ones: another run may be writing a new one."""
    store = CaseStore(tmp_path)
    put(store, make.entry())
    old, new = (tmp_path / f"entries/ab/.{KEY}.{name}.part" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir()
        (folder / "image.b2nd").write_bytes(b"half")
    os.utime(old, (1, 1))
    store.sweep()
    assert not old.exists()
    assert new.exists()
    assert store.has(KEY)
