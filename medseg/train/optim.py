"""Optimisers and learning-rate schedules, from plain arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from medseg.errors import ConfigError, near_names
from medseg.schema.recipe import OptimizerRecipe, ScheduleRecipe

OPTIMIZERS = ("sgd", "adam", "adamw")


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], recipe: OptimizerRecipe
) -> torch.optim.Optimizer:
    """Return the optimiser a recipe names.

    Weight decay spares biases and normalisation parameters under AdamW; SGD decays all, as
    nnU-Net does.

    Raises:
        ConfigError: If the name is unknown.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if recipe.name == "sgd":
        return torch.optim.SGD(
            trainable,
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
        )
    betas = (0.9, recipe.beta2)
    if recipe.name == "adam":
        return torch.optim.Adam(
            trainable, lr=recipe.lr, betas=betas, weight_decay=recipe.weight_decay
        )
    if recipe.name == "adamw":
        groups = [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, fused=True)
    raise ConfigError(
        f"optimizer.name is {recipe.name!r}; expected one of: {', '.join(OPTIMIZERS)}."
        f"{near_names(recipe.name, list(OPTIMIZERS))}"
    )


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
    def update(self, network: torch.nn.Module) -> None:
        """Move the average towards the present weights."""
        self.num_updates += 1
        weight = 1 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        current = network.state_dict()
        averaged = [name for name in self.tensors if self.tensors[name].is_floating_point()]
        torch._foreach_lerp_(
            [self.tensors[name] for name in averaged], [current[name] for name in averaged], weight
        )
        for name in self.tensors.keys() - set(averaged):
            self.tensors[name].copy_(current[name])
