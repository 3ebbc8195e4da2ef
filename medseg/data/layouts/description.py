"""The parts that every description in JSON has: labels and channel names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medseg.data.layouts.described import LabelNames, Labels
from medseg.errors import ConfigError
from medseg.schema.base import read_json


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: If the file holds something else.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, got a {type(values).__name__}")
    return values


def channel_names(description: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Return `channel_names`, or `modality` as they were called before.

    Raises:
        ConfigError: If they are not numbered from 0 without gaps.
    """
    entries = description.get("channel_names", description.get("modality"))
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(
            f"{path}: channel_names is {entries!r}; expected an object such as "
            '{"0": "T1w", "1": "FLAIR"} that names every channel.'
        )
    expected = [str(number) for number in range(len(entries))]
    if sorted(entries, key=str) != sorted(expected):
        raise ConfigError(
            f"{path}: channel_names has the keys {list(entries)}; expected {expected}. "
            "Number the channels from 0 without gaps."
        )
    return tuple(str(entries[number]) for number in expected)


def parse_labels(
    description: dict[str, Any], path: Path
) -> tuple[Labels, tuple[int, ...] | None, int | None]:
    """Return labels, regions_class_order and ignore label of a description (its `path`).

    Raises:
        ConfigError: If they are not usable.
    """
    names = label_names(description, path)
    return names.labels, names.regions_class_order, names.ignore_label


def label_names(description: dict[str, Any], path: Path) -> LabelNames:
    """Return the labels of a description: name -> value, or value -> name as in the Decathlon.

    Raises:
        ConfigError: If they are not usable.
    """
    entries = description.get("labels")
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(
            f"{path}: labels is {entries!r}; expected an object such as "
            '{"background": 0, "liver": 1}.'
        )
    try:
        labels = _by_value(entries) if _is_by_value(entries) else _by_name(entries)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{path}: labels is {entries!r}; every value must be an integer or a list of integers."
        ) from None
    order = description.get("regions_class_order")
    if order is not None and not (isinstance(order, list) and all(type(v) is int for v in order)):
        raise ConfigError(
            f"{path}: regions_class_order is {order!r}; expected a list of integers, one a region."
        )
    ignore = labels.pop("ignore", None)
    if isinstance(ignore, tuple):
        raise ConfigError(f"{path}: the ignore label is {list(ignore)}; expected one integer.")
    return LabelNames(
        labels=labels,
        regions_class_order=tuple(order) if order is not None else None,
        ignore_label=ignore,
    )


def _is_by_value(entries: dict[str, Any]) -> bool:
    return all(_is_integer(key) for key in entries) and all(
        isinstance(value, str) and not _is_integer(value) for value in entries.values()
    )


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdigit()


def _by_value(entries: dict[str, str]) -> Labels:
    """Return name -> value, or -> values that share a name; 0 is always called "background"."""
    pairs = sorted((int(value), name) for value, name in entries.items())
    named = [("background" if value == 0 else name, value) for value, name in pairs]
    values = {name: tuple(v for other, v in named if other == name) for name, _ in named}
    return {name: found[0] if len(found) == 1 else found for name, found in values.items()}


def _by_name(entries: dict[str, Any]) -> Labels:
    labels: Labels = {}
    for name, value in entries.items():
        values = tuple(map(_whole, value)) if isinstance(value, list) else (_whole(value),)
        labels[name] = values[0] if len(values) == 1 else values
    return labels


def _whole(value: Any) -> int:
    """Return an integer, also one written as 1.0 or "1"; 1.5 and true are none."""
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(value)
    return int(value)
