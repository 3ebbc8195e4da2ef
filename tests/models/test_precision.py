"""Choice of device and arithmetic; hardware the machine lacks is pretended, bf16 is computed."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from medseg.errors import ConfigError
from medseg.models.build import build_network
from medseg.models.precision import autocast_dtype, pick_device
from medseg.schema.plans import Architecture

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def pretend_cpu(monkeypatch: pytest.MonkeyPatch, *, avx512_bf16: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)


@pytest.mark.usefixtures("gpus")
def test_auto_takes_the_first_gpu() -> None:
    assert pick_device("auto") == GPU
    assert pick_device("cuda") == GPU
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cpu") == CPU


@pytest.mark.usefixtures("no_gpus")
def test_auto_without_gpu_is_the_cpu() -> None:
    assert pick_device("auto") == CPU


@pytest.mark.usefixtures("no_gpus")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "gpu", "cuda:x"])
def test_absent_devices_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"device is '{name}'; this machine has: auto, cpu"):
        pick_device(name)


@pytest.mark.parametrize(("avx512_bf16", "amx"), [(True, False), (False, True)])
def test_auto_on_cpus_with_bf16(
    monkeypatch: pytest.MonkeyPatch, avx512_bf16: bool, amx: bool
) -> None:
    pretend_cpu(monkeypatch, avx512_bf16=avx512_bf16, amx=amx)
    assert autocast_dtype(CPU) == torch.bfloat16
    assert autocast_dtype(CPU, "fp32") is None


def test_cpus_without_bf16_run_fp32_and_warn_when_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_cpu(monkeypatch, avx512_bf16=False, amx=False)
    assert autocast_dtype(CPU, "auto") is None
    with caplog.at_level(logging.WARNING):
        assert autocast_dtype(CPU, "bf16") == torch.bfloat16
    assert "emulates bf16" in caplog.text


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float16), ((9, 0), torch.bfloat16)]
)
def test_auto_on_gpus_follows_their_generation(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert autocast_dtype(GPU, "auto") == expected
    assert autocast_dtype(GPU, "fp16") == torch.float16


def test_auto_elsewhere_is_fp32() -> None:
    assert autocast_dtype(torch.device("mps"), "auto") is None


def test_impossible_and_unknown_precisions_are_refused() -> None:
    with pytest.raises(ConfigError, match="precision is 'fp16', but networks on the CPU"):
        autocast_dtype(CPU, "fp16")
    with pytest.raises(ConfigError, match="Did you mean 'bf16'"):
        autocast_dtype(CPU, "bf61")


SHAPES = {2: (2, 2, 24, 16), 3: (2, 2, 8, 12, 16)}


def network(kind: str, dimension: int) -> nn.Module:
    stages = range(3)
    return build_network(
        Architecture(
            kind=kind,
            features=tuple(8 * 2**stage for stage in stages),
            kernel_sizes=((1, *(3,) * (dimension - 1)), *((3,) * dimension,) * 2),
            strides=((1,) * dimension, (1, *(2,) * (dimension - 1)), (2,) * dimension),
            blocks_encoder=(2, 1, 1),
            blocks_decoder=(1, 1),
        ),
        num_inputs=2,
        num_logits=3,
        deep_supervision=True,
        generator=torch.Generator().manual_seed(2),
    ).use_channels_last()


@pytest.mark.parametrize("dimension", SHAPES)
@pytest.mark.parametrize("kind", ["plain_unet", "residual_unet", "mednext_b"])
def test_bf16_gives_the_logits_and_gradients_of_fp32_but_for_rounding(
    kind: str, dimension: int
) -> None:
    module = network(kind, dimension)
    images = torch.randn(SHAPES[dimension], generator=torch.Generator().manual_seed(3))
    found = []
    for enabled in (False, True):
        module.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            many = module(images)
        assert {logits.dtype for logits in many} == {torch.bfloat16 if enabled else torch.float32}
        sum((logits.float() - 1).square().mean() for logits in many).backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        found.append((many, gradients))
    (plain, exact), (low, rounded) = found
    for one, other in zip(plain, low, strict=True):
        difference = (one - other.float()).square().mean().sqrt()
        assert 0 < difference < 0.03 * one.square().mean().sqrt()
    flat = torch.cat([exact[name].flatten() for name in exact])
    found_flat = torch.cat([rounded[name].flatten() for name in exact])
    assert torch.cosine_similarity(flat, found_flat, dim=0) > 0.99
