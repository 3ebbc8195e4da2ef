"""Gzip files as a stream: unpacked once, straight into place, every checksum looked at."""

from __future__ import annotations

import zlib
from pathlib import Path
from types import TracebackType
from typing import IO

_BLOCK = 2**15
"""Packed bytes read at once."""
_PIECE = 2**16
"""Most bytes unpacked at once: larger pieces are joined from parts in fresh memory, which takes
small files twice as long."""
_GZIP = 31


class GunzipFile:
    """What a gzip file holds, read from its beginning to its end.

    Unlike the standard library's, it reads whole blocks and lets zlib compute the checksums.

    Raises:
        zlib.error: While reading, if the data are broken or a checksum is wrong.
        EOFError: While reading, if they end early.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = open(path, "rb", buffering=0)  # noqa: SIM115
        self._decoder = zlib.decompressobj(_GZIP)
        self._packed = b""
        self._position = 0

    def __enter__(self) -> GunzipFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def readinto(self, out: memoryview) -> int:
        """Fill a buffer; return the number of bytes there were, less than asked only at the end."""
        filled = 0
        while filled < len(out):
            piece = self._piece(min(len(out) - filled, _PIECE))
            if not piece:
                break
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
        self._position += filled
        return filled

    def read(self, length: int) -> bytes:
        """Return the next bytes, fewer than asked only at the end."""
        out = bytearray(length)
        return bytes(out[: self.readinto(memoryview(out))])

    def tell(self) -> int:
        """Return the number of bytes unpacked so far."""
        return self._position

    def seek(self, position: int) -> None:
        """Go forward."""
        while self._position < position and self.read(min(position - self._position, _PIECE)):
            pass

    def _piece(self, length: int) -> bytes:
        """Return up to so many bytes; none at the end of the data."""
        while True:
            if self._decoder.eof and not self._begin_next():
                return b""
            packed = self._packed or self._file.read(_BLOCK)
            piece = self._decoder.decompress(packed, length)
            self._packed = self._decoder.unconsumed_tail
            if piece:
                return piece
            if not packed and not self._decoder.eof:
                raise EOFError

    def _begin_next(self) -> bool:
        """Begin the next of several gzip members; zeros between and behind them do not count."""
        packed = self._decoder.unused_data.lstrip(b"\0")
        while not packed:
            block = self._file.read(_BLOCK)
            if not block:
                return False
            packed = block.lstrip(b"\0")
        self._decoder, self._packed = zlib.decompressobj(_GZIP), packed
        return True
