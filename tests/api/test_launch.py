"""One command in several processes: started, signalled and ended as one."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import pytest

from medseg.api import launch as module
from medseg.api.launch import launch, require_gpus, visible_devices
from medseg.errors import ConfigError, MedsegError
from medseg.train.distributed import LostProcessError, Processes, from_environment

VARIABLES = """
import json, os, pathlib, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES",
         "OMP_NUM_THREADS", "MINE")
path = pathlib.Path(sys.argv[1]) / os.environ["RANK"]
path.write_text(json.dumps({name: os.environ.get(name) for name in names}))
print("rank", os.environ["RANK"])
"""
SLEEPS = "import time; time.sleep(60)"
OBEYS = """
import os, pathlib, signal, sys, time
path = pathlib.Path(sys.argv[1]) / os.environ["RANK"]
seen = []
signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
path.write_text("ready")
while not seen:
    time.sleep(0.02)
if os.environ["RANK"] == "0":
    time.sleep(1.0)  # writes its checkpoint; the others are gone by then
path.write_text(f"told {len(seen)} times")
sys.exit(int(sys.argv[2]))
"""


def by_rank(*codes):
    """Return a command that does something else in each process."""
    code = f"import os\nexec({codes!r}[int(os.environ['RANK'])])"
    return [sys.executable, "-S", "-c", code]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "_GRACE_SECONDS", 0.7)


def test_each_process_learns_its_place(tmp_path, capfd):
    """And the main one alone is heard."""
    command = [sys.executable, "-S", "-c", VARIABLES, str(tmp_path)]
    environment = {**os.environ, "MINE": "kept"}
    environment.pop("OMP_NUM_THREADS", None)
    assert launch(command, 3, environment=environment, devices=["cuda:1", "cuda:2", "cuda:5"]) == 0
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [from_environment(one) for one in found] == [Processes(3, r, r) for r in range(3)]
    assert len({(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in found}) == 1
    assert found[0]["MASTER_ADDR"] == "127.0.0.1"
    assert {one["CUDA_VISIBLE_DEVICES"] for one in found} == {"1,2,5"}
    assert {one["MINE"] for one in found} == {"kept"}
    assert all(int(one["OMP_NUM_THREADS"]) >= 1 for one in found)
    assert capfd.readouterr().out == "rank 0\n"


def test_threads_the_user_chose_are_kept(tmp_path):
    command = [sys.executable, "-S", "-c", VARIABLES, str(tmp_path)]
    launch(command, 1, environment={**os.environ, "OMP_NUM_THREADS": "7"})
    assert json.loads((tmp_path / "0").read_text())["OMP_NUM_THREADS"] == "7"


def test_the_first_failure_ends_all_with_its_message():
    fails = "import sys; print('case_3 is damaged', file=sys.stderr); sys.exit(2)"
    start = time.monotonic()
    with pytest.raises(MedsegError, match=r"process 2 of 3 ended with status 2.*\n  case_3 is dam"):
        launch(by_rank(SLEEPS, fails, SLEEPS), 3, environment=os.environ)
    assert time.monotonic() - start < 20


def test_who_lost_another_process_is_not_blamed():
    status = LostProcessError.exit_status
    lost = f"import sys; sys.exit({status})"
    late = "import sys, time; time.sleep(0.3); print('no memory'); sys.exit(1)"
    with pytest.raises(MedsegError, match=r"process 3 of 3 ended with status 1.*\n  no memory"):
        launch(by_rank(lost, lost, late), 3, environment=os.environ)


def test_what_the_main_process_said_is_not_said_again(capfd):
    """All refuse alike; the user reads it once, from the main process."""
    refuses = "import sys; print('no such recipe', file=sys.stderr); sys.exit(2)"
    assert launch(by_rank(refuses, refuses), 2, environment=os.environ) == 2
    assert capfd.readouterr().err == "no such recipe\n"


def test_a_process_that_is_killed_is_named():
    killed = "import os; os.kill(os.getpid(), 9)"
    with pytest.raises(MedsegError, match="process 1 of 2 was ended by SIGKILL, most often for"):
        launch(by_rank(killed, SLEEPS), 2, environment=os.environ)


def test_a_process_that_is_killed_is_named_though_the_main_one_complained():
    killed = "import os; os.kill(os.getpid(), 9)"
    with pytest.raises(MedsegError, match="process 2 of 2 was ended by SIGKILL"):
        launch(by_rank("import sys; sys.exit(2)", killed), 2, environment=os.environ)


@pytest.mark.parametrize("status", [128 + signal.SIGTERM, 130])
def test_a_request_to_stop_reaches_all_once_and_is_waited_for(tmp_path, status):
    def ask():
        while sum(path.read_text() == "ready" for path in tmp_path.iterdir()) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    command = [sys.executable, "-S", "-c", OBEYS, str(tmp_path), str(status)]
    assert launch(command, 2, environment=os.environ) == status
    thread.join()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["told 1 times"] * 2


def test_too_few_free_gpus_are_refused():
    assert require_gpus(2, ["cuda:1", "cuda:3", "cuda:4"]) == ["cuda:1", "cuda:3"]
    with pytest.raises(ConfigError, match="gpus is 2, but free CUDA devices are: cuda:3"):
        require_gpus(2, ["cuda:3"])
    with pytest.raises(ConfigError, match="devices are: none"):
        require_gpus(1, [])


def test_gpus_are_numbered_as_this_process_sees_them():
    seen = {"CUDA_VISIBLE_DEVICES": "GPU-8f2, GPU-1c4, GPU-77a"}
    assert visible_devices(["cuda:2", "cuda:0"], seen) == "GPU-77a,GPU-8f2"
