"""Jobs: one queue, one thread that works it off, results that are kept for a while."""

from __future__ import annotations

import errno
import logging
import math
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from medseg.errors import MedsegError
from medseg.infer.result import Result
from medseg.serve.limits import DiskBudget, Limits, Refusal

logger = logging.getLogger(__name__)

State = Literal["queued", "running", "done", "failed", "cancelled"]
SEGMENTATION = "segmentation.nii.gz"
_LONGEST_WAIT = 10.0
"""Seconds between looks for jobs whose time is up."""
_FIRST_GUESS = 5.0
"""Seconds a job is thought to take before one has run."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Outcome:
    """What a prediction found, without its voxels."""

    labels: dict[str, int | tuple[int, ...]]
    volumes_ml: dict[str, float]
    flags: tuple[str, ...]
    shape: tuple[int, ...]
    affine: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Job:
    """One case on its way; a change makes a new value."""

    id: str
    folder: Path
    images: tuple[Path, ...]
    """File or DICOM folder of each channel."""
    state: State = "queued"
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    started: datetime | None = None
    finished: datetime | None = None
    message: str = ""
    """Why it failed."""
    outcome: Outcome | None = None

    @property
    def has_ended(self) -> bool:
        """Return whether nothing more happens to it."""
        return self.state in ("done", "failed", "cancelled")

    @property
    def segmentation(self) -> Path:
        """Return where the segmentation is, once done."""
        return self.folder / SEGMENTATION


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A place in the queue, held while its files are uploaded."""

    id: str
    folder: Path


class JobQueue:
    """Jobs in the order they came, each worked off by one thread; safe to call from any thread."""

    def __init__(
        self,
        predict: Callable[[Any], Result],
        folder: Path,
        *,
        channels: Sequence[str],
        limits: Limits,
    ) -> None:
        """Start the threads.

        Args:
            predict: Segments a case: a path, or a list of one path per channel.
            folder: Folder of its own, for all files.
            channels: Names of the channels, for messages.
            limits: How many jobs, for how long.
        """
        self.limits = limits
        self.disk = DiskBudget(limits.max_disk_bytes)
        self._predict, self._folder, self._channels = predict, folder, tuple(channels)
        self._jobs: dict[str, Job] = {}
        self._slots: set[str] = set()
        self._seconds = _FIRST_GUESS
        self._is_closed = False
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="medseg-serve-work", daemon=True)
        self._tidier = threading.Thread(target=self._tidy, name="medseg-serve-tidy", daemon=True)
        self._worker.start()
        self._tidier.start()

    @property
    def is_alive(self) -> bool:
        """Return whether jobs are being worked off."""
        return self._worker.is_alive() and not self._is_closed

    def reserve(self) -> Slot:
        """Hold a place in the queue before anything is uploaded.

        Raises:
            Refusal: If all places are taken.
        """
        with self._changed:
            waiting = len(self._slots) + len(self._waiting())
            if waiting >= self.limits.max_waiting:
                raise Refusal(
                    429,
                    f"{waiting} jobs are waiting, which is all that is accepted. Try again later.",
                    max(1, math.ceil(self._seconds)),
                )
            name = secrets.token_urlsafe(24)
            self._slots.add(name)
        slot = Slot(id=name, folder=self._folder / name)
        try:
            slot.folder.mkdir(mode=0o700)
        except OSError:
            self.release(slot)
            raise Refusal(507, "the server cannot store anything. Try again later.", 60) from None
        return slot

    def release(self, slot: Slot) -> None:
        """Give back a place whose upload came to nothing, and delete its files."""
        _remove(slot.folder)
        self.disk.settle(slot.id, 0)
        with self._changed:
            self._slots.discard(slot.id)

    def submit(self, slot: Slot, images: Sequence[Path]) -> Job:
        """Queue the case whose files are uploaded."""
        job = Job(id=slot.id, folder=slot.folder, images=tuple(images))
        with self._changed:
            self._slots.discard(slot.id)
            self._jobs[job.id] = job
            self._changed.notify_all()
        return job

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            Refusal: If there is none of this id, or none any more.
        """
        with self._changed:
            job = self._jobs.get(job_id)
        if job is None or self._is_over(job, datetime.now(UTC)):
            raise Refusal(
                404, "there is no such job; jobs are forgotten some time after they have ended."
            )
        return job

    def place(self, job: Job) -> int | None:
        """Return the place of a waiting job, 1 for the next."""
        with self._changed:
            waiting = self._waiting()
        return waiting.index(job.id) + 1 if job.id in waiting else None

    def expires(self, job: Job) -> datetime | None:
        """Return when a job that has ended is forgotten."""
        if job.finished is None:
            return None
        return job.finished + timedelta(seconds=self.limits.keep_seconds)

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a job that has not ended; forget one that has. Its files are deleted.

        The network cannot be stopped within a case: what it finds for a cancelled job is dropped.

        Returns:
            The cancelled job; None if it was forgotten.

        Raises:
            Refusal: If there is no such job.
        """
        self.get(job_id)
        with self._changed:
            job = self._jobs.get(job_id)
            if job is None or job.has_ended:
                self._jobs.pop(job_id, None)
                cancelled = None
            else:
                cancelled = replace(job, state="cancelled", finished=datetime.now(UTC))
                self._jobs[job_id] = cancelled
        if job is not None and job.state != "running":
            self._discard(job)
        return cancelled

    def close(self, grace_seconds: float) -> bool:
        """Stop: waiting jobs are dropped, the running one may take some seconds more.

        Returns:
            Whether the thread has ended; if not, it computes on for a job nobody will get.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._worker.join(grace_seconds)
        return not self._worker.is_alive()

    def _waiting(self) -> list[str]:
        return [job.id for job in self._jobs.values() if job.state == "queued"]

    def _work(self) -> None:
        while (job := self._next()) is not None:
            start = time.monotonic()
            try:
                self._run(job)
            except Exception:  # the next job is not to blame
                logger.exception("job %s was not ended properly", job.id[:6])
            self._seconds = 0.7 * self._seconds + 0.3 * (time.monotonic() - start)

    def _next(self) -> Job | None:
        """Wait for a job and mark it as running; None once the queue is closed."""
        with self._changed:
            while not self._is_closed and not self._waiting():
                self._changed.wait()
            if self._is_closed:
                return None
            job = self._jobs[self._waiting()[0]]
            job = replace(job, state="running", started=datetime.now(UTC))
            self._jobs[job.id] = job
            return job

    def _run(self, job: Job) -> None:
        """Predict one case; whatever happens becomes the state of its job."""
        outcome, message = None, ""
        try:
            result = self._predict(job.images[0] if len(job.images) == 1 else list(job.images))
            if self._is_wanted(job):
                result.save(job.segmentation)
                outcome = _outcome(result)
        except MedsegError as error:
            message = self._words(job, error)
        except Exception as error:
            logger.exception("job %s failed", job.id[:6])
            message = _unexpected(error)
        self._end(job, outcome, message)

    def _is_wanted(self, job: Job) -> bool:
        with self._changed:
            return self._jobs.get(job.id) is job and not self._is_closed

    def _end(self, job: Job, outcome: Outcome | None, message: str) -> None:
        """Say what became of a job and delete its images; all of it, if it was cancelled."""
        for image in job.images:
            _remove(image)
        if outcome is not None:  # before anybody can delete it
            self.disk.settle(job.id, _num_bytes(job.segmentation))
        with self._changed:
            is_wanted = self._jobs.get(job.id) is job
            if is_wanted:
                self._jobs[job.id] = replace(
                    job,
                    state="failed" if outcome is None else "done",
                    finished=datetime.now(UTC),
                    message=message,
                    outcome=outcome,
                )
        if not is_wanted or outcome is None:
            self._discard(job)

    def _discard(self, job: Job) -> None:
        _remove(job.folder)
        self.disk.settle(job.id, 0)

    def _is_over(self, job: Job, now: datetime) -> bool:
        end = self.expires(job)
        return end is not None and end <= now

    def _tidy(self) -> None:
        """Forget jobs whose time is up, and the oldest beyond what is kept."""
        pause = min(_LONGEST_WAIT, self.limits.keep_seconds / 4)
        while True:
            with self._changed:
                if self._is_closed:
                    return
                self._changed.wait(pause)
                ended = [job for job in self._jobs.values() if job.has_ended]
                surplus = max(len(ended) - self.limits.max_ended, 0)
                now = datetime.now(UTC)
                over = ended[:surplus] + [j for j in ended[surplus:] if self._is_over(j, now)]
                for job in over:
                    del self._jobs[job.id]
            for job in over:
                self._discard(job)

    def _words(self, job: Job, error: MedsegError) -> str:
        """Return an error's message with channels in place of the server's paths."""
        text = str(error)
        is_one_each = len(job.images) == len(self._channels) > 1
        names = self._channels if is_one_each else ("image",)
        for name, image in zip(names, job.images, strict=False):
            words = f"channel {name!r}" if is_one_each else "the image"
            text = text.replace(str(image), words).replace(image.name, words)
        return text.replace(f"{job.folder}/", "").replace(str(self._folder), "...")


def _outcome(result: Result) -> Outcome:
    return Outcome(
        labels=dict(result.labels),
        volumes_ml={name: float(volume) for name, volume in result.volumes_ml.items()},
        flags=tuple(result.flags),
        shape=tuple(result.segmentation.shape),
        affine=tuple(tuple(float(value) for value in row) for row in result.affine),
    )


def _unexpected(error: Exception) -> str:
    """Return words for an error that is not the client's; its own may hold anything."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the server's disk is full. Try again later."
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return "the server has too little memory for this image. Cut it to the region of interest."
    return f"the server could not segment this image ({type(error).__name__}); its log says more."


def _num_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
