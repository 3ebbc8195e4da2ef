"""Optimisers and learning-rate schedules, from plain arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from medseg.errors import ConfigError, near_names
from medseg.schema.recipe import OptimizerRecipe, ScheduleRecipe

OPTIMIZERS = ("sgd", "adam", "adamw")


def build_optimizer(
    groups: Sequence[tuple[Sequence[torch.nn.Parameter], float]], recipe: OptimizerRecipe
) -> torch.optim.Optimizer:
    """Return the optimiser a recipe names, in its fused form.

    A step that is told `found_inf` leaves weights and averages as they are, without the host having
    to know. Weight decay spares biases and normalisation parameters under AdamW; SGD decays all,
    as nnU-Net does.

    Args:
        groups: Parameters that learn alike, and the factor of their learning rate; it is kept in
            each of the optimiser's groups as "factor".
        recipe: Name and constants.

    Raises:
        ConfigError: If the name is unknown.
    """
    betas, decay = (0.9, recipe.beta2), recipe.weight_decay
    options: dict[str, Any] = {"lr": recipe.lr, "fused": True}
    if recipe.name == "sgd":
        options |= {"momentum": recipe.momentum, "nesterov": recipe.momentum > 0}
        sgd = torch.optim.SGD(_alike(groups, decay), **options)
        return _with_momentum(sgd) if recipe.momentum else sgd
    if recipe.name == "adam":
        return torch.optim.Adam(_alike(groups, decay), betas=betas, **options)
    if recipe.name == "adamw":
        kinds = [
            ([p for p in parameters if (p.ndim > 1) == decays], factor, decay * decays)
            for parameters, factor in groups
            for decays in (True, False)
        ]
        split = [
            {"params": parameters, "factor": factor, "weight_decay": one}
            for parameters, factor, one in kinds
            if parameters
        ]
        return torch.optim.AdamW(split, betas=betas, **options)
    raise ConfigError(
        f"optimizer.name is {recipe.name!r}; expected one of: {', '.join(OPTIMIZERS)}."
        f"{near_names(recipe.name, list(OPTIMIZERS))}"
    )


def _alike(
    groups: Sequence[tuple[Sequence[torch.nn.Parameter], float]], decay: float
) -> list[dict[str, Any]]:
    return [
        {"params": list(parameters), "factor": factor, "weight_decay": decay}
        for parameters, factor in groups
    ]


def _with_momentum(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """Start the momentum at 0, which is what the first step would make of it.

    Otherwise the fused first step allocates it without a value, and would leave it so if that step
    is skipped.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(recipe: ScheduleRecipe, peak: float, progress: float) -> float:
    """Return the learning rate at a share of the run.

    Args:
        recipe: Shape of the schedule.
        peak: Largest learning rate.
        progress: Share of the run that is done, in [0, 1].

    Source:
        Polynomial decay as in nnU-Net; cosine as in SGDR (Loshchilov and Hutter, 2017), one cycle.

    Examples:
        >>> round(learning_rate(ScheduleRecipe(name="poly"), 0.01, 0.5), 6)
        0.005359
    """
    if progress < recipe.warmup:
        return peak * min(1.0, max(progress, 1e-3) / recipe.warmup)
    done = min(1.0, (progress - recipe.warmup) / (1 - recipe.warmup))
    if recipe.name == "poly":
        return peak * float((1 - done) ** recipe.power)
    if recipe.name == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak


class Ema:
    """Exponential moving average of a network's parameters.

    The decay grows from 0 with the number of updates, so that the average does not remember the
    initial weights.
    """

    def __init__(self, network: torch.nn.Module, decay: float) -> None:
        """Start the average at the present weights."""
        self.decay = decay
        self.num_updates = 0
        self.tensors = {k: v.detach().clone() for k, v in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: torch.nn.Module, finite: torch.Tensor | None = None) -> None:
        """Move the average towards the present weights.

        Args:
            network: Has the weights.
            finite: Whether the average moves, known on the device alone; None: it does.
        """
        self.num_updates += 1
        weight = 1 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        current = network.state_dict()
        averaged = [name for name in self.tensors if self.tensors[name].is_floating_point()]
        old, new = ([each[name] for name in averaged] for each in (self.tensors, current))
        if finite is not None:
            new = [torch.where(finite, b, a) for a, b in zip(old, new, strict=True)]
        torch._foreach_lerp_(old, new, weight)
        for name in self.tensors.keys() - set(averaged):
            self.tensors[name].copy_(current[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the averages."""
        return {"tensors": self.tensors, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the averages of an earlier process."""
        self.num_updates = state["num_updates"]
        for name, tensor in state["tensors"].items():
            self.tensors[name].copy_(tensor)
