"""What may be imported, as plain text at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medseg.interop.nnunet.found import Found
from medseg.interop.totalsegmentator import Refused, Task
from medseg.report.text import printable, wrap

_UNKNOWN = "not said"


def format_found(models: Sequence[Found], place: Path) -> str:
    """Return a list of the models of nnU-Net in a folder or zip, with what tells them apart.

    Args:
        models: What was found.
        place: Where.
    """
    if not models:
        return f"{place}: no trained model of nnU-Net there."
    count = f"{len(models)} trained model{'' if len(models) == 1 else 's'} of nnU-Net"
    lines = [line for model in models for line in _model(model, Path(place).absolute())]
    return printable("\n".join([f"{place}: {count}", *lines]))


def _model(model: Found, place: Path) -> list[str]:
    folder = model.folder
    first = str(folder.relative_to(place)) if folder.is_relative_to(place) else str(folder)
    rest = {
        "dataset": model.dataset or _UNKNOWN,
        "configuration": model.configuration or _UNKNOWN,
        "version": str(model.version),
        "trainer": model.trainer or _UNKNOWN,
        "plans": model.plans or _UNKNOWN,
        "folds": ", ".join(model.folds),
        "checkpoints": ", ".join(model.checkpoints),
    }
    return ["", *wrap(first), *(f"  {name:<13} {text}" for name, text in rest.items())]


def format_tasks(tasks: Sequence[Task | Refused], place: Path) -> str:
    """Return a list of the tasks of TotalSegmentator in a folder.

    Args:
        tasks: What was found.
        place: Where.
    """
    lines = [f"{place}:"]
    for task in tasks:
        lines.append("")
        if isinstance(task, Refused):
            lines += wrap(f"{task.name}: cannot be imported: {task.reason}")
            continue
        parts = ", ".join(part.folder.parent.name for part in task.parts.values())
        lines += [f"{task.name}: {len(task.spec.labels) - 1} labels", *wrap(f"from {parts}", "  ")]
        lines += [line for note in task.notes for line in wrap(f"note: {note}", "  ")]
    return printable("\n".join(lines))
