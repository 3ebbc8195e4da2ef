"""What was found in a folder of images, as plain text at most 80 columns wide."""

from __future__ import annotations

from collections import Counter

from medseg.data.layouts.found import Found, LeftOver
from medseg.report.text import WIDTH, shortened, wrap

_INDENT = 10
_MAX_FILES = 6
_MAX_CASES = 8
_MAX_LABELS = 40


def format_found(found: Found) -> str:
    """Return a table of cases, channels, labels and groups, and of what takes no part."""
    cases = list(found.cases)
    unlisted = len(cases) - _MAX_CASES
    listed = [*cases[:_MAX_CASES], *([f"and {unlisted} more"] if unlisted > 0 else [])]
    lines = [
        *_row("folder", str(found.folder)),
        *_row("cases", f"{len(cases)}: {', '.join(listed)}"),
        *_row("channels", _channels(found)),
        *_row("labels", _labels(found)),
        *_row("groups", _groups(found)),
    ]
    for note in found.notes:
        lines += _row("note", note)
    for left in found.left_over:
        lines += _left_over(left)
    return "\n".join(lines)


def _channels(found: Found) -> str:
    per_case = Counter(len(files.channels) for files in found.cases.values())
    most = max(per_case, default=0)
    files = "1 file" if most == 1 else f"{most} files"
    return f"{', '.join(found.channels)} ({files} a case)"


def _labels(found: Found) -> str:
    parts = []
    for name, value in list(found.names.labels.items())[:_MAX_LABELS]:
        values = value if isinstance(value, tuple) else (value,)
        text = f"{name} {'+'.join(map(str, values))}"
        counts = [found.label_counts.get(v, 0) for v in values] if found.label_counts else []
        if counts and max(counts) < len(found.cases):
            text += f" (in {max(counts)} cases)" if max(counts) else " (in no case)"
        parts.append(text)
    if found.names.ignore_label is not None:
        parts.append(f"ignore {found.names.ignore_label}")
    hidden = len(found.names.labels) - _MAX_LABELS
    return ", ".join([*parts, *([f"and {hidden} more"] if hidden > 0 else [])])


def _groups(found: Found) -> str:
    groups = Counter(files.group for files in found.cases.values() if files.group is not None)
    if not groups:
        return "none: every case counts as a patient of its own"
    largest = max(groups.values())
    return f"{len(groups)} groups of {len(found.cases)} cases, at most {largest} in one"


def _left_over(left: LeftOver) -> list[str]:
    hidden = len(left.files) - _MAX_FILES
    files = [*left.files[:_MAX_FILES], *([f"and {hidden} more"] if hidden > 0 else [])]
    lines = _row("left over", f"{len(left.files)} {left.reason}:")
    lines += [f"{' ' * _INDENT}  {shortened(file, WIDTH - _INDENT - 2)}" for file in files]
    return lines


def _row(title: str, text: str) -> list[str]:
    """Return a paragraph beside its title."""
    first, *others = wrap(text, " " * _INDENT) or [""]
    return [title.ljust(_INDENT) + first.strip(), *others]
