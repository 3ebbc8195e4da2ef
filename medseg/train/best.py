"""Which weights of a run were the best so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SMOOTHING = 0.9
"""Weight of the past in the running mean of the patch Dice."""


class Best:
    """Chooses by the Dice at full volume where it is taken, otherwise by the smoothed patch Dice.

    Once a run has been judged at full volume, patches no longer choose.
    """

    def __init__(self) -> None:
        self.smoothed_dice: float | None = None
        self.patch_dice: float | None = None
        """Largest smoothed patch Dice."""
        self.full_dice: float | None = None
        """Largest mean Dice at full volume."""
        self.is_now = False
        """Whether the last epoch was the best."""

    def note(self, row: dict[str, Any]) -> None:
        """Look at an epoch's row, and write the smoothed patch Dice into it."""
        mean = row["mean_patch_dice"]
        if mean is not None:
            before = mean if self.smoothed_dice is None else self.smoothed_dice
            self.smoothed_dice = _SMOOTHING * before + (1 - _SMOOTHING) * mean
        row["smoothed_patch_dice"] = self.smoothed_dice
        full = row.get("mean_full_dice")
        patch_wins = _is_better(self.smoothed_dice, self.patch_dice)
        full_wins = _is_better(full, self.full_dice)
        self.is_now = full_wins or (patch_wins and self.full_dice is None)
        if patch_wins:
            self.patch_dice = self.smoothed_dice
        if full_wins:
            self.full_dice = full

    def state_dict(self) -> dict[str, float | None]:
        """Return the values so far."""
        return {
            "smoothed_dice": self.smoothed_dice,
            "patch_dice": self.patch_dice,
            "full_dice": self.full_dice,
        }

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Take over the values of an earlier process."""
        self.smoothed_dice = state["smoothed_dice"]
        self.patch_dice = state["patch_dice"]
        self.full_dice = state["full_dice"]


def _is_better(value: float | None, than: float | None) -> bool:
    return value is not None and (than is None or value > than)
