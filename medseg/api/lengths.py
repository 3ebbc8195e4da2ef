"""How long a run is asked to be."""

from __future__ import annotations

from dataclasses import dataclass

from medseg.errors import ConfigError
from medseg.schema.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedLength:
    """How long a run shall be; nothing given means as long as it was started, or as the recipe."""

    budget_seconds: float | None = None
    epochs: int | None = None
    iterations: int | None = None

    @property
    def is_given(self) -> bool:
        """Return whether anything was asked for."""
        return any(v is not None for v in (self.budget_seconds, self.epochs, self.iterations))

    def planned_iterations(self, recipe: Recipe) -> int | None:
        """Return the optimiser steps asked for; None where that was not, or a time."""
        if self.epochs is not None:
            return self.epochs * recipe.iterations_per_epoch
        return self.iterations


def requested_length(
    budget: str | float | None, epochs: int | None, iterations: int | None
) -> RequestedLength:
    """Return the length that options ask for.

    Raises:
        ConfigError: If several do, or one is no length.
    """
    options = {"budget": budget, "epochs": epochs, "iterations": iterations}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} both set the length of the run; give one.")
    for name, value in (("epochs", epochs), ("iterations", iterations)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; expected at least 1.")
    seconds = None if budget is None else parse_duration(budget)
    return RequestedLength(budget_seconds=seconds, epochs=epochs, iterations=iterations)


def parse_duration(duration: str | float) -> float:
    """Return seconds.

    Raises:
        ConfigError: If it is not a positive time such as 90s, 10m or 4h.

    Examples:
        >>> parse_duration("10m"), parse_duration("1.5h"), parse_duration(30)
        (600.0, 5400.0, 30.0)
    """
    text = str(duration).strip().lower()
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}.get(text[-1:])
    try:
        seconds = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"budget is {duration!r}; expected a time such as 90s, 10m or 4h.")
    return seconds
