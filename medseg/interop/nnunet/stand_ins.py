"""What stands in for the classes that a stranger's pickle names: values that do nothing.

No class or function that a file asks for is ever looked up. What models really hold is listed here
by name, each with a small constructor of ours that returns a plain value, or a stand-in for one
that is finished once the whole file is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CODE = re.compile(r"[<>=|]?(\?|b1|[iu][1248]|f[248]|[SU][0-9]{1,9}|O8?)")
"""Booleans, integers, floating-point numbers, bytes, text and objects, as numpy writes them."""
_MAX_AXES = 32
_FIRST_HALF, _LAST_HALF, _LAST_LETTER = 0xD800, 0xDFFF, 0x10FFFF
_MAX_KEY_PARTS = 64
_LARGEST_KEY = 2**53
"""Larger ones may be chosen so that all share one hash."""
_MODULES = {
    "__builtin__": "builtins",
    "numpy.core": "numpy",
    "numpy._core": "numpy",
    "numpy.core.multiarray": "numpy.multiarray",
    "numpy._core.multiarray": "numpy.multiarray",
    "numpy.core.numeric": "numpy.numeric",
    "numpy._core.numeric": "numpy.numeric",
    "pathlib._local": "pathlib",
    "torch.storage": "torch",
}
"""Modules that were renamed: other name -> the one used here."""
_TORCH_DTYPES = (
    "float16", "float32", "float64", "bfloat16",
    "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "bool",
)  # fmt: skip
NAMES = frozenset(
    [f"builtins.{name}" for name in ("int", "float", "bool", "str", "list", "dict", "tuple")]
    + ["numpy.ndarray", "torch.Tensor", "torch.nn.parameter.Parameter"]
    + [f"numpy.{name}" for name in ("float16", "float32", "float64", "bool_", "uint8", "uint16")]
    + [f"numpy.{name}" for name in ("uint32", "uint64", "int8", "int16", "int32", "int64")]
    + [f"torch.{name}" for name in _TORCH_DTYPES]
)
"""What a file may name but never call; a value of a result becomes the name."""

Constructor = Callable[..., Any]


class Leaf:
    """Base of values that stay as they are in what was read."""

    __slots__ = ()


class Ordered(dict[Any, Any]):
    """A dictionary whose class lets a file hang attributes on it; they are dropped."""

    __slots__ = ()


class Unordered(list[Any]):
    """The members of a set."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """Something that a file names."""

    name: str
    """Module and name, in today's spelling."""


class StoredDtype:
    """An element type of numpy: numbers, booleans, text or any objects.

    Raises:
        ValueError: If it is another.
    """

    __slots__ = ("_dtype", "is_object")

    def __init__(self, code: str, *_: Any) -> None:
        if type(code) is not str or not _CODE.fullmatch(code):
            raise ValueError("an array has elements of a type that models do not have")
        self.is_object = code.lstrip("<>=|").startswith("O")
        """Whether the elements are any values at all."""
        self._dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        """Take the byte order, which numpy stores beside the code.

        Raises:
            ValueError: If the type has fields or parts.
        """
        _, byte_order, parts, names, fields, *_ = state
        if parts is not None or names is not None or fields is not None:
            raise ValueError("an array has fields")
        if byte_order in ("<", ">"):
            self._dtype = self._dtype.newbyteorder("<" if byte_order == "<" else ">")

    def numpy(self) -> np.dtype[Any]:
        """Return numpy's own.

        Raises:
            ValueError: If the elements are objects.
        """
        if self.is_object:
            raise ValueError("a number is an object")
        return self._dtype


@dataclass(slots=True, eq=False)
class StoredArray:
    """An array of numpy, until the file is read."""

    shape: tuple[int, ...] = (0,)
    """Number of elements along each axis."""
    dtype: StoredDtype | None = None
    """Element type."""
    data: bytes | list[Any] = b""
    """Elements in memory order, or the objects themselves."""
    is_fortran: bool = False
    """Whether the first axis runs fastest."""

    def build(self, state: Any) -> None:
        """Take what numpy stores of an array.

        Raises:
            ValueError: If it is something else.
        """
        shape, dtype, is_fortran, data = state[-4:]
        if type(dtype) is not StoredDtype or type(shape) is not tuple:
            raise ValueError("an array has no type or shape")
        if type(data) is str:
            data = data.encode("latin1")
        if type(data) not in ((list,) if dtype.is_object else (bytes,)):
            raise ValueError("an array has no elements")
        self.shape, self.dtype, self.data, self.is_fortran = shape, dtype, data, is_fortran is True

    def finish(self) -> NDArray[Any] | list[Any]:
        """Return the array; objects become nested lists.

        Raises:
            ValueError: If shape, type and data do not fit one another.
        """
        if self.dtype is None:
            raise ValueError("an array has no elements")
        num_elements = _num_elements(self.shape)
        if isinstance(self.data, list):
            return self._nested(num_elements)
        return _array(self.data, self.dtype.numpy(), self.shape, self.is_fortran, num_elements)

    def _nested(self, num_elements: int) -> list[Any]:
        values: list[Any] = list(self.data)
        if len(values) != num_elements or (self.is_fortran and len(self.shape) > 1):
            raise ValueError(f"an array of shape {self.shape} holds {len(values)} values")
        for length in reversed(self.shape[1:]):
            if length:
                values = [values[i : i + length] for i in range(0, len(values), length)]
        return values


def _num_elements(shape: tuple[Any, ...]) -> int:
    if len(shape) > _MAX_AXES or any(type(length) is not int or length < 0 for length in shape):
        raise ValueError("an array has an impossible shape")
    return math.prod(shape)


def _array(
    data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], is_fortran: bool, num_elements: int
) -> NDArray[Any]:
    if num_elements * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {shape} and type {dtype.name} has {len(data)} bytes")
    if num_elements == 0:
        return np.zeros(shape, dtype.newbyteorder("="))
    if dtype.itemsize == 0:
        raise ValueError("an array has elements without size")
    _check_text(data, dtype)
    flat = np.frombuffer(data, np.uint8 if dtype.kind == "b" else dtype)
    values = flat.reshape(shape, order="F" if is_fortran else "C")
    array = values != 0 if dtype.kind == "b" else values.astype(dtype.newbyteorder("="))
    return np.asarray(array)


def _check_text(data: bytes, dtype: np.dtype[Any]) -> None:
    """Refuse letters that do not exist, which numpy does not look at."""
    if dtype.kind == "U":
        letters = np.frombuffer(data, np.dtype(f"{dtype.byteorder}u4"))
        is_half = (letters >= _FIRST_HALF) & (letters <= _LAST_HALF)
        if (is_half | (letters > _LAST_LETTER)).any():
            raise ValueError("a text has letters that do not exist")


class Builder:
    """The constructors, and how much they may copy: not more than the file itself holds."""

    def __init__(self, num_bytes: int) -> None:
        """Take the length of the file."""
        self._left = num_bytes
        self.constructors: Mapping[str, Constructor] = {
            "_codecs.encode": self._encoded,
            "builtins.bytearray": self._bytes,
            "builtins.bytes": self._bytes,
            "builtins.frozenset": lambda values=(): tuple(self._values(values)),
            "builtins.set": lambda values=(): Unordered(self._values(values)),
            "collections.OrderedDict": self._ordered,
            "collections.defaultdict": lambda _=None: Ordered(),
            "numpy.dtype": StoredDtype,
            "numpy.multiarray._reconstruct": lambda *_: StoredArray(),
            "numpy.multiarray.scalar": self._scalar,
            "numpy.numeric._frombuffer": self._from_buffer,
            "torch.Size": lambda sizes=(): tuple(self._values(sizes)),
            "torch.device": _device,
            **{f"pathlib.{name}": self._posix for name in ("PosixPath", "PurePosixPath")},
            **{f"pathlib.{name}": self._windows for name in ("WindowsPath", "PureWindowsPath")},
        }
        """Name -> what is called with the arguments in the file."""

    def copy(self, num_bytes: int) -> None:
        """Note that so many bytes are copied.

        Raises:
            ValueError: If this is more than an honest file needs.
        """
        self._left -= num_bytes
        if self._left < 0:
            raise ValueError("it unfolds to more than the file holds")

    def array(self, stored: StoredArray) -> NDArray[Any] | list[Any]:
        """Return a finished array."""
        self.copy(len(stored.data))
        return stored.finish()

    def _values(self, values: Any) -> Iterable[Any]:
        if type(values) not in (list, tuple):
            raise ValueError("a set or a size has no members")
        self.copy(len(values))
        return list(values)

    def _encoded(self, text: str, encoding: str = "latin1") -> bytes:
        if type(text) is not str or encoding not in ("latin1", "latin-1"):
            raise ValueError("bytes are written in an unusual way")
        self.copy(len(text))
        return text.encode("latin1")

    def _bytes(self, content: Any = b"", encoding: str = "latin1") -> bytes:
        return content if type(content) is bytes else self._encoded(content, encoding)

    def _ordered(self, pairs: Any = ()) -> Ordered:
        result = Ordered()
        for key, value in self._values(pairs):
            result[checked_key(key)] = value
        return result

    def _scalar(self, dtype: Any, content: Any) -> Any:
        if type(dtype) is not StoredDtype:
            raise ValueError("a number has no type")
        if type(content) is str:
            content = content.encode("latin1")
        if type(content) is not bytes:
            raise ValueError("a number has no value")
        self.copy(len(content))
        kind = dtype.numpy()
        if kind.itemsize != len(content):
            raise ValueError(f"a number of type {kind.name} has {len(content)} bytes")
        if kind.itemsize == 0:
            return kind.type().item()
        _check_text(content, kind)
        return content != b"\0" if kind.kind == "b" else np.frombuffer(content, kind)[0].item()

    def _from_buffer(self, content: Any, dtype: Any, shape: Any, order: Any) -> StoredArray:
        array = StoredArray()
        array.build((shape, dtype, order == "F", content))
        return array

    def _posix(self, *parts: str) -> str:
        self.copy(sum(map(len, parts)))
        return str(PurePosixPath(*parts))

    def _windows(self, *parts: str) -> str:
        self.copy(sum(map(len, parts)))
        return str(PureWindowsPath(*parts))


def _device(kind: str, index: int | None = None) -> str:
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise ValueError("a device has no name")
    return kind if index is None else f"{kind}:{index}"


def known_name(module: str, name: str) -> str:
    """Return a global's name in today's spelling; see `_MODULES`.

    Examples:
        >>> known_name("numpy._core.multiarray", "scalar"), known_name("__builtin__", "set")
        ('numpy.multiarray.scalar', 'builtins.set')
    """
    return f"{_MODULES.get(module, module)}.{name}"


def checked_key(key: Any) -> Any:
    """Return a dictionary's key if it is a plain value that is quickly compared.

    Raises:
        ValueError: If not.
    """
    left = [key]
    for _ in range(_MAX_KEY_PARTS):
        if not left:
            return key
        part = left.pop()
        if type(part) is tuple and len(part) <= _MAX_KEY_PARTS:
            left += part
        elif type(part) not in (str, int, float, bool, bytes, type(None)):
            raise ValueError("a key is no plain value")
        elif type(part) is int and abs(part) > _LARGEST_KEY:
            raise ValueError("a key is an enormous number")
    if left:
        raise ValueError("a key has too many parts")
    return key
