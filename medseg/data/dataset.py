"""Read a folder of labelled images into a `DatasetSpec`: nnU-Net raw and Decathlon layouts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from medseg.errors import ConfigError, DatasetError
from medseg.io.read import split_ending
from medseg.labels import LabelScheme
from medseg.schema.base import read_json
from medseg.schema.dataset import CaseFiles, DatasetSpec

_CHANNEL_SUFFIX = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")
_MAX_LISTED = 20


def read_dataset(folder: Path) -> DatasetSpec:
    """Return what a folder with a `dataset.json` holds; images are listed, not opened.

    Args:
        folder: nnU-Net raw layout (`imagesTr/CASE_0000.nii.gz`, `labelsTr/CASE.nii.gz`) or
            Decathlon layout (`dataset.json` with a `training` list).

    Raises:
        DatasetError: If files are missing; all problems of all cases are listed at once.
        ConfigError: If `dataset.json` is not usable.
    """
    folder = Path(folder)
    description = _read_description(folder)
    labels, regions_order, ignore = parse_labels(description, folder / "dataset.json")
    channels = _channel_names(description, folder / "dataset.json")
    if isinstance(description.get("training"), list):
        cases = _listed_cases(folder, description["training"])
    elif isinstance(description.get("dataset"), dict):
        cases = _dictionary_cases(folder, description["dataset"])
    else:
        ending = str(description.get("file_ending", ".nii.gz"))
        cases = _scanned_cases(folder, ending, len(channels))
    spec = DatasetSpec(
        name=folder.resolve().name,
        source=str(folder.resolve()),
        channels=channels,
        labels=labels,
        regions_class_order=regions_order,
        ignore_label=ignore,
        cases=dict(sorted(cases.items())),
    )
    LabelScheme.from_spec(spec)
    _check_files(folder, spec)
    return spec


def group_channels(paths: list[Path]) -> dict[str, list[tuple[int, Path]]]:
    """Group image files into cases: `CASE_NNNN.ending` is channel NNNN, no suffix channel 0.

    Returns:
        Case id -> [(channel number, file)], both sorted.
    """
    cases: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(paths):
        stem, _ = split_ending(path.name)
        match = _CHANNEL_SUFFIX.match(stem)
        case, channel = (match["case"], int(match["channel"])) if match else (stem, 0)
        cases.setdefault(case, []).append((channel, path))
    return {case: sorted(files) for case, files in sorted(cases.items())}


def _read_description(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder. Give a folder that holds dataset.json.")
    path = folder / "dataset.json"
    if not path.is_file():
        entries = sorted(entry.name for entry in folder.iterdir())[:8]
        held = f"it holds {', '.join(entries)}" if entries else "it is empty"
        raise DatasetError(
            f"{folder}: no dataset.json there ({held}). Expected the nnU-Net raw layout "
            "(dataset.json, imagesTr, labelsTr) or the Decathlon layout."
        )
    description = read_json(path)
    if not isinstance(description, dict):
        raise ConfigError(f"{path}: expected a JSON object, got a {type(description).__name__}")
    return description


def _channel_names(description: dict[str, Any], path: Path) -> tuple[str, ...]:
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


Labels = dict[str, int | tuple[int, ...]]


def parse_labels(
    description: dict[str, Any], path: Path
) -> tuple[Labels, tuple[int, ...] | None, int | None]:
    """Return labels, regions_class_order and ignore label of a `dataset.json` (its `path`).

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
        labels = _decathlon_labels(entries) if _is_decathlon(entries) else _named_labels(entries)
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
    return labels, tuple(order) if order is not None else None, ignore


def _is_decathlon(entries: dict[str, Any]) -> bool:
    return all(key.isdigit() for key in entries) and all(
        isinstance(value, str) and not value.isdigit() for value in entries.values()
    )


def _decathlon_labels(entries: dict[str, str]) -> Labels:
    """Return name -> value; value 0 is called "background" whatever the file calls it."""
    pairs = sorted((int(value), name) for value, name in entries.items())
    return {("background" if value == 0 else name): value for value, name in pairs}


def _named_labels(entries: dict[str, Any]) -> Labels:
    labels: Labels = {}
    for name, value in entries.items():
        values = tuple(int(item) for item in value) if isinstance(value, list) else (int(value),)
        labels[name] = values if len(values) > 1 else values[0]
    return labels


def _listed_cases(folder: Path, entries: list[Any]) -> dict[str, CaseFiles]:
    cases = {}
    for entry in entries:
        named = isinstance(entry, dict) and isinstance(entry.get("image"), str)
        if not named or not isinstance(entry.get("label"), str):
            raise ConfigError(
                f"{folder / 'dataset.json'}: training holds {entry!r}; expected "
                '{"image": "imagesTr/CASE.nii.gz", "label": "labelsTr/CASE.nii.gz"}.'
            )
        stem, _ = split_ending(Path(entry["label"]).name)
        if stem in cases:
            raise DatasetError(
                f"{folder / 'dataset.json'}: two training entries have a label file named "
                f"{Path(entry['label']).name}; case ids come from these names. Rename one."
            )
        image = Path(entry["image"])
        channels: tuple[str, ...] = (str(image),)
        if not (folder / image).exists():
            found = sorted((folder / image).parent.glob(f"{split_ending(image.name)[0]}_????.*"))
            channels = tuple(str(path.relative_to(folder)) for path in found) or channels
        cases[stem] = CaseFiles(
            channels=tuple(_clean(name) for name in channels), segmentation=_clean(entry["label"])
        )
    return cases


def _clean(name: str) -> str:
    return Path(name).as_posix()


def _dictionary_cases(folder: Path, entries: dict[str, Any]) -> dict[str, CaseFiles]:
    cases = {}
    for case, entry in entries.items():
        if not isinstance(entry, dict) or "images" not in entry:
            raise ConfigError(
                f"{folder / 'dataset.json'}: dataset.{case} is {entry!r}; expected "
                '{"images": [files, one per channel], "label": file}.'
            )
        cases[case] = CaseFiles(channels=tuple(entry["images"]), segmentation=entry.get("label"))
    return cases


def _scanned_cases(folder: Path, ending: str, num_channels: int) -> dict[str, CaseFiles]:
    images = _files(folder / "imagesTr", ending)
    segmentations = {split_ending(p.name)[0]: p for p in _files(folder / "labelsTr", ending)}
    grouped = group_channels(images)
    if not grouped:
        raise DatasetError(
            f"{folder / 'imagesTr'}: no image there ends in {ending!r}. Expected "
            f"CASE_0000{ending}, CASE_0001{ending} ...; check file_ending in dataset.json."
        )
    cases = {}
    for case, files in grouped.items():
        label = segmentations.get(case)
        cases[case] = CaseFiles(
            channels=tuple(
                path.relative_to(folder).as_posix()
                for path in _expected_channels(case, files, num_channels, ending)
            ),
            segmentation=label.relative_to(folder).as_posix() if label else None,
        )
    return cases


def _expected_channels(
    case: str, files: list[tuple[int, Path]], num_channels: int, ending: str
) -> list[Path]:
    """Return one file per channel; a channel without a file is named as it should be."""
    first = files[0][1]
    if len(files) == 1 and _is_unnumbered(first):
        return [first]
    found = dict(files)
    count = max(num_channels, max(found) + 1)
    return [found.get(n, first.with_name(f"{case}_{n:04d}{ending}")) for n in range(count)]


def _files(folder: Path, ending: str) -> list[Path]:
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; the nnU-Net raw layout needs it.")
    return [path for path in sorted(folder.iterdir()) if path.name.endswith(ending)]


def _check_files(folder: Path, spec: DatasetSpec) -> None:
    if not spec.cases:
        raise DatasetError(f"{folder}: the dataset has no training case. Add images and labels.")
    problems = []
    for case, files in spec.cases.items():
        first = Path(files.channels[0]) if files.channels else None
        stacked = len(files.channels) == 1 and first is not None and _is_unnumbered(first)
        if len(files.channels) != len(spec.channels) and not stacked:
            problems.append(
                f"  case {case!r}: {_count(len(files.channels), 'channel file')}, expected "
                f"{len(spec.channels)} ({', '.join(spec.channels)})"
            )
        problems += [
            f"  case {case!r}: {file} is missing (channel {number}, {name})"
            for number, (file, name) in enumerate(zip(files.channels, spec.channels, strict=False))
            if not (folder / file).is_file()
        ]
        if files.segmentation is None:
            problems.append(f"  case {case!r}: no segmentation in labelsTr")
        elif not (folder / files.segmentation).is_file():
            problems.append(f"  case {case!r}: {files.segmentation} is missing (segmentation)")
    _refuse(folder, problems, "Add the files, or remove the cases from the dataset.")


def _is_unnumbered(file: Path) -> bool:
    """Return whether a file may hold all channels as its fourth axis (Decathlon)."""
    return _CHANNEL_SUFFIX.match(split_ending(file.name)[0]) is None


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _refuse(folder: Path, problems: list[str], advice: str) -> None:
    if not problems:
        return
    shown = problems[:_MAX_LISTED]
    if len(problems) > _MAX_LISTED:
        shown.append(f"  ... and {len(problems) - _MAX_LISTED} more")
    count = _count(len(problems), "problem")
    raise DatasetError("\n".join([f"{folder}: {count}", *shown, advice]))
