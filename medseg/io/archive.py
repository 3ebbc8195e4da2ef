"""Zip archives from strangers: nothing leaves the folder, nothing grows without end."""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from medseg.errors import BundleError
from medseg.execute.sizes import size_words

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BLOCK = 2**20
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_IS_ENCRYPTED = 1
_MAX_ENTRIES = 200_000
_DIRECTORY_BYTES_PER_ENTRY = 512
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_MAGIC = b"PK\x03\x04"
_DEFLATE_AT_MOST = 1040
"""How many bytes one byte of deflate can hold; a declared size beyond it is a lie."""
_SMALL_ENOUGH = 2**30
"""Below so many bytes any ratio of packing is harmless: logs and empty label maps pack well."""
_MAX_RATIO = 100
_MAX_NAME_BYTES = 255
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError, NotImplementedError,
    RuntimeError, OverflowError,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRange:
    """Where a file that is not packed lies in the archive."""

    start: int
    """First byte."""
    num_bytes: int
    """Length."""
    crc: int
    """Checksum (CRC-32); 0: none was written."""


class TooLong(ValueError):
    """An archive's list of its files is longer than is sensible."""


class ShortReads(io.FileIO):
    """A file that is never read in large pieces, whatever length its own content asks for."""

    def __init__(self, path: Path, max_entries: int) -> None:
        """Open an archive whose list of so many files is still sensible."""
        super().__init__(path)
        self._longest = max(max_entries * _DIRECTORY_BYTES_PER_ENTRY, _BLOCK)

    def read(self, size: int | None = -1, /) -> bytes:
        """Read bytes.

        Raises:
            TooLong: If more are asked for than is sensible.
        """
        if size is None or size < 0:
            size = min(os.fstat(self.fileno()).st_size - self.tell(), self._longest)
        if size > self._longest:
            raise TooLong("its list of files is too long")
        return super().read(size) or b""


class _Content(io.RawIOBase):
    """One file of an archive, unpacked as it is read; not a byte more than it should have."""

    def __init__(self, archive: Archive, entry: zipfile.ZipInfo) -> None:
        super().__init__()
        self._archive, self._left = archive, entry.file_size
        self._source = archive.unpacked(entry)

    def readable(self) -> bool:
        return True

    def readinto(self, out: WriteableBuffer, /) -> int:
        target = memoryview(out)
        with self._archive.told():
            block = self._source.read(len(target))
            self._left -= len(block)
            if self._left < 0 or (self._left and not block):
                raise zipfile.BadZipFile("a file is longer or shorter than it says")
        target[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._source.close()
        super().close()


class Archive:
    """A zip archive whose entries were all checked before the first one is unpacked.

    Raises:
        BundleError: If it is missing or damaged, or holds anything but plain files in folders:
            paths that lead out of it, links, devices, encrypted entries, two entries of one name or
            in one place, entries of absurd size.
    """

    def __init__(self, path: Path) -> None:
        self._where = str(path)
        with self.told():
            self._file = ShortReads(path, _MAX_ENTRIES)
        try:
            with self.told():
                self._zip = zipfile.ZipFile(self._file)
                self._starts = _checked_places(self._file, self._zip, self._where)
                self._entries = _checked_entries(self._zip, path, self._where)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._zip.close()
        self._file.close()

    def names(self) -> tuple[str, ...]:
        """Return the paths of all files, with "/", in the order they are stored."""
        return tuple(self._entries)

    def size(self, name: str) -> int:
        """Return how many bytes a file has.

        Raises:
            BundleError: If there is no such file.
        """
        return self._entry(name).file_size

    def stored_range(self, name: str) -> StoredRange:
        """Return where a file lies.

        Raises:
            BundleError: If there is no such file, or it is packed.
        """
        entry = self._entry(name)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise BundleError(f"{self._where}: {name!r} is packed; expected it stored as it is.")
        start = self._starts[entry.header_offset]
        return StoredRange(start=start, num_bytes=entry.file_size, crc=entry.CRC)

    def open(self, name: str) -> io.BufferedReader:
        """Open one file for reading; its checksum is looked at when all of it was read.

        Raises:
            BundleError: If there is no such file; while reading, if it is damaged.
        """
        return io.BufferedReader(_Content(self, self._entry(name)), _BLOCK)

    def unpacked(self, entry: zipfile.ZipInfo) -> IO[bytes]:
        """Return what reads an entry.

        Raises:
            BundleError: If it is damaged.
        """
        with self.told():
            return self._zip.open(entry)

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the content of a file.

        Raises:
            BundleError: If there is no such file, it is longer, or damaged.
        """
        if self.size(name) > max_bytes:
            raise BundleError(
                f"{self._where}: {name!r} has {size_words(self.size(name))}; expected at most "
                f"{size_words(max_bytes)}."
            )
        with self.open(name) as file:
            return file.read()

    def extract(self, names: Iterable[str], folder: Path) -> list[Path]:
        """Unpack files below a folder, which is made if need be; nothing there is replaced.

        Args:
            names: Of `names()`.
            folder: The folder.

        Returns:
            The files, in the order of the names.

        Raises:
            BundleError: If one is missing, damaged, there already, or the disk is too small. Then
                nothing of them stays behind.
        """
        chosen = [(name, self._entry(name)) for name in dict.fromkeys(names)]
        made: list[Path] = []
        try:
            with self.told():
                _make_folder(folder, made)
                _check_room(folder, sum(entry.file_size for _, entry in chosen), self._where)
                return [self._extract_one(name, entry, folder, made) for name, entry in chosen]
        except BaseException:
            _remove(made)
            raise

    def _extract_one(
        self, name: str, entry: zipfile.ZipInfo, folder: Path, made: list[Path]
    ) -> Path:
        path = folder.joinpath(*name.split("/"))
        _make_folder(path.parent, made)
        with _Content(self, entry) as source, path.open("xb") as target:
            made.append(path)
            while block := source.read(_BLOCK):
                target.write(block)
        return path

    def _entry(self, name: str) -> zipfile.ZipInfo:
        if name not in self._entries:
            raise BundleError(f"{self._where}: holds no file {name!r}.")
        return self._entries[name]

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turn what goes wrong while reading into one error."""
        try:
            yield
        except BundleError:
            raise
        except FileExistsError as error:
            raise BundleError(
                f"{error.filename}: is there already; expected a new place to unpack to."
            ) from None
        except OSError as error:
            place = error.filename or self._where
            raise BundleError(f"{place}: {error.strerror or error}.") from None
        except _DAMAGE as error:
            raise BundleError(
                f"{self._where}: not a whole zip archive ({error}). Copy or download it again."
            ) from None


def leads_out(name: str) -> bool:
    """Return whether a path in an archive is no path below the archive's own folder.

    Examples:
        >>> leads_out("a/../../b"), leads_out("a/C:/b"), leads_out("a/b..c")
        (True, True, False)
    """
    parts = re.split(r"[/\\]", name)
    is_absolute = name.startswith(("/", "\\")) or any(re.match(r"[A-Za-z]:", p) for p in parts)
    return is_absolute or ".." in parts or "\0" in name


def unusual_kind(entry: zipfile.ZipInfo) -> str | None:
    """Return what an entry is if it is no plain file and no folder, in words."""
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link or a device"
    if entry.flag_bits & _IS_ENCRYPTED:
        return "an encrypted file"
    if entry.compress_type not in _METHODS:
        return "a file packed in an unusual way"
    return None


def _checked_places(file: IO[bytes], opened: zipfile.ZipFile, where: str) -> dict[int, int]:
    """Return where the content of each entry begins, by where its header does."""
    entries = sorted(opened.infolist(), key=lambda entry: entry.header_offset)
    if len(entries) > _MAX_ENTRIES:
        raise _refused(where, f"{len(entries)} entries")
    starts: dict[int, int] = {}
    end = 0
    for entry in entries:
        if entry.header_offset < end:
            raise _refused(where, "entries that lie in one another")
        file.seek(entry.header_offset)
        magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if magic != _LOCAL_MAGIC:
            raise zipfile.BadZipFile(f"no entry where {entry.filename!r} should be")
        start = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        starts[entry.header_offset] = start
        end = start + entry.compress_size
    if end > opened.start_dir:
        raise zipfile.BadZipFile("an entry goes beyond the end")
    return starts


def _checked_entries(opened: zipfile.ZipFile, path: Path, where: str) -> dict[str, zipfile.ZipInfo]:
    """Return the files by their path."""
    archive_bytes = path.stat().st_size
    files: dict[str, zipfile.ZipInfo] = {}
    for entry in opened.infolist():
        for name in {entry.filename, entry.orig_filename}:
            _check_name(name, where)
        _check_kind(entry, where)
        name = "/".join(part for part in entry.filename.split("/") if part not in ("", "."))
        if entry.is_dir() or stat.S_ISDIR(entry.external_attr >> 16) or not name:
            continue
        if name in files:
            raise _refused(where, f"two files named {name!r}")
        files[name] = entry
    _check_one_place_each(files, where)
    total = sum(entry.file_size for entry in files.values())
    if total > _SMALL_ENOUGH and total > _MAX_RATIO * archive_bytes:
        raise _refused(where, f"{size_words(total)} in {size_words(archive_bytes)}")
    return files


def _check_name(name: str, where: str) -> None:
    if leads_out(name) or "\\" in name:
        raise _refused(where, f"a path that leads out of it, {name[:200]!r}")
    is_long = any(
        len(part.encode("utf-8", "replace")) > _MAX_NAME_BYTES for part in name.split("/")
    )
    if is_long or any(unicodedata.category(letter) == "Cc" for letter in name):
        raise _refused(where, f"a path that is no path, {name[:200]!r}")


def _check_kind(entry: zipfile.ZipInfo, where: str) -> None:
    what = unusual_kind(entry)
    if what is not None:
        raise _refused(where, f"{what}, {entry.filename[:200]!r}")
    is_stored = entry.compress_type == zipfile.ZIP_STORED
    most = entry.compress_size if is_stored else _DEFLATE_AT_MOST * entry.compress_size + _BLOCK
    if entry.file_size > most:
        raise _refused(
            where,
            f"{size_words(entry.file_size)} in {size_words(entry.compress_size)}, which cannot be",
        )


def _check_one_place_each(names: Iterable[str], where: str) -> None:
    """Refuse names that are one on some disks, and files that are folders too."""
    seen: set[str] = set()
    folders: set[str] = set()
    for name in names:
        key = unicodedata.normalize("NFC", name).casefold()
        if key in seen:
            raise _refused(where, f"two files that some disks take for one, {name!r}")
        seen.add(key)
        parts = key.split("/")
        folders.update("/".join(parts[:length]) for length in range(1, len(parts)))
    both = sorted(seen & folders)
    if both:
        raise _refused(where, f"a file that is a folder too, {both[0]!r}")


def _check_room(folder: Path, num_bytes: int, where: str) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise BundleError(
            f"{where}: unpacks to {size_words(num_bytes)}, but {folder} has {size_words(free)} "
            "left. Make room, or choose another folder."
        )


def _make_folder(folder: Path, made: list[Path]) -> None:
    """Make a folder with its parents, and note which are new."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(new):
        path.mkdir(exist_ok=True)
        made.append(path)


def _remove(made: Sequence[Path]) -> None:
    for path in reversed(made):
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()


def _refused(where: str, what: str) -> BundleError:
    return BundleError(
        f"{where}: the zip archive holds {what}; expected plain files in folders. Nothing of it "
        "was unpacked. Get it from its source again."
    )
