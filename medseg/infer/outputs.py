"""The files of a prediction beside its segmentation: names, labels, reports, tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from medseg.io.names import LabelEntry
from medseg.io.palette import colour
from medseg.io.write import output_ending
from medseg.labels import LabelScheme
from medseg.schema.base import read_json, write_json, write_text
from medseg.schema.prediction import CaseReport, LabelReport, PredictionRow, PredictionSummary

Kind = Literal["segmentation", "probabilities", "entropy", "disagreement"]

SUMMARY = "summary.json"
TABLE = "summary.csv"
BACKGROUND_COLOUR = "#000000"

_ENDINGS: Mapping[Kind, str] = {
    "probabilities": ".probabilities.nii",
    "entropy": ".entropy.nii.gz",
    "disagreement": ".disagreement.nii.gz",
}
_FORMULA = tuple("=+-@\t\r\uff1d\uff0b\uff0d\uff20")
"""What makes spreadsheets take a text for something to compute, also as wide letters."""


def output_path(folder: Path, case: str, kind: Kind, ending: str = ".nii.gz") -> Path:
    """Return the file of one kind of output.

    Args:
        folder: The output folder.
        case: Name of the case.
        kind: What it holds.
        ending: Ending of the case's image; a segmentation has the same, where that loses nothing.

    Examples:
        >>> output_path(Path("out"), "anna", "segmentation", ".jpg").as_posix()
        'out/anna.png'
        >>> output_path(Path("out"), "anna", "probabilities", ".jpg").as_posix()
        'out/anna.probabilities.nii'
    """
    end = output_ending(ending) if kind == "segmentation" else _ENDINGS[kind]
    return folder / f"{case}{end}"


def report_path(folder: Path, case: str) -> Path:
    """Return the file of a case's report.

    It is CASE.json; only a case that would take the place of the summary has another name.

    Examples:
        >>> report_path(Path("out"), "anna").name, report_path(Path("out"), "Summary").name
        ('anna.json', 'Summary.case.json')
    """
    is_taken = f"{case}.json".lower() == SUMMARY
    return folder / (f"{case}.case.json" if is_taken else f"{case}.json")


def label_entries(labels: LabelScheme) -> tuple[LabelEntry, ...]:
    """Return name and colour of every value a segmentation may hold, the background first.

    A structure's colour is given by its place among the structures. With regions, a value has the
    name of the region that is painted with it; regions painted alike share theirs.
    """
    background = LabelEntry(
        value=labels.background, name="background", colour=BACKGROUND_COLOUR, opacity=0.0
    )
    painted: dict[int, list[str]] = {}
    for name, value in _painted(labels).items():
        painted.setdefault(value, []).append(name)
    places = list(labels.structures)
    return background, *(
        LabelEntry(value=value, name="/".join(names), colour=colour(places.index(names[0])))
        for value, names in painted.items()
        if value != labels.background
    )


def label_reports(labels: LabelScheme) -> dict[str, LabelReport]:
    """Return values and colour of every structure, the background first."""
    shades = {entry.value: entry.colour for entry in label_entries(labels)}
    painted = _painted(labels)
    background = LabelReport(values=(labels.background,), colour=BACKGROUND_COLOUR)
    return {"background": background} | {
        name: LabelReport(values=values, colour=shades[painted[name]])
        for name, values in labels.structures.items()
    }


def _painted(labels: LabelScheme) -> dict[str, int]:
    """Return the value each structure is painted with."""
    if labels.has_regions:
        return dict(zip(labels.structures, labels.regions_class_order or (), strict=True))
    return {name: value for name, (value,) in labels.structures.items()}


def map_names(labels: LabelScheme) -> tuple[str, ...]:
    """Return the names of the probability maps, in the order of the logit channels."""
    named = {channel: name for name, channel in labels.channels.items()}
    return tuple(named.get(channel, "background") for channel in range(labels.num_logits))


def write_report(folder: Path, report: CaseReport) -> Path:
    """Write the report of a case, atomically; write it last, for it says that the case is whole.

    Beside a TIFF the file also holds the voxel size, which stays.

    Returns:
        The file.
    """
    path = report_path(folder, report.case)
    values = report.model_dump(mode="json", exclude_none=True)
    before = read_json(path) if path.exists() else None
    if isinstance(before, dict) and "spacing" in before:
        values["spacing"] = before["spacing"]
    write_json(path, values)
    return path


def write_summary(
    folder: Path,
    summary: PredictionSummary,
    structures: Sequence[str],
    *,
    part: str | None = None,
) -> None:
    """Write `summary.json` and the same as a table, each atomically.

    Args:
        folder: The output folder.
        summary: What became of every case.
        structures: Names that have a column, in this order.
        part: "i/n" of one of several jobs, which becomes part of the names.
    """
    end = "" if part is None else "_" + part.replace("/", "_of_")
    json_path, table_path = (Path(name) for name in (SUMMARY, TABLE))
    json_path = folder / f"{json_path.stem}{end}{json_path.suffix}"
    table_path = folder / f"{table_path.stem}{end}{table_path.suffix}"
    write_json(json_path, summary.model_dump(mode="json"))
    write_text(table_path, format_table(summary.cases, structures))


def format_table(rows: Sequence[PredictionRow], structures: Sequence[str]) -> str:
    """Return the cases as comma-separated values.

    Texts that a spreadsheet would take for a formula get an apostrophe in front.

    Args:
        rows: One per case.
        structures: Names that have a column NAME_ml, in this order.

    Source:
        RFC 4180; OWASP, "CSV injection".
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    volumes = [f"{name}_ml" for name in structures]
    head = ["case", "status", "file", "seconds", *volumes, "flags", "message"]
    writer.writerow([_harmless(name) for name in head])
    for row in rows:
        found = [row.volumes_ml.get(name) for name in structures]
        texts = [row.case, row.status, row.file or ""]
        last = ["; ".join(row.flags), row.message]
        writer.writerow(
            [
                *map(_harmless, texts),
                f"{row.seconds:.3f}",
                *("" if volume is None else f"{volume:.9g}" for volume in found),
                *map(_harmless, last),
            ]
        )
    return text.getvalue()


def _harmless(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text
