"""Files of `torch.save` from strangers: their values, and their tensors when they are asked for.

Source:
    Both formats as torch 2.13 writes and reads them: a zip archive with one entry for each storage,
    and, before torch 1.6, a stream of pickles with the storages behind them.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from medseg.errors import BundleError
from medseg.execute.sizes import size_words
from medseg.interop.nnunet.pickles import MAX_BYTES, read_next_pickle, read_pickle
from medseg.interop.nnunet.stand_ins import Constructor, Leaf
from medseg.io.archive import Archive, StoredRange

if TYPE_CHECKING:
    import torch

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_BLOCK = 2**24
_SMALL = 1024
_MAX_AXES = 16
_LARGEST = 2**48
"""More numbers than any tensor has; products of such lengths still fit torch's integers."""
_MAX_SHARING = 32
"""How often the tensors of a file may tell its bytes: some models name a tensor several times."""
_ITEM_BYTES = {
    "float32": 4, "float64": 8, "float16": 2, "bfloat16": 2,
    "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "bool": 1,
    "uint16": 2, "uint32": 4, "uint64": 8,
}  # fmt: skip
_STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "ByteStorage": "uint8", "CharStorage": "int8",
    "ShortStorage": "int16", "IntStorage": "int32", "LongStorage": "int64", "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}  # fmt: skip


@dataclass(slots=True, eq=False)
class _Storage:
    """Bytes behind one or more tensors."""

    key: str
    dtype: str
    num_bytes: int
    place: StoredRange | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _View:
    """A storage, or a part of one, as the numbers that a tensor takes it for."""

    storage: _Storage
    dtype: str
    offset: int
    num_elements: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StoredTensor(Leaf):
    """A tensor in a file that is open."""

    dtype: str
    """Name of the element type as torch has it, such as "float32"."""
    shape: tuple[int, ...]
    """Number of elements along each axis."""
    _strides: tuple[int, ...] = field(repr=False)
    _offset: int = field(repr=False)
    _storage: _Storage = field(repr=False)
    _file: TorchFile = field(repr=False)

    def read(self) -> torch.Tensor:
        """Return the tensor, contiguous and on the CPU; what it shares is read each time.

        Raises:
            BundleError: If the file is damaged here.
            ValueError: If the file was closed.
        """
        import torch

        if 0 in self.shape:
            return torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        flat = self._file.read_storage(self._storage, self.dtype)
        view = flat.as_strided(self.shape, self._strides, self._offset)
        if view.numel() == flat.numel() and view.is_contiguous():
            return flat.reshape(self.shape)
        return view.clone(memory_format=torch.contiguous_format)


class TorchFile:
    """A file of `torch.save`, of which nothing is run and no tensor read before it is asked for.

    Raises:
        BundleError: If it is missing or damaged, or holds anything but plain values and tensors.
    """

    content: Any
    """What was saved: plain values as in `read_pickle`, with a `StoredTensor` for each tensor;
    where it lay (a GPU, say) does not count."""

    def __init__(self, path: Path) -> None:
        self._where = str(path)
        self._storages: dict[str, _Storage] = {}
        self._told_bytes = 0
        self._is_swapped = sys.byteorder != "little"
        try:
            self._num_bytes = path.stat().st_size
            self._file: IO[bytes] = path.open("rb")
        except OSError as error:
            raise BundleError(
                f"{path}: cannot be read ({error.strerror}); expected a file of torch.save."
            ) from None
        try:
            is_zip = self._file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
            self.content = self._read_zip(path) if is_zip else self._read_legacy()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def read_storage(self, storage: _Storage, dtype: str) -> torch.Tensor:
        """Return all numbers of a storage, in one row.

        Raises:
            BundleError: If they are damaged.
        """
        import torch

        place = storage.place
        if place is None:
            raise BundleError(self._damaged("a tensor has no numbers"))
        raw = torch.empty(place.num_bytes, dtype=torch.uint8)
        self._fill(memoryview(raw.numpy()), place)  # type: ignore[arg-type]
        if self._is_swapped:
            raw = raw.view(-1, _ITEM_BYTES[dtype]).flip(1).reshape(-1)
        return raw != 0 if dtype == "bool" else raw.view(getattr(torch, dtype))

    def _fill(self, target: memoryview, place: StoredRange) -> None:
        self._file.seek(place.start)
        crc = done = 0
        while done < len(target):
            piece = target[done : done + _BLOCK]
            num_bytes = self._file.readinto(piece)  # type: ignore[attr-defined]
            if not num_bytes:
                raise BundleError(self._damaged("it ends early"))
            crc = zlib.crc32(piece[:num_bytes], crc)
            done += num_bytes
        if place.crc not in (0, crc):
            raise BundleError(self._damaged("the checksum of a tensor is wrong"))

    def _read_zip(self, path: Path) -> Any:
        with Archive(path) as archive:
            root = self._root(archive.names())
            order = f"{root}/byteorder"
            if order in archive.names():
                self._set_order(self._small(archive, order))
            content = read_pickle(
                self._raw(archive.stored_range(f"{root}/data.pkl"), MAX_BYTES),
                where=self._where,
                persistent=self._persistent,
                constructors=self._constructors(),
            )
            for storage in self._storages.values():
                self._place(storage, archive.stored_range(f"{root}/data/{storage.key}"))
        self._check_sharing()
        return content

    def _root(self, names: tuple[str, ...]) -> str:
        roots = [name.split("/")[0] for name in names if name.split("/")[1:] == ["data.pkl"]]
        if len(roots) != 1:
            raise BundleError(
                f"{self._where}: a zip archive, but not of torch.save; expected one data.pkl in it."
            )
        if f"{roots[0]}/constants.pkl" in names:
            raise BundleError(
                f"{self._where}: holds a program (TorchScript); expected weights of torch.save."
            )
        return roots[0]

    def _small(self, archive: Archive, name: str) -> bytes:
        return self._raw(archive.stored_range(name), _SMALL)

    def _raw(self, place: StoredRange, max_bytes: int) -> bytes:
        if place.num_bytes > max_bytes:
            raise BundleError(self._damaged(f"an entry has {size_words(place.num_bytes)}"))
        content = bytearray(place.num_bytes)
        self._fill(memoryview(content), place)
        return bytes(content)

    def _set_order(self, order: bytes) -> None:
        if order not in (b"little", b"big"):
            raise BundleError(self._damaged("its byte order is unknown"))
        self._is_swapped = order.decode() != sys.byteorder

    def _place(self, storage: _Storage, place: StoredRange) -> None:
        if place.num_bytes != storage.num_bytes:
            raise BundleError(
                self._damaged(
                    f"a tensor's storage should have {size_words(storage.num_bytes)}, the file "
                    f"holds {size_words(place.num_bytes)}"
                )
            )
        storage.place = place

    def _check_sharing(self) -> None:
        if self._told_bytes > _MAX_SHARING * self._num_bytes:
            raise BundleError(self._damaged("its tensors unfold to more than the file holds"))

    def _read_legacy(self) -> Any:
        self._file.seek(0)
        self._check_beginning()
        content = read_next_pickle(
            self._file,
            where=self._where,
            persistent=self._persistent,
            constructors=self._constructors(),
        )
        self._place_all(self._next_pickle(MAX_BYTES))
        self._check_sharing()
        return content

    def _check_beginning(self) -> None:
        """Read what stands before the values: two numbers, and what the writer's machine was."""
        try:
            numbers = [self._next_pickle(_SMALL) for _ in range(2)]
            self._next_pickle(_SMALL)
        except BundleError:
            numbers = []
        if numbers != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
            raise BundleError(
                f"{self._where}: not a file of torch.save, by how it begins; expected the weights "
                "of a model. Copy or download it again."
            )

    def _next_pickle(self, max_bytes: int) -> Any:
        return read_next_pickle(self._file, where=self._where, max_bytes=max_bytes)

    def _place_all(self, keys: Any) -> None:
        """Find the storages, which lie one behind the other, each after its length.

        Their bytes are in little order, whatever machine wrote them.
        """
        known = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not known or sorted(keys) != sorted(self._storages):
            raise BundleError(self._damaged("its list of storages does not fit its tensors"))
        position = self._file.tell()
        for storage in map(self._storages.__getitem__, keys):
            self._file.seek(position)
            num_elements = int.from_bytes(self._file.read(8), "little")
            start = position + 8
            position = start + storage.num_bytes
            if num_elements * _ITEM_BYTES[storage.dtype] != storage.num_bytes:
                raise BundleError(self._damaged("a storage's length is not its tensors'"))
            if position > self._num_bytes:
                raise BundleError(self._damaged("it ends early"))
            storage.place = StoredRange(start=start, num_bytes=storage.num_bytes, crc=0)
        if position != self._num_bytes:
            raise BundleError(self._damaged("something follows its end"))

    def _persistent(self, told: Any) -> _View:
        """Return the storage a pickle refers to."""
        kind, storage_type, key, _, num_elements, *view = told
        if kind != "storage" or type(key) is not str or not _is_size(num_elements):
            raise ValueError("a storage has no key or size")
        dtype = _STORAGES[storage_type.name.removeprefix("torch.")]
        new = _Storage(key, dtype, num_elements * _ITEM_BYTES[dtype])
        storage = self._storages.setdefault(key, new)
        if (storage.dtype, storage.num_bytes) != (dtype, new.num_bytes):
            raise ValueError("a storage has two types or sizes")
        if storage.num_bytes > self._num_bytes:
            raise ValueError(
                f"a tensor of {size_words(storage.num_bytes)} is declared in a file of "
                f"{size_words(self._num_bytes)}"
            )
        if not view or view[0] is None:
            return _View(storage=storage, dtype=dtype, offset=0, num_elements=num_elements)
        _, offset, length = view[0]
        if not _is_size(offset) or not _is_size(length) or offset + length > num_elements:
            raise ValueError("a view is larger than its storage")
        return _View(storage=storage, dtype=dtype, offset=offset, num_elements=length)

    def _constructors(self) -> Mapping[str, Constructor]:
        return {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of_bytes,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_parameter_with_state": _parameter,
            "torch._tensor._rebuild_from_type_v2": self._tensor_of_type,
            **{f"torch.{name}": _no_call for name in _STORAGES},
        }

    def _tensor(
        self,
        view: _View,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        _requires_grad: bool = False,
        hooks: Any = None,
        metadata: Any = None,
    ) -> StoredTensor:
        sizes = (offset, *shape, *strides)
        if type(view) is not _View or len(shape) != len(strides) or len(shape) > _MAX_AXES:
            raise ValueError("a tensor has no storage or shape")
        if not all(map(_is_size, sizes)) or math.prod(map(_at_least_1, shape)) > _LARGEST:
            raise ValueError("a tensor has an impossible shape")
        if hooks or metadata:
            raise ValueError("a tensor has hooks, or needs more than its numbers")
        num_elements = math.prod(shape)
        last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        if num_elements and max(offset + last + 1, num_elements) > view.num_elements:
            raise ValueError("a tensor is larger than its storage")
        self._told_bytes += num_elements * _ITEM_BYTES[view.dtype]
        return StoredTensor(
            dtype=view.dtype,
            shape=tuple(shape),
            _strides=tuple(strides),
            _offset=view.offset + offset,
            _storage=view.storage,
            _file=self,
        )

    def _tensor_of_bytes(
        self, view: _View, offset: int, shape: Any, strides: Any, *rest: Any
    ) -> StoredTensor:
        """Return a tensor of a storage that does not know its element type."""
        _, hooks, dtype, *metadata = rest
        name = dtype.name.removeprefix("torch.")
        item_bytes = _ITEM_BYTES[name]
        if view.dtype != "uint8" or view.storage.num_bytes % item_bytes or view.offset:
            raise ValueError("a tensor does not fit its storage")
        typed = replace(view, dtype=name, num_elements=view.num_elements // item_bytes)
        return self._tensor(typed, offset, shape, strides, False, hooks, any(metadata))

    def _tensor_of_type(self, what: Any, kind: Any, arguments: Any, _state: Any) -> StoredTensor:
        """Return a tensor without the attributes that hang on it."""
        if kind.name not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
            raise ValueError("a tensor has a class of its own")
        tensor: StoredTensor = self._constructors()[what.name](*arguments)
        return tensor

    def _damaged(self, what: str) -> str:
        return f"{self._where}: damaged, or no file of torch.save ({what}). Copy it again."


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _at_least_1(size: int) -> int:
    return max(size, 1)


def _parameter(
    data: Any, _requires_grad: bool = False, hooks: Any = None, _state: Any = None
) -> StoredTensor:
    if not isinstance(data, StoredTensor) or hooks:
        raise ValueError("a parameter has no tensor, or hooks")
    return data


def _no_call(*_: Any) -> Any:
    raise ValueError("a storage is made by a call")
