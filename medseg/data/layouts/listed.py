"""Descriptions that list their files: the Decathlon's `training`, nnU-Net's `dataset`.

Source:
    `dataset.json` of the Medical Segmentation Decathlon; the `dataset` dictionary of nnU-Net v2,
    but that variables of the environment are not replaced.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from medseg.data.layouts.described import Described
from medseg.data.layouts.description import channel_names, label_names
from medseg.data.layouts.listing import Listing
from medseg.data.layouts.names import image_name, plain_name
from medseg.errors import ConfigError, DatasetError
from medseg.schema.dataset import CaseFiles


def read_decathlon(description: dict[str, Any], path: Path) -> Described:
    """Return the cases of the list `training`; those of `test` have no segmentation.

    Raises:
        ConfigError: If an entry is not usable.
        DatasetError: If two entries would have one id.
    """
    listing = Listing(path.parent)
    cases: dict[str, CaseFiles] = {}
    for entry in description["training"]:
        image, label = _image_and_label(entry, path)
        case = _stem(label)
        if case in cases:
            raise DatasetError(
                f"{path}: two training entries have a label file named {label.rpartition('/')[2]}; "
                "case ids come from these names. Rename one."
            )
        cases[case] = CaseFiles(channels=_channels(image, listing), segmentation=label)
    return _described(description, path, cases, listing)


def read_dictionary(description: dict[str, Any], path: Path) -> Described:
    """Return the cases of the dictionary `dataset`: id -> images and label.

    Raises:
        ConfigError: If an entry is not usable.
    """
    cases = {}
    for case, entry in description["dataset"].items():
        images, label = _get(entry, "images"), _get(entry, "label")
        if images is None or not _is_names(images) or not isinstance(label, (str, type(None))):
            raise ConfigError(
                f"{path}: dataset.{case} is {entry!r}; expected "
                '{"images": [files, one per channel], "label": file}.'
            )
        cases[case] = CaseFiles(
            channels=tuple(plain_name(name) for name in images),
            segmentation=plain_name(label) if label else None,
        )
    return _described(description, path, cases, Listing(path.parent))


def _described(
    description: dict[str, Any], path: Path, cases: dict[str, CaseFiles], listing: Listing
) -> Described:
    return Described(
        source=path,
        root=path.parent,
        channels=channel_names(description, path),
        names=label_names(description, path),
        cases=cases,
        listing=listing,
    )


def _get(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None


def _is_names(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) for v in values)


def _image_and_label(entry: Any, path: Path) -> tuple[str, str]:
    image, label = _get(entry, "image"), _get(entry, "label")
    if not isinstance(image, str) or not isinstance(label, str):
        raise ConfigError(
            f"{path}: training holds {entry!r}; expected "
            '{"image": "imagesTr/CASE.nii.gz", "label": "labelsTr/CASE.nii.gz"}.'
        )
    return plain_name(image), plain_name(label)


def _stem(name: str) -> str:
    last = name.rpartition("/")[2]
    found = image_name(last)
    return found[0] if found else last


def _channels(image: str, listing: Listing) -> tuple[str, ...]:
    """Return the image, or the channels it was split into (the list stayed as it was)."""
    if listing.has_file(image):
        return (image,)
    folder, _, last = image.rpartition("/")
    if not listing.has_folder(folder):
        return (image,)
    found = fnmatch.filter(listing.names(folder), f"{_escaped(_stem(last))}_[0-9][0-9][0-9][0-9].*")
    lead = f"{folder}/" if folder else ""
    return tuple(lead + name for name in found) or (image,)


def _escaped(text: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)
