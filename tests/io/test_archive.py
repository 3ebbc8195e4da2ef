"""Zip archives from strangers: what is in them comes out whole, and nothing else happens."""

from __future__ import annotations

import os
import stat
import struct
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

from medseg.errors import BundleError, MedsegError
from medseg.io import archive as archive_module
from medseg.io.archive import Archive

NOISE = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
FILES = {
    "Task/plans.pkl": b"plans",
    "Task/fold_0/model.bin": NOISE,
    "Task/fold_0/empty": b"",
    "Task/fold_0/log.txt": b"the same line\n" * 9000,
    "read me.txt": b"text",
}


@pytest.fixture
def zipped(tmp_path):
    """A function that packs names (or `ZipInfo`) with their contents."""

    def pack(entries, *, method=zipfile.ZIP_DEFLATED, name="models.zip"):
        path = tmp_path / name
        with zipfile.ZipFile(path, "w", method) as archive:
            for entry, content in entries:
                archive.writestr(entry, content, compress_type=method)
        return path

    return pack


@pytest.fixture
def inside(tmp_path):
    """The folder that files may go to, with neighbours that betray an escape."""
    folder = tmp_path / "a/b/inside"
    folder.mkdir(parents=True)
    return folder


def everything_below(folder):
    return set(folder.rglob("*"))


def entry(name, *, mode=0, is_encrypted=False):
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    info.flag_bits |= is_encrypted
    return info


def patched(path, old, new, count):
    """Change bytes in a file, which has them so many times."""
    content = path.read_bytes()
    assert content.count(old) == count
    path.write_bytes(content.replace(old, new))
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_files_come_out_as_they_went_in(zipped, tmp_path, method):
    path = zipped([("Task/", b""), *FILES.items()], method=method)
    with Archive(path) as archive:
        assert archive.names() == tuple(FILES)
        assert [archive.size(name) for name in FILES] == [len(part) for part in FILES.values()]
        written = archive.extract(FILES, tmp_path / "new/out")
        for name, content in FILES.items():
            assert archive.read(name, len(content)) == content
            with archive.open(name) as file:
                assert b"".join(iter(lambda file=file: file.read(70_000), b"")) == content
    assert written == [tmp_path / "new/out" / name for name in FILES]
    assert [path.read_bytes() for path in written] == list(FILES.values())
    assert {p for p in everything_below(tmp_path / "new/out") if p.is_file()} == set(written)


def test_only_what_is_asked_for_is_unpacked(zipped, inside):
    with Archive(zipped(FILES.items())) as archive:
        archive.extract(["read me.txt"], inside)
        archive.extract(["Task/plans.pkl"], inside)
    assert {p.relative_to(inside).as_posix() for p in everything_below(inside)} == {
        "read me.txt", "Task", "Task/plans.pkl"
    }  # fmt: skip


def test_usual_ways_to_write_a_path_are_one(zipped, inside):
    path = zipped([("./a/./b.txt", b"1"), ("c//d.txt", b"2"), ("e/", b"")])
    with Archive(path) as archive:
        assert archive.names() == ("a/b.txt", "c/d.txt")
        archive.extract(archive.names(), inside)
    assert (inside / "a/b.txt").read_bytes() == b"1"


def test_entries_with_ordinary_attributes_are_files(zipped):
    modes = [0, stat.S_IFREG | 0o644, stat.S_IFREG | 0o4777, 0o600]
    path = zipped([(entry(f"f{n}", mode=mode), b"x") for n, mode in enumerate(modes)])
    with Archive(path) as archive:
        assert len(archive.names()) == 4


def test_where_a_stored_file_lies_is_told(zipped):
    path = zipped(FILES.items(), method=zipfile.ZIP_STORED)
    with Archive(path) as archive, path.open("rb") as file:
        for name, content in FILES.items():
            place = archive.stored_range(name)
            file.seek(place.start)
            assert file.read(place.num_bytes) == content


def test_packed_files_lie_nowhere(zipped):
    with (
        Archive(zipped(FILES.items())) as archive,
        pytest.raises(BundleError, match=r"'read me\.txt' is packed"),
    ):
        archive.stored_range("read me.txt")


def test_unknown_names_are_told(zipped, inside):
    with Archive(zipped(FILES.items())) as archive:
        for use in (
            archive.size,
            archive.open,
            archive.stored_range,
            lambda name: archive.read(name, 9),
            lambda name: archive.extract(["read me.txt", name], inside),
        ):
            with pytest.raises(BundleError, match=r"models\.zip: holds no file 'Task/x'"):
                use("Task/x")
    assert not everything_below(inside)


def test_content_longer_than_asked_for_is_not_read(zipped):
    with (
        Archive(zipped(FILES.items())) as archive,
        pytest.raises(BundleError, match="has 4 bytes; expected at most 3 bytes"),
    ):
        archive.read("read me.txt", 3)


def refused(path, message, folder):
    """Check that an archive is refused, that the message names it, and that nothing is written."""
    before = everything_below(folder)
    with pytest.raises(BundleError, match=message) as caught, Archive(path) as archive:
        archive.extract(archive.names(), folder / "a/b/inside")
    assert str(caught.value).startswith(str(path))
    assert everything_below(folder) == before


NAMES = [
    "../slip.txt",
    "a/../../slip.txt",
    "a/..",
    "..",
    "..\\slip.txt",
    "a\\..\\..\\slip.txt",
    "a\\b.txt",
    "/slip.txt",
    "//server/slip.txt",
    "\\slip.txt",
    "\\\\server\\slip.txt",
    "C:\\slip.txt",
    "c:slip.txt",
    "/etc/passwd",
]


@pytest.mark.parametrize("name", NAMES)
def test_paths_that_lead_out_are_refused(name, zipped, inside, tmp_path):
    path = zipped([("fine.txt", b"fine"), (entry(name), b"slip")])
    refused(path, "a path that leads out of it", tmp_path)


@pytest.mark.parametrize("name", ["../slip/", "/slip/"])
def test_folders_that_lead_out_are_refused(name, zipped, inside, tmp_path):
    refused(zipped([(entry(name), b"")]), "a path that leads out of it", tmp_path)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "a/" + "n" * 256, "\u00e4" * 200])
def test_names_that_no_disk_takes_are_refused(name, zipped, inside, tmp_path):
    refused(zipped([(entry(name), b"x")]), "a path that is no path", tmp_path)


def test_a_name_that_ends_early_is_refused(zipped, inside, tmp_path):
    path = patched(zipped([("fine.txtZ../../x", b"x")]), b"fine.txtZ", b"fine.txt\0", 2)
    refused(path, "a path that leads out of it", tmp_path)


@pytest.mark.parametrize(
    "kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK]
)
def test_links_and_devices_are_refused(kind, zipped, inside, tmp_path):
    """A link, then a file through it: the classical way out."""
    path = zipped([(entry("door", mode=kind | 0o777), b"../.."), ("door/slip.txt", b"slip")])
    refused(path, "a link or a device, 'door'", tmp_path)


def test_encrypted_files_are_refused(zipped, inside, tmp_path):
    path = zipped([("a.txt", b"secret")], method=zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    refused(path, "an encrypted file, 'a.txt'", tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unusual_packing_is_refused(method, zipped, inside, tmp_path):
    refused(zipped([("a.txt", b"a" * 99)], method=method), "packed in an unusual way", tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a/b", "a/b"), "two files named 'a/b'"),
        (("a/b", "./a//b"), "two files named 'a/b'"),
        (("a/b", "A/B"), "two files that some disks take for one"),
        (("stra\u00dfe", "STRASSE"), "two files that some disks take for one"),
        (("\u00e4", "a\u0308"), "two files that some disks take for one"),
        (("a", "a/b"), "a file that is a folder too"),
        (("a/b/c", "A/b"), "a file that is a folder too"),
    ],
)  # fmt: skip
def test_two_files_in_one_place_are_refused(names, message, zipped, inside, tmp_path):
    refused(zipped([(name, b"x") for name in names]), message, tmp_path)


def test_bombs_are_refused_by_their_ratio(zipped, inside, tmp_path, monkeypatch):
    monkeypatch.setattr(archive_module, "_SMALL_ENOUGH", 10**7)
    path = zipped([("bomb.txt", bytes(30_000_000))])
    assert path.stat().st_size < 40_000
    refused(path, r"holds 30 MB in 29\.\d kB", tmp_path)


def test_small_text_may_pack_well_and_weights_may_be_large(zipped, inside, monkeypatch):
    path = zipped([("log.txt", b"a" * 5_000_000), ("w.bin", NOISE)])
    with Archive(path) as archive:
        assert archive.extract(["log.txt"], inside)[0].stat().st_size == 5_000_000
    monkeypatch.setattr(archive_module, "_SMALL_ENOUGH", 10)
    with Archive(zipped([("w.bin", NOISE)])) as archive:
        assert archive.read("w.bin", len(NOISE)) == NOISE


def central_sizes(path, *, packed=None, unpacked=None):
    """Change what the list of files says of the sizes of the first file."""
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\x01\x02")
    for offset, size in ((20, packed), (24, unpacked)):
        if size is not None:
            content[start + offset : start + offset + 4] = struct.pack("<I", size)
    path.write_bytes(content)
    return path


def test_sizes_that_cannot_be_are_refused(zipped, inside, tmp_path):
    """Deflate packs a thousandfold at most."""
    path = central_sizes(zipped([("a.txt", NOISE[:1000])]), unpacked=4 * 10**9)
    refused(path, r"4 GB in .* which cannot be", tmp_path)
    stored = zipped([("a.txt", NOISE[:1000])], method=zipfile.ZIP_STORED)
    refused(central_sizes(stored, unpacked=1001), "which cannot be", tmp_path)


@pytest.mark.parametrize("size", [7, 999, 1001, 10**5, 10**6])
def test_false_sizes_are_found_out(zipped, inside, tmp_path, size):
    path = central_sizes(zipped([("fine", b"x"), ("a.txt", b"ab" * 500)][::-1]), unpacked=size)
    refused(path, "not a whole zip archive", tmp_path)


def test_a_bomb_that_hides_its_size_is_stopped(zipped, inside, tmp_path):
    """It says that it is small; no more than that comes out, and takes no more memory."""
    path = central_sizes(zipped([("a.txt", bytes(50_000_000))]), unpacked=1000)
    tracemalloc.start()
    try:
        refused(path, "not a whole zip archive", tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_large_files_need_little_memory(zipped, inside):
    path = zipped([("a.bin", NOISE * 60)], method=zipfile.ZIP_STORED)
    with Archive(path) as archive:
        tracemalloc.start()
        try:
            archive.extract(["a.bin"], inside)
            assert tracemalloc.get_traced_memory()[1] < 8 * 10**6
        finally:
            tracemalloc.stop()


def test_entries_in_one_another_are_refused(zipped, inside, tmp_path):
    """Many entries that share the same packed bytes: a bomb without layers."""
    path = zipped([("a.txt", NOISE[:1000]), ("b.txt", NOISE[1000:2000])])
    content = bytearray(path.read_bytes())
    second = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)
    content[second + 42 : second + 46] = struct.pack("<I", 0)
    path.write_bytes(content)
    refused(path, "entries that lie in one another", tmp_path)


def test_entries_that_reach_into_the_list_are_refused(zipped, inside, tmp_path):
    path = zipped([("a.txt", NOISE[:1000])], method=zipfile.ZIP_STORED)
    refused(central_sizes(path, packed=1100, unpacked=1100), "not a whole zip archive", tmp_path)


def test_too_many_entries_are_refused(zipped, inside, tmp_path, monkeypatch):
    path = zipped([(f"{n}.txt", b"x") for n in range(21)])
    monkeypatch.setattr(archive_module, "_MAX_ENTRIES", 20)
    refused(path, "21 entries", tmp_path)


def test_a_huge_list_of_files_is_not_even_read(zipped, inside, tmp_path, monkeypatch):
    monkeypatch.setattr(archive_module, "_MAX_ENTRIES", 20)
    name = "n" * 60_000
    path = zipped([(f"{name}{n}", b"") for n in range(40)], method=zipfile.ZIP_STORED)
    refused(path, "its list of files is too long", tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive", b"\x1f\x8b" + bytes(90)])
def test_other_files_are_refused(content, inside, tmp_path):
    path = tmp_path / "x.zip"
    path.write_bytes(content)
    refused(path, r"not a whole zip archive .* Copy or download it again", tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(BundleError, match=r"x\.zip: No such file"):
        Archive(tmp_path / "x.zip")


def test_every_cut_is_noticed(zipped, inside, tmp_path):
    path = zipped([("a/b.txt", b"b" * 50), ("c", NOISE[:9])])
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(path, "not a whole zip archive", tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_in_a_file_takes_back_all_that_was_unpacked(zipped, inside, tmp_path, method):
    path = zipped([("x/fine.txt", b"fine"), ("x/y/a.bin", NOISE)], method=method)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    refused(path, "not a whole zip archive", tmp_path)
    with Archive(path) as archive, archive.open("x/y/a.bin") as file, pytest.raises(BundleError):
        file.read()


def test_what_is_there_is_not_replaced(zipped, inside):
    (inside / "x").mkdir()
    (inside / "x/b.txt").write_bytes(b"mine")
    before = everything_below(inside)
    with (
        Archive(zipped([("a/a.txt", b"a"), ("x/b.txt", b"b"), ("x/c.txt", b"c")])) as archive,
        pytest.raises(BundleError, match=r"b\.txt: is there already"),
    ):
        archive.extract(archive.names(), inside)
    assert everything_below(inside) == before
    assert (inside / "x/b.txt").read_bytes() == b"mine"


def test_a_full_disk_is_told_before_anything_is_written(zipped, inside, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(archive_module.shutil, "disk_usage", lambda _: usage)
    with (
        Archive(zipped(FILES.items())) as archive,
        pytest.raises(BundleError, match=r"unpacks to 426 kB, but .*new has 1 kB left"),
    ):
        archive.extract(archive.names(), inside / "new")
    assert not everything_below(inside)


def test_an_interruption_leaves_nothing(zipped, inside, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with Archive(zipped(FILES.items())) as archive:
        made = archive.extract(["Task/plans.pkl"], inside)
        monkeypatch.setattr(zipfile.ZipExtFile, "read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            archive.extract(["Task/fold_0/log.txt"], inside)
    assert [path for path in everything_below(inside) if path.is_file()] == made
    assert not (inside / "Task/fold_0").exists()


def test_errors_of_the_caller_stay_theirs(zipped):
    """What goes wrong beside the reading is not called a damaged archive."""
    with (
        Archive(zipped(FILES.items())) as archive,
        archive.open("read me.txt") as file,
        pytest.raises(ValueError, match="invalid literal"),
    ):
        int(file.read())


def test_damage_anywhere_is_the_same_content_or_one_error(zipped, tmp_path):
    """Whatever bytes are changed, and nothing is written outside the folder."""
    files = {"a/b.txt": b"b" * 200, "c.bin": NOISE[:150], "a/d.txt": b"text"}
    path = zipped(files.items())
    content = path.read_bytes()
    rng = np.random.default_rng(7)
    folder = tmp_path / "one/two/out"
    num_refused = 0
    for number in range(250):
        copy = bytearray(content)
        for position in rng.integers(0, len(copy), rng.integers(1, 4)):
            copy[position] = rng.integers(0, 256)
        path.write_bytes(copy)
        target = folder / str(number)
        try:
            with Archive(path) as archive:
                written = archive.extract(archive.names(), target)
            assert {file.read_bytes() for file in written} <= set(files.values())
            assert all(target in file.parents for file in written)
        except MedsegError:
            num_refused += 1
            assert not target.exists()
    assert 40 < num_refused < 250
    assert {p.name for p in (tmp_path / "one").iterdir()} <= {"two"}


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_in_the_folder_are_not_followed_to_files(zipped, inside, tmp_path):
    outside = tmp_path / "outside.txt"
    (inside / "a.txt").symlink_to(outside)
    with (
        Archive(zipped([("a.txt", b"x")])) as archive,
        pytest.raises(BundleError, match="is there already"),
    ):
        archive.extract(["a.txt"], inside)
    assert not outside.exists()


def test_files_of_more_than_4_gigabytes_are_understood(tmp_path):
    """The list of such archives has longer fields; here they are only said to be needed."""
    path = tmp_path / "x.zip"
    with (
        zipfile.ZipFile(path, "w") as archive,
        archive.open("a.bin", "w", force_zip64=True) as file,
    ):
        file.write(NOISE)
    with Archive(path) as archive:
        assert archive.read("a.bin", len(NOISE)) == NOISE
        assert archive.stored_range("a.bin").num_bytes == len(NOISE)


def test_something_in_front_does_not_matter(zipped):
    path = zipped(FILES.items(), method=zipfile.ZIP_STORED)
    path.write_bytes(b"#!/bin/sh\n" + os.urandom(50) + path.read_bytes())
    with Archive(path) as archive:
        assert archive.read("read me.txt", 4) == b"text"
        place = archive.stored_range("read me.txt")
    assert path.read_bytes()[place.start :][: place.num_bytes] == b"text"
