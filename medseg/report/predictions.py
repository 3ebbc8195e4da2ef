"""What became of predicted cases, as a table that fits a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from medseg.infer.folder import PredictionRow

_MAX_ROWS = 40


def format_predictions(rows: Sequence[PredictionRow]) -> str:
    """Return one line per case (the first ones of many), then what failed and what to look at."""
    done = [row for row in rows if row.status == "done"]
    lines = [f"{'case':<32} {'seconds':>8}  volumes (ml)"]
    lines += [_line(row) for row in done[:_MAX_ROWS]]
    if len(done) > _MAX_ROWS:
        lines.append(f"... and {len(done) - _MAX_ROWS} more")
    for row in rows:
        texts = [f"{row.case}: {flag}" for flag in row.flags]
        if row.status == "failed":
            texts = [f"{row.case} FAILED: {row.message}"]
        for text in texts:
            lines += textwrap.wrap(text, 79, subsequent_indent="    ")
    lines.append(f"{len(done)} of {len(rows)} cases predicted.")
    return "\n".join(lines)


def _line(row: PredictionRow) -> str:
    volumes = ", ".join(f"{name} {volume:.2f}" for name, volume in row.volumes_ml.items())
    if len(volumes) > 36:
        volumes = volumes[:33] + "..."
    return f"{row.case[:32]:<32} {row.seconds:>8.1f}  {volumes}"
