"""What `dataset init` prints: it fits a terminal and names what takes no part."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg.data.layouts.described import LabelNames
from medseg.data.layouts.found import Found, LeftOver
from medseg.report.layout import format_found
from medseg.schema.dataset import CaseFiles


@pytest.fixture
def found():
    cases = {
        f"a_rather_long_case_id_{n:03d}": CaseFiles(
            channels=("a.nii", "b.nii"), segmentation="s.nii", group=f"p{n // 2}"
        )
        for n in range(30)
    }
    files = tuple(f"other/{'x' * 90}_{n}.nii.gz" for n in range(9))
    return Found(
        folder=Path("/data") / ("long" * 30),
        cases=cases,
        channels=("T1w", "\u7b2c\u4e8c"),
        names=LabelNames(labels={"background": 0, "both": (3, 255)}, ignore_label=9),
        label_counts={0: 30, 3: 2, 255: 4},
        left_over=(LeftOver(reason="images without a segmentation", files=files),),
        notes=("a note " * 30,),
        target=Path("/data/medseg.json"),
    )


def test_every_line_of_words_fits_a_terminal(found):
    lines = format_found(found).splitlines()
    wide = [line for line in lines if len(line) > 80 and " " in line.strip()]
    assert wide == []


def test_what_was_found_is_told(found):
    text = " ".join(format_found(found).split())
    assert "cases 30: a_rather_long_case_id_000," in text
    assert "and 22 more" in text
    assert "channels T1w, \u7b2c\u4e8c (2 files a case)" in text
    assert "labels background 0, both 3+255 (in 4 cases), ignore 9" in text
    assert "groups 15 groups of 30 cases, at most 2 in one" in text
    assert "left over 9 images without a segmentation:" in text
    assert "and 3 more" in text
