"""Zip archives of DICOM files from strangers: nothing in them is believed, or names a file."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from medseg.execute.sizes import size_words
from medseg.io.archive import ShortReads, TooLong, leads_out, unusual_kind
from medseg.serve.limits import Limits, Refusal

_BLOCK = 2**20
_SMALL_ENOUGH = 16 * 10**6
"""Below so many bytes any ratio of packing is harmless: empty slices pack a thousandfold."""
_NESTED = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
_NO_IMAGES = ("dicomdir", "thumbs.db", "desktop.ini")

Place = Callable[[Sequence[str]], Path | None]
"""From the names of the folders an entry lies in to the folder it is unpacked to; None: skip it."""


@dataclass(slots=True, kw_only=True)
class _Room:
    """How many more bytes may be unpacked."""

    left: int
    take: Callable[[int], None]

    def use(self, num_bytes: int) -> None:
        self.left -= num_bytes
        if self.left < 0:
            raise _too_large()
        self.take(num_bytes)


def unpack(archive: Path, place: Place, *, limits: Limits, take: Callable[[int], None]) -> int:
    """Unpack the files of a zip archive under names of our own.

    Args:
        archive: The file.
        place: Chooses the folder of an entry; the folders exist.
        limits: Size, number of entries and ratio.
        take: Called with the number of bytes before they are written.

    Returns:
        Number of files.

    Raises:
        Refusal: If the archive is damaged or too large, or holds anything but plain files in
            folders: links, devices, archives, encrypted entries, paths that lead out of it.
    """
    room = _Room(left=limits.max_unpacked_bytes, take=take)
    try:
        with ShortReads(archive, limits.max_entries) as file, zipfile.ZipFile(file) as opened:
            entries = _checked(opened.infolist(), archive.stat().st_size, limits)
            return _unpack(opened, entries, place, room)
    except TooLong:
        raise _too_many() from None
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError) as error:
        raise Refusal(
            422, f"the zip archive is damaged ({error}). Pack or copy it again."
        ) from None
    except (NotImplementedError, RuntimeError):
        raise Refusal(
            422, "the zip archive needs a feature that is not supported; pack it with deflate."
        ) from None


def _checked(
    entries: list[zipfile.ZipInfo], archive_bytes: int, limits: Limits
) -> list[zipfile.ZipInfo]:
    """Check all entries before the first byte is unpacked; return those that are files."""
    if len(entries) > limits.max_entries:
        raise _too_many()
    for entry in entries:
        _check(entry)
    total = sum(entry.file_size for entry in entries)
    if total > limits.max_unpacked_bytes:
        raise _too_large()
    if total > _SMALL_ENOUGH and total > limits.max_ratio * archive_bytes:
        raise Refusal(
            413,
            f"the zip archive of {size_words(archive_bytes)} holds {size_words(total)}; expected "
            f"at most {limits.max_ratio:g} times its size. Images do not pack so well.",
        )
    return [entry for entry in entries if not entry.is_dir()]


def _check(entry: zipfile.ZipInfo) -> None:
    if leads_out(entry.orig_filename):
        raise _refused("a path that leads out of the archive")
    what = unusual_kind(entry)
    if what is not None:
        raise _refused(what)
    if entry.filename.lower().endswith(".zip"):
        raise _refused("another archive")


def _unpack(
    opened: zipfile.ZipFile, entries: Sequence[zipfile.ZipInfo], place: Place, room: _Room
) -> int:
    number = 0
    for entry in entries:
        *folders, name = _parts(entry.filename)
        is_hidden = any(part.startswith((".", "__MACOSX")) for part in (*folders, name))
        if is_hidden or name.lower() in _NO_IMAGES or not entry.file_size:
            continue
        folder = place(folders)
        if folder is None:
            continue
        number += 1
        with opened.open(entry) as source, (folder / f"{number:06d}.dcm").open("xb") as target:
            _copy(source, target, room)
    return number


def _copy(source: IO[bytes], target: IO[bytes], room: _Room) -> None:
    block = source.read(_BLOCK)
    if block.startswith(_NESTED):
        raise _refused("another archive")
    while block:
        room.use(len(block))
        target.write(block)
        block = source.read(_BLOCK)


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]


def _refused(what: str) -> Refusal:
    return Refusal(
        422,
        f"the zip archive holds {what}; expected only the DICOM files of the series, in folders or "
        "not. Nothing of it was used.",
    )


def _too_many() -> Refusal:
    return Refusal(413, "the zip archive holds too many files. Pack only the series to segment.")


def _too_large() -> Refusal:
    return Refusal(
        413, "the zip archive holds more than is accepted. Pack only the series to segment."
    )
