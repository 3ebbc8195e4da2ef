"""The files of a request: written to disk as they arrive, under our own names, one per channel."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from medseg.errors import near_names
from medseg.execute.sizes import size_words
from medseg.serve.archives import unpack
from medseg.serve.headers import check_header
from medseg.serve.limits import Limits, Refusal

IMAGE_ENDINGS = (
    ".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".png", ".jpg", ".jpeg", ".bmp",
)  # fmt: skip
"""Images in one file that names no other; TIFF is not among them, as its metadata may."""
ENDINGS = (*IMAGE_ENDINGS, ".zip")
"""What the client's file name may choose; it is used for nothing else."""
IN_ORDER = "image"
"""Field name of files that are given in the order of the channels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One file of a request, on disk."""

    field: str
    """Name of the form's field."""
    path: Path
    ending: str


class Receiver:
    """Takes the body of a multipart request piece by piece and writes its files.

    It blocks while it writes: call it in a thread.
    """

    def __init__(
        self, folder: Path, boundary: bytes, *, max_parts: int, take: Callable[[int], None]
    ) -> None:
        """Begin.

        Args:
            folder: Where the files go; it exists.
            boundary: What separates the parts.
            max_parts: Most files that are accepted.
            take: Called with a number of bytes before they are written.

        Raises:
            Refusal: If the boundary is none.
        """
        self._folder, self._max_parts, self._take = folder, max_parts, take
        self._parts: list[Part] = []
        self._file: IO[bytes] | None = None
        self._name, self._value, self._disposition = b"", b"", b""
        self._is_complete = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._add_name,
                    "on_header_value": self._add_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._open,
                    "on_part_data": self._write,
                    "on_part_end": self._close_part,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            raise _no_form() from None

    def feed(self, data: bytes) -> None:
        """Take the next piece of the body.

        Raises:
            Refusal: If it is no multipart body, or a file in it is not accepted.
        """
        try:
            self._parser.write(data)
        except FormParserError:
            raise _no_form() from None

    def finish(self) -> tuple[Part, ...]:
        """Return the files, once the whole body has been fed.

        Raises:
            Refusal: If it ended early or held no file.
        """
        self.close()
        if not self._is_complete:
            raise Refusal(400, "the request ended before the form was complete. Send it again.")
        if not self._parts:
            raise Refusal(422, "the form holds no file; expected one per channel.")
        return tuple(self._parts)

    def close(self) -> None:
        """Close the file that is being written, if any."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _begin_part(self) -> None:
        self._name, self._value, self._disposition = b"", b"", b""

    def _add_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name, self._value = b"", b""

    def _open(self) -> None:
        """Choose the ending from the client's file name and open a file of ours."""
        _, options = parse_options_header(self._disposition)
        field = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename", b"").decode("utf-8", "replace").lower()
        if not filename:
            raise Refusal(422, f"the form's field {field[:60]!r} is no file; expected files only.")
        ending = next((ending for ending in ENDINGS if filename.endswith(ending)), None)
        if ending is None:
            raise Refusal(
                415,
                f"the file in field {field[:60]!r} has an ending that is not accepted; expected "
                f"one of: {', '.join(ENDINGS)}.",
            )
        if len(self._parts) == self._max_parts:
            raise Refusal(422, f"the form holds too many files; expected {self._max_parts}.")
        path = self._folder / f"image_{len(self._parts):04d}{ending}"
        self._file = path.open("xb")
        self._parts.append(Part(field=field, path=path, ending=ending))

    def _write(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._take(end - start)
            self._file.write(memoryview(data)[start:end])

    def _close_part(self) -> None:
        self.close()

    def _end(self) -> None:
        self._is_complete = True


def _no_form() -> Refusal:
    return Refusal(
        400,
        "the body is no valid multipart form. Send files as multipart/form-data, as curl -F does.",
    )


def case_of(
    parts: Sequence[Part],
    channels: Sequence[str],
    *,
    limits: Limits,
    take: Callable[[int], None],
) -> tuple[Path, ...]:
    """Return the image of each channel, in order, zip archives unpacked to folders.

    Args:
        parts: Files of a request.
        channels: Names of the model's channels, in order.
        limits: Of the server.
        take: Called with a number of bytes before they are written.

    Returns:
        One file or DICOM folder per channel, or the one file that holds all channels.

    Raises:
        Refusal: If it is unclear which file is which channel, or one is not accepted.
    """
    ordered = _in_order(parts, channels)
    if len(ordered) == 1 and len(channels) > 1 and ordered[0].ending == ".zip":
        return _unpacked_channels(ordered[0], channels, limits=limits, take=take)
    return tuple(_one_channel(part, limits=limits, take=take) for part in ordered)


def _in_order(parts: Sequence[Part], channels: Sequence[str]) -> list[Part]:
    """Return files in the order of the channels, which field names or their own order tell."""
    if all(part.field == IN_ORDER for part in parts):
        if len(parts) not in (1, len(channels)):
            raise _wrong_channels(f"{len(parts)} files", channels)
        return list(parts)
    names = [part.field for part in parts]
    unknown = next((name for name in names if name not in channels), None)
    if unknown is not None:
        close = near_names(unknown, list(channels))
        raise _wrong_channels(f"a field {unknown[:60]!r}", channels, close)
    if sorted(names) != sorted(channels):
        raise _wrong_channels(f"the fields {', '.join(names)}", channels)
    return sorted(parts, key=lambda part: channels.index(part.field))


def _wrong_channels(found: str, channels: Sequence[str], close: str = "") -> Refusal:
    return Refusal(
        422,
        f"the form holds {found}; expected a file in each of the fields {', '.join(channels)}, or "
        f"as many files in fields called {IN_ORDER!r}, in this order.{close}",
    )


def _one_channel(part: Part, *, limits: Limits, take: Callable[[int], None]) -> Path:
    if part.ending != ".zip":
        check_header(part.path, part.ending, limits)
        return part.path
    folder = part.path.with_suffix("")
    folder.mkdir()
    if not unpack(part.path, lambda _: folder, limits=limits, take=take):
        raise _no_images()
    part.path.unlink()
    return folder


def _unpacked_channels(
    part: Part, channels: Sequence[str], *, limits: Limits, take: Callable[[int], None]
) -> tuple[Path, ...]:
    """Unpack one archive with a folder for each channel, called as the channel."""
    folders = [part.path.parent / f"series_{number:04d}" for number in range(len(channels))]
    known = {name.casefold(): folder for name, folder in zip(channels, folders, strict=True)}
    for folder in folders:
        folder.mkdir()

    def place(names: Sequence[str]) -> Path | None:
        found = {known[name.casefold()] for name in names if name.casefold() in known}
        return found.pop() if len(found) == 1 else None

    if not unpack(part.path, place, limits=limits, take=take):
        raise _no_images()
    part.path.unlink()
    lacking = [n for n, folder in zip(channels, folders, strict=True) if not any(folder.iterdir())]
    if lacking:
        raise Refusal(
            422,
            f"the zip archive has no folder called {' or '.join(lacking)}; expected one folder per "
            f"channel, called {', '.join(channels)}, each with one DICOM series.",
        )
    return tuple(folders)


def _no_images() -> Refusal:
    return Refusal(
        422,
        "the zip archive holds no files that belong to a channel; expected one DICOM series per "
        "channel, with several channels each in a folder called as the channel.",
    )


def check_space(folder: Path, num_bytes: int) -> None:
    """Refuse an upload that the disk has no room for.

    Raises:
        Refusal: If less than `num_bytes` are free.
    """
    if shutil.disk_usage(folder).free < num_bytes:
        raise Refusal(
            507, f"the server's disk has no room for {size_words(num_bytes)}. Try again later.", 60
        )
