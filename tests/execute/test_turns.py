"""Processes that change the same files take turns."""

from __future__ import annotations

import os
import sys

from medseg.execute.children import Children
from medseg.execute.turns import one_at_a_time

COUNTS = """
import pathlib, sys, time
from medseg.execute.turns import one_at_a_time
path = pathlib.Path(sys.argv[1])
for _ in range(20):
    with one_at_a_time(path):
        number = int(path.read_text())
        time.sleep(0.002)
        path.write_text(str(number + 1))
"""


def test_processes_wait_for_each_other(tmp_path):
    """Three that add to one number lose nothing."""
    path = tmp_path / "number"
    path.write_text("0")
    with Children() as children:
        command = [sys.executable, "-c", COUNTS, str(path)]
        several = [children.start(command, dict(os.environ)) for _ in range(3)]
        assert [process.wait() for process in several] == [0, 0, 0]
    assert path.read_text() == "60"
    with one_at_a_time(path):
        assert path.read_text() == "60"
