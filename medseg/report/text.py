"""Text that fits a terminal, wide letters counted as they are shown."""

from __future__ import annotations

import unicodedata

WIDTH = 80
"""Columns of a line."""


def printable(text: str) -> str:
    """Return a text whose invisible characters are spelled out, such as those that move a cursor.

    Examples:
        >>> print(printable("liver" + chr(27) + "[2J"))
        liver\\x1b[2J
    """
    return "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text
    )


def shortened(text: str, width: int) -> str:
    """Cut the middle of a text that is too wide; names tend to differ at their ends."""
    if columns(text) <= width:
        return text
    head, tail = text[: len(text) // 2], text[len(text) // 2 :]
    while columns(head) + 1 + columns(tail) > width:
        head, tail = (head[:-1], tail) if columns(head) >= columns(tail) else (head, tail[1:])
    return f"{head}~{tail}"


def columns(text: str) -> int:
    """Return how many columns of a terminal a text takes: wide characters take two.

    Examples:
        >>> columns("CSF"), columns("\\u8111")
        (3, 2)
    """
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def wrap(text: str, indent: str = "") -> list[str]:
    """Break a text into lines of at most `WIDTH` columns; all but the first are set in.

    Args:
        text: One or several paragraphs.
        indent: What every line begins with.
    """
    lines: list[str] = []
    for paragraph in text.splitlines():
        line, is_empty = indent + ("  " if lines else ""), True
        for word in _pieces(paragraph, WIDTH - len(indent) - 2):
            if not is_empty and columns(line) + 1 + columns(word) > WIDTH:
                lines.append(line)
                line, is_empty = f"{indent}  ", True
            line, is_empty = f"{line}{'' if is_empty else ' '}{word}", False
        lines.append(line)
    return lines


def _pieces(paragraph: str, width: int) -> list[str]:
    """Return the words of a paragraph; one that is wider than a line is cut."""
    pieces = []
    for word in paragraph.split():
        rest = word
        while columns(rest) > width:
            cut = next(n for n in range(len(rest), 0, -1) if columns(rest[:n]) <= width)
            pieces.append(rest[:cut])
            rest = rest[cut:]
        pieces.append(rest)
    return pieces
