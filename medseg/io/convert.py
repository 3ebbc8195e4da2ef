"""Images that other libraries hold in memory, without importing libraries nobody used."""

from __future__ import annotations

from typing import Any

from medseg.io.image import Image
from medseg.io.read import image_of


def from_object(value: Any) -> Image | None:
    """Return a SimpleITK or nibabel image as an image of intensities.

    Returns:
        Array (I, J, K) float32 with grid and header; None if `value` is neither.

    Raises:
        DatasetError: If it is no single volume of finite real numbers.
    """
    library = type(value).__module__.partition(".")[0]
    if library == "SimpleITK":
        from medseg.io.sitk import from_sitk

        return image_of(from_sitk(value), "SimpleITK image")
    if library == "nibabel":
        from medseg.io.nifti import from_nibabel

        return image_of(from_nibabel(value), "nibabel image")
    return None
