"""Weight files: whole or not at all, and errors that list everything that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from medseg.errors import BundleError
from medseg.models.weights import load_into, load_metadata, load_weights, save_weights


def network() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 3, (1, 3, 5)), nn.Conv3d(3, 4, 1))


def test_weights_come_back_with_their_metadata(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "final.safetensors"
    tensors = network().state_dict()
    save_weights(path, tensors, {"fold": "fold_0"})
    found = load_weights(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert load_metadata(path) == {"fold": "fold_0"}


def test_shared_strided_and_sliced_tensors_are_written_plainly(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "base": base,
        "same": base,
        "transposed": base.transpose(0, 2),
        "slice": base[1],
        "learned": nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "empty": torch.zeros(0, 3),
        "count": torch.tensor(7),
    }
    path = tmp_path / "odd.safetensors"
    save_weights(path, tensors)
    found = load_weights(path)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert load_metadata(path) == {}


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "final.safetensors"
    save_weights(path, {"a": torch.ones(2)})
    with pytest.raises(TypeError):
        save_weights(path, {"a": torch.zeros(2)}, {"epoch": 3})  # type: ignore[dict-item]
    assert torch.equal(load_weights(path)["a"], torch.ones(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["final.safetensors"]


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "final.safetensors"
    with pytest.raises(BundleError, match=r"final\.safetensors: no such file"):
        load_weights(path)
    save_weights(path, network().state_dict())
    content = path.read_bytes()
    for damage in (content[: len(content) // 2], content + b"more", b"\x80\x04pickle", b""):
        path.write_bytes(damage)
        with pytest.raises(BundleError, match=r"final\.safetensors: not a whole safetensors"):
            load_weights(path)


def test_weights_reach_the_network_and_keep_its_layout() -> None:
    target = network().to(memory_format=torch.channels_last_3d)
    tensors = network().state_dict()
    load_into(target, tensors, "here")
    found = target.state_dict()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    weight = found["0.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not weight.is_contiguous()


def test_everything_that_does_not_fit_is_listed_and_nothing_is_copied() -> None:
    target, tensors = network(), network().state_dict()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    del tensors["1.bias"]
    tensors["0.weight"] = torch.zeros(3, 2, 5, 3, 1)
    tensors["2.extra"] = torch.zeros(6)
    with pytest.raises(BundleError, match="fold_1: 3 tensors of 4 do not fit") as caught:
        load_into(target, tensors, "fold_1")
    message = str(caught.value)
    assert "missing 1.bias (4,)" in message
    assert "unexpected 2.extra (6,)" in message
    assert "0.weight has shape (3, 2, 5, 3, 1), expected (3, 2, 1, 3, 5)" in message
    assert all(torch.equal(before[n], value) for n, value in target.state_dict().items())
