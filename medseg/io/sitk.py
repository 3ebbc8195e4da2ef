"""Images through SimpleITK. Its (k, j, i) arrays and its LPS world exist in this file only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from medseg.errors import DatasetError, GeometryError
from medseg.io.image import Header, ItkGeometry, Stored, plain, split_ending, unreadable
from medseg.io.payload import check_payload

sitk: Any = SimpleITK
"""The library, which ships no types."""
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
_WRITTEN_TOLERANCE = 1e-3


def read(path: Path) -> Stored:
    """Read a file through SimpleITK.

    Raises:
        DatasetError: If the file is damaged, too short or too long, or holds no real numbers.
    """
    ending = split_ending(path.name)[1]
    check_payload(path, ending)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        _check_type(path, reader)
        image = reader.Execute()
    except RuntimeError as error:
        raise unreadable(path, f"ITK cannot read it ({_reason(error)})") from None
    return _stored(image, path, ending)


def from_sitk(image: Any) -> Stored:
    """Return what a SimpleITK image holds.

    Raises:
        DatasetError: If it holds no real numbers or has more than three axes.
    """
    origin = Path("SimpleITK image")
    _check_type(origin, image)
    return _stored(image, origin, ".nii.gz")


def _reason(error: RuntimeError) -> str:
    """Return the last line of ITK's message, which says what went wrong."""
    return [line.strip() for line in str(error).splitlines() if line.strip()][-1]


def _check_type(path: Path, image: Any) -> None:
    """Check an image, or a reader that knows its header, before voxels are touched."""
    name = sitk.GetPixelIDValueAsString(image.GetPixelIDValue())
    if "vector" in name:
        raise DatasetError(
            f"{path}: holds several values per voxel ({name}); expected one real number. "
            "Convert it to one file per channel."
        )
    if "complex" in name or "label" in name:
        raise DatasetError(
            f"{path}: holds {name} values; expected one real number per voxel. Convert it."
        )
    if image.GetDimension() > 3:
        raise DatasetError(
            f"{path}: has {image.GetDimension()} axes, shape {image.GetSize()}; expected three. "
            "Save one volume per file."
        )


def _stored(image: Any, path: Path, ending: str) -> Stored:
    array = sitk.GetArrayFromImage(image)
    if array.ndim == 2:
        array = array[np.newaxis]
    geometry = ItkGeometry(
        spacing=image.GetSpacing(), origin=image.GetOrigin(), direction=image.GetDirection()
    )
    header = Header(
        shape=image.GetSize(), affine=plain(_affine(geometry)), ending=ending, itk=geometry
    )
    return Stored(array=array.transpose(2, 1, 0), header=header)


def _affine(itk: ItkGeometry) -> NDArray[np.float64]:
    """Return the (4, 4) voxel index to RAS+ mm; a slice lies in the plane of I and J."""
    length = len(itk.spacing)
    lps, origin = np.eye(3), np.zeros(3)
    lps[:length, :length] = np.reshape(itk.direction, (length, length)) * np.array(itk.spacing)
    origin[:length] = itk.origin
    affine = np.eye(4)
    affine[:3, :3] = _LPS_TO_RAS @ lps
    affine[:3, 3] = _LPS_TO_RAS @ origin
    return affine


def _itk_geometry(header: Header) -> ItkGeometry:
    if header.itk is not None:
        return header.itk
    affine = np.array(header.affine)
    lps = _LPS_TO_RAS @ affine[:3, :3]
    spacing = np.linalg.norm(lps, axis=0)
    return ItkGeometry(
        spacing=tuple(spacing.tolist()),
        origin=tuple((_LPS_TO_RAS @ affine[:3, 3]).tolist()),
        direction=tuple((lps / spacing).ravel().tolist()),
    )


def write(path: Path, array: NDArray[Any], header: Header) -> None:
    """Write a file through SimpleITK; not atomic, `medseg.io.write` sees to that.

    Args:
        path: A file in a format of ITK's.
        array: (I, J, K), written in its own type.
        header: Geometry.

    Raises:
        GeometryError: If the format cannot hold the geometry.
        DatasetError: If ITK cannot write the file.
    """
    itk = _itk_geometry(header)
    values = array.transpose(2, 1, 0)
    values = values[0] if len(itk.spacing) == 2 else values
    image = sitk.GetImageFromArray(np.ascontiguousarray(values))
    image.SetSpacing(itk.spacing)
    image.SetOrigin(itk.origin)
    try:
        image.SetDirection(itk.direction)
        sitk.WriteImage(image, str(path), True)
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DatasetError(f"{path.name}: ITK cannot write it ({_reason(error)}).") from None
    written = ItkGeometry(
        spacing=reader.GetSpacing(), origin=reader.GetOrigin(), direction=reader.GetDirection()
    )
    found = Header(shape=reader.GetSize(), affine=plain(_affine(written)))
    difference = header.grid.disagreement(found.grid, _WRITTEN_TOLERANCE)
    if difference is not None:
        raise GeometryError(
            f"{path.name}: this format cannot hold the image's geometry: {difference}. "
            "Write .nii.gz instead."
        )
