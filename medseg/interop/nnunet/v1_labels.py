"""Name the labels and channels of a model of nnU-Net v1, which itself only counts them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.errors import BundleError
from medseg.interop.nnunet.v1_plans import StagePlans
from medseg.interop.nnunet.v1_trainers import REGIONS, REGIONS_CLASS_ORDER
from medseg.interop.nnunet.v2_values import shown
from medseg.schema.dataset import DatasetSpec

_FILE = "dataset.json"
_MAX_BYTES = 2**24
_LONGEST = 100
_RESERVED = ("background", "ignore")
"""Names with a meaning of their own, which a label of v1 cannot have."""


def spec_of(
    name: str, plans: StagePlans, *, has_regions: bool, described: Mapping[str, Any]
) -> DatasetSpec:
    """Return channels and labels of a model.

    The value of a label is the number of its logit channel, as the original writes it.

    Args:
        name: Of the task.
        plans: The plans.
        has_regions: Whether the trainer has its own three regions.
        described: A `dataset.json`, or nothing.
    """
    labels: dict[str, int | tuple[int, ...]] = {"background": 0}
    if has_regions:
        labels |= {
            region: values if len(values) > 1 else values[0] for region, values in REGIONS.items()
        }
    else:
        names = _by_number(described.get("labels"))
        for value in range(1, len(plans.classes) + 1):
            labels[_distinct(names.get(value, ""), f"label_{value}", labels)] = value
    names = _by_number(described.get("modality", described.get("channel_names")))
    return DatasetSpec(
        name=name,
        channels=tuple(names.get(number, own) for number, own in enumerate(plans.channels)),
        labels=labels,
        regions_class_order=REGIONS_CLASS_ORDER if has_regions else None,
    )


def described_by(
    given: Path | None, folder: Path, plans: StagePlans, *, has_regions: bool
) -> tuple[Mapping[str, Any], str | None]:
    """Return the `dataset.json` of a model, and a sentence where one was left aside.

    Args:
        given: The one a user named; None: looked for in the model's folder and in its task's.
        folder: Of the model.
        plans: The plans it has to fit.
        has_regions: Whether the labels are regions of the trainer's.

    Raises:
        BundleError: If the one a user named is missing, is no such file, or describes other labels.
    """
    if given is not None:
        content, problem = _read(given, plans, has_regions)
        if problem:
            raise BundleError(f"{given}: {problem}. Name the {_FILE} of the model's own task.")
        return content, None
    places = [folder, *([folder.parent] if folder.parent.name.startswith("Task") else [])]
    for place in (place / _FILE for place in places):
        if place.is_file():
            content, problem = _read(place, plans, has_regions)
            note = f"{place.name} beside the model was left aside: {problem}." if problem else None
            return ({} if problem else content), note
    return {}, None


def _read(path: Path, plans: StagePlans, has_regions: bool) -> tuple[Mapping[str, Any], str | None]:
    """Return what a file describes, and what is wrong with it."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            return {}, "it is far too large"
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return {}, f"it cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        return {}, f"it is not valid JSON ({str(error)[:100]})"
    if not isinstance(content, Mapping):
        return {}, "it holds no names with values"
    return content, _problem(content, plans, has_regions)


def _problem(content: Mapping[str, Any], plans: StagePlans, has_regions: bool) -> str | None:
    count = len(plans.classes)
    labels = {value for value in _by_number(content.get("labels")) if value}
    if not has_regions and labels and labels != set(range(1, count + 1)):
        return (
            f"it names the labels {shown(sorted(labels))}, the model has 1 to {count}; a model "
            "writes its labels with consecutive numbers"
        )
    channels = _by_number(content.get("modality", content.get("channel_names")))
    if channels and set(channels) != set(range(len(plans.channels))):
        return (
            f"it names the channels {shown(sorted(channels))}, the model has 0 to "
            f"{len(plans.channels) - 1}"
        )
    return None


def _by_number(values: Any) -> dict[int, str]:
    """Return number -> name of entries that are written either way round."""
    found = {}
    for key, value in values.items() if isinstance(values, Mapping) else ():
        number, name = (value, key) if isinstance(value, int) else (key, value)
        if isinstance(number, str) and number.isascii() and number.isdigit() and len(number) < 6:
            number = int(number)
        if isinstance(number, int) and isinstance(name, str) and not isinstance(number, bool):
            found[number] = name
    return found


def _distinct(name: str, instead: str, taken: Mapping[str, Any] | Sequence[str]) -> str:
    """Return a name if it can be a label's, otherwise another."""
    is_fine = 0 < len(name) <= _LONGEST and name not in taken and name not in _RESERVED
    return name if is_fine else instead
