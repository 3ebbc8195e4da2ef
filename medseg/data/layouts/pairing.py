"""Find out which image belongs to which segmentation, going by the names of files and folders."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from medseg.data.layouts.found import LeftOver, PairedCase, Pairing
from medseg.data.layouts.names import fold_pairs, image_name
from medseg.data.layouts.roles import File, Key, Sorted, by_folders, by_names, by_patterns
from medseg.data.layouts.words import take_apart
from medseg.errors import DatasetError

_COMMON = 0.8
"""Share of the cases that must have an image for it to count as a channel."""
_SKIPPED = {"__MACOSX", "medseg_work"}
_FORBIDDEN = re.compile(r'[/\\:*?"<>|\s]+')


def pair_files(
    folder: Path, *, images: str | None = None, segmentations: str | None = None
) -> Pairing:
    """Return the cases of a folder.

    Args:
        folder: Folder with images and segmentations, at any depth.
        images: Pattern of the images; None goes by the words in the names.
        segmentations: Pattern of the segmentations, likewise.

    Raises:
        DatasetError: If no image belongs to any segmentation.
        ConfigError: If a pattern is not usable.
    """
    names = list_images(folder)
    if images or segmentations:
        ways = [by_patterns(names, images, segmentations)]
    else:
        taken = [take_apart(name) for name in names]
        ways = [by_folders(taken), by_names(taken)]
    pairings, problems = [], []
    for way in ways:
        try:
            pairings.append(_pair(way))
        except DatasetError as error:
            problems.append(error)
    best = max(pairings, key=lambda pairing: len(pairing.cases), default=None)
    if best is not None and best.cases:
        return best
    raise problems[0] if problems else DatasetError(_nothing(folder, names, ways))


def list_images(folder: Path) -> list[str]:
    """Return every image file below a folder, relative to it, sorted; links are followed."""
    found = []
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in _SKIPPED)
        lead = Path(root).relative_to(folder).as_posix()
        lead = "" if lead == "." else f"{lead}/"
        shown = [name for name in sorted(files) if not name.startswith(".") and image_name(name)]
        found += [lead + name for name in fold_pairs(shown)]
    return sorted(found)


def _pair(files: Sorted) -> Pairing:
    labels = _one_per_case(files)
    images = _images_of(labels, files)
    channels = _channels(images)
    cases: dict[Key, PairedCase] = {}
    for key, label in labels.items():
        found = images.get(key, {})
        chosen = _chosen(found, channels)
        if not found:
            files.leave("segmentations without an image", [label.name])
            continue
        files.leave("not in every case", (f.name for s, f in found.items() if s not in chosen))
        if len(chosen) < max(1, len(channels)):
            names = (file.name for file in chosen.values())
            files.leave("cases that lack a channel", [*names, label.name])
            continue
        groups = [file.group for file in (label, *chosen.values()) if file.group]
        cases[key] = PairedCase(
            images={_joined(suffix): file.name for suffix, file in chosen.items()},
            segmentation=label.name,
            group=groups[0] if groups else None,
        )
    ids = _case_ids({key: labels[key] for key in cases})
    return Pairing(
        cases={ids[key]: case for key, case in cases.items()},
        channels=tuple(map(_joined, channels)) or ("",),
        left_over=tuple(
            LeftOver(reason=reason, files=tuple(sorted(names)))
            for reason, names in files.left_over.items()
            if names
        ),
    )


def _one_per_case(files: Sorted) -> dict[Key, File]:
    """Return key -> segmentation; of several the one whose kind is preferred or most frequent."""
    kinds = Counter(label.kind for label in files.labels)
    claims: dict[Key, list[File]] = {}
    for label in files.labels:
        claims.setdefault(label.key, []).append(label)
    chosen = {}
    for key, found in claims.items():
        ranked = sorted(found, key=lambda f: (f.words.preference, -kinds[f.kind], f.kind, f.name))
        chosen[key] = ranked[0]
        files.leave("other segmentations of the same case", (f.name for f in ranked[1:]))
    return chosen


def _images_of(labels: dict[Key, File], files: Sorted) -> dict[Key, dict[Key, File]]:
    """Return segmentation's key -> what else is in the image's key -> image.

    An image belongs to the segmentation with its very key, or with the longest key that its own
    begins or ends with; the rest names the channel. Segmentations that are left may have more in
    their keys than their images.
    """
    found: dict[Key, dict[Key, File]] = {}
    lonely = []
    for image in files.images:
        case, suffix = _owner(image.key, labels)
        if case is None:
            lonely.append(image)
        elif suffix in found.setdefault(case, {}):
            files.leave("another file of the same case and channel", [image.name])
        else:
            found[case][suffix] = image
    unused = {image.key: image for image in lonely}
    owners = {key: _owner(key, unused)[0] for key in labels if key not in found}
    counts = Counter(owners.values())
    for key, owner in owners.items():
        if owner is not None and counts[owner] == 1:
            found[key] = {(): unused.pop(owner)}
        elif owner is not None:
            files.leave("several segmentations of one image", [labels[key].name])
    for image in unused.values():
        files.leave("images without a segmentation", [image.name])
    return found


def _owner(key: Key, owners: Mapping[Key, File]) -> tuple[Key | None, Key]:
    """Return the longest key that a key begins (or else ends) with, and the rest of it."""
    for length in range(len(key), 0, -1):
        if key[:length] in owners:
            return key[:length], key[length:]
    for start in range(1, len(key)):
        if key[start:] in owners:
            return key[start:], key[:start]
    return None, ()


def _channels(images: Mapping[Key, Mapping[Key, File]]) -> tuple[Key, ...]:
    """Return what names the channels: the images that most cases have.

    Raises:
        DatasetError: If the cases hold too different images.
    """
    counts = Counter(suffix for found in images.values() for suffix in found)
    common = sorted(suffix for suffix, n in counts.items() if n >= _COMMON * len(images))
    if common or all(len(found) == 1 for found in images.values()):
        return tuple(common)
    listed = ", ".join(f"{_joined(s) or '(none)'} {n}" for s, n in counts.most_common(8))
    raise DatasetError(
        f"the {len(images)} cases hold different images (word: cases): {listed}. Say which of them "
        "every case has: medseg dataset init FOLDER --images '*_t1.nii.gz'"
    )


def _chosen(found: Mapping[Key, File], channels: tuple[Key, ...]) -> dict[Key, File]:
    """Return a case's images that are channels; its only one where names tell no channels."""
    if not channels:
        return dict.fromkeys([()], next(iter(found.values()))) if found else {}
    return {suffix: found[suffix] for suffix in channels if suffix in found}


def _joined(suffix: Key) -> str:
    return "_".join(suffix)


def _case_ids(labels: Mapping[Key, File]) -> dict[Key, str]:
    """Return key -> case id: the name, with the folders before it only where that is needed."""
    names = {key: label.case or label.words.text for key, label in labels.items()}
    counts = Counter(names.values())
    for key, label in labels.items():
        if not names[key] or counts[names[key]] > 1:
            before = [label.group or ""] if label.case else label.words.folders
            names[key] = "_".join(part for part in (*before, names[key]) if part) or "case"
    counts = Counter(names.values())
    for key, name in names.items():
        if counts[name] > 1:
            names[key] = "_".join(key)
    return {key: _FORBIDDEN.sub("_", name).lstrip(".") for key, name in names.items()}


def _nothing(folder: Path, names: Sequence[str], ways: Sequence[Sorted]) -> str:
    """Return the message for a folder in which nothing could be paired."""
    if not names:
        return f"{folder}: no image file there, at any depth. Give the folder of the data."

    files = max(ways, key=lambda way: min(len(way.images), len(way.labels)))

    def shown(found: Sequence[File]) -> str:
        listed = ", ".join(file.name for file in found[:3])
        more = ", ..." if len(found) > 3 else ""
        return f"{len(found)} ({listed}{more})" if found else "none"

    return (
        f"{folder}: of {len(names)} image files none could be paired with its segmentation.\n"
        f"  taken for images: {shown(files.images)}\n"
        f"  taken for segmentations: {shown(files.labels)}\n"
        "Say which are which, for example: medseg dataset init FOLDER "
        "--images 'scans/{case}.nii.gz' --segmentations 'drawn/{case}_organ.nii.gz'"
    )
