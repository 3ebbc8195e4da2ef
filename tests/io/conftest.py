"""One asymmetric oblique image, and ways to write it that share nothing with medseg."""

import gzip
import struct
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import SimpleITK

SHAPE = (5, 6, 7)
MARK = (1, 4, 2)
AFFINE = np.array(
    [
        [0.6, -0.55, 0.8, -31.5],
        [0.3, 0.9, -1.2, 12.25],
        [0.2, 0.35, 2.6, 40.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
"""Sheared on purpose: only an sform holds it."""
MARK_WORLD = (-31.5, 13.75, 46.8)
"""Position of voxel (1, 4, 2), worked out by hand: -31.5 + 0.6 - 2.2 + 1.6, and so on."""


def oblique(spacing=(0.7, 1.1, 3.0), origin=(-31.5, 12.25, 40.0)):
    """Return a rotated affine with no shear."""
    a, b = np.deg2rad((20, -35))
    about_s = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_r = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_s @ about_r * spacing
    affine[:3, 3] = origin
    return affine


def values(dtype=np.int16, shape=SHAPE):
    """Return an array in which no voxel equals another (of an integer type that holds them)."""
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def write_nifti(path, array, affine=AFFINE, *, sform=1, qform=0, slope=None, inter=0, **fields):
    """Write a NIfTI file byte by byte; nibabel only fills the header."""
    order = array.dtype.byteorder if array.dtype.byteorder in "<>" else "<"
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_xyzt_units("mm")
    if qform:
        header.set_qform(affine, qform)
    if sform:
        header.set_sform(affine, sform)
    header["scl_slope"], header["scl_inter"] = (np.nan, np.nan) if slope is None else (slope, inter)
    header["vox_offset"] = 352
    for name, value in fields.items():
        header[name] = value
    content = header.binaryblock + bytes(4) + array.tobytes(order="F")
    packed = gzip.compress(content, 3) if path.name.endswith(".gz") else content
    path.write_bytes(packed)
    return path


def itk_image(array, affine=None):
    """Return a SimpleITK image of an (I, J, K) array, flipping the world by hand."""
    affine = oblique() if affine is None else affine
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    direction = affine[:3, :3] / spacing
    direction[:2] *= -1
    image.SetSpacing(spacing.tolist())
    image.SetOrigin([-affine[0, 3], -affine[1, 3], affine[2, 3]])
    image.SetDirection(direction.ravel().tolist())
    return image


def write_itk(path, array, affine=None, compress=False):
    SimpleITK.WriteImage(itk_image(array, affine), str(path), compress)
    return path


def header_of(path):
    """Return the fields of a NIfTI-1 header, read with struct alone."""
    with gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as file:
        block = file.read(348)
    assert struct.unpack("<i", block[:4]) == (348,)
    names = {
        "dim": (40, "8h"), "datatype": (70, "h"), "pixdim": (76, "8f"), "vox_offset": (108, "f"),
        "scl_slope": (112, "f"), "scl_inter": (116, "f"), "xyzt_units": (123, "B"),
        "qform_code": (252, "h"), "sform_code": (254, "h"), "quaternion": (256, "3f"),
        "offset": (268, "3f"), "srow": (280, "12f"), "magic": (344, "4s"),
    }  # fmt: skip
    return {name: struct.unpack_from("<" + code, block, at) for name, (at, code) in names.items()}


@pytest.fixture(scope="session")
def sample():
    """Return the helpers and constants of this file."""
    return SimpleNamespace(
        shape=SHAPE,
        mark=MARK,
        mark_world=MARK_WORLD,
        affine=AFFINE,
        oblique=oblique,
        values=values,
        write_nifti=write_nifti,
        itk_image=itk_image,
        write_itk=write_itk,
        header_of=header_of,
    )
