"""The page about the check lists every kind of problem with its level."""

from __future__ import annotations

import re
from pathlib import Path

import medseg.check

ROOT = Path(medseg.check.__file__).parents[2]
CODE = r"\"([a-z0-9]+(?:-[a-z0-9]+)*)\""
CALL = re.compile(
    rf"(?:found\.(?:error|warning)|_warning)\(\s*{CODE}|code = {CODE}|code, words = {CODE}"
)
GRIDS = ("shape", "axes-swapped", "orientation", "spacing", "origin", "direction")


def codes():
    """Return every code that stands in the source."""
    found = set(GRIDS)
    for path in (ROOT / "medseg/check").glob("*.py"):
        for groups in CALL.findall(path.read_text(encoding="utf-8")):
            found |= set(filter(None, groups))
    return found


def test_every_code_is_in_the_table_and_no_other():
    page = (ROOT / "docs/how-to/check-a-dataset.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+`) \| (error|warning|both) \|", page, re.MULTILINE)
    listed = [code for cell, _ in rows for code in re.findall(r"`([a-z0-9-]+)`", cell)]
    assert sorted(listed) == sorted(codes())


def test_every_code_is_planted_somewhere():
    tests = "".join(p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("*.py"))
    missing = [c for c in codes() if c not in tests and c.replace("-", "_") + "=" not in tests]
    assert missing == []
