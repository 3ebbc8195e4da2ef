"""The operations of a pickle, one by one: what the file says, without doing any of it.

Source:
    Python's `pickletools`, which describes every operation of protocols 0 to 5.
"""

from __future__ import annotations

import codecs
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

_STOP = "STOP"
_ESCAPED = re.compile(rb"""(?:[^\\]|\\(?:[\\'"abfnrtv]|x[0-9a-fA-F]{2}|[0-3]?[0-7]{1,2}))*""")

_Read = Callable[[bytes, int], tuple[Any, int]]
"""From a content and a position to an argument and the position behind it."""


def operations(content: bytes) -> Iterator[tuple[str, Any, int]]:
    """Yield the name, the argument and the end of each operation, up to and with STOP.

    Raises:
        ValueError: If there is no such operation, or the content ends within one.

    Examples:
        >>> list(operations(b"K\\x05."))
        [('BININT1', 5, 2), ('STOP', None, 3)]
    """
    position, length, name = 0, len(content), ""
    while name != _STOP:
        if position >= length:
            raise ValueError("it ends early")
        known = _OPERATIONS[content[position]]
        if known is None:
            raise ValueError(f"{content[position]:#04x} is no operation")
        name, read = known
        if read is None:
            position += 1
            yield name, None, position
        else:
            argument, position = read(content, position + 1)
            yield name, argument, position


def _piece(content: bytes, start: int, num_bytes: int) -> tuple[bytes, int]:
    end = start + num_bytes
    if num_bytes < 0 or end > len(content):
        raise ValueError("it ends early")
    return content[start:end], end


def _number(form: str) -> _Read:
    """Return what reads one number of a fixed form."""
    parts = struct.Struct(form)

    def read(content: bytes, position: int) -> tuple[Any, int]:
        piece, end = _piece(content, position, parts.size)
        return parts.unpack(piece)[0], end

    return read


def _counted(form: str, decode: Callable[[bytes], Any]) -> _Read:
    """Return what reads bytes that stand behind their number."""
    parts = struct.Struct(form)

    def read(content: bytes, position: int) -> tuple[Any, int]:
        piece, position = _piece(content, position, parts.size)
        piece, position = _piece(content, position, parts.unpack(piece)[0])
        return decode(piece), position

    return read


def _line(decode: Callable[[bytes], Any]) -> _Read:
    """Return what reads the rest of a line."""

    def read(content: bytes, position: int) -> tuple[Any, int]:
        end = content.find(b"\n", position)
        if end < 0:
            raise ValueError("it ends early")
        return decode(content[position:end]), end + 1

    return read


def _two_lines(content: bytes, position: int) -> tuple[Any, int]:
    module, position = _line(_text)(content, position)
    name, position = _line(_text)(content, position)
    return (module, name), position


def _text(piece: bytes) -> str:
    return piece.decode("utf-8")


def _latin(piece: bytes) -> str:
    return piece.decode("latin1")


def _any_text(piece: bytes) -> str:
    return piece.decode("utf-8", "surrogatepass")


def _escaped_unicode(piece: bytes) -> str:
    return piece.decode("raw-unicode-escape")


def _quoted(piece: bytes) -> str:
    """Read text of Python 2 as its `repr` writes it."""
    inner = piece[1:-1]
    is_quoted = len(piece) > 1 and piece[:1] == piece[-1:] and piece[:1] in (b"'", b'"')
    if not is_quoted or not _ESCAPED.fullmatch(inner):
        raise ValueError("a text has no quotes or unknown escapes")
    return _latin(codecs.escape_decode(inner)[0])


def _integer(piece: bytes) -> int:
    return int.from_bytes(piece, "little", signed=True)


def _decimal(piece: bytes) -> int | bool:
    return piece == b"01" if piece in (b"00", b"01") else int(piece)


def _long_decimal(piece: bytes) -> int:
    return int(piece.removesuffix(b"L"))


_TABLE: dict[str, tuple[int, _Read | None]] = {
    "MARK": (0x28, None),
    "EMPTY_TUPLE": (0x29, None),
    "STOP": (0x2E, None),
    "POP": (0x30, None),
    "POP_MARK": (0x31, None),
    "DUP": (0x32, None),
    "BINBYTES": (0x42, _counted("<I", bytes)),
    "SHORT_BINBYTES": (0x43, _counted("<B", bytes)),
    "FLOAT": (0x46, _line(float)),
    "BINFLOAT": (0x47, _number(">d")),
    "INT": (0x49, _line(_decimal)),
    "BININT": (0x4A, _number("<i")),
    "BININT1": (0x4B, _number("<B")),
    "LONG": (0x4C, _line(_long_decimal)),
    "BININT2": (0x4D, _number("<H")),
    "NONE": (0x4E, None),
    "PERSID": (0x50, _line(_latin)),
    "BINPERSID": (0x51, None),
    "REDUCE": (0x52, None),
    "STRING": (0x53, _line(_quoted)),
    "BINSTRING": (0x54, _counted("<i", _latin)),
    "SHORT_BINSTRING": (0x55, _counted("<B", _latin)),
    "UNICODE": (0x56, _line(_escaped_unicode)),
    "BINUNICODE": (0x58, _counted("<I", _any_text)),
    "EMPTY_LIST": (0x5D, None),
    "APPEND": (0x61, None),
    "BUILD": (0x62, None),
    "GLOBAL": (0x63, _two_lines),
    "DICT": (0x64, None),
    "APPENDS": (0x65, None),
    "GET": (0x67, _line(int)),
    "BINGET": (0x68, _number("<B")),
    "INST": (0x69, _two_lines),
    "LONG_BINGET": (0x6A, _number("<I")),
    "LIST": (0x6C, None),
    "OBJ": (0x6F, None),
    "PUT": (0x70, _line(int)),
    "BINPUT": (0x71, _number("<B")),
    "LONG_BINPUT": (0x72, _number("<I")),
    "SETITEM": (0x73, None),
    "TUPLE": (0x74, None),
    "SETITEMS": (0x75, None),
    "EMPTY_DICT": (0x7D, None),
    "PROTO": (0x80, _number("<B")),
    "NEWOBJ": (0x81, None),
    "EXT1": (0x82, _number("<B")),
    "EXT2": (0x83, _number("<H")),
    "EXT4": (0x84, _number("<i")),
    "TUPLE1": (0x85, None),
    "TUPLE2": (0x86, None),
    "TUPLE3": (0x87, None),
    "NEWTRUE": (0x88, None),
    "NEWFALSE": (0x89, None),
    "LONG1": (0x8A, _counted("<B", _integer)),
    "LONG4": (0x8B, _counted("<i", _integer)),
    "SHORT_BINUNICODE": (0x8C, _counted("<B", _any_text)),
    "BINUNICODE8": (0x8D, _counted("<Q", _any_text)),
    "BINBYTES8": (0x8E, _counted("<Q", bytes)),
    "EMPTY_SET": (0x8F, None),
    "ADDITEMS": (0x90, None),
    "FROZENSET": (0x91, None),
    "NEWOBJ_EX": (0x92, None),
    "STACK_GLOBAL": (0x93, None),
    "MEMOIZE": (0x94, None),
    "FRAME": (0x95, _number("<Q")),
    "BYTEARRAY8": (0x96, _counted("<Q", bytes)),
    "NEXT_BUFFER": (0x97, None),
    "READONLY_BUFFER": (0x98, None),
}
_BY_CODE = {code: (name, read) for name, (code, read) in _TABLE.items()}
_OPERATIONS = tuple(_BY_CODE.get(code) for code in range(256))
