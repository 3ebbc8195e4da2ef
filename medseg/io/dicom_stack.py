"""Where the slices of a DICOM series lie, and whether they make one even stack.

Position and direction of each slice alone tell it, never file names or numbers. DICOM's axes (left,
posterior, superior) exist in this file only.

Source:
    DICOM PS3.3 (2024) section C.7.6.2 (Image Plane Module) for positions, directions and spacing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError, GeometryError
from medseg.io.dicom_header import DicomHeader, tag_words
from medseg.io.image import Header, ItkGeometry, plain

_POSITION, _ORIENTATION, _SPACING = 0x00200032, 0x00200037, 0x00280030
_THICKNESS, _DISTANCE = 0x00180050, 0x00180088
_UNIT_TOLERANCE = 1e-3
"""How far direction cosines may be from perpendicular unit vectors: they are often rounded."""
_SAME_TOLERANCE = 2e-4
"""How far slices may differ in direction or pixel size (relative): 0.1 pixels across 512."""
_EVEN_TOLERANCE = 0.2
"""How far a slice may lie from its place in an even stack, in distances of slices: positions may be
rounded to 0.1 mm. A missing slice moves one by at least a third."""
_SIDEWAYS_TOLERANCE = 0.1
"""How far a slice may lie beside the line of the others, in pixels."""
_TILT_TOLERANCE = np.deg2rad(0.1)
"""How far the stack may lean from the normal of its slices; what is below stays in the affine."""
_SAME_PLACE_MM = 1e-3
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Slice:
    """Where one slice lies, in DICOM's axes (LPS, mm)."""

    header: DicomHeader
    shape: tuple[int, int]
    """Voxels along I and J: columns and rows."""
    spacing: tuple[float, float]
    """mm along I and J."""
    directions: NDArray[np.float64]
    """(3, 3) unit vectors of I, J and their normal, in columns."""
    position: NDArray[np.float64]
    """(3,) centre of the first voxel."""

    @property
    def name(self) -> str:
        return self.header.path.name

    def lies_like(self, other: _Slice) -> bool:
        """Return whether two slices are parallel and have the same pixels."""
        return (
            self.shape == other.shape
            and np.allclose(self.spacing, other.spacing, rtol=_SAME_TOLERANCE, atol=0)
            and np.allclose(self.directions, other.directions, rtol=0, atol=_SAME_TOLERANCE)
        )


def in_order(headers: Sequence[DicomHeader]) -> tuple[DicomHeader, ...]:
    """Return headers by position along the normal most of them have.

    Where one has no position or no direction, the order stays: `stack` says what is wrong.
    """
    counts = Counter(header.text(_ORIENTATION) for header in headers)
    usual = counts.most_common(1)[0][0]
    try:
        normal = _directions(next(one for one in headers if one.text(_ORIENTATION) == usual))[:, 2]
        places = {header.path: float(_position(header) @ normal) for header in headers}
    except DatasetError:
        return tuple(headers)
    return tuple(sorted(headers, key=lambda header: (places[header.path], header.path)))


def stack(folder: Path, headers: Sequence[DicomHeader]) -> tuple[Header, tuple[DicomHeader, ...]]:
    """Return the geometry of a series, and its files from the first slice to the last.

    Args:
        folder: Where the files lie, for messages.
        headers: One per slice, in any order.

    Raises:
        DatasetError: If a file holds several frames.
        GeometryError: If a slice does not say where it lies, or the slices make no even stack.
    """
    slices = [_slice(header) for header in headers]
    _check_parallel(folder, slices)
    normal = slices[0].directions[:, 2]
    slices.sort(key=lambda one: float(one.position @ normal))
    first = slices[0]
    axes = np.column_stack([first.directions[:, :2] * first.spacing, _step(folder, slices)])
    header = _header((*first.shape, len(slices)), axes, first.position)
    return header, tuple(one.header for one in slices)


def _slice(header: DicomHeader) -> _Slice:
    """Return where a file's one slice lies.

    Raises:
        DatasetError: If it has several frames.
        GeometryError: If a value is missing or makes no sense.
    """
    if header.num_frames > 1:
        raise DatasetError(
            f"{header.path}: holds {header.num_frames} frames (multi-frame or enhanced DICOM); "
            "expected one slice per file. Convert it to NIfTI, for instance with dcm2niix, or "
            "export it as single slices."
        )
    rows_mm, columns_mm = _given(header, _SPACING, 2)
    if min(rows_mm, columns_mm) <= 0:
        raise _bad(header, _SPACING, "two lengths above 0, in mm")
    return _Slice(
        header=header,
        shape=(header.whole(0x00280011), header.whole(0x00280010)),
        spacing=(columns_mm, rows_mm),  # the distance between columns is the step along I
        directions=_directions(header),
        position=_position(header),
    )


def _given(header: DicomHeader, tag: int, count: int) -> tuple[float, ...]:
    """Return the numbers of a value that must be there."""
    values = header.numbers(tag)
    if len(values) != count:
        raise _bad(header, tag, f"{count} numbers")
    return values


def _bad(header: DicomHeader, tag: int, expected: str) -> GeometryError:
    text = header.text(tag)
    found = f"is '{text}'" if text else "is missing"
    return GeometryError(
        f"{header.path}: {tag_words(tag)} {found}; expected {expected}. Without it nobody knows "
        "where the slice lies: export the original series again."
    )


def _position(header: DicomHeader) -> NDArray[np.float64]:
    return np.array(_given(header, _POSITION, 3))


def _directions(header: DicomHeader) -> NDArray[np.float64]:
    """Return the (3, 3) unit vectors of I, J and their normal, in columns (LPS)."""
    along_i, along_j = np.reshape(_given(header, _ORIENTATION, 6), (2, 3))
    lengths = np.linalg.norm(along_i), np.linalg.norm(along_j)
    off = max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(along_i @ along_j))
    if off > _UNIT_TOLERANCE:
        raise _bad(header, _ORIENTATION, "two perpendicular unit vectors")
    along_i = along_i / lengths[0]
    along_j = along_j - (along_j @ along_i) * along_i
    along_j = along_j / np.linalg.norm(along_j)
    return np.stack([along_i, along_j, np.cross(along_i, along_j)], axis=1)


def _check_parallel(folder: Path, slices: Sequence[_Slice]) -> None:
    """Check that all slices are parallel and of one size; what most have counts as expected."""
    groups: list[list[_Slice]] = []
    for one in slices:
        group = next((group for group in groups if group[0].lies_like(one)), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    if len(groups) == 1:
        return
    groups.sort(key=len, reverse=True)
    most, others = groups[0], [one for group in groups[1:] for one in group]
    localizers = [one for one in others if "LOCALIZER" in one.header.text(0x00080008).upper()]
    hint = f" Localizers among them: {len(localizers)}." if localizers else ""
    raise GeometryError(
        f"{folder}: {len(others)} of {len(slices)} slices do not fit the others: "
        f"{others[0].name} {_difference(others[0], most[0])} (as most have).{hint} Move what is "
        f"not part of the volume out of the folder: {_names(others)}."
    )


def _difference(found: _Slice, expected: _Slice) -> str:
    if found.shape != expected.shape:
        return f"has {found.shape} columns and rows, expected {expected.shape}"
    if not np.allclose(found.spacing, expected.spacing, rtol=_SAME_TOLERANCE, atol=0):
        return f"has pixels of {_mm(found.spacing)} mm, expected {_mm(expected.spacing)} mm"
    here, there = (one.header.text(_ORIENTATION) for one in (found, expected))
    return f"lies in another plane: its {tag_words(_ORIENTATION)} is {here}, expected {there}"


def _step(folder: Path, slices: Sequence[_Slice]) -> NDArray[np.float64]:
    """Return the way (3,) from one slice to the next, in mm.

    Args:
        folder: Where the files lie, for messages.
        slices: Parallel slices in order.

    Raises:
        GeometryError: If they make no even stack.
    """
    first, last = slices[0], slices[-1]
    normal = first.directions[:, 2]
    if len(slices) == 1:
        return normal * _thickness(first.header)
    places = np.array([float((one.position - first.position) @ normal) for one in slices])
    _check_doubled(folder, slices, places)
    _check_gaps(folder, slices, places)
    step = (last.position - first.position) / (len(slices) - 1)
    _check_straight(folder, slices, step)
    return step


def _header(
    shape: tuple[int, int, int], lps: NDArray[np.float64], origin: NDArray[np.float64]
) -> Header:
    """Return the header of a volume whose (3, 3) axes and origin are DICOM's, in mm."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = _LPS_TO_RAS @ lps, _LPS_TO_RAS @ origin
    spacing = np.linalg.norm(lps, axis=0)
    itk = ItkGeometry(
        spacing=tuple(spacing.tolist()),
        origin=tuple(origin.tolist()),
        direction=tuple((lps / spacing).ravel().tolist()),
    )
    return Header(shape=shape, affine=plain(affine), itk=itk)


def _thickness(header: DicomHeader) -> float:
    """Return the thickness of a slice that is alone, in mm."""
    for tag in (_THICKNESS, _DISTANCE):
        values = header.numbers(tag)
        if values and values[0] > 0:
            return values[0]
    raise _bad(header, _THICKNESS, "the thickness of this single slice in mm")


def _check_doubled(folder: Path, slices: Sequence[_Slice], places: NDArray[np.float64]) -> None:
    same = np.flatnonzero(np.diff(places) < _SAME_PLACE_MM)
    if same.size == 0:
        return
    first, second = slices[same[0]], slices[same[0] + 1]
    num_places = len(slices) - same.size
    raise GeometryError(
        f"{folder}: {len(slices)} slices lie at {num_places} positions: {first.name} and "
        f"{second.name} are both at {_mm(first.position)} mm; expected one slice per position. "
        "Remove copies, or give each echo, time or b-value a folder of its own."
    )


def _check_gaps(folder: Path, slices: Sequence[_Slice], places: NDArray[np.float64]) -> None:
    """Check that slices follow one another at one distance."""
    even = np.linspace(places[0], places[-1], len(places))
    if np.abs(places - even).max() <= _EVEN_TOLERANCE * places[-1] / (len(places) - 1):
        return
    gaps = np.diff(places)
    counts = np.rint(gaps / gaps.min())
    missing = int(counts.sum()) - len(gaps)
    widest = int(np.argmax(gaps))
    where = f"between {slices[widest].name} and {slices[widest + 1].name} are {gaps[widest]:.4g} mm"
    if np.abs(gaps - counts * gaps.min()).max() <= _EVEN_TOLERANCE * gaps.min():
        raise GeometryError(
            f"{folder}: {missing} of {len(slices) + missing} slices missing: {where}, expected "
            f"{gaps.min():.4g} mm. Copy or export the whole series again."
        )
    raise GeometryError(
        f"{folder}: the distance of slices changes from {gaps.min():.4g} to {gaps.max():.4g} mm: "
        f"{where}; expected one distance throughout. Add slices that are missing, or resample the "
        "series to even slices, for instance with dcm2niix."
    )


def _check_straight(folder: Path, slices: Sequence[_Slice], step: NDArray[np.float64]) -> None:
    """Check that the first voxels of all slices lie on one line along the normal."""
    first = slices[0]
    along = float(step @ first.directions[:, 2])
    sideways = float(np.linalg.norm(step - along * first.directions[:, 2]))
    tilt = np.arctan2(sideways, along)
    if tilt > _TILT_TOLERANCE:
        raise GeometryError(
            f"{folder}: the stack of slices leans by {np.rad2deg(tilt):.3g} degrees (gantry "
            f"tilt): each slice lies {sideways:.3g} mm sideways of the one before, expected "
            "straight above it. Resample it to a straight volume, for instance with dcm2niix."
        )
    for number, one in enumerate(slices):
        off = one.position - first.position - number * step
        beside = float(np.linalg.norm(off @ first.directions[:, :2]))
        if beside > _SIDEWAYS_TOLERANCE * min(first.spacing):
            raise GeometryError(
                f"{folder}: {one.name} lies {beside:.3g} mm beside the line from the first slice "
                "to the last; expected all on one line. Was its position changed? Export the "
                "series again."
            )


def _names(slices: Sequence[_Slice], most: int = 5) -> str:
    names = sorted(one.name for one in slices)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _mm(values: Sequence[float] | NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{float(value):.6g}" for value in values) + ")"
