"""The command itself: a process of its own, real sockets, signals, and what is left on disk."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import pytest

import medseg
from medseg.cli.main import run
from medseg.errors import ConfigError
from medseg.io.read import read_segmentation
from medseg.serve import server
from medseg.serve.server import address_of, is_loopback, listen, read_token, work_folder
from tests.infer.conftest import make_bundle, make_channels, make_oblique, write_case

PATIENCE = 90


class Process:
    """`medseg serve` on a free port, with a folder of its own for what it stores."""

    def __init__(self, bundle, scratch, *options):
        scratch.mkdir(exist_ok=True)
        self.scratch = scratch
        environment = {**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "medseg", "serve", str(bundle), "--port", "0", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.greeting = ""
        for line in self.process.stdout:
            self.greeting += line
            if line.startswith("Ctrl-C"):
                break
        else:
            raise AssertionError(self.process.communicate()[1])
        self.address = re.search(r"Address: (\S+)", self.greeting).group(1)

    def client(self, **headers):
        return httpx2.Client(base_url=self.address, timeout=PATIENCE, headers=headers)

    def left(self):
        return sorted(self.scratch.rglob("medseg-serve-*"))

    def stop(self, number):
        """Send a signal; return exit status, seconds and what was printed on stderr."""
        start = time.monotonic()
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, time.monotonic() - start, err


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(bundle, *options, scratch=tmp_path / "scratch"):
        started.append(Process(bundle, scratch, *options))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("model") / "bundle").folder


def upload(client, paths):
    files = [(n, (p.name, p.read_bytes())) for n, p in zip(("T1w", "CT"), paths, strict=True)]
    return client.post("/v1/jobs", files=files)


def wait_for(client, job):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        job = client.get(job["links"]["job"]).json()
        if job["state"] in ("done", "failed", "cancelled"):
            return job
        time.sleep(0.05)
    raise AssertionError(job)


def test_clients_at_once_get_their_own_results_and_ctrl_c_ends_it(start, bundle, tmp_path):
    process = start(bundle)
    shapes = [(19, 15, 11), (11, 17, 13), (14, 20, 12), (12, 10, 18)]
    cases = [
        write_case(tmp_path / f"in{n}", "c", make_channels(shape, seed=n), make_oblique())
        for n, shape in enumerate(shapes)
    ]

    def segment(paths):
        with process.client() as client:
            job = wait_for(client, upload(client, paths).json())
            assert job["state"] == "done", job["message"]
            content = client.get(job["links"]["segmentation"]).content
        target = paths[0].parent / "found.nii.gz"
        target.write_bytes(content)
        return read_segmentation(target).array

    with ThreadPoolExecutor(len(cases)) as pool:
        found = list(pool.map(segment, cases))
    model = medseg.load(bundle)
    for paths, array in zip(cases, found, strict=True):
        expected = model.predict(paths).segmentation
        assert array.shape == expected.shape
        assert (array == expected).mean() > 0.999  # the number of threads may differ
    assert len(process.left()) > 0
    status, seconds, err = process.stop(signal.SIGINT)
    assert status == 130
    assert seconds < 10
    assert err.splitlines()[-1] == "Stopped; all uploads and results are deleted."
    assert "Traceback" not in err
    assert process.left() == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_of_the_greeting_works_with_a_token(start, bundle, tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    process = start(bundle, "--token-file", str(token), "--max-upload", "100KB", "--tta", "none")
    assert "100 kB an upload" in process.greeting
    paths = write_case(tmp_path, "c", make_channels(), make_oblique())
    for path, name in zip(paths, ("T1w", "CT"), strict=True):
        path.rename(tmp_path / f"{name}.nii.gz")
    commands = [line.strip() for line in process.greeting.splitlines() if "curl" in line]
    job = "ID"
    for command in commands[:1] + commands[1:2] * 200 + commands[2:]:
        done = subprocess.run(
            command.replace("ID", job).replace("curl", "curl -sS --fail", 1),
            shell=True, cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found = re.search(r'"id":"([\w-]+)","state":"(\w+)"', done.stdout)
        job = found.group(1) if found else job
        if found and found.group(2) != "done":
            time.sleep(0.05)
    assert set(np.unique(read_segmentation(tmp_path / "segmentation.nii.gz").array)) <= {0, 1, 2, 3}
    with process.client() as client:
        assert client.get("/v1/model").status_code == 401
    with process.client(Authorization="Bearer 0123456789abcdef") as client:
        assert client.get("/v1/model").json()["tta"] == "none"
        answer = client.post("/v1/jobs", files={"image": ("a.nii", os.urandom(2_000_000))})
        assert answer.status_code == 413


@pytest.mark.slow
def test_kill_leaves_files_that_the_next_start_removes_and_sigterm_leaves_none(
    start, bundle, tmp_path
):
    """The second process is stopped amid a job of minutes: it ends within seconds all the same."""
    first = start(bundle)
    paths = write_case(tmp_path, "c", make_channels((120, 110, 100)), make_oblique())
    with first.client() as client:
        assert upload(client, paths).status_code == 202
    first.stop(signal.SIGKILL)
    assert any(path.name.endswith(".nii.gz") for path in first.scratch.rglob("*"))
    (old,) = first.left()
    second = start(bundle, "--tta", "flips")
    assert old not in second.left()
    assert len(second.left()) == 1
    with second.client() as client:
        job = upload(client, paths).json()
        while client.get(job["links"]["job"]).json()["state"] != "running":
            time.sleep(0.05)
        time.sleep(1)
        assert client.get("/health", timeout=5).status_code == 200
        assert client.get(job["links"]["job"]).json()["state"] == "running"
    status, seconds, err = second.stop(signal.SIGTERM)
    assert (status, "Traceback" in err) == (143, False)
    assert seconds < 15
    assert second.left() == []


class TestParts:
    def test_taken_port_is_refused(self):
        with (
            listen("127.0.0.1", 0) as first,
            pytest.raises(ConfigError, match=r"cannot be opened.*--port"),
        ):
            listen("127.0.0.1", first.getsockname()[1])

    @pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
    def test_addresses(self):
        with listen("127.0.0.1", 0) as listener:
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address_of(listener))

    @pytest.mark.parametrize(
        ("host", "expected"),
        [("::1", True), ("127.3.2.1", True), ("192.168.0.1", False), ("::", False)],
    )
    def test_loopback(self, host, expected):
        assert is_loopback(host) is expected

    def test_token_file(self, tmp_path):
        path = tmp_path / "token"
        path.write_text(" 0123456789abcdef \n")
        assert read_token(path) == "0123456789abcdef"
        for bad in ("", "short", "0123456789\nabcdef", "\xe9" * 20):
            path.write_text(bad, encoding="utf-8")
            with pytest.raises(ConfigError, match="expected one line of at least 16"):
                read_token(path)
        with pytest.raises(ConfigError, match="cannot be read"):
            read_token(tmp_path / "none")

    def test_work_folder_goes_and_leaves_those_of_the_living(self, tmp_path, monkeypatch):
        monkeypatch.setattr(server.tempfile, "gettempdir", lambda: str(tmp_path))
        dead, foreign = tmp_path / "medseg-serve-dead", tmp_path / "medseg-serve-foreign"
        for folder in (dead, foreign):
            folder.mkdir()
        (dead / "lock").touch()
        (foreign / "precious").touch()
        (tmp_path / "medseg-serve-link").symlink_to(foreign)
        with work_folder() as first:
            assert first.stat().st_mode & 0o777 == 0o700
            with work_folder() as second:
                assert first.exists()
                assert second.exists()
                assert not dead.exists()
            assert not second.exists()
        assert not first.exists()
        assert (foreign / "precious").exists()


class TestCommand:
    @pytest.fixture
    def refuse(self, bundle, capsys):
        def call(*options):
            assert run(["serve", str(bundle), *options]) == 2
            return capsys.readouterr().err

        return call

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--max-upload", "lots"], "max-upload is 'lots'; expected a size such as 4GB"),
            (["--max-upload", "30GB"], "max-disk is 20 GB, less than the 30 GB"),
            (["--keep", "soon"], "keep is 'soon'; expected a time"),
            (["--tta", "maybe"], "tta is 'maybe'"),
            (["--token-file", "/nowhere/token"], "the token cannot be read"),
            (["--host", "256.1.2.3"], "cannot be opened"),
        ],
    )
    def test_wrong_options_are_refused_before_anything_starts(self, options, words, refuse):
        assert words in refuse(*options)

    def test_missing_packages_are_named(self, refuse, monkeypatch):
        find = server.importlib.util.find_spec
        monkeypatch.setattr(
            server.importlib.util,
            "find_spec",
            lambda name: None if name == "uvicorn" else find(name),
        )
        message = refuse()
        assert "needs uvicorn" in message
        assert "pip install 'medseg[serve]'" in message

    def test_warning_beyond_this_machine(self):
        from medseg.cli.serve import _warning

        assert "there is no authentication" in _warning("0.0.0.0", has_token=False)
        assert "nothing is encrypted" in _warning("0.0.0.0", has_token=True)
