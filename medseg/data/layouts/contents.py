"""What the images and segmentations of paired files hold: channels, labels, patients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.data.layouts.described import LabelNames, Labels
from medseg.data.layouts.found import Found, LeftOver, Pairing
from medseg.data.layouts.label_files import find_label_names
from medseg.data.layouts.names import MANIFEST, RASTER_ENDINGS
from medseg.data.layouts.words import take_apart
from medseg.data.patients import find_patients, patient_of
from medseg.errors import DatasetError
from medseg.execute.local import map_cases
from medseg.execute.progress import progress_bar
from medseg.io.read import read_channels, read_segmentation
from medseg.io.size import stored_bytes
from medseg.schema.dataset import CaseFiles
from medseg.values import distinct_values

_NUM_LOOKED_AT = 3
"""Cases whose images are opened."""
_MAX_VALUES = 1000
"""More different values than that are instance numbers or intensities."""
_NEED_FACTOR = 4
"""Memory that reading a segmentation takes, as a multiple of its voxel data."""
_CT_AIR = -500
"""A smallest value below this is that of air in Hounsfield units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Looked:
    """What the images of one case hold, file by file."""

    num_channels: tuple[int, ...]
    is_ct: tuple[bool, ...]
    fits: tuple[bool, ...]
    """Whether the image has the shape of the segmentation."""


def with_images(folder: Path, pairing: Pairing, progress: bool) -> Found:
    """Open some images and return cases whose channels have names."""
    chosen = list(pairing.cases)[:: max(1, len(pairing.cases) // _NUM_LOOKED_AT)][:_NUM_LOOKED_AT]
    looked, problems = [], []
    function = partial(_look, folder, pairing)
    with progress_bar(len(chosen), "look at images", shown=progress) as bar:
        for outcome in map_cases(function, chosen, workers=1):
            if outcome.value is not None:
                looked.append(outcome.value)
            elif outcome.error is not None:
                problems.append(str(outcome.error))
            bar.update()
    if not looked:
        raise DatasetError("\n".join(["no image could be read:", *(f"  {p}" for p in problems)]))
    kept, left_over = _on_the_grid(pairing, looked)
    names = _channel_names(pairing, kept, looked)
    cases = {
        case: CaseFiles(
            channels=tuple(found.images[pairing.channels[n]] for n in kept),
            segmentation=found.segmentation,
            group=found.group,
        )
        for case, found in sorted(pairing.cases.items())
    }
    grouped, note = with_patients(cases)
    return Found(
        folder=folder,
        cases=grouped,
        channels=names,
        names=LabelNames(labels={}),
        label_counts={},
        left_over=(*pairing.left_over, *left_over),
        notes=(*problems, *([note] if note else [])),
        target=folder / MANIFEST,
    )


def _look(folder: Path, pairing: Pairing, case: str) -> _Looked:
    found = pairing.cases[case]
    shape = read_segmentation(folder / found.segmentation).array.shape
    counts, is_ct, fits = [], [], []
    for channel in pairing.channels:
        array = read_channels([folder / found.images[channel]]).array
        counts.append(len(array))
        is_ct.append(_is_ct(array))
        fits.append(array.shape[1:] == shape)
    return _Looked(num_channels=tuple(counts), is_ct=tuple(is_ct), fits=tuple(fits))


def _is_ct(array: NDArray[np.float32]) -> bool:
    """Return whether intensities look like Hounsfield units: integers, with air among them."""
    some = array[:, ::3, ::3, ::2]
    return bool(some.min() < _CT_AIR and np.array_equal(some, np.rint(some)))


def _on_the_grid(pairing: Pairing, looked: Sequence[_Looked]) -> tuple[list[int], list[LeftOver]]:
    """Return the channels that share the grid of the segmentation; all where none does."""
    kept = [n for n in range(len(pairing.channels)) if any(one.fits[n] for one in looked)]
    if not kept:
        return list(range(len(pairing.channels))), []
    left = [
        LeftOver(
            reason="images that do not have the shape of the segmentation",
            files=tuple(case.images[channel] for case in pairing.cases.values()),
        )
        for number, channel in enumerate(pairing.channels)
        if number not in kept
    ]
    return kept, left


def _channel_names(
    pairing: Pairing, kept: Sequence[int], looked: Sequence[_Looked]
) -> tuple[str, ...]:
    """Return a name for each channel, by what the files' names and their values tell."""
    names: list[str] = []
    for number in kept:
        key = pairing.channels[number]
        count = max(one.num_channels[number] for one in looked)
        file = next(iter(pairing.cases.values())).images[key]
        if count > 1:
            colours = ["R", "G", "B", "A"][:count]
            is_colour = file.lower().endswith(RASTER_ENDINGS) and count <= len(colours)
            names += colours if is_colour else [f"channel_{n}" for n in range(count)]
        else:
            is_ct = all(one.is_ct[number] for one in looked)
            names.append("CT" if is_ct else _channel_name(pairing, key, len(kept)))
    if len(set(names)) < len(names):
        return tuple(f"{name}_{number}" for number, name in enumerate(names))
    return tuple(names)


def _channel_name(pairing: Pairing, key: str, num_files: int) -> str:
    """Return the sequence that all files of a channel name; else what sets them apart."""
    words = [take_apart(case.images[key]) for case in pairing.cases.values()]
    sequences = Counter(one.sequence for one in words)
    sequence = words[0].sequence
    if sequence is not None and len(sequences) == 1:
        return "CT" if sequence.lower() == "ct" else sequence
    if num_files == 1 or not key:
        return "image"
    return f"channel_{int(key)}" if key.isdigit() else key


def with_labels(found: Found, folder: Path, progress: bool) -> Found:
    """Read every segmentation and return the dataset with its labels."""
    counts: Counter[int] = Counter()
    problems = []
    function = partial(_values_of, found.folder, found.cases)
    needs = {
        case: _NEED_FACTOR * stored_bytes(found.folder / str(files.segmentation))
        for case, files in found.cases.items()
    }
    with progress_bar(len(found.cases), "read labels", shown=progress) as bar:
        for outcome in map_cases(function, list(found.cases), needs=needs):
            if outcome.error is None:
                counts.update(outcome.value or ())
            else:
                problems.append(str(outcome.error))
            bar.update()
    if not counts:
        listed = "\n".join(f"  {text}" for text in problems[:5])
        raise DatasetError(f"{folder}: no segmentation could be read:\n{listed}")
    if len(counts) > _MAX_VALUES:
        raise DatasetError(
            f"{folder}: the segmentations hold {len(counts)} different values, from {min(counts)} "
            f"to {max(counts)}; these look like instance numbers or intensities, not labels. Give "
            "the label maps: medseg dataset init FOLDER --segmentations PATTERN"
        )
    named, notes = find_label_names(folder, counts, found.cases)
    labels = name_labels(sorted(counts), named)
    return replace(
        found,
        names=LabelNames(labels=labels),
        label_counts=dict(sorted(counts.items())),
        notes=(*found.notes, *notes, *(f"not read: {text}" for text in problems)),
    )


def name_labels(values: Sequence[int], known: Mapping[int, str]) -> Labels:
    """Return name -> value for the values found, and no others; known names are used.

    Examples:
        >>> name_labels([0, 255], {})
        {'background': 0, 'foreground': 255}
        >>> name_labels([1, 3], {3: "liver", 4: "spleen"})
        {'background': 0, 'label_1': 1, 'liver': 3}
    """
    foreground = [value for value in values if value != 0]
    labels: Labels = {"background": 0}
    if foreground == [255] and 255 not in known:
        return {**labels, "foreground": 255}
    for value in sorted(foreground):
        name = known.get(value, f"label_{value}")
        labels[f"{name}_{value}" if name in labels else name] = value
    return labels


def _values_of(folder: Path, cases: Mapping[str, CaseFiles], case: str) -> tuple[int, ...]:
    array = read_segmentation(folder / str(cases[case].segmentation)).array
    return tuple(distinct_values(array).tolist())


def with_patients(cases: Mapping[str, CaseFiles]) -> tuple[dict[str, CaseFiles], str]:
    """Return cases with patients, where ids name them and nobody else did; and what to say."""
    if any(files.group is not None for files in cases.values()):
        return dict(cases), ""
    patients = find_patients(cases)
    if not patients:
        return dict(cases), ""
    groups = {case: patients.get(case, patient_of(case)) for case in cases}
    example = next(iter(patients))
    note = f"groups are patients, going by the ids ({example} -> {patients[example]})"
    return {
        case: files.model_copy(update={"group": groups[case]}) for case, files in cases.items()
    }, note
