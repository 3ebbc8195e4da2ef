"""Child processes: no one outlives its parent, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from medseg.execute.children import Children, how_it_ended, last_lines

PYTHON = [sys.executable, "-S", "-c"]
STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {grandchild.pid}")
time.sleep(60)
"""
COUNTS = """
import pathlib, signal, sys, time
seen = []
def note(number, _):
    seen.append(str(number))
    pathlib.Path(sys.argv[1]).write_text(" ".join(seen))
signal.signal(signal.SIGINT, note)
pathlib.Path(sys.argv[1]).write_text("")
while True:
    time.sleep(0.05)
"""
PARENT = f"""
import os, sys
from medseg.execute.children import Children
with Children() as children:
    command = {[*PYTHON, "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"]!r}
    children.start(command, dict(os.environ)).wait()
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="ends children by a Linux call")


def is_alive(pid):
    """Return whether a process runs; one that only waits for its parent to notice does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(condition, seconds=20.0):
    """Wait until a condition holds; return whether it does."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@linux
def test_a_child_dies_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    with parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    assert until(lambda: not is_alive(pid), 5)


@linux
def test_what_does_not_end_is_killed_with_what_it_started(tmp_path):
    path = tmp_path / "pids"
    with Children() as children:
        children.start([*PYTHON, STUBBORN, str(path)], dict(os.environ))
        assert until(lambda: path.exists() and len(path.read_text().split()) == 2)
        pids = [int(text) for text in path.read_text().split()]
        assert all(map(is_alive, pids))
        children.end(patience_seconds=0.1)
    assert until(lambda: not any(map(is_alive, pids)), 5)


def test_the_end_of_the_block_ends_children_whatever_ends_the_block():
    process = None

    def start_and_fail():
        nonlocal process
        with Children() as children:
            process = children.start([*PYTHON, "import time; time.sleep(60)"], dict(os.environ))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        start_and_fail()
    assert process.returncode == -signal.SIGTERM


def test_signals_are_passed_on_twice_and_then_end_what_runs(tmp_path):
    path = tmp_path / "seen"
    before = signal.getsignal(signal.SIGINT)
    with Children() as children:
        process = children.start([*PYTHON, COUNTS, str(path)], dict(os.environ))
        assert until(path.exists)
        for expected in ("2", "2 2"):
            os.kill(os.getpid(), signal.SIGINT)
            assert until(lambda expected=expected: path.read_text() == expected)
        assert process.poll() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert until(lambda: process.poll() is not None, 5)
        assert children.signals == [signal.SIGINT] * 3
    assert process.returncode == -signal.SIGKILL
    assert path.read_text() == "2 2"
    assert signal.getsignal(signal.SIGINT) is before


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Children():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_can_start_children(tmp_path):
    log, statuses = tmp_path / "log.txt", []

    def run():
        with Children() as children:
            command = [*PYTHON, "import os; print(os.environ['WHO'])"]
            statuses.append(children.start(command, {"WHO": "a thread"}, log).wait())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert statuses == [0]
    assert log.read_text() == "a thread\n"


def test_last_lines_leave_out_what_was_overwritten(tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes(b"first\n\n  10%\r  55%\r100%\nsaid \xff twice\n \n")
    assert last_lines(log) == ["first", "100%", "said \ufffd twice"]
    assert last_lines(log, 1) == ["said \ufffd twice"]
    assert last_lines(tmp_path / "nothing.txt") == []


def test_an_end_without_a_message_has_its_reason():
    assert how_it_ended(-9) == "was ended by SIGKILL, most often for lack of memory"
    assert how_it_ended(1) == "ended with status 1"
    assert how_it_ended(-77) == "was ended by signal 77"
