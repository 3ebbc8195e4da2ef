"""What the description of a dataset says, whatever its layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from medseg.data.layouts.listing import Listing
from medseg.schema.check import Problem
from medseg.schema.dataset import CaseFiles

Labels = dict[str, int | tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelNames:
    """The labels of a description, their values as in the files."""

    labels: Labels
    regions_class_order: tuple[int, ...] | None = None
    ignore_label: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """Channels, labels and cases as a description gives them; files are named, not looked for."""

    source: Path
    """The description."""
    root: Path
    """Folder that relative names start from."""
    channels: tuple[str, ...]
    names: LabelNames
    cases: dict[str, CaseFiles]
    listing: Listing
    """Files below `root`."""
    lists_files: bool = False
    """Whether a person wrote down each file: then one file may hold all channels of its case."""
    problems: tuple[Problem, ...] = field(default=())
    """What was wrong with the description or with the folders it stands for."""


def problem(
    code: str, message: str, *, case: str | None = None, file: str | None = None
) -> Problem:
    """Return something that must be corrected before the dataset can be used."""
    return Problem(code=code, level="error", message=message, case=case, file=file)


def remark(code: str, message: str, *, case: str | None = None, file: str | None = None) -> Problem:
    """Return something a person should know, though the dataset can be used."""
    return Problem(code=code, level="warning", message=message, case=case, file=file)
