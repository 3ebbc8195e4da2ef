"""Archives from strangers: nothing leaves the folder, nothing grows without end."""

from __future__ import annotations

import os
import stat
import struct
import zipfile

import pytest

from medseg.serve.archives import unpack
from medseg.serve.limits import Limits, Refusal

LIMITS = Limits(max_upload_bytes=10_000_000, max_disk_bytes=100_000_000, max_entries=20)


@pytest.fixture
def inside(tmp_path):
    """The folder that files may go to, with neighbours that betray an escape."""
    folder = tmp_path / "a/b/inside"
    folder.mkdir(parents=True)
    return folder


def run(archive, folder, limits=LIMITS, place=None):
    taken = []
    count = unpack(archive, place or (lambda _: folder), limits=limits, take=taken.append)
    return count, sum(taken)


def everything_below(tmp_path):
    return {path for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()}


def entry(name, *, mode=0, system=3):
    info = zipfile.ZipInfo(name)
    info.create_system = system
    info.external_attr = mode << 16
    return info


def test_files_get_names_of_ours_and_keep_their_content(zipped, inside):
    contents = {"S1/x.dcm": b"one", "S1/./y": b"two", "z; rm -rf.exe": b"three"}
    archive = zipped([("S1/", b""), *contents.items()])
    assert run(archive, inside) == (3, 11)
    found = {path.name: path.read_bytes() for path in inside.iterdir()}
    assert found == {"000001.dcm": b"one", "000002.dcm": b"two", "000003.dcm": b"three"}


def test_what_systems_add_is_passed_over(zipped, inside):
    names = ["__MACOSX/S/._a.dcm", ".DS_Store", "S/Thumbs.db", "S/DICOMDIR", "S/.hidden/a", "S/a"]
    assert run(zipped([(name, b"x") for name in names]), inside)[0] == 1


def test_folders_choose_the_place(zipped, inside, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    places = {"T1w": inside, "CT": other}

    def place(folders):
        return next((places[name] for name in folders if name in places), None)

    archive = zipped([("p/T1w/1", b"a"), ("p/CT/1", b"b"), ("p/scout/1", b"c")])
    assert run(archive, inside, place=place)[0] == 2
    assert [p.read_bytes() for p in (*inside.iterdir(), *other.iterdir())] == [b"a", b"b"]


@pytest.mark.parametrize(
    "name",
    [
        "../slip.dcm",
        "a/../../slip.dcm",
        "..\\slip.dcm",
        "a\\..\\..\\slip.dcm",
        "/slip.dcm",
        "//server/slip.dcm",
        "\\slip.dcm",
        "C:\\slip.dcm",
        "c:slip.dcm",
        "/etc/passwd",
    ],
)
def test_paths_that_lead_out_are_refused(name, zipped, inside, tmp_path):
    archive = zipped([("fine.dcm", b"fine"), (entry(name), b"slip")])
    before = everything_below(tmp_path)
    with pytest.raises(Refusal, match="a path that leads out of the archive"):
        run(archive, inside)
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices_are_refused(kind, zipped, inside, tmp_path):
    """A link, then a file through it: the classical way out."""
    archive = zipped([(entry("door", mode=kind | 0o777), b"../.."), ("door/slip.dcm", b"slip")])
    before = everything_below(tmp_path)
    with pytest.raises(Refusal, match="a link or a device"):
        run(archive, inside)
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("name", ["inner.zip", "INNER.ZIP", "inner.dcm"])
def test_archives_in_archives_are_refused(name, zipped, inside):
    inner = zipped([("a.dcm", b"a")], name="inner.zip").read_bytes()
    with pytest.raises(Refusal, match="another archive"):
        run(zipped([(name, inner)]), inside)


def test_bomb_is_refused_by_its_ratio_before_it_is_unpacked(zipped, inside):
    archive = zipped([("bomb.dcm", bytes(30_000_000))])
    assert archive.stat().st_size < 40_000
    with pytest.raises(Refusal, match=r"expected at most 100 times its size") as caught:
        run(archive, inside)
    assert caught.value.status == 413
    assert not list(inside.iterdir())


def test_content_larger_than_accepted_is_refused(zipped, inside, changed):
    limits = changed(LIMITS, max_upload_bytes=1000)
    archive = zipped([("a.dcm", os.urandom(2500)), ("b.dcm", os.urandom(2500))])
    assert limits.max_unpacked_bytes == 4000
    with pytest.raises(Refusal, match="holds more than is accepted"):
        run(archive, inside, limits)
    assert not list(inside.iterdir())


def test_lies_about_the_size_are_found_out(zipped, inside):
    """The size in the header is made small; what comes out is counted, and does not fit it."""
    archive = zipped([("a.dcm", os.urandom(300_000))])
    raw = archive.read_bytes()
    assert raw.count(struct.pack("<I", 300_000)) == 2
    archive.write_bytes(raw.replace(struct.pack("<I", 300_000), struct.pack("<I", 7)))
    with pytest.raises(Refusal, match="is damaged"):
        run(archive, inside)
    assert sum(path.stat().st_size for path in inside.iterdir()) <= 7


def test_too_many_entries_are_refused(zipped, inside):
    archive = zipped([(f"{n}.dcm", b"x") for n in range(21)])
    with pytest.raises(Refusal, match="too many files"):
        run(archive, inside)


def test_a_huge_directory_is_not_even_read(zipped, inside):
    """The list of entries itself may be gigabytes; it is refused by the length it claims."""
    name = "n" * 60_000
    archive = zipped([(f"{name}{n}", b"") for n in range(40)], method=zipfile.ZIP_STORED)
    with pytest.raises(Refusal, match="too many files"):
        run(archive, inside)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unusual_packing_is_refused(method, zipped, inside):
    with pytest.raises(Refusal, match="packed in an unusual way"):
        run(zipped([("a.dcm", b"a" * 100)], method=method), inside)


def test_encrypted_files_are_refused(zipped, inside):
    archive = zipped([("a.dcm", b"a")], method=zipfile.ZIP_STORED)
    raw = bytearray(archive.read_bytes())
    raw[raw.index(b"PK\x03\x04") + 6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(raw)
    with pytest.raises(Refusal, match="an encrypted file"):
        run(archive, inside)


@pytest.mark.parametrize("damage", ["garbage", "cut", "flipped", "empty"])
def test_damaged_archives_are_refused_in_words(damage, zipped, inside):
    archive = zipped([("a.dcm", os.urandom(5000))])
    raw = bytearray(archive.read_bytes())
    if damage == "flipped":
        raw[2000] ^= 255
    parts = {"garbage": os.urandom(999), "cut": raw[:3000], "flipped": raw, "empty": b""}
    archive.write_bytes(parts[damage])
    with pytest.raises(Refusal, match="the zip archive is damaged") as caught:
        run(archive, inside)
    assert str(inside.parent) not in str(caught.value)


def test_disk_budget_stops_the_unpacking(zipped, inside):
    def full(num_bytes):
        raise Refusal(507, "full")

    with pytest.raises(Refusal, match="full"):
        unpack(zipped([("a", b"abc")]), lambda _: inside, limits=LIMITS, take=full)
    assert sum(path.stat().st_size for path in inside.iterdir()) == 0


def test_refusals_survive_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(Refusal(429, "words", 7)))
    assert (error.status, str(error), error.retry_after) == (429, "words", 7)
