"""The table at the end of `predict`."""

from __future__ import annotations

import pytest

from medseg.report.predictions import format_predictions
from medseg.report.text import columns
from medseg.schema.prediction import PredictionRow

LONG = "a_name_of_a_case_that_some_hospital_made_up_and_nobody_shortens_{:03d}"


def done(case, flags=(), **volumes):
    return PredictionRow(case=case, status="done", seconds=0.31, volumes_ml=volumes, flags=flags)


def test_the_whole_of_a_small_table():
    rows = [
        done("anna", liver=1512.306, tumour=0.02),
        done("bert", ("liver touches the border",), liver=9.5, tumour=0.0051),
        PredictionRow(case="carl", status="failed", message="carl.nii.gz: cut short"),
        PredictionRow(case="dora", status="skipped", message="has an output"),
    ]
    assert format_predictions(rows).splitlines() == [
        "case  seconds    liver  tumour",
        "------------------------------",
        "anna      0.3  1512.31  0.0200",
        "bert      0.3     9.50  0.0051",
        "volumes in ml",
        "",
        "2 done, 1 failed, 1 skipped, 1 with flags",
        "",
        "failed:",
        "  carl: carl.nii.gz: cut short",
        "",
        "with flags:",
        "  bert: liver touches the border",
    ]


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("num_structures", [0, 1, 4, 118])
def test_every_line_fits(width, num_structures):
    volumes = {f"vertebrae_cervical_{n}_\u808b": 10.0**n % 1e7 for n in range(num_structures)}
    rows = [done(LONG.format(n), ("much to say " * 30,), **volumes) for n in range(45)]
    rows += [PredictionRow(case=LONG.format(99), status="failed", message="/x" * 300)]
    lines = format_predictions(rows, width).splitlines()
    assert max(map(columns, lines)) <= width
    assert any(LONG.format(0)[-12:] in line for line in lines), "the ends of names tell them apart"
    assert "45 done, 1 failed, 45 with flags" in lines


def test_what_is_left_out_is_told():
    rows = [done(f"c{n:02d}", **{f"structure {i}": 1.0 for i in range(60)}) for n in range(41)]
    text = format_predictions(rows)
    assert "volumes in ml; 1 more case and 55 more structures in summary.csv" in text
    assert "c39" in text
    assert "c40" not in text


def test_a_wider_terminal_shows_more_structures():
    rows = [done("a", **{f"structure {i}": 1.0 for i in range(60)})]
    shown = [format_predictions(rows, width).count("structure ") for width in (80, 120)]
    assert shown == [5, 8]


def test_many_failures_are_cut_off():
    rows = [PredictionRow(case=f"c{n:02d}", status="failed", message="bad") for n in range(30)]
    lines = format_predictions(rows).splitlines()
    assert lines[0] == "0 done, 30 failed"
    assert lines[-2:] == ["  c19: bad", "  ... and 10 more in summary.csv"]


def test_volumes_that_are_missing_or_tiny():
    rows = [done("a", x=3e-7, y=0.0), done("b", x=2.1e-8)]
    lines = format_predictions(rows).splitlines()
    assert lines[2].split() == ["a", "0.3", "0.000000300", "0.00"]
    assert lines[3].split() == ["b", "0.3", "0.000000021", "-"]


def test_nothing_at_all():
    assert format_predictions([]) == "0 done"
