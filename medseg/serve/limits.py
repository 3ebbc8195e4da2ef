"""What a server takes on at most, and how it says no."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

from medseg.errors import ConfigError, MedsegError
from medseg.execute.sizes import size_words

_UNPACKED_PER_UPLOAD = 4


class Refusal(MedsegError):
    """A request is not served; the message is for the client and holds nothing of the server."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        """Tell the HTTP status, the words, and after how many seconds another try makes sense."""
        super().__init__(status, message, retry_after)
        self.status, self.message, self.retry_after = status, message, retry_after

    def __str__(self) -> str:
        """Return the words."""
        return self.message


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server takes on at most."""

    max_upload_bytes: int = 2 * 10**9
    """Bytes of one request."""
    max_waiting: int = 16
    """Jobs that wait or are being uploaded; the running one does not count."""
    max_disk_bytes: int = 20 * 10**9
    """Bytes of all uploads and results together."""
    keep_seconds: float = 3600.0
    """How long a job that ended is known, and its result can be had."""
    max_entries: int = 20_000
    """Files in one zip archive."""
    max_ratio: float = 100.0
    """How much larger than a zip archive its content may be."""
    idle_seconds: float = 60.0
    """How long an upload may stand still."""
    upload_seconds: float = 3600.0
    """How long an upload may take."""
    max_ended: int = 1000
    """Jobs that ended and are still known; the oldest is forgotten for the next."""

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could be served."""
        problems = [
            f"{name} is {value:g}; expected more than 0."
            for name, value in (
                ("max-upload", self.max_upload_bytes),
                ("max-waiting", self.max_waiting),
                ("keep", self.keep_seconds),
            )
            if not 0 < value < math.inf
        ]
        if self.max_disk_bytes < self.max_upload_bytes:
            problems.append(
                f"max-disk is {size_words(self.max_disk_bytes)}, less than the "
                f"{size_words(self.max_upload_bytes)} of one upload (max-upload). Raise it."
            )
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def max_unpacked_bytes(self) -> int:
        """Bytes of the files in one zip archive, and of the voxels of one image as float32."""
        return _UNPACKED_PER_UPLOAD * self.max_upload_bytes


class DiskBudget:
    """How many bytes each job has on the disk, and that all together stay below a limit."""

    def __init__(self, limit: int) -> None:
        """Begin with an empty disk."""
        self._limit = limit
        self._taken: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """Return the bytes of all jobs."""
        with self._lock:
            return sum(self._taken.values())

    def take(self, owner: str, num_bytes: int) -> None:
        """Add bytes to those of a job.

        Raises:
            Refusal: If they do not fit.
        """
        with self._lock:
            if sum(self._taken.values()) + num_bytes > self._limit:
                raise Refusal(
                    507,
                    f"the server's space for uploads and results ({size_words(self._limit)}) is "
                    "used up. Delete jobs that are no longer needed, or try again later.",
                    60,
                )
            self._taken[owner] = self._taken.get(owner, 0) + num_bytes

    def settle(self, owner: str, num_bytes: int) -> None:
        """Say what a job has on the disk now, whether or not it fits; 0: nothing any more."""
        with self._lock:
            self._taken[owner] = num_bytes
            if not num_bytes:
                del self._taken[owner]
