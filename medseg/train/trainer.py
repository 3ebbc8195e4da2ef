"""The state of a training run, and what one step does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from medseg.labels import LabelScheme
from medseg.losses.compound import Loss
from medseg.models.groups import encoder_parameters, parameter_groups
from medseg.schema.recipe import Recipe
from medseg.train.best import Best
from medseg.train.distributed import Processes
from medseg.train.feed import Samples
from medseg.train.finite import FiniteWatch
from medseg.train.judge import Judged, PatchScores, judge_patches
from medseg.train.optim import Ema, build_optimizer, learning_rate
from medseg.train.schedule import Length
from medseg.train.timing import Clock

_FEWEST_EPOCHS = 2
"""In a shorter run the learning rate changes every iteration, whatever the recipe says."""
_WARM_AGAIN = 0.05
"""Least share of an extension in which the learning rate rises."""
_PEEK_EVERY = 50
"""Steps between two looks at the loss on an accelerator, which has to be waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts a trainer is put together from."""

    network: nn.Module
    num_inputs: int
    """Channels of the images; in a cascade with those of the stage before."""
    loss: Loss
    """(list of logits, target, valid) -> scalar; also told `annotated` where a batch is partial."""
    labels: LabelScheme
    device: torch.device
    dtype: torch.dtype | None
    """Autocast type of the network; None computes in float32."""
    processes: Processes = Processes()  # noqa: RUF009 - a frozen value
    """The processes that train this network."""


class Trainer:
    """Network, optimiser, schedule position and running results of one run."""

    def __init__(self, recipe: Recipe, parts: Parts, length: Length) -> None:
        """Put a new run together; nothing is computed yet."""
        self.recipe, self.parts, self.length = recipe, parts, length
        self.network = parts.network.to(parts.device)
        self.network.use_channels_last()  # type: ignore[operator]
        if recipe.optimizer.freeze_encoder:
            encoder_parameters(self.network)  # refuses a network without one before anything runs
        groups = parameter_groups(self.network, layer_decay=recipe.optimizer.layer_decay)
        self.optimizer = build_optimizer(groups, recipe.optimizer)
        self.ema = Ema(self.network, recipe.ema) if recipe.ema else None
        self.scaler = torch.amp.GradScaler(
            parts.device.type, enabled=parts.dtype == torch.float16 and parts.device.type == "cuda"
        )
        self.clock = Clock(parts.device)
        self.watch = FiniteWatch(parts.device)
        self.best = Best()
        self.iterations_per_epoch = recipe.iterations_per_epoch
        self.epoch = self.first_epoch = self.step_in_epoch = 0
        self.num_stretches = self.session = 1
        self.seconds_to_last_step = 0.0
        self._buffers = [b for b in self.network.buffers() if b.is_floating_point()]
        self._loss_sum = torch.zeros((), device=parts.device)
        self._finite_steps = torch.zeros((), dtype=torch.int64, device=parts.device)
        self._is_frozen = False
        self._inner: nn.Module = self.network
        self.forward: Callable[[torch.Tensor], Any] = self.network
        self.use(self.network)

    def use(self, module: nn.Module) -> None:
        """Compute with `module`, a faster form of the network that shares its weights."""
        self._inner = module
        self.forward = self.parts.processes.wrap(module)

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of the present step."""
        schedule, progress = self.recipe.schedule, self.length.progress
        if schedule.per == "epoch" and self.length.estimated_iterations() >= (
            _FEWEST_EPOCHS * self.iterations_per_epoch
        ):
            progress = self._epoch_progress
        if self.num_stretches > 1:
            schedule = schedule.model_copy(update={"warmup": max(schedule.warmup, _WARM_AGAIN)})
        return learning_rate(schedule, self.recipe.optimizer.lr, progress)

    @property
    def _epoch_progress(self) -> float:
        done = (self.epoch - self.first_epoch) * self.iterations_per_epoch
        total = self.length.num_iterations
        return done / total if total else self.length.progress

    def is_epoch_over(self) -> bool:
        """Return whether the present epoch has all its steps."""
        return self.step_in_epoch > 0 and (
            self.step_in_epoch >= self.iterations_per_epoch or self.length.is_done()
        )

    def mean_loss(self) -> float:
        """Return the mean loss of the epoch's finite steps so far; waits for the device."""
        return float(self._loss_sum) / max(int(self._finite_steps), 1)

    def peek(self) -> float | None:
        """Return the mean loss so far; on an accelerator only now and then, as it synchronises."""
        if self.parts.device.type != "cpu" and self.step_in_epoch % _PEEK_EVERY:
            return None
        return self.mean_loss()

    def step(self, samples: Samples) -> torch.Tensor:
        """Do one optimiser step and return its loss, still on the device."""
        self._set_rates()
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        buffers = [buffer.clone() for buffer in self._buffers]
        with self.clock.part("forward"):
            loss = self.loss_of(self.forward, samples)
        with self.clock.part("backward"):
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            finite = self._update(loss)
            for buffer, before in zip(self._buffers, buffers, strict=True):
                buffer.copy_(torch.where(finite, buffer, before))
            self._average(finite)
        self.watch.note(finite, samples.case_ids)
        self.length.advance()
        self.parts.processes.agree(self.length)
        seen = loss.detach().nan_to_num(0.0, 0.0, 0.0)
        self._loss_sum += seen * finite
        self._finite_steps += finite
        self.step_in_epoch += 1
        return seen

    def loss_of(self, network: Callable[[torch.Tensor], Any], samples: Samples) -> torch.Tensor:
        """Return the loss of a batch in training, by the network or another form of it."""
        with self.autocast():
            logits = _as_list(network(samples.images))
        return self._loss(logits, samples)

    def _set_rates(self) -> None:
        """Set the learning rates, and whether the encoder learns."""
        rate = self.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        shall_freeze = (
            self.num_stretches == 1 and self.length.progress < self.recipe.optimizer.freeze_encoder
        )
        if shall_freeze != self._is_frozen:
            self._is_frozen = shall_freeze
            for parameter in encoder_parameters(self.network):
                parameter.requires_grad_(not shall_freeze)
            self.use(self._inner)

    def _loss(self, logits: list[torch.Tensor], samples: Samples) -> torch.Tensor:
        if samples.annotated is None:
            return self.parts.loss(logits, samples.target, samples.valid)
        return self.parts.loss(logits, samples.target, samples.valid, annotated=samples.annotated)

    def _update(self, loss: torch.Tensor) -> torch.Tensor:
        """Apply the gradients; a step that is not finite leaves weights and averages alone.

        The device decides by itself: nothing is asked of it here.
        """
        self.scaler.unscale_(self.optimizer)
        limit = self.recipe.gradient_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        finite = torch.isfinite(norm + loss.detach())
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        return finite

    def _average(self, finite: torch.Tensor) -> None:
        """Move the average of the weights, unless the step was skipped."""
        if self.ema is None:
            return
        if self.parts.device.type != "cpu":
            self.ema.update(self.network, finite)
        elif bool(finite):
            self.ema.update(self.network)

    def validate(self, batches: Iterable[Samples]) -> PatchScores:
        """Return the Dice of each structure pooled over validation patches, and the mean loss.

        The weights judged are those that are saved: the moving average where there is one.
        """
        self.network.eval()
        weights = self.weights()

        def judge(samples: Samples) -> Judged:
            with self.autocast():
                logits = _as_list(functional_call(self.network, weights, (samples.images,)))
            return logits[0], self._loss(logits, samples)

        return judge_patches(batches, self.parts.labels, judge, self.parts.processes.sum_over)

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Count the epoch and decide whether its weights are the best so far."""
        self.best.note(row)
        self.epoch += 1
        self.step_in_epoch = 0
        self._loss_sum.zero_()
        self._finite_steps.zero_()
        self.seconds_to_last_step = row["elapsed_seconds"]

    def restart_averages(self) -> None:
        """Start the moving average at the present weights, which are other ones than at first."""
        if self.ema is not None:
            self.ema = Ema(self.network, self.ema.decay)

    def begin_stretch(self) -> None:
        """Go on beyond the end of the run: a new schedule from the present weights."""
        self.length.begin_stretch()
        self.num_stretches += 1
        self.first_epoch = self.epoch

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights to predict with: the moving average where there is one."""
        return dict(self.ema.tensors if self.ema is not None else self.network.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return everything a later process needs to go on exactly here."""
        return {
            "network": dict(self.network.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "length": self.length.state_dict(),
            "epoch": self.epoch,
            "first_epoch": self.first_epoch,
            "num_stretches": self.num_stretches,
            "session": self.session,
            "step_in_epoch": self.step_in_epoch,
            "loss_sum": self._loss_sum,
            "watch": self.watch.state_dict(),
            "finite_steps": self._finite_steps,
            "best": self.best.state_dict(),
            "seconds_to_last_step": self.seconds_to_last_step,
            "random": _random_state(self.parts.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state written by `state_dict`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        _match_layouts(self.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        self.length.load_state_dict(state["length"])
        self.epoch, self.first_epoch = state["epoch"], state["first_epoch"]
        self.num_stretches, self.session = state["num_stretches"], state["session"] + 1
        self.step_in_epoch = state["step_in_epoch"]
        self._loss_sum.copy_(state["loss_sum"])
        self.watch.load_state_dict(state["watch"])
        self._finite_steps.copy_(state["finite_steps"])
        self.best.load_state_dict(state["best"])
        self.seconds_to_last_step = state["seconds_to_last_step"]
        if self.parts.processes.is_main:  # the others' states are not kept
            _set_random_state(state["random"], self.parts.device)

    def autocast(self) -> Any:
        """Return the context of the network's arithmetic."""
        if self.parts.dtype is None:
            return nullcontext()
        return torch.autocast(self.parts.device.type, dtype=self.parts.dtype)


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of torch's global generators, for networks that drop features out."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser's averages the memory layout of their parameters.

    Fused optimisers pair values by their place in memory, whatever the strides say.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _as_list(logits: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return [logits] if isinstance(logits, torch.Tensor) else list(logits)
