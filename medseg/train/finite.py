"""Steps whose loss or gradient is not finite: they are skipped, counted, and end a run in time."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from medseg.errors import MedsegError

_MAX_IN_A_ROW = 20
_LOOK_EVERY = 50
"""Steps between two looks at an accelerator, which has to be waited for."""


class FiniteWatch:
    """Counts the steps that are not finite, on the device; looks at the count now and then.

    On the CPU it looks after every step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._total = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._case_ids: deque[tuple[str, ...]] = deque(maxlen=_LOOK_EVERY)
        self._steps = 0

    def note(self, is_finite: torch.Tensor, case_ids: tuple[str, ...]) -> None:
        """Count a step.

        Raises:
            MedsegError: If too many in a row were not finite, with the cases they held.
        """
        self._total += ~is_finite
        self._in_a_row = torch.where(is_finite, 0, self._in_a_row + 1)
        self._case_ids.append(case_ids)
        self._steps += 1
        if self._device.type == "cpu" or self._steps % _LOOK_EVERY == 0:
            self._look()

    def _look(self) -> None:
        in_a_row = int(self._in_a_row)
        if in_a_row >= _MAX_IN_A_ROW:
            batches = list(self._case_ids)[-in_a_row:]
            cases = sorted({case for batch in batches for case in batch})
            shown = ", ".join(cases[:8]) + (f" and {len(cases) - 8} more" if len(cases) > 8 else "")
            raise MedsegError(
                f"training diverged: {in_a_row} steps in a row had a loss or gradient that is not "
                f"finite; the last batch held {', '.join(batches[-1])}, all of them {shown}. "
                "Lower optimizer.lr, or look at these images."
            )

    @property
    def total(self) -> int:
        """Return the number of skipped steps; waits for the device."""
        return int(self._total)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"total": self.total, "in_a_row": int(self._in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the counts of an earlier process."""
        self._total.fill_(state["total"])
        self._in_a_row.fill_(state["in_a_row"])
