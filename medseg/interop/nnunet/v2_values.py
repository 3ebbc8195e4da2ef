"""Numbers and names as other programs write them into JSON: strictly checked, nothing guessed."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, Strict, ValidationError, ValidationInfo

from medseg.errors import BundleError, near_names
from medseg.schema.base import Schema

_LONGEST, _MOST_FEATURES, _MOST_BLOCKS, _LARGEST_STEP = 2**14, 2**14, 64, 32
_SMALLEST_SPACING, _LARGEST_SPACING = 1e-6, 1e6
_MAX_BYTES = 2**26
S = TypeVar("S", bound=Schema)


class FileSchema(Schema):
    """Base of files that other programs write: what is not needed is not looked at."""

    model_config = ConfigDict(extra="ignore")


def as_whole(value: Any) -> Any:
    """Return a whole number that was written as 32.0 as the number it is."""
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    return value


def one_of(*known: str, dotted: bool = False, advice: str = "") -> Callable[[str], str]:
    """Return what checks a name, and of a dotted one returns the last part.

    Args:
        known: Names that are expected.
        dotted: Whether a path may stand before the name.
        advice: What a message says at the end; without it, which known name is close.
    """

    def check(name: str) -> str:
        last = name.rsplit(".", 1)[-1] if dotted else name
        if last not in known:
            end = f" {advice}" if advice else near_names(last, list(known))
            raise ValueError(f"expected one of: {', '.join(known)}.{end}")
        return last

    return check


Whole = Annotated[int, Strict(), BeforeValidator(as_whole)]
Count = Annotated[Whole, Field(ge=1, le=_MOST_BLOCKS)]
Features = Annotated[Whole, Field(ge=1, le=_MOST_FEATURES)]
Step = Annotated[Whole, Field(ge=1, le=_LARGEST_STEP)]
Length = Annotated[Whole, Field(ge=1, le=_LONGEST)]
Real = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Spacing = Annotated[Real, Field(ge=_SMALLEST_SPACING, le=_LARGEST_SPACING)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(max_length=200)]


def as_many(values: Any, info: ValidationInfo, other: str, *, fewer: int = 0) -> None:
    """Raise ValueError unless there are as many entries as another field has or says."""
    there = info.data.get(other)
    if there is None:
        return
    expected = (there if isinstance(there, int) else len(there)) - fewer
    if len(values) != expected:
        entries = "entry" if len(values) == 1 else "entries"
        raise ValueError(f"it has {len(values)} {entries}; expected {expected}, as {other} says")


def only(values: dict[str, Any] | None, allowed: Mapping[str, Callable[[Any], bool]]) -> Any:
    """Return arguments if each is known and has a value that is understood."""
    wrong = [
        f"{name}={value!r:.60}"
        for name, value in (values or {}).items()
        if name not in allowed or not allowed[name](value)
    ]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} is not understood; expected only {', '.join(allowed)}, with usual "
            "values"
        )
    return values


def checked(schema: type[S], values: Any, where: str, problems: list[str]) -> S | None:
    """Return values as a schema, or None after noting every problem.

    Args:
        schema: What is expected.
        values: What a file holds.
        where: File, and the keys that lead to the values.
        problems: Where problems are added, in words.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        for item in error.errors():
            place = ".".join([where, *(printable(str(part)) for part in item["loc"])])
            message = item["msg"].removeprefix("Value error, ")
            found = "it is missing" if item["type"] == "missing" else f"got {shown(item['input'])}"
            expected = "" if item["type"] == "missing" else f"; {message[0].lower()}{message[1:]}"
            problems.append(f"{place}: {found}{expected}")
    return None


def printable(text: str) -> str:
    """Return a name from a foreign file as it may stand in a message: short, on one line.

    >>> printable("organ\\n\\x1b[2J")
    'organ??[2J'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text[:200])


def shown(value: Any) -> str:
    """Return a value of a foreign file in a few words, however large it is."""
    return ascii(reprlib.repr(value.tolist() if isinstance(value, np.ndarray) else value))[1:-1]


def read_foreign_json(path: Path) -> Any:
    """Return plain values of a JSON file that another program wrote.

    Raises:
        BundleError: If it cannot be read, is far too large or no JSON.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
        return json.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200] or "too deep"
        raise BundleError(f"{path}: no valid JSON ({reason}). Copy the file again.") from None
