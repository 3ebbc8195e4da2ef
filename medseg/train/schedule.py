"""How long a run is: a number of iterations, or a time that the schedule is fitted to."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

_SMOOTHING = 0.1
"""Weight of the newest iteration in the running mean of the seconds an iteration takes."""
_UNKNOWN_ITERATIONS = 1000.0
"""Assumed to be left until the first two iterations have been timed."""


@dataclass(slots=True, kw_only=True)
class Length:
    """The share of a run that is done; it reaches 1 with the last iteration.

    With a number of iterations the share grows evenly. With a budget each iteration adds what is
    left divided by the iterations that still fit, so the schedule always ends in time, however
    the speed of the machine changes. A run that is extended begins a new stretch: shares and
    lengths are those of the stretch, iterations are counted on.
    """

    num_iterations: int | None = None
    """Iterations of the stretch; None with a budget."""
    budget_seconds: float | None = None
    """Time within which its last iteration must have ended; None with a number of iterations."""
    started: float = 0.0
    """`time.monotonic()` at which this process began to work on the stretch."""
    spent_before: float = 0.0
    """Seconds that earlier processes worked on the stretch."""
    first_iteration: int = 0
    """Iterations done before the stretch."""
    progress: float = 0.0
    """Share of the stretch that is done, in [0, 1]."""
    seconds_per_iteration: float | None = None
    """Running mean, everything included but validation at full volume."""
    iteration: int = 0
    """Iterations done."""
    _last: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse a run without, or with two, lengths."""
        if (self.num_iterations is None) == (self.budget_seconds is None):
            raise ValueError("give either num_iterations or budget_seconds")

    def advance(self) -> None:
        """Count one iteration."""
        self.iteration += 1
        if self.num_iterations is not None:
            self.progress = (self.iteration - self.first_iteration) / self.num_iterations
            return
        now = time.monotonic()
        if self._last is not None:
            seconds = now - self._last
            before = self.seconds_per_iteration or seconds
            self.seconds_per_iteration = before + _SMOOTHING * (seconds - before)
        self._last = now
        left = self._iterations_left()
        self.progress += (1 - self.progress) / (1 + max(0.0, left))
        if left < 1.5:
            self.progress = 1.0

    def forget_pause(self) -> None:
        """Leave what happened since the last iteration out of the time an iteration takes."""
        self._last = None

    def is_done(self) -> bool:
        """Return whether the stretch has reached its length."""
        return self.progress >= 1

    def elapsed_seconds(self) -> float:
        """Return the seconds spent on the stretch so far, earlier processes included."""
        return time.monotonic() - self.started + self.spent_before

    def estimated_iterations(self) -> int:
        """Return the iterations of the whole run, as far as is known."""
        if self.num_iterations is not None:
            return self.first_iteration + self.num_iterations
        return self.iteration + max(0, int(self._iterations_left()))

    def state_dict(self) -> dict[str, Any]:
        """Return where the run stands."""
        return {
            "iteration": self.iteration,
            "first_iteration": self.first_iteration,
            "progress": self.progress,
            "seconds_per_iteration": self.seconds_per_iteration,
            "elapsed_seconds": self.elapsed_seconds(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where an earlier process stood."""
        self.iteration = state["iteration"]
        self.first_iteration = state["first_iteration"]
        self.progress = state["progress"]
        self.seconds_per_iteration = state["seconds_per_iteration"]
        self.spent_before = state["elapsed_seconds"]

    def begin_stretch(self) -> None:
        """Begin anew from the present iteration."""
        self.first_iteration = self.iteration
        self.progress, self.spent_before, self._last = 0.0, 0.0, None

    def _iterations_left(self) -> float:
        if self.budget_seconds is None:
            return 0.0
        seconds = self.budget_seconds - self.elapsed_seconds()
        if self.seconds_per_iteration is None:
            return _UNKNOWN_ITERATIONS if seconds > 0 else 0.0
        return seconds / self.seconds_per_iteration
