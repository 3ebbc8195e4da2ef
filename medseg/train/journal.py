"""The journal of a run: one JSON row per epoch, and what is told to observers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from medseg.schema.base import write_text


class Observer(Protocol):
    """Records what happens; never changes it."""

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """Receive the finished epoch's journal row."""


class Journal:
    """`journal.jsonl`: fixed keys, one row per epoch."""

    def __init__(self, path: Path) -> None:
        """Append to `path`."""
        self.path = Path(path)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows written so far; a last line cut off by a crash is left out."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def cut_back(self, num_epochs: int) -> None:
        """Drop the rows after an epoch, to agree with the checkpoint a run goes on from."""
        rows = [row for row in self.rows() if row["epoch"] < num_epochs]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
