"""Scores as text."""

import numpy as np
import pytest

from medseg.metrics.case import evaluate_case, summarize
from medseg.report.table import format_metrics
from medseg.schema.metrics import CaseMetrics

STRUCTURES = {
    "white matter": (1,),
    "left anterior cerebral artery": (2,),
    "absent": (9,),
    "\u767d\u8d28": (1, 2),
}


def columns(line):
    """Return the columns a terminal needs, where Chinese letters take two."""
    return sum(2 if letter > "\u2e80" else 1 for letter in line)


@pytest.fixture
def metrics():
    cases = {}
    for number in range(8):
        reference = np.zeros((20, 14, 9), np.uint8)
        reference[3:15, 3:10, 2:7] = 1
        reference[5:9, 5:9, 3:6] = 2
        prediction = np.roll(reference, number, axis=0)
        scores = evaluate_case(
            prediction, reference, structures=STRUCTURES, affine=np.diag([1.5, 1, 2, 1])
        )
        cases[f"sub-{number}_ses-01_acq-MPRAGE_run-01_rec-T{number}w"] = CaseMetrics(
            structures=scores
        )
    return summarize(
        cases,
        structures=STRUCTURES,
        failed={"sub-9": "/data/a/very/long/path/to/sub-9.nii.gz cannot be read: " + "word " * 40},
        notes=["label 7 is in no reference and was not scored; 3 predictions hold it: a, b, c"],
    )


def test_no_line_is_wider_than_a_terminal(metrics):
    for line in format_metrics(metrics).splitlines():
        assert columns(line) <= 80, line
        assert line == line.rstrip()


def test_rows_hold_the_statistics(metrics):
    lines = format_metrics(metrics).splitlines()
    row = next(line for line in lines if line.startswith("white matter"))
    dice = metrics.summary["white matter"].dice
    hd95 = metrics.summary["white matter"].hd95_mm.mean
    cells = row.removeprefix("white matter").split()
    assert cells[:5] == [
        "8",
        f"{dice.mean:.3f}",
        "+-",
        f"{dice.std:.3f}",
        f"{dice.min:.3f}",
    ]
    assert cells[5] == f"{hd95:.2f}"
    absent = next(line for line in lines if line.startswith("absent"))
    assert absent.split() == ["absent", "0", *["-"] * 6]
    mean = next(line for line in lines if line.startswith("mean"))
    assert mean.split()[1:3] == ["8", f"{metrics.foreground_mean.dice:.3f}"]


def test_columns_line_up(metrics):
    lines = format_metrics(metrics).splitlines()
    rows = [line for line in lines[:8] if "0." in line or "recall" in line]
    assert len({columns(line) for line in rows}) == 1


def test_lowest_cases_come_first_and_keep_both_ends_of_their_names(metrics):
    lines = format_metrics(metrics, num_worst=2).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("lowest cases"))
    first, second, after = lines[start + 2 : start + 5]
    assert first.startswith("sub-7_ses-01_ac~")
    assert "rec-T7w " in first
    assert "left ante~al artery " in first
    assert second.startswith("sub-6")
    assert after == ""


def test_failures_and_notes_are_told(metrics):
    text = format_metrics(metrics)
    assert "1 of 9 cases could not be evaluated:\n  sub-9: /data/a/very" in text
    assert "note: label 7 is in no reference" in text


def test_list_of_lowest_cases_can_be_left_out(metrics):
    assert "lowest cases" not in format_metrics(metrics, num_worst=0)
    single = summarize(dict(list(metrics.cases.items())[:1]), structures=STRUCTURES)
    assert "lowest cases" not in format_metrics(single)


def test_no_case_at_all():
    text = format_metrics(summarize({}, structures=STRUCTURES, failed={"a": "broken"}))
    assert "1 of 1 cases could not be evaluated" in text
