"""Problems that show only between cases: duplicates, outliers, patients in several cases."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from medseg.check.outliers import apart, minority
from medseg.data.patients import find_patients
from medseg.labels import LabelScheme
from medseg.schema.check import CaseFacts, FileFacts, Problem
from medseg.schema.dataset import DatasetSpec

_AXIS_OF = {letter: axis for axis, pair in enumerate(("LR", "PA", "IS")) for letter in pair}
_SPACING_FACTOR = 3.0
"""Voxels this much larger or smaller than all others are worth a look."""
_INTENSITY_FACTOR = 4.0
"""Standard deviations this much larger or smaller than all others are."""
_MEDIAN_STDS = 3.0
"""Medians, in standard deviations of their image, this far from all others are."""
_MAX_NAMED = 5
_SEEN_AGAIN = ("missing-file", "missing-segmentation", "channel-count")


def compare_cases(spec: DatasetSpec, facts: Mapping[str, CaseFacts]) -> tuple[Problem, ...]:
    """Return what is wrong with the cases of a dataset taken together; never an error.

    Args:
        spec: The dataset.
        facts: Case id -> what `inspect_case` found.
    """
    usable = {case: entry for case, entry in facts.items() if not entry.errors}
    return (
        *_same_images(spec, facts),
        *_same_segmentations(spec, facts),
        *_orientations(usable),
        *_spacings(usable),
        *_intensities(spec, usable),
        *_scalings(spec, usable),
        *_patients(spec),
        *_colliding_ids(spec),
        *_unused_labels(spec, facts),
    )


def unseen(described: Sequence[Problem], facts: Mapping[str, CaseFacts]) -> tuple[Problem, ...]:
    """Return the problems of a description that the files of the cases do not show again.

    Args:
        described: What `scan_dataset` found.
        facts: Case id -> what `inspect_case` found.
    """
    return tuple(p for p in described if p.case not in facts or p.code not in _SEEN_AGAIN)


def _warning(
    code: str, message: str, *, case: str | None = None, file: str | None = None
) -> Problem:
    return Problem(code=code, level="warning", message=message, case=case, file=file)


def _image_files(spec: DatasetSpec, case: str, entry: CaseFacts) -> list[FileFacts]:
    names = set(spec.cases[case].channels)
    return [file for file in entry.files if file.path in names]


def _same_images(spec: DatasetSpec, facts: Mapping[str, CaseFacts]) -> Iterator[Problem]:
    """Compare every image with those of earlier cases; constant ones say nothing."""
    first_with: dict[str, tuple[str, FileFacts]] = {}
    for case, entry in facts.items():
        constant = {problem.file for problem in entry.problems if problem.code == "constant"}
        for file in _image_files(spec, case, entry):
            if not file.picture or file.path in constant:
                continue
            earlier, other = first_with.setdefault(file.picture, (case, file))
            if earlier == case:
                continue
            how = "byte for byte" if other.sha256 == file.sha256 else "stored in another way"
            yield _warning(
                "duplicate-image",
                f"{file.path} holds the same image as {other.path} of case {earlier!r}, {how}; "
                "expected another one. A fold would be judged on what it was trained on: remove "
                "one, or give both cases the same group.",
                case=case,
                file=file.path,
            )


def _same_segmentations(spec: DatasetSpec, facts: Mapping[str, CaseFacts]) -> Iterator[Problem]:
    first_with: dict[str, tuple[str, str]] = {}
    pictures: dict[str, set[str]] = {}
    for case, entry in facts.items():
        name = spec.cases[case].segmentation
        pictures[case] = {file.picture for file in _image_files(spec, case, entry)}
        file = next((f for f in entry.files if f.path == name), None)
        if file is None or len(entry.labels) < 2:
            continue
        earlier, other = first_with.setdefault(file.sha256, (case, file.path))
        if earlier == case or pictures[earlier] & pictures[case]:
            continue
        yield _warning(
            "duplicate-segmentation",
            f"{file.path} is byte for byte {other} of case {earlier!r}, though the images differ; "
            "expected a segmentation of its own. One of them belongs to another image.",
            case=case,
            file=file.path,
        )


def _orientations(facts: Mapping[str, CaseFacts]) -> Iterator[Problem]:
    found = minority({case: e.orientation for case, e in facts.items() if e.orientation})
    if found is None:
        return
    usual, others = found
    for case in others:
        yield _warning(
            "orientation-outlier",
            f"stored {facts[case].orientation}, {len(facts) - len(others)} of {len(facts)} cases "
            f"are {usual}. medseg turns every case the same way by its header; look at the "
            "picture, in case the header is wrong.",
            case=case,
        )


def _canonical_spacing(entry: CaseFacts) -> tuple[float, ...] | None:
    """Return the spacing along right, anterior, superior, in mm."""
    if entry.spacing is None or len(entry.orientation) != 3:
        return None
    axes = [_AXIS_OF[letter] for letter in entry.orientation]
    return tuple(entry.spacing[axes.index(axis)] for axis in range(3))


def _spacings(facts: Mapping[str, CaseFacts]) -> Iterator[Problem]:
    found = {case: _canonical_spacing(entry) for case, entry in facts.items()}
    known = {case: spacing for case, spacing in found.items() if spacing is not None}
    if not known:
        return
    logs = np.log(np.array(list(known.values())))
    least = math.log(_SPACING_FACTOR)
    far = {place for axis in range(3) for place in apart(logs[:, axis].tolist(), least)}
    usual = np.exp(np.median(logs, axis=0))
    cases = list(known)
    for place in sorted(far):
        yield _warning(
            "spacing-outlier",
            f"voxels of {_numbers(known[cases[place]])} mm (right, anterior, superior), in most "
            f"cases about {_numbers(usual.tolist())} mm. Check the header: lost or in another "
            "unit?",
            case=cases[place],
        )


def _intensities(spec: DatasetSpec, facts: Mapping[str, CaseFacts]) -> Iterator[Problem]:
    for number, channel in enumerate(spec.channels):
        measured = {
            case: entry.channels[number]
            for case, entry in facts.items()
            if len(entry.channels) == len(spec.channels) and entry.channels[number].std > 0
        }
        cases, found = list(measured), list(measured.values())
        far = {
            *apart([math.log(one.std) for one in found], math.log(_INTENSITY_FACTOR)),
            *apart([one.median / one.std for one in found], _MEDIAN_STDS),
        }
        for place in sorted(far):
            one = found[place]
            usual = [float(np.median([getattr(o, n) for o in found])) for n in ("median", "std")]
            yield _warning(
                "intensity-outlier",
                f"channel {channel}: median {one.median:.4g}, standard deviation {one.std:.4g}; in "
                f"most cases about {usual[0]:.4g} and {usual[1]:.4g}. Another sequence, other "
                "units, or a damaged export? Look at the image.",
                case=cases[place],
            )


def _scalings(spec: DatasetSpec, facts: Mapping[str, CaseFacts]) -> Iterator[Problem]:
    """Find the few images that are scaled among many that are not."""
    files = [(case, f) for case, entry in facts.items() for f in _image_files(spec, case, entry)]
    plain = {str(n): (f.slope, f.inter) == (1.0, 0.0) for n, (_, f) in enumerate(files)}
    found = minority(plain)
    if found is None or not found[0]:
        return
    for number in found[1]:
        case, file = files[int(number)]
        yield _warning(
            "odd-scaling",
            f"{file.path}: scl_slope is {file.slope:g} and scl_inter {file.inter:g}; no scaling "
            "(1, 0) in most other images. medseg applies it; if the intensities are then wrong, "
            "correct the header.",
            case=case,
            file=file.path,
        )


def _patients(spec: DatasetSpec) -> Iterator[Problem]:
    if any(entry.group is not None for entry in spec.cases.values()):
        return
    found: dict[str, list[str]] = {}
    for case, patient in find_patients(spec.cases).items():
        found.setdefault(patient, []).append(case)
    if not found:
        return
    named = [f"{patient} ({', '.join(cases)})" for patient, cases in found.items()]
    more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
    count = f"{len(named)} patient{'s' if len(named) != 1 else ''}"
    yield _warning(
        "same-patient",
        f"{count} seem{'s' if len(named) == 1 else ''} to have several cases: "
        f"{', '.join(named[:_MAX_NAMED])}{more}. A fold would be judged on patients it was "
        "trained on: give every case its patient as group in a manifest.",
    )


def _colliding_ids(spec: DatasetSpec) -> Iterator[Problem]:
    first_with: dict[str, str] = {}
    for case in spec.cases:
        earlier = first_with.setdefault(case.casefold(), case)
        if earlier != case:
            yield _warning(
                "similar-ids",
                f"cases {earlier!r} and {case!r} differ in upper and lower case alone; on many "
                "file systems one would overwrite the other. Rename one.",
                case=case,
            )


def _unused_labels(spec: DatasetSpec, facts: Mapping[str, CaseFacts]) -> Iterator[Problem]:
    found = {value for entry in facts.values() for value in entry.labels}
    if not found:
        return
    for name, values in LabelScheme.from_spec(spec).structures.items():
        if not found & set(values):
            listed = ", ".join(str(value) for value in values)
            yield _warning(
                "unused-label",
                f"label {name!r} ({listed}) has no voxel in any case; expected some. Remove it "
                "from the dataset's description, or check the values of the segmentations.",
            )


def _numbers(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:.3g}" for value in values)
