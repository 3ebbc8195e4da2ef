"""nnU-Net's raw layout: `imagesTr/CASE_NNNN.ending` and `labelsTr/CASE.ending`.

Source:
    Dataset format of nnU-Net v2. Its `file_ending` is a preference here: endings may differ within
    a dataset, and where two files claim one channel the one with this ending is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg.data.layouts.described import Described, problem, remark
from medseg.data.layouts.description import channel_names, label_names
from medseg.data.layouts.listing import Listing
from medseg.data.layouts.names import fold_pairs, image_name, may_hold_channels
from medseg.errors import DatasetError
from medseg.io.image import split_channel
from medseg.schema.check import Problem
from medseg.schema.dataset import CaseFiles

_IMAGES, _LABELS = "imagesTr", "labelsTr"


def read_raw(description: dict[str, Any], path: Path) -> Described:
    """Return what the two folders beside a `dataset.json` hold.

    Raises:
        ConfigError: If `dataset.json` is not usable.
        DatasetError: If a folder is missing or holds no image.
    """
    listing = Listing(path.parent)
    channels = channel_names(description, path)
    names = label_names(description, path)
    ending = str(description.get("file_ending", "")).lower()
    images, labels = (_images(listing, folder) for folder in (_IMAGES, _LABELS))
    if not images:
        raise DatasetError(
            f"{path.parent / _IMAGES}: no image there. Expected CASE_0000{ending or '.nii.gz'}, "
            "CASE_0001 ..., one file a channel."
        )
    problems: list[Problem] = []
    segmentations = _segmentations(labels, ending, problems)
    cases = _cases(_claims(images, segmentations), ending, problems)
    lone = [case for case in segmentations if case not in cases]
    strays = [case for case in lone if _is_stray(segmentations[case], ending, labels)]
    cases |= {case: {} for case in lone if case not in strays}
    usual = _usual_ending(images, ending)
    files = {
        case: CaseFiles(
            channels=tuple(
                f"{_IMAGES}/{name}" for name in _expected(case, found, len(channels), usual)
            ),
            segmentation=f"{_LABELS}/{segmentations[case]}" if case in segmentations else None,
        )
        for case, found in cases.items()
    }
    kept = _without_strays(files, ending, problems)
    problems += [
        remark(
            "left-over",
            f"{_LABELS}/{segmentations[case]} has no image in {_IMAGES} and does not end in "
            f"{ending!r}; it takes no part.",
            file=f"{_LABELS}/{segmentations[case]}",
        )
        for case in sorted(strays)
    ]
    return Described(
        source=path,
        root=path.parent,
        channels=channels,
        names=names,
        cases=kept,
        listing=listing,
        problems=tuple(problems),
    )


def _images(listing: Listing, folder: str) -> list[str]:
    try:
        found = listing.names(folder)
    except FileNotFoundError:
        raise DatasetError(
            f"{listing.root / folder}: no such folder; the nnU-Net raw layout needs it."
        ) from None
    return fold_pairs([name for name in found if image_name(name)])


def _segmentations(labels: list[str], ending: str, problems: list[Problem]) -> dict[str, str]:
    """Return case -> file in `labelsTr`."""
    claims: dict[str, list[str]] = {}
    for name in labels:
        claims.setdefault(_stem(name), []).append(name)
    return {
        case: _choose(found, ending, case, "the segmentation", problems)
        for case, found in claims.items()
    }


def _claims(images: list[str], segmentations: Mapping[str, str]) -> dict[str, dict[int, list[str]]]:
    """Return case -> channel number -> files that claim to be it.

    A file that is called like a segmentation is that case, whatever digits its name ends in.
    """
    claims: dict[str, dict[int, list[str]]] = {}
    for name in images:
        stem = _stem(name)
        case, number = (stem, 0) if stem in segmentations else split_channel(stem)
        claims.setdefault(case, {}).setdefault(number or 0, []).append(name)
    return claims


def _cases(
    claims: Mapping[str, Mapping[int, list[str]]], ending: str, problems: list[Problem]
) -> dict[str, dict[int, str]]:
    return {
        case: {
            number: _choose(files, ending, case, f"channel {number}", problems)
            for number, files in sorted(found.items())
        }
        for case, found in claims.items()
    }


def _choose(files: list[str], ending: str, case: str, role: str, problems: list[Problem]) -> str:
    """Return the file that is meant where several claim to be the same thing."""
    if len(files) == 1:
        return files[0]
    preferred = [name for name in files if ending and name.lower().endswith(ending)]
    folder = _LABELS if role == "the segmentation" else _IMAGES
    listed, what = ", ".join(f"{folder}/{name}" for name in files), f"{role} of case {case!r}"
    if len(preferred) == 1:
        problems.append(
            remark(
                "two-files",
                f"{listed} all claim to be {what}; {preferred[0]} is taken, since dataset.json "
                f"says file_ending {ending!r}.",
                case=case,
            )
        )
        return preferred[0]
    problems.append(
        problem(
            "two-files",
            f"{listed} all claim to be {what}. Keep one of them, or say in dataset.json which "
            "file_ending is meant.",
            case=case,
        )
    )
    return files[0]


def _expected(case: str, found: Mapping[int, str], num_channels: int, ending: str) -> list[str]:
    """Return one file per channel; a channel without a file is named as it should be.

    A picture, or a file without a number, may hold several channels: such files are taken as
    they are, and counted when they are read.
    """
    if not found:
        return [f"{case}_{number:04d}{ending}" for number in range(num_channels)]
    names = list(found.values())
    is_counted = list(found) == list(range(len(found))) and len(names) <= num_channels
    if is_counted and all(may_hold_channels(name, case) for name in names):
        return names
    known = image_name(names[0])
    ending = known[1] if known else ending
    count = max(num_channels, max(found) + 1)
    return [found.get(number, f"{case}_{number:04d}{ending}") for number in range(count)]


def _is_stray(name: str, ending: str, labels: list[str]) -> bool:
    """Return whether a file in `labelsTr` is of another kind than the segmentations."""
    has_ending = [bool(ending) and label.lower().endswith(ending) for label in labels]
    return any(has_ending) and not name.lower().endswith(ending)


def _usual_ending(images: list[str], ending: str) -> str:
    """Return the ending a missing image would have: the declared one, or that of most images."""
    found = Counter(known[1] for name in images if (known := image_name(name)))
    return ending if not found or ending in found else found.most_common(1)[0][0]


def _without_strays(
    cases: Mapping[str, CaseFiles], ending: str, problems: list[Problem]
) -> dict[str, CaseFiles]:
    """Leave out pictures and the like beside images of the declared ending."""
    kept = {}
    for case, files in cases.items():
        is_stray = bool(ending) and not any(n.lower().endswith(ending) for n in files.channels)
        if files.segmentation is None and is_stray:
            problems.append(
                remark(
                    "left-over",
                    f"{files.channels[0]} has no segmentation and does not end in {ending!r}; "
                    "it takes no part.",
                    file=files.channels[0],
                )
            )
        else:
            kept[case] = files
    return kept


def _stem(name: str) -> str:
    found = image_name(name)
    return found[0] if found else name
