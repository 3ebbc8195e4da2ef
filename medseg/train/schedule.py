"""How long a run is: a number of iterations, or a time that the schedule is fitted to."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

_SMOOTHING = 0.1
"""Weight of the newest iteration in the running mean of the seconds an iteration takes."""


@dataclass(slots=True, kw_only=True)
class Length:
    """The share of a run that is done; it reaches 1 with the last iteration.

    With a number of iterations the share grows evenly. With a deadline each iteration adds what
    is left divided by the iterations that still fit, so the schedule always ends in time,
    however the speed of the machine changes.
    """

    num_iterations: int | None
    """Iterations of the whole run; None with a deadline."""
    deadline: float | None = None
    """`time.monotonic()` at which the last iteration must have ended."""
    progress: float = 0.0
    """Share of the run that is done, in [0, 1]."""
    seconds_per_iteration: float | None = None
    """Running mean, everything included."""
    iteration: int = 0
    """Iterations done."""
    _last: float | None = field(default=None, repr=False)

    def advance(self) -> None:
        """Count one iteration."""
        self.iteration += 1
        if self.num_iterations is not None:
            self.progress = self.iteration / self.num_iterations
            return
        now = time.monotonic()
        if self._last is not None:
            seconds = now - self._last
            before = self.seconds_per_iteration or seconds
            self.seconds_per_iteration = before + _SMOOTHING * (seconds - before)
        self._last = now
        self.progress += (1 - self.progress) / max(1, 1 + self._iterations_left(now))
        if self._iterations_left(now) < 1:
            self.progress = 1.0

    @property
    def done(self) -> bool:
        """Return whether the run has reached its length."""
        return self.progress >= 1

    def estimated_iterations(self) -> int:
        """Return the iterations of the whole run, as far as is known."""
        if self.num_iterations is not None:
            return self.num_iterations
        return self.iteration + int(self._iterations_left(time.monotonic()))

    def _iterations_left(self, now: float) -> float:
        if self.deadline is None or self.seconds_per_iteration is None:
            return 1e3
        return (self.deadline - now) / self.seconds_per_iteration
