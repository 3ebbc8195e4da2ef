"""A server in this process whose model waits for leave, and archives of every kind."""

from __future__ import annotations

import threading
import time
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from starlette.testclient import TestClient

from medseg.errors import DatasetError
from medseg.serve.app import Served, create_app
from medseg.serve.jobs import JobQueue
from medseg.serve.limits import Limits

CHANNELS = ("T1w", "CT")
LABELS = {"background": 0, "organ": 1, "all": (1, 2)}
ENDED = ("done", "failed", "cancelled")


@dataclass
class FakeResult:
    """Looks like a prediction; its voxels tell which files it was made from."""

    segmentation: np.ndarray
    affine: np.ndarray
    flags: tuple[str, ...] = ("nothing to see",)

    labels = LABELS
    volumes_ml = {"organ": 1.5}  # noqa: RUF012

    def save(self, path):
        nib.save(nib.Nifti1Image(self.segmentation, self.affine), path)


class FakeModel:
    """Answers with the first byte of each file; waits while it is told to."""

    def __init__(self):
        self.leave = threading.Event()
        self.leave.set()
        self.cases: list[list[Path]] = []

    def __call__(self, case):
        paths = case if isinstance(case, list) else [case]
        self.cases.append(paths)
        if not self.leave.wait(20):
            raise TimeoutError
        first = [next(iter(sorted(p.iterdir()))) if p.is_dir() else p for p in paths]
        marks = [_first_byte(path) for path in first]
        if 0 in marks:
            raise DatasetError(f"{paths[-1]}: begins with a zero. Copy it again; see {paths[0]}.")
        if 255 in marks:
            raise RuntimeError(f"a secret in {paths[0]}")
        segmentation = np.array(marks, np.uint8).reshape(len(marks), 1, 1)
        return FakeResult(segmentation, np.diag([0.7, 1.1, 3.0, 1.0]))


def _first_byte(path):
    with path.open("rb") as file:
        return file.read(1)[0]


class Serving:
    """A server, its client, and what lies on its disk."""

    def __init__(self, folder, limits, token=None):
        self.folder, self.model = folder, FakeModel()
        self.queue = JobQueue(self.model, folder, channels=CHANNELS, limits=limits)
        served = Served(
            name="Dataset999_Tiny",
            configuration="tiny",
            folds=("fold_0",),
            channels=CHANNELS,
            labels=LABELS,
            token=token,
        )
        self.app = create_app(self.queue, served, version="9.9")
        self.client = TestClient(self.app, base_url="http://127.0.0.1", follow_redirects=False)

    def post(self, *files, **more):
        """Upload (field, file name, content) triples."""
        form = [(field, (name, content)) for field, name, content in files]
        return self.client.post("/v1/jobs", files=form, **more)

    def post_case(self, marks=b"\x05\x06", **more):
        """Upload one file per channel, each a single byte."""
        files = [(name, f"{name}.nii.gz", marks[n : n + 1] * 3) for n, name in enumerate(CHANNELS)]
        return self.post(*files, **more)

    def job(self, job_id):
        return self.client.get(f"/v1/jobs/{job_id}").json()

    def wait_for(self, job_id, *states):
        """Return the job once it is in one of some states; by default once it has ended."""
        for _ in range(1000):
            job = self.job(job_id)
            if job["state"] in (states or ENDED):
                return job
            time.sleep(0.01)
        raise AssertionError(f"still {job}")

    def until(self, condition):
        for _ in range(1000):
            if condition():
                return
            time.sleep(0.01)
        raise AssertionError("it did not become true")

    def files(self):
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def serving(tmp_path):
    """A function that starts a server in `tmp_path / "server"` with some limits changed."""
    started = []

    @contextmanager
    def _closing():
        try:
            yield
        finally:
            for one in started:
                one.model.leave.set()
                assert one.queue.close(10)

    def start(token=None, **limits):
        folder = tmp_path / f"server{len(started)}"
        folder.mkdir()
        few = {"max_upload_bytes": 4_000_000, "max_disk_bytes": 40_000_000}
        started.append(Serving(folder, Limits(**{**few, **limits}), token))
        return started[-1]

    with _closing():
        yield start


@pytest.fixture
def zipped(tmp_path):
    """A function that packs names (or `ZipInfo`) with their contents."""

    def pack(entries, *, method=zipfile.ZIP_DEFLATED, name="case.zip"):
        path = tmp_path / name
        with zipfile.ZipFile(path, "w", method) as archive:
            for entry, content in entries:
                archive.writestr(entry, content, compress_type=method)
        return path

    return pack


@pytest.fixture(scope="session")
def changed():
    """`dataclasses.replace`, for limits."""
    return replace
