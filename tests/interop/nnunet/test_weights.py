"""Fitting foreign tensors to a network."""

from __future__ import annotations

import pytest
import torch

from medseg.errors import BundleError
from medseg.interop.nnunet.weights import (
    copies_of_blocks,
    fit,
    read_tensors,
    unwrapped,
    wanted_tensors,
    without_copies,
)
from medseg.models.build import build_network
from tests.interop.nnunet.v2_folders import make_architecture


class Stored:
    """A tensor that says how often it was read."""

    def __init__(self, tensor):
        self.tensor, self.shape, self.times = tensor, tuple(tensor.shape), 0

    def read(self):
        self.times += 1
        return self.tensor


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_wanted_tensors_are_those_of_the_network_without_its_memory(kind, norm):
    architecture = make_architecture(kind=kind, norm=norm)
    wanted = wanted_tensors(architecture, num_inputs=4, num_logits=5)
    network = build_network(architecture, num_inputs=4, num_logits=5).state_dict()
    assert {n: (t.shape, t.dtype) for n, t in wanted.items()} == {
        n: (t.shape, t.dtype) for n, t in network.items()
    }
    assert all(tensor.is_meta for tensor in wanted.values())


def test_a_network_that_contradicts_itself_is_refused():
    architecture = make_architecture().model_copy(update={"blocks_decoder": (1,)})
    with pytest.raises(BundleError, match="blocks_decoder has 1 entries; expected 2"):
        wanted_tensors(architecture, num_inputs=1, num_logits=2)


def test_names_lose_what_wrappers_put_before_them():
    tensor = Stored(torch.zeros(2))
    table = {"module._orig_mod.a.module.b": tensor, "c": tensor}
    assert list(unwrapped(table, "file")) == ["a.module.b", "c"]


def test_copies_are_told_from_what_they_repeat():
    names = [
        "encoder.stages.0.0.convs.0.conv.weight",
        "encoder.stages.0.0.convs.0.all_modules.0.weight",
        "encoder.stages.0.blocks.1.conv2.all_modules.1.running_mean",
        "encoder.stages.0.blocks.1.skip.1.all_modules.2.bias",
        "decoder.encoder.stages.0.0.convs.0.conv.weight",
        "decoder.stages.0.convs.0.all_modules.0.bias",
        "decoder.seg_layers.0.bias",
    ]
    assert copies_of_blocks(names) == {
        names[1]: names[0],
        names[2]: "encoder.stages.0.blocks.1.conv2.norm.running_mean",
        names[3]: "encoder.stages.0.blocks.1.skip.1.norm.bias",
        names[4]: names[0],
        names[5]: "decoder.stages.0.convs.0.conv.bias",
    }


def test_a_lone_copy_takes_the_place_of_what_is_missing():
    one, two = Stored(torch.zeros(2)), Stored(torch.zeros(2))
    assert without_copies({"copy": one, "b": two}, {"copy": "a"}, "f") == {"a": one, "b": two}
    with pytest.raises(BundleError, match=r"copy has shape \(3,\), b \(2,\)"):
        without_copies({"copy": Stored(torch.zeros(3)), "b": two}, {"copy": "b"}, "f")


def test_nothing_is_read_until_all_names_and_shapes_fit():
    wanted = {"a": torch.zeros(2, 3, device="meta"), "b": torch.zeros(4, device="meta")}
    stored = {"a": Stored(torch.zeros(3, 2)), "c": Stored(torch.zeros(1))}
    with pytest.raises(BundleError, match=r"^f: 3 tensors of 2 do not fit") as error:
        fit(stored, wanted, "f")
    lines = [line.strip() for line in str(error.value).splitlines()[1:4]]
    assert lines == ["missing: b (4,)", "left over: c (1,)", "a has shape (3, 2), expected (2, 3)"]
    assert [tensor.times for tensor in stored.values()] == [0, 0]
    fit({"a": Stored(torch.zeros(2, 3))}, wanted, "f", optional=["b"])


def test_values_come_in_the_networks_types_and_what_is_missing_is_filled():
    wanted = {
        "a": torch.zeros(2, device="meta"),
        "b": torch.zeros(3, device="meta"),
        "n": torch.zeros((), dtype=torch.int64, device="meta"),
    }
    stored = {"n": Stored(torch.tensor(7)), "a": Stored(torch.tensor([1.5, 2], dtype=torch.half))}
    found = read_tensors(stored, wanted, "f", fills={"b": 1.0, "n": 0.0})
    assert list(found) == ["a", "b", "n"]
    assert [tensor.dtype for tensor in found.values()] == [torch.float32] * 2 + [torch.int64]
    assert torch.equal(found["a"], torch.tensor([1.5, 2]))
    assert torch.equal(found["b"], torch.ones(3))
    assert found["n"] == 7


def test_all_values_that_are_no_numbers_are_named():
    wanted = {name: torch.zeros(2, device="meta") for name in "abc"}
    stored = {
        "a": Stored(torch.tensor([1, float("inf")])),
        "b": Stored(torch.zeros(2)),
        "c": Stored(torch.zeros(2, dtype=torch.complex64)),
    }
    with pytest.raises(BundleError, match="2 tensors are not usable") as error:
        read_tensors(stored, wanted, "f")
    assert "a holds values that are infinite" in str(error.value)
    assert "c is of type torch.complex64" in str(error.value)
