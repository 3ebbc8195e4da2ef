"""What was found in a folder that nobody has described."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medseg.data.layouts.described import LabelNames
from medseg.schema.dataset import CaseFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOver:
    """Files that take no part."""

    reason: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedCase:
    """One case: its images by what sets them apart, and its segmentation."""

    images: Mapping[str, str]
    """Words that tell the channels of a case apart ("" for an only one) -> file."""
    segmentation: str
    group: str | None = None
    """Patient, where a pattern names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """Which image belongs to which segmentation."""

    cases: Mapping[str, PairedCase]
    channels: tuple[str, ...]
    """Keys of every case's `images`, in order."""
    left_over: tuple[LeftOver, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A dataset as it was found."""

    folder: Path
    """Folder that file names are relative to."""
    cases: Mapping[str, CaseFiles]
    channels: tuple[str, ...]
    names: LabelNames
    label_counts: Mapping[int, int]
    """Value -> number of cases that hold it; empty where the segmentations were not read."""
    left_over: tuple[LeftOver, ...] = ()
    notes: tuple[str, ...] = ()
    """What a person should know about how it was understood."""
    target: Path
    """File that is to hold the description."""
    table: Path | None = None
    """Table that lists the cases; the description then holds the rest."""
    is_described: bool = False
    """Whether a description is there that needs nothing added."""
