"""NIfTI-1, NIfTI-2 and Analyze through nibabel's headers. Every byte of a file is accounted for."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from medseg.errors import DatasetError
from medseg.io.colour import OPAQUE, without_opacity
from medseg.io.gunzip import GunzipFile
from medseg.io.image import Header, NiftiGeometry, Stored, check_length, plain, unreadable

nib: Any = nibabel
"""The library, whose headers have no types."""
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}
_MAGIC = (b"n+1\0", b"ni1\0")
_LARGEST_NIFTI1_AXIS = 32767
_LARGEST_GZIP_RATIO = 1100
_GZIP_LEVEL = 3
_WRITE_BYTES = 2**24
"""Brought into the order of the file at a time."""
_STRIP = 16
_SCANNER = 1
_FORM_CODES = {0, 1, 2, 3, 4, 5}


def read(path: Path) -> Stored:
    """Read a NIfTI file or pair.

    The affine is the sform where its code is above 0, else the qform where its code is above 0,
    else voxel sizes alone with the first axis pointing left; metres and micrometres become mm.

    Args:
        path: `.nii`, `.nii.gz`, or either file of a `.hdr`/`.img` pair.

    Raises:
        DatasetError: If the file is damaged, too short or too long, or holds no real numbers.

    Source:
        Affine: behaviour of nibabel `get_best_affine`, and the NIfTI-1 standard's units.
    """
    header_path, data_path = _files(path)
    try:
        with ExitStack() as stack:
            file = stack.enter_context(_open(header_path))
            header = _parse_header(file, header_path)
            if data_path != header_path:
                file = stack.enter_context(_open(data_path))
            array = _read_array(file, header, data_path)
        return _stored(array, header, path)
    except DatasetError:
        raise
    except (EOFError, zlib.error) as error:
        raise unreadable(path, _compression_problem(path, error)) from None
    except (HeaderDataError, KeyError, ValueError, OverflowError) as error:
        raise unreadable(path, f"its NIfTI header is not valid ({error})") from None


def _files(path: Path) -> tuple[Path, Path]:
    """Return the files with the header and with the voxels."""
    if path.suffix.lower() not in (".hdr", ".img"):
        return path, path
    upper = path.suffix.isupper()
    header, data = (path.with_suffix(s.upper() if upper else s) for s in (".hdr", ".img"))
    for part in (header, data):
        if not part.is_file():
            raise DatasetError(
                f"{path}: its other file {part.name} is missing; expected both {header.name} and "
                f"{data.name} in {path.parent}. Copy both."
            )
    return header, data


def _open(path: Path) -> Any:
    if path.name.lower().endswith(".gz"):
        return GunzipFile(path)
    return open(path, "rb")


def _compression_problem(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return "it ends in .gz and is not gzip-compressed"
    if isinstance(error, EOFError):
        return "the compressed data end too early (cut short)"
    return f"the compressed data are broken ({error})"


def _parse_header(file: Any, path: Path) -> Any:
    """Read the header, leaving the file behind it; byte order is recognised."""
    block = file.read(348)
    sizes = {struct.unpack(order + "i", block[:4])[0] for order in "<>"} if len(block) > 3 else {0}
    if 540 in sizes:
        block += file.read(540 - 348)
        kind, length = nib.Nifti2Header, 540
    elif 348 in sizes and block[344:] in _MAGIC:
        kind, length = nib.Nifti1Header, 348
    elif 348 in sizes and path.suffix.lower() == ".hdr":
        kind, length = nib.AnalyzeHeader, 348
    else:
        packed = block[:2] == b"\x1f\x8b"
        hint = " (it is gzip-compressed: name it .nii.gz)" if packed else ""
        raise unreadable(path, f"it does not begin with a NIfTI header{hint}")
    if len(block) < length:
        raise unreadable(path, f"its header has {len(block)} bytes", f"{length}")
    header = kind(block, check=False)
    return header if _is_in_order(header) else kind(block)


def _is_in_order(header: Any) -> bool:
    """Return whether nibabel's checks, which are slow, would find nothing to mend or refuse."""
    if "sform_code" not in header:
        return False
    raw = header.structarr
    offset = raw["vox_offset"].item()
    smallest = raw.nbytes + 4 if raw["magic"].item().startswith(b"n+") else 0
    code, known = raw["datatype"].item(), header._data_type_codes
    return bool(
        code in known
        and raw["bitpix"] == known.dtype[code].itemsize * 8
        and abs(raw["pixdim"][0]) == 1
        and (raw["pixdim"][1:4] > 0).all()
        and {raw["qform_code"].item(), raw["sform_code"].item()} <= _FORM_CODES
        and offset % 16 == 0
        and offset >= smallest
    )


def _read_array(file: Any, header: Any, path: Path) -> NDArray[Any]:
    """Read the voxels to the end of the file."""
    shape = tuple(int(length) for length in header.get_data_shape())
    dtype = _real_type(header, path)
    if not shape or min(shape) < 1:
        raise unreadable(path, f"its header gives the shape {shape}")
    size = int(np.prod([dtype.itemsize, *shape], dtype=object))
    file.seek(max(int(header["vox_offset"]), file.tell()))
    stored = path.stat().st_size
    packed = path.name.lower().endswith(".gz")
    largest = stored * _LARGEST_GZIP_RATIO if packed else max(stored - file.tell(), 0)
    check_length(path, min(size, largest), size)
    buffer = np.empty(size, dtype=np.uint8)
    check_length(path, _fill(file, buffer.data), size)
    check_length(path, size + _remaining(file), size)
    return buffer.view(dtype).reshape(shape, order="F")


def _real_type(header: Any, path: Path) -> np.dtype[Any]:
    dtype: np.dtype[Any] = header.get_data_dtype()
    if dtype.kind not in "iuf" and not dtype.fields:
        code = int(header["datatype"])
        name = "complex" if dtype.kind == "c" else "unusual"
        raise DatasetError(
            f"{path}: holds {name} values (NIfTI data type {code}); expected one real number per "
            "voxel. Convert it to one file per part."
        )
    return dtype


def _fill(file: Any, buffer: memoryview) -> int:
    """Read into a buffer until it is full or the file ends; return the number of bytes read."""
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled : filled + 2**24])
        if not count:
            break
        filled += count
    return filled


def _remaining(file: Any) -> int:
    return sum(len(block) for block in iter(lambda: file.read(2**14), b""))


def _stored(array: NDArray[Any], header: Any, path: Path) -> Stored:
    shape = array.shape
    array = _spatial(array, path)
    slope, inter = header.get_slope_inter()
    nifti = _geometry(header) if "sform_code" in header else None
    scale = _MM_PER_UNIT.get(nifti.xyzt_units & 7, 1.0) if nifti else 1.0
    affine = np.diag([scale, scale, scale, 1.0]) @ _affine(header, nifti)
    name = path.name.lower()
    shape = shape if array.ndim == 3 else shape[:3]
    is_rgb = bool(array.dtype.fields)
    return Stored(
        array=_colours(array, path) if is_rgb else array,
        slope=1.0 if slope is None else float(slope),
        inter=0.0 if inter is None else float(inter),
        fourth="colours" if is_rgb else "series",
        header=Header(
            shape=shape,
            affine=plain(affine),
            ending=".nii.gz" if name.endswith(".gz") else path.suffix.lower(),
            nifti=nifti,
        ),
    )


def _spatial(array: NDArray[Any], path: Path) -> NDArray[Any]:
    """Return (I, J, K), or (I, J, K, T) for a series."""
    shape = array.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    shape = (*shape, 1, 1)[:3] if len(shape) < 3 else shape
    if len(shape) > 4:
        raise DatasetError(
            f"{path}: has {len(shape)} axes, shape {shape}; expected three. "
            "Save one volume per file."
        )
    return array.reshape(shape, order="F")


def _colours(array: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    """Return (I, J, K, 3) of (I, J, K) records of red, green, blue and perhaps opacity."""
    names = array.dtype.names or ()
    if array.ndim != 3:
        raise DatasetError(
            f"{path}: holds a series of {array.shape[3]} volumes in colours; expected one. "
            "Save one volume per file."
        )
    colours = np.stack([array[name] for name in names], axis=-1)
    return without_opacity(colours, OPAQUE, str(path)) if len(names) == 4 else colours


def _affine(header: Any, nifti: NiftiGeometry | None) -> NDArray[np.float64]:
    if nifti is not None and nifti.sform_code > 0:
        return np.array([*nifti.sform, (0.0, 0.0, 0.0, 1.0)])
    best: NDArray[np.float64] = header.get_best_affine()
    return best


def _geometry(header: Any) -> NiftiGeometry:
    raw = header.structarr
    fields = dict(zip(raw.dtype.names, raw.item(), strict=True))

    def floats(*names: str) -> tuple[float, ...]:
        return tuple(float(fields[name]) for name in names)

    return NiftiGeometry(
        version=2 if fields["sizeof_hdr"] == 540 else 1,
        pixdim=tuple(raw["pixdim"].tolist()),
        xyzt_units=fields["xyzt_units"],
        qform_code=fields["qform_code"],
        sform_code=fields["sform_code"],
        quaternion=floats("quatern_b", "quatern_c", "quatern_d"),
        offset=floats("qoffset_x", "qoffset_y", "qoffset_z"),
        sform=tuple(tuple(raw[f"srow_{axis}"].tolist()) for axis in "xyz"),
    )


def from_nibabel(image: Any) -> Stored:
    """Return what a nibabel image holds, already scaled.

    Raises:
        DatasetError: If it holds no real numbers or more than four axes.
    """
    array = np.asanyarray(image.dataobj)
    header = image.header
    origin = Path(image.get_filename() or "nibabel image")
    _real_type(header, origin)
    nifti = _geometry(header) if "sform_code" in header else None
    spatial = _spatial(array, origin)
    scale = _MM_PER_UNIT.get(nifti.xyzt_units & 7, 1.0) if nifti else 1.0
    affine = np.diag([scale, scale, scale, 1.0]) @ image.affine
    shape = array.shape if spatial.ndim == 3 else array.shape[:3]
    return Stored(array=spatial, header=Header(shape=shape, affine=plain(affine), nifti=nifti))


def write(
    path: Path,
    array: NDArray[Any],
    header: Header,
    *,
    slope: float = 1.0,
    extension: bytes = b"",
) -> None:
    """Write a NIfTI file or pair; not atomic, `medseg.io.write` sees to that.

    Beside the array it takes no memory but that of a few slices.

    Args:
        path: `.nii`, `.nii.gz`, or either file of a `.hdr`/`.img` pair.
        array: (I, J, K), written in its own type.
        header: Geometry; fields of a NIfTI input are written as they were.
        slope: What a stored value is multiplied with by who reads it (`scl_slope`).
        extension: Header extension; a pair, which old programs read as Analyze, goes without.
    """
    pair = path.suffix.lower() in (".hdr", ".img")
    shape = header.shape
    front = header_bytes(
        array.dtype, shape, header, slope=slope, extension=b"" if pair else extension, pair=pair
    )
    data_path = path.with_suffix(".img") if pair else path
    if pair:
        path.with_suffix(".hdr").write_bytes(front)
    with open(data_path, "wb") as plain_file, ExitStack() as stack:
        file: Any = plain_file
        if path.name.lower().endswith(".gz"):
            file = stack.enter_context(
                gzip.GzipFile(
                    filename="", mode="wb", compresslevel=_GZIP_LEVEL, fileobj=plain_file, mtime=0
                )
            )
        if not pair:
            file.write(front)
        for part in _stored_order(array):
            file.write(part.data)


def _stored_order(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield the voxels in the order of the file, a few slices at a time.

    Copied in narrow strips: whole rows of 512 x 512 slices would fall on the same lines of the
    processor's cache again and again, which takes several times as long.
    """
    reverse = array.T
    native = array.dtype.newbyteorder("=")
    step = max(1, _WRITE_BYTES // max(1, math.prod(reverse.shape[1:]) * native.itemsize))
    for start in range(0, len(reverse), step):
        part = reverse[start : start + step]
        if not part.flags.c_contiguous or part.dtype != native:
            slices = np.empty(part.shape, dtype=native)
            for first in range(0, part.shape[-1], _STRIP):
                strip = (..., slice(first, first + _STRIP))
                slices[strip] = part[strip]
            part = slices
        yield part


def header_bytes(
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    header: Header,
    *,
    slope: float = 1.0,
    extension: bytes = b"",
    pair: bool = False,
) -> bytes:
    """Return what a file has before its voxels.

    Args:
        dtype: Type of the voxels, which are in this machine's byte order.
        shape: Shape of the array in the file.
        header: Geometry of the image it belongs to.
        slope: What a stored value is multiplied with.
        extension: Header extension, its length a multiple of 16.
        pair: Whether the voxels lie in a file of their own.
    """
    target = _new_header(dtype, shape, header)
    target["scl_slope"] = slope
    target["vox_offset"] = 0 if pair else target.structarr.nbytes + 4 + len(extension)
    if pair:
        target["magic"] = bytes(target["magic"].item()).replace(b"n+", b"ni")
    has_extension = bytes([bool(extension), 0, 0, 0])
    return bytes(target.binaryblock) + has_extension + extension


def _new_header(dtype: np.dtype[Any], shape: tuple[int, ...], header: Header) -> Any:
    nifti = header.nifti
    large = max(shape) > _LARGEST_NIFTI1_AXIS or (nifti is not None and nifti.version == 2)
    target = nib.Nifti2Header() if large else nib.Nifti1Header()
    target.set_data_dtype(dtype.newbyteorder("="))
    target.set_data_shape(shape)
    if nifti is not None:
        _restore_geometry(target, nifti)
    else:
        _place(target, np.array(header.affine))
    target["scl_inter"] = 0
    for axis in range(len(header.shape) + 1, len(shape) + 1):
        target["pixdim"][axis] = target["pixdim"][axis] or 1  # a step of 0 is refused by ITK
    return target


def _restore_geometry(target: Any, nifti: NiftiGeometry) -> None:
    target["pixdim"] = nifti.pixdim
    target["xyzt_units"] = nifti.xyzt_units
    target["qform_code"], target["sform_code"] = nifti.qform_code, nifti.sform_code
    for name, value in zip(("quatern_b", "quatern_c", "quatern_d"), nifti.quaternion, strict=True):
        target[name] = value
    for axis, value, row in zip("xyz", nifti.offset, nifti.sform, strict=True):
        target[f"qoffset_{axis}"], target[f"srow_{axis}"] = value, row


def _place(target: Any, affine: NDArray[np.float64]) -> None:
    """Set sform and qform; a sheared affine has no qform, so its code is 0."""
    target.set_sform(affine, code=_SCANNER)
    target.set_qform(affine, code=_SCANNER)
    if not np.allclose(target.get_qform(), affine, rtol=1e-4, atol=1e-3):
        target["qform_code"] = 0
    target.set_xyzt_units("mm")
