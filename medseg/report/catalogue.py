"""The catalogue of public models as plain text at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from medseg.execute.sizes import size_words
from medseg.report.plans import wrapped
from medseg.report.text import WIDTH, columns, shortened, wrap
from medseg.schema.catalogue import CatalogueEntry

NOT_VERIFIED = "not verified"
"""Shown for what is empty because it could not be verified."""
_INDENT = 16
_SIZE_COLUMNS = 14
_LICENCE_COLUMNS = 14
_FIELDS = {"modality": "images", "size_bytes": "size"}


def format_models(entries: Sequence[CatalogueEntry], num_known: int) -> str:
    """Return two lines for each model: its name, size and licence, and what it segments.

    Args:
        entries: The models to show.
        num_known: Models in the catalogue.
    """
    if not entries:
        return f"None of the {num_known} models of the catalogue matches."
    lines = [_row("name", "size", "licence"), "-" * WIDTH]
    for entry in entries:
        size = NOT_VERIFIED if entry.size_bytes is None else size_words(entry.size_bytes)
        lines.append(_row(entry.name, size, entry.licence or NOT_VERIFIED))
        lines += wrap(entry.task, "    ")
    lines += ["-" * WIDTH, f"{len(entries)} of {num_known} models"]
    return "\n".join(lines)


def format_model(entry: CatalogueEntry) -> str:
    """Return every field of a model, those that could not be verified as such."""
    values = {name: _words(entry, name) for name in type(entry).model_fields}
    del values["unverified"], values["source"]
    lines = [
        line
        for name, text in values.items()
        for line in _paragraph(_FIELDS.get(name, name), text or NOT_VERIFIED)
    ]
    for number, source in enumerate(entry.source):
        lines += _paragraph("source" if number == 0 else "", source)
    return "\n".join(lines)


def format_note(entry: CatalogueEntry) -> str:
    """Return what a user should know of a model that was imported; an empty text if nothing."""
    if entry.format != "totalsegmentator":
        return ""
    return "\n".join(
        wrap(
            "Note: TotalSegmentator also crops to other structures, which is left out. A part of "
            "a larger task is the network alone: 'medseg import totalsegmentator' joins the parts "
            "of one folder."
        )
    )


def _words(entry: CatalogueEntry, name: str) -> str:
    value = getattr(entry, name)
    if isinstance(value, tuple):
        count = f"{len(value)}: " if len(value) > 1 else ""
        return f"{count}{', '.join(value)}" if value else ""
    if isinstance(value, int):
        return f"{size_words(value)} ({value} bytes)"
    return str(value or "")


def _row(name: str, size: str, licence: str) -> str:
    width = WIDTH - _SIZE_COLUMNS - _LICENCE_COLUMNS
    text = shortened(name, width - 1)
    return (
        f"{text}{' ' * (width - columns(text))}{size:<{_SIZE_COLUMNS}}"
        f"{shortened(licence, _LICENCE_COLUMNS)}".rstrip()
    )


def _paragraph(title: str, text: str) -> list[str]:
    """Return a paragraph beside its title; addresses are never broken."""
    if " " not in text:
        return [f"{title:<{_INDENT}}{text}"]
    return wrapped(text, WIDTH, first=f"{title:<{_INDENT}}", further=" " * _INDENT)
