"""The same training with several seeds: one figure tells little, mean and spread tell more."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.api.training import Run, run_name, train
from medseg.errors import ConfigError
from medseg.schema.metrics import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A score over seeds."""

    values: tuple[float, ...]
    """One for each seed in which it is defined."""

    @property
    def mean(self) -> float | None:
        """Return the arithmetic mean; None for no value."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Return the sample standard deviation; None for fewer than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedRuns:
    """Runs that differ in their seed alone."""

    runs: dict[int, Run]
    """Seed -> run."""

    @property
    def dice(self) -> dict[str, Spread]:
        """Return structure -> full-volume Dice, averaged over the trained folds; "mean" last."""
        scores = [_scores(run.metrics.values()) for run in self.runs.values()]
        names = dict.fromkeys(name for score in scores for name in score)
        return {
            name: Spread(values=tuple(score[name] for score in scores if name in score))
            for name in names
        }


def train_seeds(
    num_seeds: int,
    dataset: str | Path,
    config: str,
    fold: int | str,
    *,
    recipe: str | Path = "default",
    name: str | None = None,
    seed: int | None = None,
    **options: Any,
) -> SeedRuns:
    """Train with `num_seeds` seeds, one after another, each in a run of its own.

    The runs are named after the recipe (or `name`) and their seed: `fast_seed0`, `fast_seed1` ...
    The same call again goes on where it stopped.

    Args:
        num_seeds: How many; they are counted up from `seed`.
        dataset: As in `train`, like all other options.
        config: Configuration.
        fold: Fold.
        recipe: Name or path of a recipe.
        name: What the names of the runs begin with.
        seed: The first seed; None: 0.
        **options: The other options of `train`.

    Raises:
        ConfigError: If fewer than two seeds are asked for.
    """
    if num_seeds < 2:
        raise ConfigError(f"seeds is {num_seeds}; expected at least 2, for a mean and a spread.")
    first, base = seed or 0, run_name(name, recipe)
    runs = {}
    for number in range(first, first + num_seeds):
        runs[number] = train(
            dataset,
            config,
            fold,
            recipe=recipe,
            name=f"{base}_seed{number}",
            seed=number,
            **options,
        )
        options["started"] = None
    return SeedRuns(runs=runs)


def _scores(folds: Sequence[Metrics] | Any) -> dict[str, float]:
    """Return structure -> mean Dice over the folds in which it is defined, and their "mean"."""
    found: dict[str, list[float]] = {}
    for metrics in folds:
        each = {name: summary.dice.mean for name, summary in metrics.summary.items()}
        for name, value in {**each, "mean": metrics.foreground_mean.dice}.items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in found.items()}
