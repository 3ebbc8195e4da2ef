"""Pickles from strangers: the values that Python reads, and nothing else that they could do."""

from __future__ import annotations

import collections
import copyreg
import io
import os
import pathlib
import pickle
import pickletools
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg.errors import BundleError, MedsegError
from medseg.interop.nnunet import pickles, stand_ins
from medseg.interop.nnunet.pickles import read_next_pickle, read_pickle

MODELS = Path(__file__).parents[4] / "shared" / "data" / "nnunet_models"
PROTOCOLS = range(6)


def read(content, **options):
    return read_pickle(content, where="plans.pkl", **options)


def plain(value):
    """Return what should come of a value that Python's own pickle read."""
    if isinstance(value, dict):
        return {plain(key): plain(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(part) for part in value)
    if isinstance(value, frozenset):
        return tuple(plain(part) for part in value)
    if isinstance(value, (list, set)):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype == object:
        return value.tolist()
    if isinstance(value, np.ndarray):
        return value.astype(value.dtype.newbyteorder("="))
    if isinstance(value, (pathlib.PurePath, torch.device, torch.dtype)):
        return str(value)
    return bytes(value) if isinstance(value, bytearray) else value


def same(one, other):
    """Compare types as well, element by element."""
    if isinstance(one, np.ndarray):
        is_array = isinstance(other, np.ndarray) and one.dtype == other.dtype
        return is_array and one.shape == other.shape and np.array_equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


VALUES = {
    "numbers": [0, 1, -1, 255, 70_000, -(2**31), 2**63, -(2**100), 0.1, -1e300, True, False, None],
    "text": ["", "a", "kidney", "\u00e4\u03b1\U0001f600", "x" * 70_000, "line\nbreak\\"],
    "bytes": [b"", b"\x00\xff", bytearray(b"\x80abc"), b"y" * 300],
    "nested": {"a": [1, (2, (3, {"b": ()}))], (1, ("x", None)): {}, 4: [[], [[]]], b"k": 2.5},
    "long": [list(range(2500)), {str(n): n for n in range(2500)}, tuple(range(5))],
    "sets": [set(), {7}, {"a"}, frozenset(), frozenset({(1, 2)})],
    "ordered": collections.OrderedDict([("z", 1), ("a", collections.OrderedDict(b=2))]),
    "default": collections.defaultdict(list, {3: [1], 1: []}),
    "arrays": [
        np.array([[1.5, -2, 3e8], [4, 5, 6]]),
        np.arange(24, dtype=np.int16).reshape(2, 3, 4),
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.arange(30).reshape(5, 6)[::2, 1:4],
        np.array([True, False, True]),
        np.array(["ct", "\u00e4b"]),
        np.array([b"ab", b"c"]),
        np.zeros((0, 3), np.uint8),
        np.array(7.25),
        np.array([1, 2], ">i4"),
        np.arange(3, dtype=np.float16),
    ],
    "scalars": [
        np.float64(0.1), np.float32(0.1), np.float16(2), np.int64(-3), np.uint8(200),
        np.bool_(True), np.bool_(False), np.str_("t2"), np.bytes_(b"ab"), np.str_(""),
        np.float64("inf"),
    ],
    "objects": [np.array([1, "a", None, [2]], object), np.array([[1, "b"], [None, 2]], object)],
    "keys": {np.int64(3): "three", np.float64(0.5): "half", np.str_("s"): 1},
    "places": [
        pathlib.PurePosixPath("/data/x/y.pkl"), pathlib.PurePosixPath("a", "b"),
        pathlib.PureWindowsPath("C:\\models\\x"), pathlib.Path("a"),
    ],
    "torch": [torch.device("cuda", 1), torch.device("cpu"), torch.float32, torch.bfloat16],
    "size": tuple(torch.Size((2, 3))),
}  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", VALUES)
def test_values_are_those_that_python_reads(name, protocol):
    content = pickle.dumps(VALUES[name], protocol)
    expected = plain(pickle.loads(content))
    assert same(read(content), expected)
    assert same(read(pickletools.optimize(content)), expected)


def test_a_size_of_torch_is_a_tuple():
    assert same(read(pickle.dumps([torch.Size((2, 3))])), [(2, 3)])


def test_arrays_can_be_changed_and_belong_to_nobody_else():
    array = read(pickle.dumps(np.arange(3.0)))
    array[0] = 9
    assert array.flags.owndata or array.base.flags.writeable


def test_comparison_tells_types_apart():
    """The oracle above must be able to fail."""
    assert not same([1], [1.0])
    assert not same([1], (1,))
    assert not same(np.zeros(2, np.float32), np.zeros(2))
    assert not same({"a": 1, "b": 2}, {"b": 2, "a": 1})


@pytest.mark.skipif(not MODELS.is_dir(), reason="needs the models in ../shared/data")
def test_files_of_models_are_those_that_python_reads():
    files = [path for path in MODELS.rglob("*.pkl") if path.is_file()]
    assert {"plans.pkl", "model_final_checkpoint.model.pkl", "case.pkl"} <= {p.name for p in files}
    for path in files:
        expected = plain(pickle.loads(path.read_bytes()))
        assert same(read_pickle(path, where=str(path)), expected), path


PYTHON_2 = (
    b"\x80\x02}(U\x04sizecnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nK\x00\x85U\x01b"
    b"\x87R(K\x01K\x02\x85cnumpy\ndtype\nq\x02U\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
    b"J\xff\xff\xff\xffK\x00tb\x89U\x10" + np.array([-1.5, 3.25], "<f8").tobytes() + b"tb"
    b"U\x02sdcnumpy.core.multiarray\nscalar\nh\x02U\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff"
    b"\xffJ\xff\xff\xff\xffK\x00tbU\x04" + np.array(-7.5, "<f4").tobytes() + b"\x86R"
    b"U\x03setc__builtin__\nset\n]K\x05a\x85Ru."
)  # fmt: skip


def test_pickles_of_python_2_are_read():
    """There bytes were text: the numbers of arrays stand in the file as letters."""
    with_names = pickle.loads(PYTHON_2, encoding="latin1")
    assert same(read(PYTHON_2), plain(with_names))
    assert np.array_equal(read(PYTHON_2)["size"], [-1.5, 3.25])


def test_shared_parts_stay_shared():
    part = [1, {"a": 2}]
    both = read(pickle.dumps([part, part, [1, {"a": 2}]]))
    assert both[0] is both[1]
    assert both[0] is not both[2]


def test_the_same_small_value_twice_is_no_unfolding():
    """Python writes short text and single bytes once and refers to them."""
    flags = [np.bool_(n % 2) for n in range(5000)]
    assert read(pickle.dumps(flags, 2)) == [bool(n % 2) for n in range(5000)]


class Caller:
    """Asks for any call when it is unpickled."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


def harmful(marker):
    """Return pickles that make the file, by their trick."""
    command = f"echo > {marker}"
    python = f"open({str(marker)!r}, 'w').close()"
    text = lambda value: b"X" + len(value).to_bytes(4, "little") + value.encode()  # noqa: E731
    short = lambda value: b"\x8c" + bytes([len(value)]) + value.encode()  # noqa: E731
    system = b"cos\nsystem\n"
    return {
        "call": pickle.dumps(Caller(os.system, command)),
        "call, protocol 0": pickle.dumps(Caller(os.system, command), 0),
        "call, protocol 2": pickle.dumps(Caller(os.system, command), 2),
        "in a list": pickle.dumps([1, {"a": (Caller(os.system, command),)}]),
        "as a key": pickle.dumps({Caller(os.system, command): 1}),
        "eval": pickle.dumps(Caller(eval, python)),
        "exec": pickle.dumps(Caller(exec, python)),
        "open": pickle.dumps(Caller(open, str(marker), "w")),
        "mkdir": pickle.dumps(Caller(pathlib.Path.mkdir, pathlib.PosixPath(marker))),
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n" + text("os") + b"\x85R"
        + text("system") + b"tR" + text(command) + b"\x85R.",
        "dotted": b"\x80\x04" + short("os") + short("path.os.system") + b"\x93" + text(command)
        + b"\x85R.",
        "by global": system + text(command) + b"\x85R.",
        "by stack": b"\x80\x04" + short("os") + short("system") + b"\x93" + text(command)
        + b"\x85R.",
        "instance": b"(" + text(command) + b"ios\nsystem\n.",
        "object": b"(" + system + text(command) + b"o.",
        "memo": system + b"q\x000h\x00" + text(command) + b"\x85R.",
        "behind the end of the data": b"]" + system + text(command) + b"\x85R0.",
        "state": pickle.dumps(
            Caller(collections.OrderedDict, state={"a": Caller(os.system, command)})
        ),
        "number": b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R"
        + system + text(command) + b"\x85R\x86R.",
        "default": b"ccollections\ndefaultdict\n" + system + b"\x85R" + text(command) + b"}s.",
    }  # fmt: skip


TRICKS = tuple(harmful("x"))


@pytest.mark.parametrize("trick", TRICKS)
def test_code_is_not_run(trick, tmp_path):
    marker = tmp_path / "marker"
    content = harmful(marker)[trick]
    with pytest.raises(BundleError, match=r"plans\.pkl: the pickle asks for '.*Nothing in it was"):
        read(content)
    assert not marker.exists()


@pytest.mark.parametrize("trick", [t for t in TRICKS if t not in ("number", "default", "open")])
def test_the_same_files_do_run_code_elsewhere(trick, tmp_path):
    """The check above must be able to fail."""
    marker = tmp_path / "marker"
    try:
        pickle.loads(harmful(marker)[trick])
    except Exception as error:  # what such a file leaves is no value
        assert marker.exists(), error  # noqa: PT017
    assert marker.exists()


def test_a_registered_extension_is_not_called(tmp_path):
    marker = tmp_path / "marker"
    command = f"echo > {marker}".encode()
    content = b"\x80\x02\x82\x77X" + len(command).to_bytes(4, "little") + command + b"\x85R."
    copyreg.add_extension("os", "system", 0x77)
    try:
        with pytest.raises(BundleError, match="uses the operation EXT1"):
            read(content)
        assert not marker.exists()
        pickle.loads(content)
        assert marker.exists()
    finally:
        copyreg.remove_extension("os", "system", 0x77)


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        (b"cos\nsystem\n.", "os.system"),
        (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
        (b"c__builtin__\neval\n.", "__builtin__.eval"),
        (b"cnumpy\nload\n.", "numpy.load"),
        (b"cnumpy.core.multiarray\nfromfile\n.", "numpy.core.multiarray.fromfile"),
        (b"cnumpy.testing._private.utils\nrunstring\n.", "runstring"),
        (b"ctorch\nload\n.", "torch.load"),
        (b"ctorch.storage\n_load_from_bytes\n.", "torch.storage._load_from_bytes"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n.", "torch._utils._rebuild_tensor_v2"),
        (b"ctorch.hub\nload\n.", "torch.hub.load"),
        (b"cnnunetv2.training.x\nMyTrainer\n.", "nnunetv2.training.x.MyTrainer"),
        (b"cfunctools\npartial\n.", "functools.partial"),
        (b"c_codecs\nlookup\n.", "_codecs.lookup"),
        (b"cbuiltins\nstr.format\n.", "builtins.str.format"),
        (b"c\nsystem\n.", ".system"),
    ],
)
def test_what_is_asked_for_is_named(content, asked):
    with pytest.raises(BundleError) as caught:
        read(content)
    assert f"asks for '{asked}'" in str(caught.value) or asked in str(caught.value)
    assert "Nothing in it was run" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\nstr\nX\x01\x00\x00\x00a\x85R.",
        b"cnumpy\nndarray\nK\x05\x85\x85R.",
        b"cbuiltins\nlist\n)\x81.",
        b"\x80\x04cbuiltins\nint\n)}\x92.",
        b"ctorch\nfloat32\n)R.",
    ],
)
def test_what_may_be_named_may_not_be_called(content):
    with pytest.raises(BundleError, match="the pickle calls '"):
        read(content)


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\nstr\n}X\x01\x00\x00\x00aK\x01sb.",
        b"ccollections\nOrderedDict\n}b.",
        b"}}b.",
        b"]}b.",
        b"K\x01}b.",
        b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x85R}b.",
    ],
)
def test_nothing_but_our_own_takes_a_state(content):
    with pytest.raises(BundleError, match="sets attributes of a value"):
        read(content)


def test_attributes_of_a_dictionary_are_dropped():
    state = collections.OrderedDict(a=1)
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    assert same(read(pickle.dumps(state)), {"a": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b".", "damaged"),
        (b"K\x01K\x02.", "not one value but several"),
        (b"(K\x01.", "not one value but several"),
        (b"K\x01.K", "something follows its end"),
        (b"\x80\x06K\x01.", "protocol 6"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x05K\x01\x98.", "READONLY_BUFFER"),
        (b"K\x012.", "DUP"),
        (b"P1\n.", "PERSID"),
        (b"K\x01Q.", "outside the file"),
        (b"h\x05.", "damaged"),
        (b"K\x01r\xff\xff\xff\x7f.", "numbers its parts"),
        (b"K\x01p-1\n.", "numbers its parts"),
        (b"\xff", "damaged"),
        (b"K\x01K\x02a.", "fills what is no list"),
        (b"]K\x01K\x02s.", "fills what is no dictionary"),
        (b"\x80\x04](K\x01\x90.", "fills what is no set"),
        (b"}(K\x01u.", "fills what is no dictionary"),
        (b"}]K\x01s.", "a key is no plain value"),
        (b"K\x01\x87.", "damaged"),
        (b"u.", "damaged"),
        (b"K\x01)R.", "calls what is no function"),
        (b"ccollections\nOrderedDict\nK\x01R.", "arguments are no tuple"),
        (b"\x80\x04ccollections\nOrderedDict\n)}K\x01K\x01s\x92.", "arguments of a call"),
        (b"T\xff\xff\xff\x7fabc.", "damaged"),
        (b"X\xff\xff\xff\x7fabc.", "damaged"),
        (b"\x80\x03B\xff\xff\xff\x7fabc.", "damaged"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "damaged"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "damaged"),
        (b"\x8b\xff\xff\xff\x7fabc.", "damaged"),
        (b"\x8b\x00\x01\x00\x00" + b"\x7f" * 256 + b".", "a number is too large"),
        (b"L" + b"9" * 5000 + b"L\n.", "damaged"),
        (b"X\x03\x00\x00\x00\xed\xa0\x80.", "damaged"),
    ],
)  # fmt: skip
def test_damage_is_one_error(content, message):
    with pytest.raises(BundleError, match=message):
        read(content)


def array_state(shape, code="f8", data=bytes(16), order=b"\x89"):
    """Return a pickle of an array with any state."""
    return (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85X\x01\x00\x00\x00b"
        b"\x87R(K\x01" + pickle.dumps(shape, 2)[2:-1] + b"cnumpy\ndtype\nX"
        + len(code).to_bytes(4, "little") + code.encode() + b"K\x00K\x01\x87R" + order
        + pickle.dumps(data, 3)[2:-1] + b"tb."
    )  # fmt: skip


def test_arrays_made_by_hand_are_read():
    assert np.array_equal(read(array_state((2,))), np.zeros(2))


@pytest.mark.parametrize(
    "content",
    [
        array_state((2**31,)),
        array_state((3,)),
        array_state((-2,)),
        array_state((-1, -2)),
        array_state((2.0,)),
        array_state((True, 2)),
        array_state([2]),
        array_state((1,) * 40 + (2,)),
        array_state((0, 2**62), data=b""),
        array_state((2**40,), "U0", b""),
        array_state((2,), "V8"),
        array_state((1,), "c16"),
        array_state((1,), "f16"),
        array_state((1,), "f8,f8"),
        array_state((2,), "M8[s]"),
        array_state((1,), "O8"),
        array_state((4,), "U1", b"\xff" * 16),
        array_state((4,), "U1", b"\x00\xd8\x00\x00" * 4),
        array_state((2,), data=[1, 2]),
    ],
)
def test_arrays_that_cannot_be_are_refused(content):
    with pytest.raises(BundleError, match="damaged"):
        read(content)


def test_arrays_with_fields_are_refused():
    with pytest.raises(BundleError, match="damaged"):
        read(pickle.dumps(np.zeros(2, [("a", "f8"), ("b", "i4")])))


def test_truth_values_are_true_or_false():
    assert read(array_state((4,), "b1", b"\x00\x01\x02\xff")).view(np.uint8).tolist() == [
        0,
        1,
        1,
        1,
    ]


def nested(depth):
    return b"]" * depth + b"a" * (depth - 1) + b"."


def test_deep_nesting_is_refused():
    assert read(nested(50))
    for depth in (200, 10**5):
        with pytest.raises(BundleError, match="nested too deeply"):
            read(nested(depth))


def test_deep_nesting_put_together_from_shared_parts_is_refused():
    part = b"](" + nested(60)[:-1] + b"q\x00" + b"]" * 60 + b"h\x00" + b"a" * 60 + b"e."
    with pytest.raises(BundleError, match="nested too deeply"):
        read(part)


def test_a_value_in_itself_is_refused():
    """Python's own reader returns a list that contains itself."""
    for content in (b"]q\x00h\x00a.", b"}q\x00K\x01h\x00s.", b"](h\x00e.", b"]q\x00(h\x00h\x00e."):
        with pytest.raises(BundleError):
            read(content)


@pytest.mark.parametrize("content", [b"}" + b")" + b"\x85" * 10**5 + b"K\x01s.",
                                     b"}(" + b"K\x01" * 10**5 + b"tK\x01s."])  # fmt: skip
def test_keys_that_take_long_to_compare_are_refused(content):
    """A key of a hundred thousand nested tuples ends Python's own interpreter."""
    with pytest.raises(BundleError, match=r"a key has too many parts|a key is no plain value"):
        read(content)


def peak_bytes(content):
    """Return the memory that refusing a pickle takes."""
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match="unfolds to more than the file holds"):
            read(content)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_unfolds_without_end_is_refused():
    """Each level holds the one before it ten times: thirty levels are 10^30 values."""
    levels = b"]q\x00" + b"".join(
        b"0](" + b"h" + bytes([n]) + (b"h" + bytes([n])) * 9 + b"eq" + bytes([n + 1])
        for n in range(30)
    )
    assert peak_bytes(levels + b".") < 10**6


@pytest.mark.parametrize(
    "call",
    [
        b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R",
        b"c__builtin__\nbytearray\nh\x00X\x06\x00\x00\x00latin1\x86R",
        b"cpathlib\nPurePosixPath\nh\x00\x85R",
    ],
)
def test_copies_of_one_large_text_are_refused(call):
    num_bytes = 10**6
    text = b"X" + num_bytes.to_bytes(4, "little") + b"\x7a" * num_bytes
    assert peak_bytes(b"]" + text + b"q\x000(" + call * 300 + b"e.") < 10 * num_bytes


@pytest.mark.parametrize("call", [b"c__builtin__\nset\nh\x00\x85R", b"ctorch\nSize\nh\x00\x85R"])
def test_copies_of_one_long_list_are_refused(call):
    members = b"(" + b"K\x01" * 10**5 + b"lq\x00"
    assert peak_bytes(b"]" + members + b"0(" + call * 300 + b"e.") < 10**7


def test_copies_of_one_arrays_bytes_are_refused():
    large = b"B" + (10**6).to_bytes(4, "little") + bytes(10**6) + b"q\x00"
    array = array_state((10**6,), "u1", b"data")[2:-1].replace(b"q\x00", b"")
    shared = array.replace(b"C\x04data", b"h\x00")
    assert shared.count(b"h\x00") == 1
    assert np.array_equal(read(b"]" + large + b"0" + shared + b"a."), [np.zeros(10**6)])
    assert peak_bytes(b"]" + large + b"0(" + shared * 200 + b"e.") < 10**7


@pytest.mark.parametrize("limit", ["_MAX_OPERATIONS", "_MAX_CONTAINERS"])
def test_numbers_of_parts_are_limited(monkeypatch, limit):
    """One byte of a file makes a list of sixty."""
    monkeypatch.setattr(pickles, limit, 1000)
    assert len(read(b"(" + b"]" * 900 + b"t.")) == 900
    with pytest.raises(BundleError, match="too many parts"):
        read(b"(" + b"]" * 2000 + b"t.")


def test_length_is_limited(tmp_path):
    content = pickle.dumps(list(range(100)))
    path = tmp_path / "plans.pkl"
    path.write_bytes(content)
    for source in (content, path):
        assert read(source, max_bytes=len(content)) == list(range(100))
        with pytest.raises(BundleError, match=r"the pickle has .* expected at most 50 bytes"):
            read(source, max_bytes=50)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(BundleError, match=r"plans\.pkl: cannot be read"):
        read(tmp_path / "nothing.pkl")
    with pytest.raises(BundleError, match=r"plans\.pkl: cannot be read"):
        read(tmp_path)


def test_a_stream_is_left_behind_its_pickle():
    stream = io.BytesIO(b"xx" + pickle.dumps([1]) + pickle.dumps({"a": 2}, 4) + b"rest")
    stream.seek(2)
    values = [read_next_pickle(stream, where="x") for _ in range(2)]
    assert values == [[1], {"a": 2}]
    assert stream.read() == b"rest"


def test_what_lies_outside_is_stood_for():
    content = b"]((X\x01\x00\x00\x00aK\x07tQK\x02e."
    assert read(content, persistent=lambda told: [told]) == [[("a", 7)], 2]


def test_more_names_can_be_given():
    content = b"cmine\nmake\nK\x03\x85R."
    assert read(content, constructors={"mine.make": lambda number: [number]}) == [3]


def test_every_allowed_name_is_inert():
    """No constructor is a class or function of the library that it is named after."""
    constructors = stand_ins.Builder(0).constructors
    for name, constructor in constructors.items():
        own = getattr(constructor, "__module__", "") or type(constructor).__module__
        assert own == "medseg.interop.nnunet.stand_ins", name


GOOD = pickle.dumps(
    {
        "num_stages": 2,
        "plans": collections.OrderedDict({0: {"patch": np.array([40, 56, 48]), "do": True}}),
        "spacing": [np.array([1.0, 0.7, 0.9]), np.float64(3.5), (1, "ct", b"x", None)],
        "names": {"a", "b"},
    },
    4,
)


def damaged_copies(content, number, seed):
    """Yield copies with some bytes changed, and cut or doubled parts."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        copy = bytearray(content)
        for position in rng.integers(0, len(copy), rng.integers(1, 5)):
            copy[position] = rng.integers(0, 256)
        if rng.random() < 0.2:
            start, end = sorted(rng.integers(0, len(copy), 2))
            copy = copy[:start] + copy[end:] if rng.random() < 0.5 else copy[:end] + copy[start:]
        yield bytes(copy)


def test_damage_anywhere_is_a_plain_value_or_one_error():
    """Whatever byte is changed; and no module is imported."""
    contents = [GOOD, pickle.dumps(pickle.loads(GOOD), 0), PYTHON_2]
    copies = [
        copy for n, content in enumerate(contents) for copy in damaged_copies(content, 1500, n)
    ]
    before = set(sys.modules)
    num_refused = 0
    for copy in copies:
        try:
            read(copy)
        except MedsegError:
            num_refused += 1
    assert num_refused > 1000
    assert {
        name for name in set(sys.modules) - before if not name.startswith("encodings.")
    } == set()


def test_every_cut_is_noticed():
    for length in range(len(GOOD)):
        with pytest.raises(BundleError):
            read(GOOD[:length])


def test_any_operations_in_any_order_are_a_plain_value_or_one_error():
    operations = [bytes([code]) for code in range(256)]
    pieces = [*operations, b"K\x01", b"}", b"]", b")", b"(", b"\x85", b"\x86", b"R", b"b", b"h\x00",
              b"q\x00", b"X\x01\x00\x00\x00a", b"cnumpy\ndtype\n", b"ccollections\nOrderedDict\n",
              b"cnumpy.core.multiarray\nscalar\n", b"cnumpy.core.multiarray\n_reconstruct\n",
              b"c_codecs\nencode\n", b"C\x08" + bytes(8), b"X\x02\x00\x00\x00f8"]  # fmt: skip
    rng = np.random.default_rng(5)
    num_read = 0
    for _ in range(5000):
        chosen = rng.integers(200, len(pieces), rng.integers(1, 12))
        try:
            read(b"".join(pieces[index] for index in chosen) + b".")
            num_read += 1
        except MedsegError:
            pass
    assert num_read > 50
