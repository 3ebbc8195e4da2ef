"""Requests to stop: noted, nothing else; a second Ctrl-C does not wait."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from medseg.train.signals import Stopped, stop_requests

ASKING = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
]


@pytest.mark.parametrize("number", ASKING)
def test_signal_is_noted_and_handlers_come_back(number):
    before = signal.getsignal(number)
    if before in (signal.SIG_IGN, None):
        pytest.skip("ignored where the tests run")
    with stop_requests() as request:
        assert request.signal is None
        signal.raise_signal(number)
        assert request.signal == number
    assert signal.getsignal(number) is before


def test_first_signal_counts():
    with stop_requests() as request:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert request.signal == signal.SIGTERM


def test_second_interrupt_is_raised_at_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with stop_requests() as request:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert request.signal == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_come_back_after_an_error():
    before = [signal.getsignal(number) for number in ASKING]
    with pytest.raises(ValueError, match="inside"), stop_requests():
        raise ValueError("inside")
    assert [signal.getsignal(number) for number in ASKING] == before


def test_nested_blocks_give_back_in_order():
    with stop_requests() as outer:
        with stop_requests() as inner:
            signal.raise_signal(signal.SIGTERM)
        assert (outer.signal, inner.signal) == (None, signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert outer.signal == signal.SIGTERM


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stop_requests() as request:
            signal.raise_signal(signal.SIGTERM)
            assert request.signal is None
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_gets_no_requests_and_changes_no_handler():
    found = []

    def work():
        before = signal.getsignal(signal.SIGTERM)
        with stop_requests() as request:
            found.append((request.signal, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, True)]


def test_stop_says_where_the_run_stands_and_survives_pickling():
    stop = Stopped(15, 1234)
    copy = pickle.loads(pickle.dumps(stop))
    assert str(copy) == str(stop)
    assert str(stop).startswith(
        "Stopped by SIGTERM after iteration 1234; the checkpoint is written"
    )
    assert copy.exit_status == 143
    assert not isinstance(stop, Exception), "whoever handles errors and goes on must not catch it"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_real_process_finishes_its_step_and_leaves_with_the_signal_s_status():
    code = """
        import sys, time
        from medseg.train.signals import Stopped, stop_requests
        try:
            with stop_requests() as request:
                print("running", flush=True)
                for step in range(1, 1000):
                    time.sleep(0.02)
                    if request.signal is not None:
                        raise Stopped(request.signal, step)
        except Stopped as stop:
            print(stop, flush=True)
            sys.exit(stop.exit_status)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGTERM)
        said = process.stdout.readline()
    assert process.returncode == 143
    assert said.startswith("Stopped by SIGTERM after iteration ")
