"""The choice between compiled and eager, with a compiler that the tests control."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg.errors import ConfigError
from medseg.models import compile as compiling
from medseg.models.build import build_network
from medseg.models.compile import fastest, has_cpp_compiler
from medseg.schema.plans import Architecture

WAIT = 0.03


class Network(nn.Module):
    """A convolution, a dropout that draws, a norm that remembers; slow by `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, 2, 1)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm3d(2)
        self.seconds = seconds

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.norm(self.drop(self.layer(images)))


class Wrapper(nn.Module):
    """Stands for a compiled network: takes time once, then less or more than the network."""

    def __init__(self, network: Network, first: float, later: float) -> None:
        super().__init__()
        self.inner, self.first, self.later, self.calls = network, first, later, 0

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(self.later if self.calls else self.first)
        self.calls += 1
        network = self.inner
        return network.norm(network.drop(network.layer(images)))


def images() -> Tensor:
    return torch.linspace(-1, 1, 120).reshape(2, 1, 3, 4, 5)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    def install(*, first: float = 0.0, later: float = 0.0, error: Exception | None = None) -> Any:
        calls: list[dict[str, Any]] = []

        def replacement(network: Network, **options: Any) -> nn.Module:
            calls.append(options)
            if error is not None:
                raise error
            return Wrapper(network, first, later)

        monkeypatch.setattr(torch, "compile", replacement)
        monkeypatch.setattr(torch.compiler, "reset", lambda: None)
        monkeypatch.setattr(compiling, "has_cpp_compiler", lambda: True)
        return calls

    return install


def test_faster_form_is_kept_and_told(compiler, caplog) -> None:
    compiler(first=0.05, later=0.0)
    network = Network(seconds=WAIT)
    with caplog.at_level(logging.INFO):
        found = fastest(network, images)
    assert found.is_compiled
    assert isinstance(found.module, Wrapper)
    assert found.seconds["eager"] >= WAIT > found.seconds["compiled"]
    assert found.seconds["compile"] >= 0.05
    (record,) = caplog.records
    assert "without compiling" in record.message


@pytest.mark.parametrize("gain", [-0.5, 0.0])
def test_form_that_is_no_faster_is_dropped(compiler, gain: float) -> None:
    compiler(later=WAIT * (1 - gain))
    network = Network(seconds=WAIT)
    found = fastest(network, images)
    assert not found.is_compiled
    assert found.module is network
    assert "gains nothing" in found.reason
    assert set(found.seconds) == {"compile", "eager", "compiled"}


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_failing_compiler_leads_back_in_one_line(compiler, caplog, mode: str) -> None:
    compiler(error=RuntimeError("no such kernel\nand a long trace"))
    network = Network()
    with caplog.at_level(logging.INFO):
        found = fastest(network, images, mode=mode)
    assert found.module is network
    (record,) = caplog.records
    assert "compiling failed (RuntimeError: no such kernel)" in record.message
    assert record.levelname == ("WARNING" if mode == "on" else "INFO")


def test_failing_step_is_no_fault_of_the_compiler(compiler) -> None:
    compiler()

    def step(module: nn.Module) -> None:
        raise ConfigError("the loss does not fit")

    with pytest.raises(ConfigError, match="the loss does not fit"):
        fastest(Network(), images, step=step)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no alarms")
def test_compiler_that_hangs_is_stopped(compiler, monkeypatch) -> None:
    compiler(first=30.0)
    monkeypatch.setattr(compiling, "USUAL_SECONDS", 0.1)
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    found = fastest(Network(), images, seconds_left=0.3 / compiling.SHARE)
    assert time.monotonic() - start < 5
    assert not found.is_compiled
    assert "took more than 0 s" in found.reason
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_nothing_is_left_behind_by_the_trial(compiler) -> None:
    compiler(later=1e-4)
    torch.manual_seed(8)
    network = Network()
    network.layer.weight.grad = torch.full_like(network.layer.weight, 3.0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    fastest(network, images)
    assert torch.equal(torch.get_rng_state(), state)
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert float(network.layer.weight.grad.mean()) == 3.0
    assert network.norm.weight.grad is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "off"}, "compile is off"),
        ({"mode": "on", "decided": False}, "started without compiling"),
        ({"decided": False}, "started without compiling"),
        ({"seconds_left": 600.0}, "too much for so short a run"),
    ],
)
def test_compiling_is_not_even_tried(compiler, options: dict[str, Any], reason: str) -> None:
    calls = compiler()
    network = Network()
    found = fastest(network, images, **options)
    assert found.module is network
    assert reason in found.reason
    assert calls == []


@pytest.mark.parametrize("options", [{"decided": True, "seconds_left": 60.0}, {"mode": "on"}])
def test_what_was_decided_or_ordered_is_not_timed(compiler, options: dict[str, Any]) -> None:
    compiler(later=WAIT)
    found = fastest(Network(), images, **options)
    assert found.is_compiled
    assert set(found.seconds) == {"compile"}


def test_machine_without_cpp_compiler_stays_eager_and_says_so(monkeypatch, caplog) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not has_cpp_compiler()
    with caplog.at_level(logging.INFO):
        found = fastest(Network(), images)
    assert not found.is_compiled
    assert [record.message for record in caplog.records] == [
        "network not compiled: compiling for the CPU needs a C++ compiler, and there is none"
    ]


def test_graphs_need_cuda_and_unknown_modes_are_named() -> None:
    with pytest.raises(ConfigError, match="compile is 'graphs', which needs a CUDA device"):
        fastest(Network(), images, mode="graphs")
    with pytest.raises(ConfigError, match=r"compile is 'graph'.*Did you mean 'graphs'"):
        fastest(Network(), images, mode="graph")


@pytest.mark.slow
@pytest.mark.skipif(not has_cpp_compiler(), reason="there is no C++ compiler")
def test_compiled_unet_computes_the_same_and_saves_under_the_same_names() -> None:
    network = build_network(
        Architecture(
            kind="plain_unet",
            features=(2, 4),
            kernel_sizes=((1, 3), (3, 3)),
            strides=((1, 1), (2, 2)),
            blocks_encoder=(1, 1),
            blocks_decoder=(1,),
        ),
        num_inputs=1,
        num_logits=2,
        deep_supervision=True,
    ).use_channels_last()
    batch = torch.randn(2, 1, 8, 12)
    names = list(network.state_dict())
    found = fastest(network, lambda: batch, mode="on")
    assert found.is_compiled, found.reason
    torch.testing.assert_close(found.module(batch)[0], network(batch)[0], rtol=1e-4, atol=1e-5)
    assert list(network.state_dict()) == names
    shared = {id(parameter) for parameter in network.parameters()}
    assert {id(parameter) for parameter in found.module.parameters()} == shared
