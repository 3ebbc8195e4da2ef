"""The report of a check: a table for the terminal, a page for the eyes."""

from __future__ import annotations

import base64
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from medseg.data.dataset import scan_dataset
from medseg.report.check import (
    all_problems,
    check_page,
    format_check,
    format_fixed,
    num_errors,
)
from medseg.report.palette import COLOURS
from medseg.report.text import columns
from medseg.report.thumbnail import SIZE, _indexed, png, thumbnail
from medseg.schema.check import CaseFacts, ChannelFacts, CheckReport, Problem
from tests.check.conftest import Raw

CHANNEL = ChannelFacts(min=0, max=9.5, mean=4, std=2, median=4)


def problem(level, code, case, message, fix=None):
    return Problem(code=code, level=level, case=case, message=message, file="x.nii.gz", fix=fix)


@pytest.fixture
def report():
    long = "the segmentation holds 7 " + "and much more " * 12 + "\u809d\u810f" * 40
    cases = {
        "good<1>": CaseFacts(
            shape=(4, 5, 6), spacing=(1, 2, 3), orientation="LPS", channels=(CHANNEL,),
            labels={0: 100, 7: 20},
        ),
        "odd \u809d": CaseFacts(problems=(problem("warning", "name", "odd \u809d", "<b>x</b>"),)),
        "bad": CaseFacts(
            problems=(
                problem("warning", "float-label", "bad", "float", fix="stores integers"),
                problem("error", "unexpected-label", "bad", long),
            )
        ),
    }  # fmt: skip
    whole = (
        problem("warning", "duplicate-image", "good<1>", "same image"),
        Problem(code="same-patient", level="warning", message="two of one"),
    )
    return CheckReport(dataset="Tiny & small", made_with="", cases=cases, problems=whole)


class Page(HTMLParser):
    """Collect tags, texts and what would be loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def fixable(report):
    return [problem for problem in all_problems(report) if problem.fix]


class TestTerminal:
    def test_summary_names_every_kind_and_every_error(self, report):
        text = format_check(report)
        assert text.startswith("Tiny & small: 3 cases, 1 with errors, 2 with warnings, 1 problem")
        rows = [line.split() for line in text.splitlines()]
        assert ["error", "unexpected-label", "1", "bad"] in rows
        assert ["warning", "name", "1", "odd", "\u809d"] in rows
        assert ["warning", "same-patient", "1", "the", "dataset"] in rows
        assert "error unexpected-label: case 'bad': the segmentation holds 7" in text
        assert "--fix OUT would write a copy with 1 problem corrected" in text

    def test_every_line_fits(self, report):
        lines = (
            format_check(report) + "\n" + format_fixed(report, "/some/where" * 12, fixable(report))
        ).splitlines()
        assert max(map(columns, lines)) <= 80

    def test_many_cases_of_one_kind_take_one_line(self):
        cases = {
            f"case_{n:03d}": CaseFacts(problems=(problem("error", "nan", f"case_{n:03d}", "NaN"),))
            for n in range(99)
        }
        text = format_check(CheckReport(dataset="Many", made_with="", cases=cases))
        (line,) = [line for line in text.splitlines() if line.startswith("error    nan")]
        assert "case_000, case_001" in line
        assert re.search(r"\+ \d\d$", line)
        assert "... and 79 more" in text

    def test_healthy_dataset_is_said_to_be_so(self):
        report = CheckReport(dataset="Fine", made_with="", cases={"a": CaseFacts()})
        assert format_check(report) == "Fine: 1 case. No problem was found."
        assert num_errors(report) == 0

    def test_corrections_are_listed_and_the_rest_counted(self, report):
        text = format_fixed(report, "copy", fixable(report))
        assert "Corrected copy: copy (1 problem corrected)" in text
        assert "case 'bad': stores integers (x.nii.gz)" in text
        assert "4 problems" in text

    def test_what_was_not_corrected_is_not_said_to_be(self, report):
        text = format_fixed(report, "copy", [])
        assert "Corrected copy: copy (0 problems corrected)" in text
        assert "stores integers" not in text
        assert "5 problems" in text


class TestPage:
    def test_page_needs_nothing_from_elsewhere(self, report):
        page = Page(check_page(report, {"bad": b"\x89PNG"}))
        assert page.sources == ["data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()]
        assert "http" not in check_page(report, {})

    def test_cases_with_problems_come_first(self, report):
        page = Page(check_page(report, {}))
        rows = [a["data-level"] for tag, a in page.tags if tag == "tr" and "data-level" in a]
        assert rows == ["error", "warning", "warning"]
        assert page.text.index("unexpected-label") < page.text.index("duplicate-image")

    def test_names_and_messages_are_text_not_markup(self, report):
        page = Page(check_page(report, {}))
        assert "<b>x</b>" in page.text
        assert "good<1>" in page.text
        assert "Tiny & small" in page.text

    def test_every_cell_can_be_sorted_by(self, report):
        page = Page(check_page(report, {}))
        cells = [attributes for tag, attributes in page.tags if tag == "td"]
        assert len(cells) == 3 * 6
        assert all("data-key" in attributes for attributes in cells)

    def test_facts_are_shown(self, report):
        text = Page(check_page(report, {})).text
        for shown in ("4 x 5 x 6 LPS", "1 x 2 x 3 mm", "0 to 9.5", "7: 20", "two of one"):
            assert shown in text


def decode(content):
    """Read an RGB PNG without filters: the obvious reverse of the format."""
    chunks, place = {}, 8
    while place < len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        name, data = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        crc = int.from_bytes(content[place + 8 + length : place + 12 + length], "big")
        assert crc == zlib.crc32(name + data)
        chunks[name] = data
        place += length + 12
    columns, rows = (int.from_bytes(chunks[b"IHDR"][n : n + 4], "big") for n in (0, 4))
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(rows, -1)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(rows, columns, 3)


def shade(index):
    return np.array([int(COLOURS[index][n : n + 2], 16) for n in (1, 3, 5)], np.uint8)


class TestThumbnail:
    @pytest.fixture
    def folder(self, datasets, tmp_path):
        return datasets.write(tmp_path / "Dataset007_Tiny", num_cases=2)

    def test_png_holds_the_pixels(self):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3)).astype(np.uint8)
        np.testing.assert_array_equal(decode(png(pixels)), pixels)

    def test_each_structure_has_an_outline_of_its_colour(self, folder):
        spec, _ = scan_dataset(folder)
        pixels = decode(thumbnail(spec, "case_1"))
        assert max(pixels.shape[:2]) <= 3 * SIZE + 6
        for index in (0, 1):
            found = (pixels == shade(index)).all(axis=2).sum()
            assert 20 < found < 0.2 * pixels.size / 3

    def test_segmentation_of_another_shape_stands_alone(self, folder, datasets):
        raw, (spec, _) = Raw(folder), scan_dataset(folder)
        whole = decode(thumbnail(spec, "case_1"))
        raw.change(raw.segmentation("case_1"), lambda values: values.swapaxes(0, 1))
        apart = decode(thumbnail(spec, "case_1"))
        assert len(apart) > 1.6 * len(whole)

    @pytest.mark.parametrize("broken", ["imagesTr/case_1_0000.nii.gz", "labelsTr/case_1.nii.gz"])
    def test_what_can_be_read_is_drawn(self, folder, broken):
        spec, _ = scan_dataset(folder)
        (folder / broken).write_bytes(b"broken")
        assert decode(thumbnail(spec, "case_1")).any()

    def test_nothing_readable_gives_no_picture(self, folder):
        spec, _ = scan_dataset(folder)
        for path in folder.glob("*Tr/case_1*"):
            path.write_bytes(b"")
        assert thumbnail(spec, "case_1") == b""

    @pytest.mark.parametrize("found", [[0, 3, 7, 900], [-4, 3, 7], [7, *range(9, 400)]])
    def test_structures_are_numbered_like_one_by_one(self, found):
        """The first value that is no structure is the background where there is no 0."""
        labels = np.random.default_rng(2).permuted(np.resize(found, 600)).reshape(6, 10, 10)
        numbered = dict.fromkeys(found, 0)
        rest = [value for value in found if value not in (3, 7)]
        structures = [v for v in (3, 7) if v in found]
        structures += [v for v in rest if v != (0 if 0 in found else rest[0])]
        numbered |= {value: n for n, value in enumerate(structures[:250], start=1)}
        expected = [numbered[value] for value in labels.reshape(-1).tolist()]
        assert _indexed(labels, [3, 7, 8]).reshape(-1).tolist() == expected

    def test_nan_is_drawn_too(self, folder):
        raw, (spec, _) = Raw(folder), scan_dataset(folder)
        raw.change(raw.channel(0, "case_1"), lambda values: np.where(values > 120, np.nan, values))
        assert decode(thumbnail(spec, "case_1")).std() > 5
