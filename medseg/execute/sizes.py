"""Amounts of memory and disk, as people write and read them."""

from __future__ import annotations

import math

from medseg.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{end}": factor
    for number, letter in enumerate("KMGT", start=1)
    for end, factor in (("", 1000**number), ("B", 1000**number), ("IB", 1024**number))
}


def read_size(text: str | int, name: str) -> int:
    """Return "4GB", "512MiB" or "2g" in bytes; a number is one already.

    Args:
        text: What a user wrote.
        name: What a message calls it.

    Raises:
        ConfigError: If it is no size.

    Examples:
        >>> read_size("1.5GB", "max_memory"), read_size("2 GiB", "max_memory")
        (1500000000, 2147483648)
    """
    number = str(text).strip().upper()
    unit = number.lstrip("0123456789.").strip()
    try:
        size = float(number.removesuffix(unit)) * _UNITS[unit]
    except (KeyError, ValueError):
        size = 0.0
    if not 1 <= size < math.inf:
        raise ConfigError(f"{name} is {text!r}; expected a size such as 4GB or 512MiB.")
    return int(size)


def size_words(num_bytes: float) -> str:
    """Return an amount in words.

    Examples:
        >>> size_words(3_210_000_000), size_words(45_600_000), size_words(12)
        ('3.21 GB', '45.6 MB', '12 bytes')
    """
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:g} bytes"
