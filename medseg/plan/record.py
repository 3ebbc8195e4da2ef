"""What was drawn from each case, on disk, so that a grown data set is not read again."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from medseg.plan.fingerprint import CaseStatistics, Samples
from medseg.schema.base import write_bytes
from medseg.schema.check import CaseFacts

MAX_VALUES = 4096
"""Distinct values of a channel that are kept; more are merged with their neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawn:
    """The intensities drawn from one case."""

    samples: tuple[Samples, ...]
    """One table per channel."""
    num_samples: int
    """Voxels that were asked for from each channel."""
    is_exact: bool
    """Whether no values were merged."""
    content: str = ""
    """Hash of the files they were drawn from."""

    def statistics(self, facts: CaseFacts) -> CaseStatistics | None:
        """Return what the case contributes to the fingerprint, None if it cannot be used."""
        if facts.fingerprint is None or facts.errors:
            return None
        return CaseStatistics(
            case=facts.fingerprint, relative_size=facts.relative_size, samples=self.samples
        )


def thin(drawn: Drawn) -> Drawn:
    """Return the draws with at most about `MAX_VALUES` distinct values in each channel.

    Neighbours are merged into their mean, so that mean, minimum and maximum stay and a percentile
    moves by a few thousandths of a percent of the draws at most.
    """
    if all(len(table.values) <= MAX_VALUES for table in drawn.samples):
        return drawn
    return replace(drawn, samples=tuple(map(_merged, drawn.samples)), is_exact=False)


def _merged(table: Samples) -> Samples:
    if len(table.values) <= MAX_VALUES:
        return table
    below = np.cumsum(table.counts, dtype=np.int64) - table.counts
    group = below * (MAX_VALUES - 2) // (below[-1] + 1) + 1
    group[0], group[-1] = 0, MAX_VALUES
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    counts = np.add.reduceat(table.counts.astype(np.int64), starts)
    sums = np.add.reduceat(table.values.astype(np.float64) * table.counts, starts)
    return Samples(values=(sums / counts).astype(np.float32), counts=counts.astype(np.int32))


def write_draws(path: Path, cases: Mapping[str, Drawn]) -> None:
    """Write the draws of all cases into one file, atomically."""
    tables = [table for drawn in cases.values() for table in drawn.samples]
    nothing: list[npt.NDArray[Any]] = [np.empty(0, np.float32)]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        case=np.array(list(cases), dtype=np.str_),
        num_samples=np.array([drawn.num_samples for drawn in cases.values()], dtype=np.int64),
        is_exact=np.array([drawn.is_exact for drawn in cases.values()], dtype=np.bool_),
        content=np.array([drawn.content for drawn in cases.values()], dtype=np.str_),
        channels=np.array([len(drawn.samples) for drawn in cases.values()], dtype=np.int64),
        length=np.array([len(table.values) for table in tables], dtype=np.int64),
        values=np.concatenate([table.values for table in tables] or nothing),
        counts=np.concatenate([table.counts for table in tables] or nothing).astype(np.int32),
    )
    write_bytes(path, buffer.getvalue())


def read_draws(path: Path) -> dict[str, Drawn]:
    """Return the draws in a file; nothing where there is none, or a damaged one."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return _unpacked({name: stored[name] for name in stored.files})
    except (OSError, BadZipFile, EOFError, KeyError, ValueError):
        return {}


def _unpacked(stored: Mapping[str, npt.NDArray[Any]]) -> dict[str, Drawn]:
    ends = np.cumsum(stored["length"])[:-1]
    values, counts = np.split(stored["values"], ends), np.split(stored["counts"], ends)
    tables = [Samples(values=v, counts=c) for v, c in zip(values, counts, strict=True)]
    found, first = {}, 0
    for number, case in enumerate(stored["case"].tolist()):
        last = first + int(stored["channels"][number])
        found[case] = Drawn(
            samples=tuple(tables[first:last]),
            num_samples=int(stored["num_samples"][number]),
            is_exact=bool(stored["is_exact"][number]),
            content=str(stored["content"][number]),
        )
        first = last
    return found
