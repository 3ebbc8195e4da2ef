"""Patterns that say which files are meant: `sub-{group}/ses-*/anat/*_T1w.nii.gz`."""

from __future__ import annotations

import re

from medseg.errors import ConfigError, near_names

FIELDS = ("case", "channel", "group")
_PIECE = re.compile(r"\*\*/|\*\*|\*|\?|\{[^{}]*\}|[^*?{]+|\{")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return a pattern as a regular expression for paths relative to the dataset's folder.

    `*` and `?` stand for letters within a name, `**/` for any folders, `{case}`, `{channel}` and
    `{group}` for what tells cases, channels and patients apart. A pattern without "/" is for file
    names in whatever folder.

    Raises:
        ConfigError: If a field is unknown.

    Examples:
        >>> compile_pattern("*_{channel}.nii.gz").fullmatch("p1/p1_t1.nii.gz")["channel"]
        't1'
        >>> compile_pattern("{case}/{case}_seg.png").fullmatch("a/b_seg.png") is None
        True
    """
    text = pattern.strip().replace("\\", "/").removeprefix("./")
    if not text:
        raise ConfigError("the pattern is empty; expected one such as 'images/*.nii.gz'.")
    if "/" not in text:
        text = f"**/{text}"
    seen: set[str] = set()
    return re.compile("".join(_regex(piece, pattern, seen) for piece in _PIECE.findall(text)))


def _regex(piece: str, pattern: str, seen: set[str]) -> str:
    fixed = {"**/": r"(?:[^/]+/)*", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    if piece in fixed:
        return fixed[piece]
    if not piece.startswith("{"):
        return re.escape(piece)
    name = piece[1:-1]
    if name not in FIELDS:
        raise ConfigError(
            f"pattern {pattern!r}: unknown field {piece}; expected one of "
            f"{', '.join(f'{{{field}}}' for field in FIELDS)}.{near_names(name, list(FIELDS))}"
        )
    if name in seen:
        return f"(?P={name})"
    seen.add(name)
    return f"(?P<{name}>[^/]+?)"
