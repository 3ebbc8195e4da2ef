"""Files of `torch.save` from strangers, new and old: the same tensors, no code, no false sizes."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg.errors import BundleError, MedsegError
from medseg.interop.nnunet.torch_file import StoredTensor, TorchFile

MODELS = Path(__file__).parents[4] / "shared" / "data" / "nnunet_models"
MAGIC = 0x1950A86A20F9469CFC6C
FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


def checkpoint():
    """Return what a training leaves: weights with shared and odd tensors, an optimiser, numbers."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv3d(2, 3, (1, 3, 2)), torch.nn.BatchNorm3d(3), torch.nn.Conv3d(3, 5, 1)
    )
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.randn(2, 2, 4, 5, 6)).sum().backward()
    optimizer.step()
    return {
        "network_weights": network.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": None,
        "logging": {"dice": [np.float64(0.5), np.float32(0.25)], "epochs": np.int64(3)},
        "init_args": {"device": torch.device("cuda", 0), "fold": 0, "plans": {"a": [1, 2.5]}},
        "inference_allowed_mirroring_axes": (0, 1, 2),
        "size": torch.Size((2, 3)),
        "plot": collections.OrderedDict(a=[(1, np.array([1.5, 2.5]))]),
    }


TENSORS = {
    **{
        str(dtype): (torch.arange(-12, 12) * 1.5).reshape(2, 3, 4).to(dtype)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16,
                      torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
    },
    "uint8": torch.arange(24, dtype=torch.uint8).reshape(4, 3, 2),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
    "empty axis": torch.zeros(2, 0, 3, dtype=torch.int16),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "part": torch.arange(60.0).reshape(3, 4, 5)[1:, 1::2, 2:4],
    "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "channels last": torch.arange(120.0).reshape(1, 4, 5, 6).to(memory_format=torch.channels_last),
    "flat view": torch.arange(10)[4:7],
    "parameter": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)),
    "buffer": torch.nn.Buffer(torch.arange(4.0)),
}  # fmt: skip


def save(value, path, is_zip=True):
    torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    return path


def plain(value):
    """Return what should be read, tensors as they are."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, tuple):
        return tuple(plain(part) for part in value)
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, torch.device) else value


def compare(found, expected, place=""):
    """Compare values and read every tensor; return how many there were."""
    if isinstance(expected, torch.Tensor):
        assert type(found) is StoredTensor, place
        tensor = found.read()
        assert type(tensor) is torch.Tensor
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), place
        assert (f"torch.{found.dtype}", found.shape) == (str(tensor.dtype), tuple(tensor.shape))
        assert torch.equal(tensor, expected.detach().cpu()), place
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert not tensor.requires_grad
        return 1
    if isinstance(expected, np.ndarray):
        assert np.array_equal(found, expected), place
        return 0
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert list(found) == list(expected), place
        return sum(compare(found[key], expected[key], f"{place}/{key}") for key in expected)
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), place
        return sum(compare(a, b, f"{place}[]") for a, b in zip(found, expected, strict=True))
    assert found == expected, place
    return 0


def read_all(path):
    """Return the number of tensors that are equal to what torch itself reads."""
    expected = plain(torch.load(path, weights_only=False, map_location="cpu"))
    with TorchFile(path) as file:
        return compare(file.content, expected)


@FORMATS
def test_checkpoints_are_those_that_torch_reads(tmp_path, is_zip):
    assert read_all(save(checkpoint(), tmp_path / "checkpoint_final.pth", is_zip)) >= 20


@FORMATS
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_those_that_torch_reads(tmp_path, name, is_zip):
    assert read_all(save({"a": TENSORS[name]}, tmp_path / "x.pth", is_zip)) == 1


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_numbers_are_those_that_torch_reads(tmp_path, dtype):
    tensor = torch.arange(6, dtype=torch.int64).to(dtype).reshape(2, 3)
    assert read_all(save([tensor], tmp_path / "x.pth")) == 1


@FORMATS
def test_all_tensors_in_one_file_keep_apart(tmp_path, is_zip):
    assert read_all(save(TENSORS, tmp_path / "x.pth", is_zip)) == len(TENSORS)


@FORMATS
def test_tensors_that_share_numbers_are_read(tmp_path, is_zip):
    """Some networks name a tensor four times, and some optimisers keep all in one row."""
    row = torch.arange(20.0)
    value = {"a": row, "b": row, "c": row[3:9].reshape(2, 3), "d": row[9:].view(11)}
    assert read_all(save(value, tmp_path / "x.pth", is_zip)) == 4


@FORMATS
def test_attributes_on_tensors_are_dropped(tmp_path, is_zip):
    tensor, parameter = torch.arange(3.0), torch.nn.Parameter(torch.arange(2.0))
    tensor.tag = parameter.tag = "x"
    assert read_all(save([tensor, parameter], tmp_path / "x.pth", is_zip)) == 2


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@FORMATS
def test_every_protocol_is_read(tmp_path, is_zip, protocol):
    path = tmp_path / "x.pth"
    torch.save(checkpoint(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    assert read_all(path) >= 20


def test_places_on_other_devices_do_not_count(tmp_path):
    """A file whose tensors lay on a GPU that this machine does not have."""
    path = rewritten(
        save({"a": torch.arange(3.0)}, tmp_path / "x.pth"),
        lambda name, data: data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:1")
        if name == "data.pkl" else data,
    )  # fmt: skip
    assert read_all(path) == 1


@pytest.mark.skipif(not MODELS.is_dir(), reason="needs the models in ../shared/data")
def test_models_are_those_that_torch_reads():
    files = [*MODELS.rglob("*.model"), *MODELS.rglob("*.pth")]
    assert len(files) >= 10
    assert all(read_all(path) > 40 for path in files)


def rewritten(path, change, **options):
    """Write a zip file anew with changed entries (None: left out), none of them packed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in entries.items():
            changed = change(name.split("/", 1)[1], data)
            if changed is not None:
                archive.writestr(name, changed)
    return path


@pytest.mark.parametrize("name", ["torch.float32", "torch.int16", "torch.bool", "torch.float64"])
def test_the_other_byte_order_is_turned_around(tmp_path, name):
    tensor = TENSORS[name]
    size = tensor.element_size()

    def turned(entry, data):
        if entry == "data/0":
            return b"".join(data[i : i + size][::-1] for i in range(0, len(data), size))
        return b"big" if entry == "byteorder" else data

    path = rewritten(save([tensor], tmp_path / "x.pth"), turned)
    with TorchFile(path) as file:
        assert torch.equal(file.content[0].read(), tensor)
    assert read_all(path) == 1


def test_old_zip_files_without_a_byte_order_are_read(tmp_path):
    path = rewritten(
        save(checkpoint(), tmp_path / "x.pth"),
        lambda name, data: None if name in ("byteorder", ".format_version") else data,
    )
    assert read_all(path) >= 20


def test_files_without_checksums_are_read(tmp_path):
    """Torch can be told not to compute them; then all are zero."""
    torch.serialization.set_crc32_options(False)
    try:
        path = save(checkpoint(), tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_all(path) >= 20


def position_of(path, numbers):
    content = path.read_bytes()
    assert content.count(numbers) == 1
    return content.index(numbers)


def test_tensors_are_read_only_when_asked_for(tmp_path):
    """Damage in the optimiser's numbers is not even noticed; in a tensor that is read, it is."""
    path = save({"a": torch.arange(5.0), "o": torch.arange(100.0, 140.0)}, tmp_path / "x.pth")
    start = position_of(path, torch.arange(100.0, 140.0).numpy().tobytes())
    content = bytearray(path.read_bytes())
    content[start + 9] ^= 1
    path.write_bytes(content)
    with TorchFile(path) as file:
        assert torch.equal(file.content["a"].read(), torch.arange(5.0))
        with pytest.raises(BundleError, match=r"x\.pth: damaged.*checksum of a tensor is wrong"):
            file.content["o"].read()


@FORMATS
def test_a_closed_file_is_not_read(tmp_path, is_zip):
    with TorchFile(save([torch.arange(3.0)], tmp_path / "x.pth", is_zip)) as file:
        tensor = file.content[0]
    with pytest.raises(ValueError, match="closed file"):
        tensor.read()
    assert repr(tensor) == "StoredTensor(dtype='float32', shape=(3,))"


class Told:
    """Something a pickle says lies outside it."""

    def __init__(self, *told):
        self.told = told


class Rebuilt:
    """A tensor as a pickle tells it: any call with any arguments."""

    def __init__(self, function, *arguments):
        self.parts = (function, arguments)

    def __reduce__(self):
        return self.parts


class Pickler(pickle.Pickler):
    """Writes `Told` as torch writes storages."""

    def persistent_id(self, value):
        return value.told if isinstance(value, Told) else None


def told(num_elements=4, kind=torch.FloatStorage, key="0", **options):
    more = (options["view"],) if "view" in options else ()
    return Told("storage", kind, key, "cpu", num_elements, *more)


def tensor(storage, *, offset=0, shape=(4,), strides=(1,), hooks=None, function=None, more=()):
    hooks = collections.OrderedDict() if hooks is None else hooks
    function = function or torch._utils._rebuild_tensor_v2
    return Rebuilt(function, storage, offset, shape, strides, False, hooks, *more)


def write(path, value, storages=None, is_zip=True, keys=None, magic=MAGIC):
    """Write a file of torch.save by hand: a pickle and storages, whether they fit or not."""
    storages = (
        {"0": (4, np.arange(4, dtype=np.float32).tobytes())} if storages is None else storages
    )
    with path.with_suffix(".pickle").open("wb") as file:
        Pickler(file, 2).dump(value)
    data = path.with_suffix(".pickle").read_bytes()
    if is_zip:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            for key, (_, numbers) in storages.items():
                archive.writestr(f"archive/data/{key}", numbers)
            archive.writestr("archive/version", "3\n")
        return path
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    parts = [pickle.dumps(part, 2) for part in (magic, 1001, system)]
    parts += [data, pickle.dumps(list(storages) if keys is None else keys, 2)]
    parts += [struct.pack("<q", length) + numbers for length, numbers in storages.values()]
    path.write_bytes(b"".join(parts))
    return path


def with_view(storage, is_zip):
    """Old files also tell of which part of which storage something is."""
    return storage if is_zip else Told(*storage.told, None)


@FORMATS
def test_files_made_by_hand_are_read(tmp_path, is_zip):
    """The next tests change one thing each in this one."""
    path = write(tmp_path / "x.pth", {"a": tensor(with_view(told(), is_zip))}, is_zip=is_zip)
    assert read_all(path) == 1


def test_parts_of_storages_in_old_files_are_read(tmp_path):
    storage = told(view=("part", 1, 3))
    value = [tensor(storage, shape=(2,), offset=1), tensor(told(view=None))]
    path = write(tmp_path / "x.pth", value, is_zip=False)
    with TorchFile(path) as file:
        assert file.content[0].read().tolist() == [2, 3]
        assert file.content[1].read().tolist() == [0, 1, 2, 3]
    assert read_all(path) == 2


HUGE = 2**29
FALSE_SIZES = {
    "2 GB in 4 bytes": tensor(told(HUGE), shape=(HUGE,)),
    "2 GB by zero strides": tensor(told(), shape=(HUGE,), strides=(0,)),
    "2 GB in two axes": tensor(told(), shape=(2**15, 2**14), strides=(0, 0)),
    "5 of 4": tensor(told(), shape=(5,)),
    "behind the end": tensor(told(), shape=(3,), offset=2),
    "far behind the end": tensor(told(), shape=(1,), offset=2**40),
    "by strides": tensor(told(), shape=(2, 2), strides=(3, 1)),
    "more by overlap": tensor(told(), shape=(3, 2), strides=(1, 1)),
    "negative offset": tensor(told(), shape=(2,), offset=-1),
    "negative size": tensor(told(), shape=(-4,)),
    "negative strides": tensor(told(), shape=(4,), strides=(-1,), offset=3),
    "negative storage": tensor(told(-4)),
    "more numbers than there are": tensor(told(5)),
    "fewer numbers than there are": tensor(told(3), shape=(3,)),
    "other type": tensor(told(4, torch.DoubleStorage)),
    "no whole numbers": tensor(told(2, torch.DoubleStorage), shape=(1.5,)),
    "true": tensor(told(), shape=(True, 4), strides=(4, 1)),
    "fewer strides": tensor(told(), shape=(2, 2)),
    "many axes": tensor(told(), shape=(1,) * 70, strides=(1,) * 70),
    "empty but huge": tensor(told(), shape=(0, 2**40, 2**40), strides=(1, 1, 1)),
    "huge product": tensor(told(), shape=(2**40, 2**40), strides=(0, 0)),
    "text": tensor(told(), shape="4", strides=(1,)),
    "no storage": tensor("0"),
    "missing storage": tensor(told(key="7")),
    "path": tensor(told(key="../data.pkl")),
    "number as key": tensor(told(key=0)),
    "two sizes": [tensor(told()), tensor(told(3), shape=(3,))],
    "two types": [tensor(told()), tensor(told(4, torch.IntStorage))],
    "complex": tensor(told(4, torch.ComplexFloatStorage)),
    "a module": tensor(Told("module", "a", "b", "c", 4)),
    "a bare storage": told(),
    "storage as a tensor": tensor(tensor(told())),
    "no tuple": tensor(Told(3)),
    "hooks": tensor(told(), hooks=collections.OrderedDict(a=1)),
    "conjugate": tensor(told(), more=({"conj": True},)),
    "called storage": Rebuilt(torch.FloatStorage, 4),
    "parameter of text": Rebuilt(torch._utils._rebuild_parameter, "a", True, {}),
}


@FORMATS
@pytest.mark.parametrize("name", FALSE_SIZES)
def test_false_tensors_are_refused_before_any_is_read(tmp_path, name, is_zip, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("memory was taken")

    monkeypatch.setattr(torch, "empty", fail)
    value = old(FALSE_SIZES[name]) if not is_zip else FALSE_SIZES[name]
    path = write(tmp_path / "x.pth", {"a": value}, is_zip=is_zip)
    with pytest.raises(BundleError, match=r"x\.pth: (damaged|the zip archive|the pickle|holds no)"):
        TorchFile(path)


def old(value):
    """Return the same with what old files add to the mention of a storage."""
    if isinstance(value, list):
        return [old(part) for part in value]
    if isinstance(value, Told) and len(value.told) == 5:
        return Told(*value.told, None)
    if isinstance(value, Rebuilt):
        function, arguments = value.parts
        return Rebuilt(function, *map(old, arguments))
    return value


@pytest.mark.parametrize("view", [("p", 2, 3), ("p", -1, 2), ("p", 0, -1), ("p", 0), "abc", 5])
def test_false_parts_of_storages_are_refused(tmp_path, view):
    path = write(tmp_path / "x.pth", tensor(told(view=view), shape=(1,)), is_zip=False)
    with pytest.raises(BundleError, match="damaged"):
        TorchFile(path)


def test_tensors_that_tell_the_same_numbers_without_end_are_refused(tmp_path):
    numbers = np.arange(10_000, dtype=np.float32).tobytes()
    value = [tensor(told(10_000), shape=(10_000,)) for _ in range(2000)]
    path = write(tmp_path / "x.pth", value, {"0": (10_000, numbers)})
    with pytest.raises(BundleError, match="unfold to more than the file holds"):
        TorchFile(path)


@pytest.mark.parametrize(
    "change",
    [
        {"keys": []},
        {"keys": ["1"]},
        {"keys": ["0", "0"]},
        {"keys": 7},
        {"keys": [0]},
        {"storages": {"0": (4, bytes(15))}},
        {"storages": {"0": (4, bytes(17))}},
        {"storages": {"0": (5, bytes(16))}},
        {"storages": {"0": (-4, bytes(16))}},
        {"storages": {"0": (2**61, bytes(16))}},
        {"storages": {"0": (4, bytes(16)), "1": (4, bytes(16))}},
    ],
)
def test_old_files_with_other_storages_are_refused(tmp_path, change):
    path = write(tmp_path / "x.pth", tensor(told(view=None)), is_zip=False, **change)
    with pytest.raises(BundleError, match=r"x\.pth: damaged"):
        TorchFile(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"P", b"not a model", pickle.dumps({"a": 1}), pickle.dumps(MAGIC, 2), b"\x80\x02"],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"x\.pth: not a file of torch.save"):
        TorchFile(path)


def test_wrong_magic_is_refused(tmp_path):
    path = write(tmp_path / "x.pth", [], {}, is_zip=False, magic=MAGIC + 1)
    with pytest.raises(BundleError, match=r"x\.pth: not a file of torch.save"):
        TorchFile(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(BundleError, match=r"x\.pth: cannot be read"):
        TorchFile(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/b.txt"], "not of torch.save"),
        (["a/data.pkl", "b/data.pkl"], "not of torch.save"),
        (["data.pkl"], "not of torch.save"),
        (["a/data.pkl", "a/constants.pkl"], "TorchScript"),
        (["a/data.pkl", "../a"], "leads out"),
    ],
)
def test_other_zip_files_are_refused(tmp_path, names, message):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, pickle.dumps([]))
    with pytest.raises(BundleError, match=message):
        TorchFile(path)


def test_packed_numbers_are_refused(tmp_path):
    path = save([torch.zeros(1000)], tmp_path / "x.pth")
    rewritten(path, lambda _, data: data, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(BundleError, match="is packed"):
        TorchFile(path)


@FORMATS
def test_code_is_not_run(tmp_path, is_zip):
    marker = tmp_path / "marker"
    path = write(tmp_path / "x.pth", [Rebuilt(os.system, f"echo > {marker}")], {}, is_zip=is_zip)
    with pytest.raises(BundleError, match=r"x\.pth: the pickle asks for '.*\.system'"):
        TorchFile(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


@FORMATS
@pytest.mark.parametrize(
    "trick",
    [
        Rebuilt(torch.storage._load_from_bytes, b"x"),
        Rebuilt(torch.load, "x.pth"),
        Rebuilt(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, ((), (), (2, 2))),
        Rebuilt(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, ("true",), {}),
        Rebuilt(torch.jit.load, "x"),
        torch.nn.Conv2d(1, 2, 3),
    ],
)
def test_tricks_with_torch_are_refused(tmp_path, trick, is_zip):
    path = write(tmp_path / "x.pth", [trick], {}, is_zip=is_zip)
    with pytest.raises(BundleError, match=r"x\.pth: the pickle asks for '"):
        TorchFile(path)


def test_code_before_the_values_of_old_files_is_not_run(tmp_path):
    marker = tmp_path / "marker"
    for magic in (Rebuilt(os.system, f"echo > {marker}"), MAGIC):
        path = write(tmp_path / "x.pth", [], {}, is_zip=False, magic=magic)
        if magic == MAGIC:
            keys = Rebuilt(os.system, f"echo > {marker}")
            write(path, [], {}, is_zip=False, keys=keys)
        with pytest.raises(BundleError):
            TorchFile(path)
    assert not marker.exists()


@FORMATS
def test_damage_anywhere_is_read_or_one_error(tmp_path, is_zip):
    """Whatever bytes are changed, and wherever the file ends; no module is imported."""
    value = {"a": torch.arange(6.0).reshape(2, 3), "b": [torch.ones(3).half(), np.float32(2)],
             "c": torch.arange(40)[3:30:2], "d": torch.device("cpu")}  # fmt: skip
    content = save(value, tmp_path / "x.pth", is_zip).read_bytes()
    rng = np.random.default_rng(3)
    path = tmp_path / "y.pth"
    read_some(tmp_path / "x.pth")
    before = set(sys.modules)
    num_refused = 0
    for number in range(400):
        copy = bytearray(content)
        for position in rng.integers(0, len(copy), rng.integers(1, 6)):
            copy[position] = rng.integers(0, 256)
        path.write_bytes(copy[: rng.integers(0, len(copy))] if number % 5 == 0 else copy)
        try:
            read_some(path)
        except MedsegError:
            num_refused += 1
    assert 80 < num_refused < 400
    assert {
        name for name in set(sys.modules) - before if not name.startswith("encodings.")
    } == set()


def read_some(path):
    with TorchFile(path) as file:
        left = [file.content]
        while left:
            part = left.pop()
            if isinstance(part, StoredTensor):
                assert part.read().nbytes <= path.stat().st_size
            elif isinstance(part, (list, tuple)):
                left += part
            elif isinstance(part, dict):
                left += part.values()
