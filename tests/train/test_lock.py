"""One process trains a fold: refusals, left-over locks, and races of real processes."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import pytest

from medseg.errors import ConfigError
from medseg.train import lock as lock_module
from medseg.train.lock import LOCK, FoldLock, Holder

HOLD = """
    import sys, time
    from pathlib import Path
    from medseg.train.lock import FoldLock
    with FoldLock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""
CONTEND = """
    import os, sys
    from pathlib import Path
    from medseg.errors import ConfigError
    from medseg.train.lock import FoldLock
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    start, go = os.pipe()
    told, tell = os.pipe()
    hold, end = os.pipe()

    def contend():
        os.close(go), os.close(end)
        os.read(start, 1)  # until the parent closes the other end, for all at once
        try:
            with FoldLock(folder) as lock:
                os.write(tell, b"w")
                os.read(hold, 1)
                lock.require_held()
        except ConfigError as error:
            os.write(tell, b"l" if "is trained by process" in str(error) else b"?")

    for _ in range(count):
        if not os.fork():
            contend()
            os._exit(0)
    os.close(go)
    results = b"".join(os.read(told, 1) for _ in range(count))
    held = (folder / "lock").exists()
    os.close(end)
    statuses = {os.wait()[1] for _ in range(count)}
    print(results.count(b"w"), results.count(b"l"), held, statuses, flush=True)
"""
on_linux = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")


def start(code, *arguments):
    """Start a Python process that needs nothing from the environment."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={}
    )


@contextmanager
def ended(*processes):
    """End the processes at the end, whatever happened."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def leave(folder, **changes):
    """Leave a lock as a process would that was killed."""
    folder.mkdir(exist_ok=True)
    holder = Holder.present().model_copy(update=changes)
    (folder / LOCK).write_text(holder.model_dump_json())
    return holder


def age(path, seconds):
    """Make a file look as if it had not been touched for some time."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def gone_pid():
    """Return the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def take(folder, **options):
    """Take the lock and give it back."""
    with FoldLock(folder, **options):
        pass


def rest(folder):
    return sorted(path.name for path in folder.iterdir())


class TestHolding:
    def test_file_names_the_process_and_goes_with_the_block(self, tmp_path):
        with FoldLock(tmp_path) as lock:
            values = json.loads((tmp_path / LOCK).read_text())
            assert values["pid"] == os.getpid()
            assert {"host", "boot", "started", "taken", "command", "token"} < set(values)
            assert rest(tmp_path) == [LOCK]
            lock.require_held()
        assert rest(tmp_path) == []

    def test_an_exception_gives_it_back(self, tmp_path):
        with pytest.raises(SystemExit), FoldLock(tmp_path):
            sys.exit(3)
        take(tmp_path)

    def test_second_process_is_told_who_trains_and_what_to_do(self, tmp_path):
        process = start(HOLD, tmp_path / "fold_2")
        with ended(process):
            assert process.stdout.readline() == "held\n"
            with pytest.raises(ConfigError) as caught:
                take(tmp_path / "fold_2")
        said = str(caught.value)
        for part in ("fold_2", f"process {process.pid} on ", " since 20", "Wait", "--name"):
            assert part in said

    def test_second_call_in_this_process_is_refused_too(self, tmp_path):
        with FoldLock(tmp_path), pytest.raises(ConfigError, match="this process trains the fold"):
            take(tmp_path)
        assert rest(tmp_path) == []

    def test_a_lock_that_is_another_s_by_now_is_left_alone(self, tmp_path):
        with FoldLock(tmp_path) as lock:
            other = leave(tmp_path, token="another", pid=1)
            with pytest.raises(ConfigError, match="no longer holds the fold"):
                lock.require_held()
        assert json.loads((tmp_path / LOCK).read_text())["token"] == other.token

    def test_a_lock_that_was_deleted_is_noticed(self, tmp_path):
        with FoldLock(tmp_path) as lock:
            (tmp_path / LOCK).unlink()
            with pytest.raises(ConfigError, match="was deleted"):
                lock.require_held()

    def test_damage_to_the_file_does_not_end_the_hold(self, tmp_path):
        with FoldLock(tmp_path) as lock:
            (tmp_path / LOCK).write_text("")
            lock.require_held()
        assert rest(tmp_path) == []

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_child_does_not_give_back_its_parent_s_lock(self, tmp_path):
        code = """
            import os, sys
            from pathlib import Path
            from medseg.train.lock import FoldLock
            with FoldLock(Path(sys.argv[1])) as lock:
                if not os.fork():
                    lock.__exit__(None, None, None)
                    os._exit(0)
                os.wait()
                lock.require_held()
                print("held", flush=True)
        """
        process = start(code, tmp_path)
        with ended(process):
            assert process.stdout.readline() == "held\n"

    def test_folder_made_for_the_lock_alone_goes_with_it(self, tmp_path):
        take(tmp_path / "run" / "fold_0")
        assert rest(tmp_path) == []
        with FoldLock(tmp_path / "run" / "fold_0"):
            (tmp_path / "run" / "fold_0" / "run.json").write_text("{}")
        assert rest(tmp_path / "run" / "fold_0") == ["run.json"]

    def test_clearing_a_fold_spares_its_lock(self, tmp_path):
        (tmp_path / "checkpoints" / "00000007").mkdir(parents=True)
        (tmp_path / "journal.jsonl").write_text("{}")
        with FoldLock(tmp_path) as lock:
            lock.clear()
            assert rest(tmp_path) == [LOCK]
            lock.require_held()

    def test_holder_touches_the_file(self, tmp_path):
        with FoldLock(tmp_path, beat_seconds=0.05):
            age(tmp_path / LOCK, 1000)
            limit = time.monotonic() + 5
            while time.time() - (tmp_path / LOCK).stat().st_mtime > 100:
                assert time.monotonic() < limit
                time.sleep(0.02)

    def test_works_without_hard_links(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise PermissionError("no hard links here")

        monkeypatch.setattr(os, "link", refuse)
        with FoldLock(tmp_path) as lock:
            lock.require_held()
            with pytest.raises(ConfigError, match="this process trains"):
                take(tmp_path)
        leave(tmp_path, pid=gone_pid())
        with FoldLock(tmp_path) as lock:
            lock.require_held()
        assert rest(tmp_path) == []


class TestLeftOver:
    def test_of_a_process_that_was_killed(self, tmp_path, caplog):
        process = start(HOLD, tmp_path)
        with ended(process):
            assert process.stdout.readline() == "held\n"
            process.kill()  # not waited for: its id is still taken
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with FoldLock(tmp_path) as lock:
                lock.require_held()
        assert f"took over the lock of process {process.pid} on " in caplog.text
        assert rest(tmp_path) == []

    @on_linux
    def test_whose_process_id_is_another_process_s_now(self, tmp_path):
        leave(tmp_path, started="1")
        with FoldLock(tmp_path) as lock:
            lock.require_held()

    @on_linux
    def test_of_this_machine_before_it_was_started_anew(self, tmp_path):
        leave(tmp_path, boot="an earlier start")
        age(tmp_path / LOCK, 100)  # three beats and a little
        with FoldLock(tmp_path) as lock:
            lock.require_held()

    def test_of_another_machine_that_has_been_silent_for_five_minutes(self, tmp_path, caplog):
        leave(tmp_path, host="elsewhere", pid=77)
        age(tmp_path / LOCK, 310)
        with FoldLock(tmp_path) as lock:
            lock.require_held()
        assert "took over the lock of process 77 on elsewhere" in caplog.text

    @pytest.mark.parametrize("content", ["", "{", '{"pid": 3}', "\x00" * 40, "[1]"])
    def test_that_cannot_be_read_is_watched_like_another_machine_s(self, tmp_path, content):
        (tmp_path / LOCK).write_text(content)
        age(tmp_path / LOCK, 310)
        with FoldLock(tmp_path) as lock:
            lock.require_held()
        assert rest(tmp_path) == []

    def test_of_heirs_that_died_on_the_way(self, tmp_path):
        dead = gone_pid()
        first = leave(tmp_path, pid=dead, token="first")
        for token, after in (("second", first.token), ("third", "second")):
            heir = Holder.present().model_copy(update={"pid": dead, "token": token})
            (tmp_path / f".lock.{after}.heir").write_text(heir.model_dump_json())
        with FoldLock(tmp_path) as lock:
            lock.require_held()
            assert rest(tmp_path) == [LOCK]
        assert rest(tmp_path) == []

    def test_not_while_an_heir_lives(self, tmp_path):
        leave(tmp_path, pid=gone_pid(), token="first")
        heir = Holder.present().model_copy(update={"host": "elsewhere"})
        (tmp_path / ".lock.first.heir").write_text(heir.model_dump_json())
        heart = beating(tmp_path / ".lock.first.heir")
        with heart, pytest.raises(ConfigError, match="on elsewhere"):
            take(tmp_path, beat_seconds=0.2)


@contextmanager
def beating(path):
    """Touch a file from a thread, as its holder on another machine would."""
    over = threading.Event()

    def beat():
        while not over.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class TestOtherMachines:
    def test_one_that_gives_signs_of_life_is_left_alone(self, tmp_path, caplog):
        leave(tmp_path, host="elsewhere", pid=77)
        with (
            beating(tmp_path / LOCK),
            caplog.at_level(logging.INFO, "medseg.train.lock"),
            pytest.raises(ConfigError, match="process 77 on elsewhere"),
        ):
            take(tmp_path, beat_seconds=0.2)
        assert "Looking for a sign of life, at most 2 s" in caplog.text
        assert rest(tmp_path) == [LOCK]

    def test_clocks_need_not_agree(self, tmp_path):
        """The other machine's clock is an hour behind: its touches look old, but they come."""
        leave(tmp_path, host="elsewhere", pid=77)
        age(tmp_path / LOCK, 3600 - 1)

        def slow_clock():
            for number in range(200):
                if over.wait(0.05):
                    return
                age(tmp_path / LOCK, 3600 - number)

        over = threading.Event()
        thread = threading.Thread(target=slow_clock)
        thread.start()
        try:
            with pytest.raises(ConfigError, match="on elsewhere"):
                take(tmp_path, beat_seconds=400)
        finally:
            over.set()
            thread.join()

    def test_a_lock_given_back_while_it_is_watched_is_taken(self, tmp_path):
        leave(tmp_path, host="elsewhere")
        timer = threading.Timer(0.3, (tmp_path / LOCK).unlink)
        timer.start()
        with FoldLock(tmp_path, beat_seconds=1) as lock:
            lock.require_held()
        timer.join()

    def test_process_ids_mean_nothing_in_another_container(self, tmp_path, monkeypatch):
        """Same host name, same start of the machine, other name space of ids."""
        leave(tmp_path, pid=gone_pid(), boot="abc pid:[1]")
        monkeypatch.setattr(lock_module, "_boot", lambda: "abc pid:[2]")
        with beating(tmp_path / LOCK), pytest.raises(ConfigError, match="is trained by process"):
            take(tmp_path, beat_seconds=0.4)


class TestRaces:
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.parametrize("left_over", ["nothing", "dead", "line", "silent", "damaged"])
    def test_exactly_one_of_many_wins(self, tmp_path, left_over):
        folder = tmp_path / "fold_0"
        folder.mkdir()
        if left_over in ("dead", "line"):
            leave(folder, pid=gone_pid(), token="first")
        if left_over == "line":
            heir = Holder.present().model_copy(update={"pid": gone_pid(), "token": "second"})
            (folder / ".lock.first.heir").write_text(heir.model_dump_json())
        if left_over == "silent":
            leave(folder, host="elsewhere")
            age(folder / LOCK, 1000)
        if left_over == "damaged":
            (folder / LOCK).write_text("")
            age(folder / LOCK, 1000)
        process = start(CONTEND, folder, 24)
        with ended(process):
            assert process.stdout.readline() == "1 23 True {0}\n"
        assert rest(folder) == []

    def test_one_who_looked_before_another_inherited_comes_too_late(self, tmp_path):
        """Between its look and its heir's file, the other has inherited and cleared the line."""
        leave(tmp_path, pid=gone_pid())
        late, own = FoldLock(tmp_path), Holder.present()
        draft = lock_module._write_draft(late.path, own)
        found = late._last_in_line()
        with FoldLock(tmp_path) as lock:
            assert not late._inherit(draft, found, own)
            lock.require_held()
            draft.unlink()
            assert rest(tmp_path) == [LOCK]

    def test_takeovers_by_threads_never_overlap(self, tmp_path, monkeypatch):
        """Many short holds, each left over as if by a kill: at no time are there two holders."""
        dead, inside, most, wins = gone_pid(), [0], [0], [0]
        guard = threading.Lock()
        present = Holder.present

        def mortal(own=Holder):
            return present().model_copy(update={"pid": dead, "started": None})

        alive = set()
        monkeypatch.setattr(Holder, "present", mortal)
        monkeypatch.setattr(
            Holder, "verdict", lambda self: "alive" if self.token in alive else "gone"
        )

        def contend():
            for _ in range(25):
                lock = FoldLock(tmp_path)
                own = Holder.present()
                alive.add(own.token)
                draft = lock_module._write_draft(lock.path, own)
                try:
                    lock._acquire(draft, own)
                except ConfigError:
                    alive.discard(own.token)
                    continue
                finally:
                    draft.unlink(missing_ok=True)
                with guard:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    wins[0] += 1
                time.sleep(0.001)
                with guard:
                    inside[0] -= 1
                alive.discard(own.token)  # killed: its lock stays

        threads = [threading.Thread(target=contend) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1]
        assert wins[0] >= 12


def test_a_signal_that_ends_the_process_orderly_gives_the_lock_back(tmp_path):
    process = start(HOLD, tmp_path)
    with ended(process):
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGINT)  # KeyboardInterrupt
        process.wait(20)
    assert rest(tmp_path) == []
