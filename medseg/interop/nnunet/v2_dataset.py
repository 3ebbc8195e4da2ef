"""The `dataset.json` of a model of nnU-Net v2: its channels, and what its logits mean."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from medseg.errors import ConfigError
from medseg.interop.nnunet.v2_values import FileSchema, Text, Whole, as_whole, checked, shown
from medseg.labels import LabelScheme
from medseg.schema.dataset import DatasetSpec

_HIGHEST = 2**16 - 1
_MOST_CHANNELS = 1024


def _label(value: Any) -> Any:
    """Return the value of a label, or the values of a region, as whole numbers.

    Raises:
        ValueError: If it is neither.
    """
    entries = value if isinstance(value, (list, tuple)) else [value]
    numbers = [as_whole(entry) for entry in entries]
    is_sound = all(
        isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= _HIGHEST
        for number in numbers
    )
    if not numbers or not is_sound:
        raise ValueError(f"expected a number from 0 to {_HIGHEST}, or a list of such")
    return tuple(numbers)


def _channel(value: Any) -> Any:
    return str(value) if isinstance(value, (int, float)) else value


Label = Annotated[tuple[int, ...], BeforeValidator(_label)]
Channels = Annotated[
    dict[str, Annotated[Text, BeforeValidator(_channel)]],
    Field(min_length=1, max_length=_MOST_CHANNELS),
]


class DatasetFile(FileSchema):
    """`dataset.json`."""

    channel_names: Channels | None = None
    """Number -> name."""
    modality: Channels | None = None
    """What `channel_names` was called before."""
    labels: dict[str, Label]
    """Name -> value, or values of a region."""
    regions_class_order: tuple[Whole, ...] | None = None
    """Value that is written for each region."""
    overwrite_image_reader_writer: Text | None = None
    """Class that reads images, where the plans do not say."""

    @field_validator("channel_names", "modality")
    @classmethod
    def _counts_up(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        expected = [str(number) for number in range(len(value or ()))]
        if value is not None and set(value) != set(expected):
            raise ValueError(f"expected the numbers of the channels: {', '.join(expected)}")
        return value

    @field_validator("labels")
    @classmethod
    def _makes_sense(cls, value: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        if value.get("background") != (0,):
            raise ValueError('expected "background": 0 among the labels')
        others = [entry for name, label in value.items() if name != "ignore" for entry in label]
        if "ignore" in value and value["ignore"] != (max(others) + 1,):
            raise ValueError(f"expected {max(others) + 1} for ignore, the number after the others")
        missing = sorted(set(range(max(others))) - set(others))
        if missing and not any(len(label) > 1 for label in value.values()):
            raise ValueError(
                f"expected consecutive values, {missing[0]} is missing; channels of the network "
                "stand for them in this order"
            )
        return value

    @field_validator("regions_class_order")
    @classmethod
    def _is_for_all(cls, value: Any, info: ValidationInfo) -> Any:
        return value if "labels" in info.data else None

    @property
    def channels(self) -> tuple[str, ...]:
        """Return the names of the channels, in order."""
        names = self.channel_names or self.modality or {}
        return tuple(names[str(number)] for number in range(len(names)))

    @property
    def has_regions(self) -> bool:
        """Return whether some label stands for several values."""
        return any(len(label) > 1 for name, label in self.labels.items() if name != "ignore")


def dataset_spec(
    raw: Any, where: str, name: str, problems: list[str], notes: list[str]
) -> tuple[DatasetSpec, DatasetFile] | None:
    """Return channels and labels in medseg's terms, and the file as it is.

    Args:
        raw: Content of the file.
        where: What messages call the file.
        name: Name of the dataset.
        problems: Where problems are added, in words.
        notes: Where what a user should know is added.
    """
    file = checked(DatasetFile, raw, where, problems)
    if file is None:
        return None
    if not file.channels:
        problems.append(f"{where}.channel_names: it is missing")
        return None
    counts = {len(names) for names in (file.channel_names, file.modality) if names}
    if len(counts) > 1:
        problems.append(f"{where}.modality: got {shown(file.modality)}; expected no other channels")
    spec = DatasetSpec(
        name=name,
        channels=file.channels,
        labels=_labels(file, notes),
        regions_class_order=file.regions_class_order if file.has_regions else None,
        ignore_label=file.labels.get("ignore", (None,))[0],
    )
    try:
        LabelScheme.from_spec(spec)
    except ConfigError as error:
        problems += [f"{where}: {line.strip()}" for line in str(error).splitlines()[1:]]
        return None
    return spec, file


def _labels(file: DatasetFile, notes: list[str]) -> dict[str, int | tuple[int, ...]]:
    """Return name -> value or values; of labels that share a value the first name stays."""
    labels: dict[str, int | tuple[int, ...]] = {}
    for name, values in file.labels.items():
        value = values[0] if len(values) == 1 else values
        twin = next((other for other, known in labels.items() if known == value), None)
        if name == "ignore":
            continue
        if twin is not None and not file.has_regions:
            notes.append(f"Labels {twin!r} and {name!r} share the value {value}; {twin!r} stays.")
            continue
        labels[name] = value
    return labels
