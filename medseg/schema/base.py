"""Base of every file medseg reads or writes, and the two functions that do it."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from medseg.errors import ConfigError

FORMAT_VERSION = 1
"""Version written into every JSON file; files of a later version are refused."""


FILE_NAME = re.compile(r"\w[\w.+-]*")
"""Names that may become those of files and folders, wherever they come from."""


_LARGEST_NUMBER = 1e300
"""Integers of any length may stand in JSON; beyond this no float would hold them."""


class Schema(BaseModel):
    """Base of every file medseg reads or writes: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


S = TypeVar("S", bound=Schema)


def validate(schema: type[S], values: Any, origin: str) -> S:
    """Check plain values against a schema and report all problems at once.

    Raises:
        ConfigError: With one line per problem: where it is, what was found, what was expected.
    """
    found = values.get("format_version", FORMAT_VERSION) if isinstance(values, dict) else 0
    if isinstance(found, int) and found > FORMAT_VERSION:
        raise ConfigError(
            f"{origin}: format_version is {found}, this medseg reads up to {FORMAT_VERSION}. "
            "Update medseg to read this file."
        )
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = [
            f"  {'.'.join(str(part) for part in item['loc']) or '(whole file)'}: "
            f"got {_shorten(item['input'])}; {item['msg'][0].lower()}{item['msg'][1:]}"
            for item in error.errors()
        ]
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError("\n".join([f"{count} in {origin}:", *problems])) from None


def _shorten(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_json(path: Path) -> Any:
    """Read plain JSON values.

    Raises:
        ConfigError: If the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: not valid JSON ({error}). Restore or delete the file."
        ) from None


def read(schema: type[S], path: Path) -> S:
    """Read a JSON file into a schema.

    Raises:
        ConfigError: If the file is missing, is not JSON or does not fit the schema.
    """
    return validate(schema, read_json(path), str(path))


def write(path: Path, value: Schema) -> None:
    """Write a schema as JSON, atomically."""
    write_json(path, value.model_dump(mode="json"))


def write_json(path: Path, values: Any) -> None:
    """Write plain values as readable JSON (short lists on one line), atomically."""
    write_text(path, format_json(values) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def is_number(value: Any) -> bool:
    """Return whether a plain value is a real, finite number, and no truth value.

    Examples:
        >>> is_number(2), is_number(True), is_number(float("nan")), is_number(10**400)
        (True, False, False, False)
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < _LARGEST_NUMBER


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def format_json(values: Any, width: int = 100, indent: int = 0) -> str:
    """Return JSON with every list or object that fits into one line kept on one line.

    Examples:
        >>> format_json({"a": [1, 2]})
        '{"a": [1, 2]}'
    """
    flat = json.dumps(values, ensure_ascii=False, allow_nan=False)
    if len(flat) + indent <= width or not isinstance(values, (dict, list, tuple)) or not values:
        return flat
    pad = " " * (indent + 2)
    if isinstance(values, dict):
        items = [
            f"{pad}{_quoted(str(key))}: {format_json(item, width, indent + 2)}"
            for key, item in values.items()
        ]
        return "{\n" + ",\n".join(items) + "\n" + " " * indent + "}"
    items = [pad + format_json(item, width, indent + 2) for item in values]
    return "[\n" + ",\n".join(items) + "\n" + " " * indent + "]"
