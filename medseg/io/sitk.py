"""Images through SimpleITK. Its (k, j, i) arrays and its LPS world exist in this file only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

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
    if "complex" in name or "label" in name:
        raise DatasetError(f"{path}: holds {name} values; expected real numbers. Convert it.")
    is_vector = "vector" in name
    if image.GetDimension() > (3 if is_vector else 4):
        raise DatasetError(
            f"{path}: has {image.GetDimension()} axes, shape {image.GetSize()}, and {name} values; "
            "expected three axes, and perhaps one of channels. Save one volume per file."
        )


def _stored(image: Any, path: Path, ending: str) -> Stored:
    array, geometry = sitk.GetArrayFromImage(image), _geometry(image)
    is_vector = image.GetNumberOfComponentsPerPixel() > 1
    if image.GetDimension() == 2:
        array = array[np.newaxis]
    axes = (2, 1, 0, 3) if is_vector else (2, 1, 0) if array.ndim == 3 else (3, 2, 1, 0)
    header = Header(
        shape=image.GetSize()[:3], affine=plain(_affine(geometry)), ending=ending, itk=geometry
    )
    fourth: Literal["series", "colours", "values"] = "series"
    if is_vector:
        fourth = "colours" if array.shape[3] == 3 and array.dtype == np.uint8 else "values"
    return Stored(array=array.transpose(axes), header=header, fourth=fourth)


def _geometry(image: Any) -> ItkGeometry:
    """Return spacing, origin and direction of the first three axes."""
    length = image.GetDimension()
    direction = np.reshape(image.GetDirection(), (length, length))[:3, :3]
    return ItkGeometry(
        spacing=image.GetSpacing()[:3],
        origin=image.GetOrigin()[:3],
        direction=tuple(direction.ravel().tolist()),
    )


def read_rows(path: Path) -> NDArray[Any]:
    """Read the rows of a picture, (rows, columns, C), from the top.

    Raises:
        DatasetError: If ITK cannot read it.
    """
    try:
        rows: NDArray[Any] = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    except RuntimeError as error:
        raise unreadable(path, f"ITK cannot read it ({_reason(error)})") from None
    return rows


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
        raise DatasetError(
            f"{path.name}: ITK cannot write {array.dtype} values so ({_reason(error)}). "
            "Write .nii.gz instead."
        ) from None
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
