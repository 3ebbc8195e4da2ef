"""Pickles from strangers, read as data: nothing in them is imported, called or believed.

A pickle is a program for a small machine that can call anything there is. This is a machine of our
own which knows the operations that plain data need; where a file names a class, a stand-in of
`medseg.interop.nnunet.stand_ins` takes its place, or the file is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from medseg.errors import BundleError
from medseg.execute.sizes import size_words
from medseg.interop.nnunet.operations import operations
from medseg.interop.nnunet.stand_ins import (
    NAMES,
    Builder,
    Constructor,
    Leaf,
    Named,
    Ordered,
    StoredArray,
    StoredDtype,
    Unordered,
    checked_key,
    known_name,
)

MAX_BYTES = 2**26
"""Longest pickle; real ones have some kilobytes, or megabytes with a long training's history."""
_MAX_OPERATIONS = 10**7
_MAX_PROTOCOL = 5
_MAX_INTEGER_BITS = 128
_MAX_DEPTH = 100
_MAX_VALUES = 10**7
_MAX_CONTAINERS = 10**6
_ERRORS = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError,
    RecursionError, EOFError,
)  # fmt: skip

_PLAIN = frozenset((int, float, bool, bytes, type(None)))
_Finished = tuple[Any, int, int]
"""A plain value, how deep it is nested, and of how many values it consists."""

Persistent = Callable[[Any], Any]
"""From what a file says of something stored outside its pickle to what stands for it."""


def read_pickle(
    source: Path | bytes,
    *,
    where: str,
    persistent: Persistent | None = None,
    constructors: Mapping[str, Constructor] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Return the values in a pickle; nothing it asks for is imported or called.

    Args:
        source: The file, or its content.
        where: What messages call it.
        persistent: Stands for what is stored outside the pickle; None: there is no such thing.
        constructors: More names a file may call, by module and name.
        max_bytes: Longest content.

    Returns:
        dict, list, tuple, str, int, float, bool, None, bytes and numpy arrays of numbers, booleans
        or text; numbers of numpy as Python's, arrays of objects and sets as lists; paths, devices
        and the names of types as text.

    Raises:
        BundleError: If it is missing, damaged, or asks for anything else.
    """
    content = _content(source, where, max_bytes) if isinstance(source, Path) else source
    if len(content) > max_bytes:
        raise BundleError(_too_long(where, len(content), max_bytes))
    value, num_bytes = _read(content, where, persistent, constructors)
    if num_bytes != len(content):
        raise BundleError(_damaged(where, "something follows its end"))
    return value


def read_next_pickle(
    file: IO[bytes],
    *,
    where: str,
    persistent: Persistent | None = None,
    constructors: Mapping[str, Constructor] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Return the values in the pickle that begins here; the file is left behind its end.

    Raises:
        BundleError: As in `read_pickle`.
    """
    start = file.tell()
    value, num_bytes = _read(file.read(max_bytes), where, persistent, constructors)
    file.seek(start + num_bytes)
    return value


def _read(
    content: bytes,
    where: str,
    persistent: Persistent | None,
    constructors: Mapping[str, Constructor] | None,
) -> tuple[Any, int]:
    """Return the values and the length of the pickle."""
    builder = Builder(len(content))
    try:
        machine = _Machine(where, {**builder.constructors, **(constructors or {})}, persistent)
        value, length = machine.run(content)
        return _Finish(builder).value(value), length
    except BundleError:
        raise
    except _ERRORS as error:
        raise BundleError(_damaged(where, str(error) or type(error).__name__)) from None


def _content(path: Path, where: str, max_bytes: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise BundleError(_too_long(where, size, max_bytes))
        return path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{where}: cannot be read ({error.strerror}); expected a pickle file."
        ) from None


class _Machine:
    """The stack, the marks in it and the memory of what was met before."""

    def __init__(
        self,
        where: str,
        constructors: Mapping[str, Constructor],
        persistent: Persistent | None,
    ) -> None:
        self.where = where
        self.constructors = constructors
        self.persistent = persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memory: dict[int, Any] = {}

    def run(self, content: bytes) -> tuple[Any, int]:
        """Return the one value that the operations leave, and where they end."""
        steps, end = _STEPS, 0
        for number, (name, argument, end) in enumerate(operations(content)):  # noqa: B007
            if number > _MAX_OPERATIONS:
                raise ValueError("it has too many parts")
            step = steps.get(name)
            if step is None:
                raise BundleError(_foreign(self.where, f"uses the operation {name}"))
            step(self, argument)
        if len(self.stack) != 1 or self.below:
            raise ValueError("it holds not one value but several")
        return self.stack[0], end

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_integer(self, value: int) -> None:
        if value.bit_length() > _MAX_INTEGER_BITS:
            raise ValueError("a number is too large")
        self.stack.append(value)

    def pop(self, _: Any) -> None:
        self.stack.pop()

    def get(self, index: int) -> None:
        self.stack.append(self.memory[index])

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop_tuple(self, length: int) -> None:
        if len(self.stack) < length:
            raise IndexError("a value is missing")
        self.stack[-length:] = [tuple(self.stack[-length:])]

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError("it fills what is no list")
        self.stack[-1].extend(items)

    def add(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not Unordered:
            raise TypeError("it fills what is no set")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, Ordered) or len(items) % 2:
            raise TypeError("it fills what is no dictionary")
        for index in range(0, len(items), 2):
            target[checked_key(items[index])] = items[index + 1]

    def pop_pair(self) -> list[Any]:
        value, key = self.stack.pop(), self.stack.pop()
        return [key, value]

    def remember(self, index: int) -> None:
        if not 0 <= index <= len(self.memory) + 1:
            raise ValueError("it numbers its parts in an impossible way")
        self.memory[index] = self.stack[-1]

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name is no text")
        known = known_name(module, name)
        if known not in NAMES and known not in self.constructors:
            asked = f"{module}.{name}"[:200]
            raise BundleError(_foreign(self.where, f"asks for {asked!r}"))
        self.stack.append(Named(name=known))

    def call(self, _: Any) -> None:
        arguments, what = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple:
            raise TypeError("arguments are no tuple")
        if type(what) is not Named:
            raise TypeError("it calls what is no function")
        constructor = self.constructors.get(what.name)
        if constructor is None:
            raise BundleError(_foreign(self.where, f"calls {what.name!r}"))
        self.stack.append(constructor(*arguments))

    def call_with_names(self, _: Any) -> None:
        if self.stack.pop() != {}:
            raise TypeError("it names the arguments of a call")
        self.call(_)

    def build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) in (StoredArray, StoredDtype) and type(state) is tuple:
            target.build(state)
        elif type(target) is not Ordered or type(state) is not dict:
            raise BundleError(_foreign(self.where, "sets attributes of a value"))

    def instance(self, names: tuple[str, str]) -> None:
        self.name(*names)
        raise BundleError(_foreign(self.where, "makes an object of a class"))

    def load_persistent(self, _: Any) -> None:
        if self.persistent is None:
            raise BundleError(_foreign(self.where, "refers to something outside the file"))
        self.stack.append(self.persistent(self.stack.pop()))

    def protocol(self, number: int) -> None:
        if number > _MAX_PROTOCOL:
            raise ValueError(f"it has protocol {number}; expected at most {_MAX_PROTOCOL}")


def _dictionary(machine: _Machine, _: Any) -> None:
    items = machine.since_mark()
    machine.push({})
    machine.set_items(items)


_Step = Callable[[_Machine, Any], None]
_VALUES = (
    "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
)  # fmt: skip
_STEPS: dict[str, _Step] = {
    **dict.fromkeys(_VALUES, _Machine.push),
    **dict.fromkeys(("INT", "LONG", "LONG1", "LONG4"), _Machine.push_integer),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(Unordered()),
    "MARK": _Machine.mark,
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "FROZENSET": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "DICT": _dictionary,
    "TUPLE1": lambda machine, _: machine.pop_tuple(1),
    "TUPLE2": lambda machine, _: machine.pop_tuple(2),
    "TUPLE3": lambda machine, _: machine.pop_tuple(3),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.add(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop_pair()),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "POP": _Machine.pop,
    "POP_MARK": lambda machine, _: machine.since_mark().clear(),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.remember),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memory)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "GLOBAL": lambda machine, names: machine.name(*names),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.pop_pair()),
    "INST": _Machine.instance,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.call_with_names,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.load_persistent,
    "PROTO": _Machine.protocol,
    "FRAME": lambda machine, _: None,
    "STOP": lambda machine, _: None,
}
"""Operation -> what it does; every other one is refused."""


class _Finish:
    """Makes plain values of what the machine left; what was shared stays shared."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder
        self._done: dict[int, _Finished] = {}
        self._kept: list[Any] = []

    def value(self, value: Any) -> Any:
        return self._finished(value, 0)[0]

    def _finished(self, value: Any, depth: int) -> _Finished:
        if type(value) in _PLAIN or isinstance(value, Leaf):
            return value, 0, 1
        known = self._done.get(id(value))
        if known is None:
            if depth > _MAX_DEPTH:
                raise ValueError("it is nested too deeply, or in itself")
            if len(self._done) >= _MAX_CONTAINERS:
                raise ValueError("it has too many parts")
            known = self._done[id(value)] = self._new(value, depth)
        if depth + known[1] > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        return known

    def _new(self, value: Any, depth: int) -> _Finished:
        kind = type(value)
        if kind is StoredArray:
            value = self._builder.array(value)
            self._kept.append(value)
            return (value, 0, 1) if type(value) is not list else self._finished(value, depth)
        if kind in (dict, Ordered):
            keys = [self._finished(key, depth + 1)[0] for key in value]
            parts = [self._finished(part, depth + 1) for part in value.values()]
            return self._whole(dict(zip(keys, [part[0] for part in parts], strict=True)), parts)
        if kind in (list, tuple, Unordered):
            parts = [self._finished(part, depth + 1) for part in value]
            plain = [part[0] for part in parts]
            return self._whole(tuple(plain) if kind is tuple else plain, parts)
        return _leaf(value), 0, 1

    @staticmethod
    def _whole(value: Any, parts: list[_Finished]) -> _Finished:
        size = 1 + sum(part[2] for part in parts)
        if size > _MAX_VALUES:
            raise ValueError("it unfolds to more than the file holds")
        return value, 1 + max((part[1] for part in parts), default=0), size


def _leaf(value: Any) -> Any:
    if type(value) is str:
        value.encode()
        return value
    if type(value) is Named:
        return value.name
    if type(value) is StoredDtype:
        return value.numpy().name
    raise ValueError("something in it is never finished")


def _foreign(where: str, what: str) -> str:
    return (
        f"{where}: the pickle {what}; expected only plain values, arrays and tensors, as in the "
        "files of nnU-Net. Nothing in it was run. Do not open it with other programs unless you "
        "trust whoever made it."
    )


def _damaged(where: str, what: str) -> str:
    return f"{where}: damaged, or no pickle of a model ({what[:200]}). Copy or download it again."


def _too_long(where: str, num_bytes: int, max_bytes: int) -> str:
    return (
        f"{where}: the pickle has {size_words(num_bytes)}; expected at most "
        f"{size_words(max_bytes)}. A model's plans are far smaller; this is another file."
    )
