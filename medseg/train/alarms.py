"""Alarms in words: structures that a network never finds or loses again, losses that go wrong."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.train.journal import Journal

logger = logging.getLogger(__name__)

_FOUND, _LOST = 0.3, 0.02
"""Patch Dice above which a structure counts as found, and below which as not found."""
_NEVER_AFTER = 0.3
"""Share of the run after which a structure should have been found once."""
_STILL_AFTER = 0.2
"""Share of the run after which the loss should have moved."""
_FEWEST_EPOCHS = 4
"""Epochs before anything is said of a run."""
_FOUND_EPOCHS = 3
"""Epochs with a structure after which it can be lost."""
_FLICKER = 3
"""Times the longest gap so far that a structure has to be missing."""
_LOST_SHARE = 0.1
"""Share of its best Dice below which a structure is being lost."""
_LOST_EPOCHS = 5
"""Epochs in a row without a structure that are no accident; in a short run 3."""
_SMALLEST_DROP = 0.02
"""Fall of the loss from its first value, as a share of it, that counts as learning."""
_LARGEST_RISE = 0.25
"""Rise of the loss above its first value, as a share of it or 1, that counts as diverging."""
_RISEN_EPOCHS = 3
_EXPLODED = 10.0
"""Rise as a share of the first value, or of 1, that needs no second epoch."""
_SKIPPED_SHARE = 0.1
"""Share of an epoch's steps that is worth an alarm when skipped, from 3 steps on."""
_SMALLEST_SCALE = 0.2
"""Losses closer to zero than this are measured against it."""
_MOST_NAMES = 8

Rows = Sequence[Mapping[str, Any]]
Values = NDArray[np.float64]


class AlarmBell:
    """Says each alarm once, in the log and in the row of the epoch that gave rise to it."""

    def __init__(self, journal: Journal) -> None:
        """Judge the epochs of `journal` and those that follow; belongs before it as observer."""
        self._rows = journal.rows()
        self._known = set(collapse_alarms(self._rows))

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """Put the alarms that are new into the row, under `alarms`."""
        self._rows.append(dict(row))
        found = [alarm for alarm in collapse_alarms(self._rows) if alarm not in self._known]
        self._known.update(found)
        for alarm in found:
            logger.warning("%s", alarm)
        if isinstance(row, dict):
            row["alarms"] = found


def collapse_alarms(rows: Rows) -> list[str]:
    """Return every alarm that the epochs so far give rise to, in the order of the epochs.

    An alarm names the epoch it arose in and stays as it is when epochs are added, so what is new
    is what the rows before did not give rise to. Structures that the validation patches do not
    hold are passed over; those of a fold without validation as well.

    Args:
        rows: Rows of the journal: `progress`, `train_loss`, `patch_dice`; where known also
            `steps`, `skipped_steps`, and `patch_voxels`, structure -> voxels of the reference and
            of the prediction.
    """
    if not rows:
        return []
    found = [*_dice_alarms(rows), *_loss_alarms(rows)]
    return [alarm for _, alarm in sorted(found, key=lambda item: item[0])]


def _dice_alarms(rows: Rows) -> Iterator[tuple[int, str]]:
    """Yield (row, alarm) for structures; those that share a fate share a sentence."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("patch_dice") or {}))
    never: dict[int, list[str]] = defaultdict(list)
    lost: dict[tuple[int, int], list[str]] = defaultdict(list)
    best = np.full(len(rows), -1.0)
    for name in names:
        dice = np.array([_number((row.get("patch_dice") or {}).get(name)) for row in rows])
        best = np.fmax(best, dice)
        if (index := _never_found(rows, name, dice)) is not None:
            never[index].append(name)
        if (loss := _lost(rows, dice)) is not None:
            lost[loss].append(name)
    for index, group in never.items():
        yield index, _say_never(rows, index, group, bool((best[: index + 1] < _LOST).all()))
    for (index, epochs), group in lost.items():
        yield index, _say_lost(rows, index, group, epochs)


def _never_found(rows: Rows, name: str, dice: Values) -> int | None:
    """Return the row from which on a structure should have been found.

    Dice is not known where neither reference nor prediction has a voxel. The patches are the same
    in each epoch, so one unknown value tells that the reference has none.
    """
    for index, progress in enumerate(_progress(rows)):
        so_far = dice[: index + 1]
        if np.isnan(so_far[-1]) or so_far[-1] >= _LOST or _reference(rows[index], name) == 0:
            return None
        if progress >= _NEVER_AFTER and index + 1 >= _FEWEST_EPOCHS:
            return index
    return None


def _lost(rows: Rows, dice: Values) -> tuple[int, int] | None:
    """Return the row in which a structure that was found has been missing for long, and how long.

    One that comes and goes is missing for long when it is so several times as long as ever before.
    """
    best: list[float] = []
    progress = _progress(rows)
    missing = longest = 0
    for index, value in enumerate(dice):
        best = sorted([*best, *([value] if value > _FOUND else [])])[-_FOUND_EPOCHS:]
        if not best or not value < max(_LOST, _LOST_SHARE * best[0]):
            longest, missing = max(longest, missing), 0
            continue
        missing += 1
        is_long = missing >= max(_patience(progress, index), _FLICKER * longest)
        if is_long and len(best) == _FOUND_EPOCHS:
            return index, missing
    return None


def _patience(progress: Values, index: int) -> int:
    """Return how many epochs in a row are no accident: a tenth of the run, within limits."""
    per_epoch = max(progress[index] / (index + 1), 1e-6)
    return int(min(_LOST_EPOCHS, max(3, round(0.1 / per_epoch))))


def _loss_alarms(rows: Rows) -> Iterator[tuple[int, str]]:
    loss = np.array([_number(row.get("train_loss")) for row in rows])
    for index, say in (
        (_still(rows, loss), _say_still),
        (_risen(loss), _say_risen),
        (_skipping(rows), _say_skipping),
    ):
        if index is not None:
            yield index, say(rows, index)


def _still(rows: Rows, loss: Values) -> int | None:
    """Return the row by which the loss should have fallen; a network that finds much may rest."""
    index = next((i for i, share in enumerate(_progress(rows)) if share >= _STILL_AFTER), None)
    if index is None or len(rows) < _FEWEST_EPOCHS:
        return None
    index = max(index, _FEWEST_EPOCHS - 1)
    if loss[0] < 0:  # Dice outweighs cross-entropy from the start: the network came trained
        return None
    dice = [_number(row.get("mean_patch_dice")) for row in rows[: index + 1]]
    so_far = loss[: index + 1]
    has_moved = not np.min(so_far[1:]) > so_far[0] - _SMALLEST_DROP * _scale(loss)
    return None if has_moved or any(value > _FOUND for value in dice) else index


def _risen(loss: Values) -> int | None:
    """Return the row in which the loss has been above its first value for long."""
    rise, above = (loss - loss[0]) / max(abs(loss[0]), 1), 0
    for index, value in enumerate(rise):
        above = above + 1 if value > _LARGEST_RISE else 0
        if above == _RISEN_EPOCHS or value > _EXPLODED:
            return index
    return None


def _skipping(rows: Rows) -> int | None:
    """Return the first row in which many steps were skipped."""
    for index in range(len(rows)):
        steps, skipped = _steps(rows, index)
        if steps and skipped > max(_SKIPPED_SHARE * steps, 2):
            return index
    return None


def _steps(rows: Rows, index: int) -> tuple[float, float]:
    """Return the steps of an epoch, and how many of them were skipped."""
    row, before = rows[index], rows[index - 1] if index else {}
    steps = row.get("steps") or row.get("iteration", 0) - before.get("iteration", 0)
    return steps, row.get("skipped_steps", 0) - before.get("skipped_steps", 0)


def _say_never(rows: Rows, index: int, names: list[str], are_all: bool) -> str:
    share = f"{_progress(rows)[index]:.0%} of the run"
    if are_all:
        return (
            f"{_epoch(rows, index)}: after {share} no structure has been found in the validation "
            "patches. Check that labels lie on their images ('medseg dataset check'), then lower "
            "optimizer.lr or train for longer."
        )
    return (
        f"{_epoch(rows, index)}: after {share} {_listed(names)} not been found once in validation "
        f"patches that show {_them(names)}{_prediction(rows[index], names)}. Look at the labels; "
        "if they are right, train with sampling.foreground_from=class or, for small lesions, "
        "sampling.foreground_unit=lesion, or for longer."
    )


def _say_lost(rows: Rows, index: int, names: list[str], epochs: int) -> str:
    return (
        f"{_epoch(rows, index)}: {_listed(names)} been found before, and for {epochs} epochs next "
        "to nothing of that is left. Lower optimizer.lr or gradient_clip; if it happens again, "
        "train with sampling.foreground_from=class."
    )


def _say_still(rows: Rows, index: int) -> str:
    share = f"{_progress(rows)[index]:.0%} of the run"
    return (
        f"{_epoch(rows, index)}: the loss has not fallen in {share} "
        f"({_loss(rows, 0)}, now {_loss(rows, index)}). Change optimizer.lr (mostly: raise "
        "it if nothing moves, lower it if the loss jumps), and look at the labels."
    )


def _say_risen(rows: Rows, index: int) -> str:
    return (
        f"{_epoch(rows, index)}: the loss rises instead of falling ({_loss(rows, 0)}, now "
        f"{_loss(rows, index)}). Lower optimizer.lr or gradient_clip, or add schedule.warmup."
    )


def _say_skipping(rows: Rows, index: int) -> str:
    steps, skipped = _steps(rows, index)
    return (
        f"{_epoch(rows, index)}: {skipped:.0f} of {steps:.0f} steps had a loss or gradient that "
        "is not finite and were skipped. Lower optimizer.lr, or set precision=fp32; if that does "
        "not help, look at the images for values out of all proportion."
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MOST_NAMES])
    more = len(names) - _MOST_NAMES
    verb = "has" if len(names) == 1 else "have"
    return f"{shown} and {more} more {verb}" if more > 0 else f"{shown} {verb}"


def _them(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _prediction(row: Mapping[str, Any], names: list[str]) -> str:
    """Return how much is predicted of the structures, where the journal tells."""
    voxels = row.get("patch_voxels") or {}
    if not all(name in voxels for name in names):
        return ""
    found = sum(voxels[name][1] for name in names)
    return " (nothing is predicted)" if not found else f" ({found:.0f} voxels, all elsewhere)"


def _reference(row: Mapping[str, Any], name: str) -> float | None:
    found = (row.get("patch_voxels") or {}).get(name)
    return None if found is None else float(found[0])


def _progress(rows: Rows) -> Values:
    """Return the largest share of the run so far; a run that is extended begins a new one."""
    return np.maximum.accumulate([float(row.get("progress") or 0) for row in rows])


def _scale(loss: Values) -> float:
    return max(abs(float(loss[0])), _SMALLEST_SCALE)


def _epoch(rows: Rows, index: int) -> str:
    return f"epoch {rows[index].get('epoch', index) + 1}"


def _loss(rows: Rows, index: int) -> str:
    return f"{'first' if index == 0 else ''} {_number(rows[index].get('train_loss')):.3g}".strip()


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
