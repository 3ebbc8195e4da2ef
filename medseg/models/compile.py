"""Compile a network where that is timed to be faster."""

from __future__ import annotations

import logging
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medseg.errors import ConfigError, near_names

logger = logging.getLogger(__name__)

Step = Callable[[nn.Module], Any]
"""Runs a module forward and backward as training does; steps no optimiser."""
MODES = ("auto", "on", "off", "graphs")

MARGIN = 0.03
"""A compiled step must be this much faster than an eager one."""
SHARE = 0.05
"""Part of the time left that compiling may take."""
USUAL_SECONDS = 60.0
"""What compiling usually takes; where that is too long, it is not tried."""
LONGEST_SECONDS = 600.0
"""What compiling may take where the end of the run is not known."""
_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """The module to call in training, and how it was chosen."""

    module: nn.Module
    """The network itself or its compiled form, which shares its parameters. Save and validate with
    the network: names in the compiled form's `state_dict` are others."""
    is_compiled: bool
    reason: str
    """Why, in words."""
    seconds: dict[str, float] = field(default_factory=dict)
    """`compile`: the first compiled step; `eager`, `compiled`: one step; where they were timed."""


class _TooSlow(BaseException):
    """Compiling took longer than it may; no Exception, since the compiler renames those."""


class _Graphs(nn.Module):
    """Tells the library where a step begins, so that CUDA graphs may reuse their memory."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return self.module(images)


def fastest(
    network: nn.Module,
    example: Callable[[], Tensor],
    *,
    mode: Literal["auto", "on", "off", "graphs"] = "auto",
    step: Step | None = None,
    seconds_left: float | None = None,
    decided: bool | None = None,
) -> Compiled:
    """Return the network or its compiled form, whichever does training steps faster.

    Nothing but time is spent: gradients, buffers and random states are put back. What was decided
    is said in one line of the log.

    Args:
        network: On its device, in training mode.
        example: Gives images (B, C, *spatial) as training does, on the network's device.
        mode: `auto` compiles where it is at least 3 % faster; `on` compiles unless it fails; `off`
            does not; `graphs` compiles with CUDA graphs.
        step: Forward and backward as in training; None: those of the mean square of all logits.
        seconds_left: Until the run ends; `auto` does not try where compiling would take more than
            5 % of it, and gives up beyond. None: not known.
        decided: What a run that goes on has decided before; None: nothing.

    Raises:
        ConfigError: If the mode is unknown, or is `graphs` on another device than CUDA.
    """
    _check_mode(mode)
    images = example()
    if mode == "graphs" and images.device.type != "cuda":
        raise ConfigError(
            f"compile is 'graphs', which needs a CUDA device, but the network is on "
            f"{images.device.type!r}; expected one of: auto, on, off."
        )
    limit = LONGEST_SECONDS if seconds_left is None else SHARE * seconds_left
    if (reason := _why_not(mode, images.device, limit, decided)) is not None:
        return _said(Compiled(module=network, is_compiled=False, reason=reason), mode)
    trial = _Trial(network, step or _square_step(images), images.device)
    must_compile = decided is True or mode in ("on", "graphs")
    with _undone(network, images.device):
        found = trial.run(
            graphs=mode == "graphs",
            race=not must_compile,
            limit=None if must_compile else min(limit, LONGEST_SECONDS),
        )
    return _said(found, mode)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        known = list(MODES)
        raise ConfigError(
            f"compile is {mode!r}; expected one of: {', '.join(known)}.{near_names(mode, known)}"
        )


def _why_not(mode: str, device: torch.device, limit: float, decided: bool | None) -> str | None:
    """Return why compiling need not be tried, in words; None if it is to be."""
    if mode == "off" or decided is False:
        return "compile is off" if mode == "off" else "this run was started without compiling"
    if mode != "auto" or decided is True:
        return None
    if device.type not in ("cpu", "cuda"):
        return f"networks are not compiled on {device.type!r}"
    if limit < USUAL_SECONDS:
        return f"compiling takes about {USUAL_SECONDS:.0f} s, too much for so short a run"
    if device.type == "cpu" and not has_cpp_compiler():
        return "compiling for the CPU needs a C++ compiler, and there is none"
    return None


def has_cpp_compiler() -> bool:
    """Return whether there is a program that turns compiled networks into machine code."""
    from torch._inductor import config

    candidates = config.cpp.cxx
    names = candidates if isinstance(candidates, (tuple, list)) else (candidates,)
    return any(name is not None and shutil.which(str(name)) is not None for name in names)


@dataclass(frozen=True, slots=True)
class _Trial:
    network: nn.Module
    step: Step
    device: torch.device

    def run(self, *, graphs: bool, race: bool, limit: float | None) -> Compiled:
        """Compile, time both forms in turn, and keep one; whatever fails leads back to eager."""
        seconds: dict[str, float] = {}
        options: dict[str, Any] = {"mode": "reduce-overhead"} if graphs else {}
        self._timed(self.network)  # warms up; what fails here is no fault of the compiler
        try:
            with warnings.catch_warnings(), _time_limit(limit):
                warnings.simplefilter("ignore")
                module: nn.Module = torch.compile(self.network, **options)  # type: ignore[assignment]
                module = _Graphs(module) if graphs else module
                seconds["compile"] = self._timed(module)
                if race:
                    rounds = [self._both(module) for _ in range(_ROUNDS)]
                    seconds["eager"] = min(eager for eager, _ in rounds)
                    seconds["compiled"] = min(compiled for _, compiled in rounds)
        except _TooSlow:
            return self._eager(f"compiling took more than {limit:.0f} s", seconds)
        except Exception as error:  # whatever the compiler stumbles over
            return self._eager(f"compiling failed ({_first_line(error)})", seconds)
        if not race:
            reason = f"compiled in {seconds['compile']:.0f} s"
            return Compiled(module=module, is_compiled=True, reason=reason, seconds=seconds)
        pair = f"{seconds['compiled']:.3f} s a step, {seconds['eager']:.3f} s without compiling"
        if seconds["compiled"] > (1 - MARGIN) * seconds["eager"]:
            return self._eager(f"compiling gains nothing: {pair}", seconds)
        reason = f"compiled in {seconds['compile']:.0f} s: {pair}"
        return Compiled(module=module, is_compiled=True, reason=reason, seconds=seconds)

    def _eager(self, reason: str, seconds: dict[str, float]) -> Compiled:
        torch.compiler.reset()  # frees what was compiled
        return Compiled(module=self.network, is_compiled=False, reason=reason, seconds=seconds)

    def _both(self, module: nn.Module) -> tuple[float, float]:
        return self._timed(self.network), self._timed(module)

    def _timed(self, module: nn.Module) -> float:
        """Return the seconds of one step."""
        self.network.zero_grad(set_to_none=True)
        _wait(self.device)
        start = time.perf_counter()
        self.step(module)
        _wait(self.device)
        return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _square_step(images: Tensor) -> Step:
    def step(module: nn.Module) -> None:
        logits = module(images)
        many = [logits] if isinstance(logits, Tensor) else logits
        torch.stack([each.float().square().mean() for each in many]).sum().backward()  # type: ignore[no-untyped-call]

    return step


@contextmanager
def _undone(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Put gradients, buffers and random states back as they were."""
    buffers = {name: buffer.detach().clone() for name, buffer in network.named_buffers()}
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(buffers[name])
        for name, parameter in network.named_parameters():
            parameter.grad = gradients[name]


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `_TooSlow` in the block when the time is over.

    Only in the main thread of a system with alarms; elsewhere the block takes what it takes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if seconds is None or not is_main or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _said(found: Compiled, mode: str) -> Compiled:
    """Say in the log what was decided; a wish that is not granted is a warning."""
    if found.is_compiled:
        logger.info("network %s", found.reason)
    elif mode in ("on", "graphs"):
        logger.warning("network not compiled, as compile is %r asked for: %s", mode, found.reason)
    elif mode == "auto":
        logger.info("network not compiled: %s", found.reason)
    return found
