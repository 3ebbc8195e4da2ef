"""Files beside a segmentation: names, colours, reports without traces of the machine, tables."""

from __future__ import annotations

import csv
import io
import json

import nibabel
import numpy as np
import pytest

from medseg.errors import ConfigError
from medseg.geometry import Grid
from medseg.infer.outputs import (
    format_table,
    label_entries,
    label_reports,
    map_names,
    output_path,
    report_path,
    write_report,
    write_summary,
)
from medseg.io.image import Header
from medseg.io.palette import COLOURS
from medseg.io.read import read_segmentation
from medseg.io.write import write_segmentation
from medseg.labels import LabelScheme
from medseg.schema.base import read, validate
from medseg.schema.prediction import CaseReport, PredictionRow, PredictionSummary, Provenance

LABELS = LabelScheme(labels={"vessel": 255, "background": 7, "liver": -3}, ignore_label=9)
REGIONS = LabelScheme(
    labels={"background": 0, "whole": (1, 2, 3), "core": (2, 3), "enhancing": 3},
    regions_class_order=(1, 2, 3),
)
ALIKE = LabelScheme(
    labels={"background": 0, "all": (1, 2), "left": 1, "right": 2}, regions_class_order=(1, 1, 2)
)
PROVENANCE = {
    "model": "Dataset007_Liver",
    "bundle": "bundle",
    "bundle_sha256": "ab" * 32,
    "folds": ["fold_0"],
    "checkpoint": "final",
    "tta": "none",
    "step": 0.5,
    "precision": "bfloat16",
    "device": "cpu",
    "medseg_version": "0.1",
}


def make_report(case="anna", **changes):
    values = {
        "case": case,
        "inputs": ("anna_0000.nii.gz",),
        "files": {"segmentation": "anna.nii.gz"},
        "labels": label_reports(LABELS),
        "volumes_ml": {"vessel": 0.1 + 0.2, "liver": 1512.5},
        "flags": ("touches the border",),
        "provenance": Provenance(**PROVENANCE),
        "seconds": {"read": 0.1, "network": 2.5},
    }
    return CaseReport(**{**values, **changes})


class TestLabels:
    def test_every_value_of_a_segmentation_has_name_and_colour(self):
        found = {entry.value: (entry.name, entry.colour) for entry in label_entries(LABELS)}
        assert found == {
            7: ("background", "#000000"),
            255: ("vessel", COLOURS[0]),
            -3: ("liver", COLOURS[1]),
        }
        assert [entry.opacity for entry in label_entries(LABELS)] == [0, 1, 1]

    def test_a_value_has_the_name_of_the_region_painted_with_it(self):
        assert {entry.value: entry.name for entry in label_entries(REGIONS)} == {
            0: "background",
            1: "whole",
            2: "core",
            3: "enhancing",
        }

    def test_regions_painted_alike_share_name_and_colour(self):
        names = [(entry.value, entry.name) for entry in label_entries(ALIKE)]
        assert names == [(0, "background"), (1, "all/left"), (2, "right")]
        reports = label_reports(ALIKE)
        assert reports["all"].colour == reports["left"].colour == COLOURS[0]
        assert (reports["all"].values, reports["left"].values) == ((1, 2), (1,))
        assert reports["right"].colour == COLOURS[2]

    def test_files_and_reports_agree(self):
        reports = label_reports(LABELS)
        assert list(reports) == ["background", "vessel", "liver"]
        assert {report.values[0]: report.colour for report in reports.values()} == {
            entry.value: entry.colour for entry in label_entries(LABELS)
        }

    @pytest.mark.parametrize(
        ("labels", "names"),
        [
            (LABELS, ("background", "liver", "vessel")),
            (REGIONS, ("whole", "core", "enhancing")),
        ],
    )
    def test_maps_are_named_in_the_order_of_the_channels(self, labels, names):
        assert map_names(labels) == names
        assert len(names) == labels.num_logits


class TestPaths:
    @pytest.mark.parametrize(
        ("kind", "name"),
        [
            ("segmentation", "a.1.png"),
            ("probabilities", "a.1.probabilities.nii"),
            ("entropy", "a.1.entropy.nii.gz"),
            ("disagreement", "a.1.disagreement.nii.gz"),
        ],
    )
    def test_every_kind_has_its_name(self, tmp_path, kind, name):
        assert output_path(tmp_path, "a.1", kind, ".jpeg") == tmp_path / name

    @pytest.mark.parametrize("case", ["summary", "SUMMARY"])
    def test_no_report_takes_the_place_of_the_summary(self, tmp_path, case):
        assert report_path(tmp_path, case).name == f"{case}.case.json"
        assert report_path(tmp_path, f"{case}_1").name == f"{case}_1.json"


class TestReport:
    def test_what_is_written_is_read(self, tmp_path):
        report = make_report()
        assert write_report(tmp_path, report) == tmp_path / "anna.json"
        assert read(CaseReport, tmp_path / "anna.json") == report
        assert "spacing" not in json.loads((tmp_path / "anna.json").read_text())

    @pytest.mark.parametrize("name", ["/data/x/a.nii.gz", "x\\a.nii.gz", "../a"])
    @pytest.mark.parametrize("field", ["inputs", "files", "bundle"])
    def test_no_path_of_the_machine_gets_in(self, field, name):
        values = make_report().model_dump(mode="json")
        if field == "bundle":
            values["provenance"]["bundle"] = name
        else:
            values[field] = [name] if field == "inputs" else {"segmentation": name}
        with pytest.raises(ConfigError, match="without a folder"):
            validate(CaseReport, values, "x")

    @pytest.mark.parametrize("first", ["segmentation", "report"])
    def test_the_voxel_size_of_a_tiff_and_the_report_share_a_file(self, tmp_path, first):
        """Both are CASE.json: neither may take the other away, in either order."""
        array = np.arange(5 * 6 * 7).reshape(5, 6, 7).astype(np.uint8) % 4
        header = Header.of_grid(Grid(array.shape, np.diag([0.5, 0.7, 3, 1])))
        steps = [
            lambda: write_segmentation(tmp_path / "anna.tif", array, header),
            lambda: write_report(tmp_path, make_report()),
        ]
        for step in steps if first == "segmentation" else [*steps[::-1], steps[1]]:
            step()
        found = read(CaseReport, tmp_path / "anna.json")
        assert found.spacing == pytest.approx((3, 0.7, 0.5))
        assert found.case == "anna"
        assert read_segmentation(tmp_path / "anna.tif").grid.spacing == pytest.approx((0.5, 0.7, 3))

    def test_names_and_colours_reach_the_file(self, tmp_path):
        array = np.array([7, 255, -3], np.int16)[np.arange(60).reshape(3, 4, 5) % 3]
        header = Header.of_grid(Grid(array.shape, np.eye(4)))
        write_segmentation(tmp_path / "x.nii.gz", array, header, labels=label_entries(LABELS))
        image = nibabel.load(tmp_path / "x.nii.gz")
        text = image.header.extensions[0].get_content().decode()
        assert 'Key="-3"' in text
        assert ">liver<" in text
        np.testing.assert_array_equal(np.asarray(image.dataobj), array)


ROWS = (
    PredictionRow(
        case="anna",
        status="done",
        file="anna.nii.gz",
        volumes_ml={"liver": 1512.123456789, "=vessel": 1e-7},
        flags=("one", 'two, "three"'),
        seconds=1.23456,
    ),
    PredictionRow(case="=cmd|'/c calc'!A1", status="failed", message="-bad\nfile\u00e9"),
    PredictionRow(case="carl", status="skipped", message="has an output"),
)


class TestTable:
    def test_a_reader_of_csv_finds_every_value(self):
        text = format_table(ROWS, ["liver", "=vessel"])
        rows = list(csv.reader(io.StringIO(text, newline="")))
        assert rows[0] == [
            "case", "status", "file", "seconds", "liver_ml", "'=vessel_ml", "flags", "message",
        ]  # fmt: skip
        assert rows[1] == [
            "anna", "done", "anna.nii.gz", "1.235", "1512.12346", "1e-07",
            'one; two, "three"', "",
        ]  # fmt: skip
        assert rows[2][:2] == ["'=cmd|'/c calc'!A1", "failed"]
        assert rows[2][4:] == ["", "", "", "'-bad\nfile\u00e9"]
        assert [len(row) for row in rows] == [8] * 4
        assert text.endswith("\r\n")

    @pytest.mark.parametrize("letter", "=+-@\t\r\uff1d\uff0b\uff0d\uff20")
    def test_nothing_is_a_formula(self, letter):
        row = PredictionRow(case=f"{letter}1+1", status="done", flags=(f"{letter}x",))
        (found,) = list(csv.reader(io.StringIO(format_table([row], []), newline="")))[1:]
        assert found[0] == f"'{letter}1+1"
        assert found[4] == f"'{letter}x"

    def test_both_summaries_are_written_whole(self, tmp_path):
        summary = PredictionSummary(model="m", folds=("fold_0",), tta="none", step=0.5, cases=ROWS)
        write_summary(tmp_path, summary, ["liver"])
        assert read(PredictionSummary, tmp_path / "summary.json") == summary
        assert (tmp_path / "summary.csv").read_bytes().decode() == format_table(ROWS, ["liver"])
        write_summary(tmp_path, summary, ["liver"], part="2/5")
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "summary.csv",
            "summary.json",
            "summary_2_of_5.csv",
            "summary_2_of_5.json",
        ]
