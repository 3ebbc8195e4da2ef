"""Folds share the GPUs: one on each at a time, errors and requests to stop included."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time

import pytest

from medseg.api import side_by_side as module
from medseg.api.side_by_side import FoldProcess, free_devices, free_of, run_folds
from medseg.errors import MedsegError
from medseg.execute.children import Children

WORKS = """
import json, pathlib, sys, time
folder, fold, device, seconds = sys.argv[1:]
start = time.time()
print("train", fold + ":  50% loss 0.25", flush=True)
time.sleep(float(seconds))
row = {"device": device, "start": start, "end": time.time()}
(pathlib.Path(folder) / f"{fold}.json").write_text(json.dumps(row))
if fold == "fold_1":
    sys.exit("Error: case_7 is damaged")
"""
OBEYS = """
import pathlib, signal, sys, time
path, seen = pathlib.Path(sys.argv[1]), []
signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
path.write_text("ready")
while not seen:
    time.sleep(0.02)
time.sleep(0.3)
path.write_text(f"told {len(seen)} times")
sys.exit(130)
"""


def works(folder, seconds=0.4):
    def command_of(fold, device):
        return [sys.executable, "-S", "-c", WORKS, str(folder), fold, device, str(seconds)]

    return command_of


def rows_of(folder):
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


class TestRunFolds:
    FOLDS = ("fold_0", "fold_2", "fold_3", "fold_4")

    def test_each_device_has_one_fold_at_a_time(self, tmp_path):
        run_folds(
            self.FOLDS,
            ["cuda:0", "cuda:3"],
            works(tmp_path),
            logs=tmp_path / "logs",
            environment=os.environ,
            shown=False,
        )
        rows = rows_of(tmp_path)
        assert tuple(rows) == self.FOLDS
        for device in ("cuda:0", "cuda:3"):
            mine = sorted((r["start"], r["end"]) for r in rows.values() if r["device"] == device)
            assert mine, f"{device} was not used"
            assert all(mine[n][1] <= mine[n + 1][0] for n in range(len(mine) - 1))
        first, second = rows["fold_0"], rows["fold_2"]
        assert first["start"] < second["end"]
        assert second["start"] < first["end"]

    def test_a_fold_that_fails_does_not_stop_the_others(self, tmp_path):
        with pytest.raises(MedsegError) as caught:
            run_folds(
                ["fold_0", "fold_1", "fold_2"],
                ["cuda:0"],
                works(tmp_path, 0.05),
                logs=tmp_path / "logs",
                environment=os.environ,
                shown=False,
            )
        assert list(rows_of(tmp_path)) == ["fold_0", "fold_1", "fold_2"]
        message = str(caught.value)
        assert message.startswith("1 of 3 folds failed")
        assert "fold_1 ended with status 1" in message
        assert "Error: case_7 is damaged" in message
        assert str(tmp_path / "logs" / "fold_1.txt") in message
        assert (tmp_path / "logs" / "fold_2.txt").read_text() == "train fold_2:  50% loss 0.25\n"

    def test_ctrl_c_is_passed_on_once_and_waited_for(self, tmp_path):
        paths = [tmp_path / name for name in ("fold_0", "fold_1")]

        def ask():
            while not all(path.exists() and path.read_text() == "ready" for path in paths):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run_folds(
                ["fold_0", "fold_1", "fold_2"],
                ["cuda:0", "cuda:1"],
                lambda fold, device: [sys.executable, "-S", "-c", OBEYS, str(tmp_path / fold)],
                logs=tmp_path / "logs",
                environment=os.environ,
                shown=False,
            )
        thread.join()
        assert [path.read_text() for path in paths] == ["told 1 times"] * 2
        assert not (tmp_path / "fold_2").exists()

    def test_in_a_log_a_fold_has_a_line_when_it_starts_and_ends(self, tmp_path, monkeypatch):
        stream = io.StringIO()
        monkeypatch.setattr(module.sys, "stderr", stream)
        run_folds(
            ["fold_0", "fold_2"],
            ["cuda:0"],
            works(tmp_path, 0.05),
            logs=tmp_path / "logs",
            environment=os.environ,
        )
        lines = stream.getvalue().splitlines()
        assert [line.split()[:2] for line in lines] == [
            [fold, "cuda:0"] for fold in ("fold_0", "fold_0", "fold_2", "fold_2")
        ]
        assert [line.split()[2] for line in lines[1::2]] == ["done", "done"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(text):
    """Return the lines a terminal shows after it has received a text: a slow, tiny terminal."""
    lines, row = [""], 0
    for part in text.replace("\x1b[2K", "\x00").split("\n"):
        rest = part
        while rest.startswith("\x1b["):
            count, _, rest = rest[2:].partition("A")
            row -= int(count)
        rest = rest.lstrip("\r")
        if rest.startswith("\x00"):
            lines[row] = rest[1:]
        elif rest:
            lines[row] += rest
        row += 1
        lines += [""] * (row + 1 - len(lines))
    return [line for line in lines if line]


class TestBoard:
    def test_a_terminal_shows_one_line_for_each_fold_however_often_it_is_drawn(
        self, tmp_path, monkeypatch
    ):
        stream = Terminal()
        monkeypatch.setattr(module.sys, "stderr", stream)
        monkeypatch.setattr(module, "_REDRAW_SECONDS", 0.0)
        run_folds(
            ["fold_0", "fold_2", "fold_4"],
            ["cuda:0", "cuda:1"],
            works(tmp_path, 0.3),
            logs=tmp_path / "logs",
            environment=os.environ,
        )
        shown = screen(stream.getvalue())
        assert [line.split()[0] for line in shown] == ["fold_0", "fold_2", "fold_4"]
        assert all(line.split()[2:4] == ["done", "in"] for line in shown)
        assert stream.getvalue().count("50% loss 0.25") >= 3

    def test_a_running_fold_says_what_its_log_says_last(self, tmp_path):
        row = FoldProcess(name="fold_3", log=tmp_path / "fold_3.txt", device="cuda:1")
        assert row.line().split() == ["fold_3", "cuda:1", "waits"]
        row.log.write_text("reading\ntrain fold_3:  12%| 30/250\n")
        with Children() as children:
            row.process = children.start([sys.executable, "-S", "-c", "pass"], dict(os.environ))
            assert row.line().split(maxsplit=2) == ["fold_3", "cuda:1", "12%| 30/250"]
        row.status, row.seconds = -9, 3700.0
        assert row.line().endswith("most often for lack of memory after 1 h 1 min")


class TestFreeDevices:
    def test_a_gpu_somebody_computes_on_is_not_free(self):
        total = 80_000_000_000
        assert free_of([(total, total), (20_000_000_000, total), (75_000_000_000, total)]) == [
            "cuda:0",
            "cuda:2",
        ]

    def test_it_is_asked_in_another_process(self, monkeypatch):
        monkeypatch.setattr(module, "_PROBE", "print('a warning'); print('[[9, 9], null, [1, 9]]')")
        monkeypatch.setattr(module, "_BUSY_BYTES", 0)
        assert free_devices() == ["cuda:0"]

    def test_a_driver_that_does_not_answer_leaves_none(self, monkeypatch, caplog):
        monkeypatch.setattr(module, "_PROBE", "raise SystemExit('no driver')")
        assert free_devices() == []
        assert "no driver" in caplog.text
