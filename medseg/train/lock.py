"""One process trains a fold: its lock, a file that names the process and shows that it lives."""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal

from medseg.errors import ConfigError
from medseg.schema.base import FORMAT_VERSION, Schema, format_json, read

logger = logging.getLogger(__name__)

LOCK = "lock"
"""Name of the file in the folder of a fold."""
_BEAT_SECONDS = 30.0
"""How often a process that holds a lock touches it."""
_SILENT_BEATS = 10
"""Beats missed in a row after which a process that cannot be asked is taken for gone."""
_SILENT_BEATS_REBOOTED = 3
"""The same where this machine has been started anew since."""
_LOOK_SECONDS = 0.5


class Holder(Schema):
    """Who holds a lock: the content of the file."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    token: str
    """Drawn anew for each lock."""
    pid: int
    """Process id."""
    host: str
    """Name of the machine."""
    boot: str | None = None
    """Id of the machine's present start, and of the process ids' name space; None: not known."""
    started: str | None = None
    """When the process started, in the system's own ticks; None: not known."""
    taken: str
    """When the lock was taken, UTC."""
    command: str
    """What the process runs."""

    @classmethod
    def present(cls) -> Holder:
        """Return a description of this process, with a new token."""
        pid = os.getpid()
        return cls(
            token=secrets.token_hex(8),
            pid=pid,
            host=socket.gethostname(),
            boot=_boot(),
            started=_started(pid),
            taken=datetime.now(UTC).isoformat(sep=" ", timespec="seconds"),
            command=shlex.join(sys.argv)[:500],
        )

    def verdict(self) -> Literal["alive", "gone", "unknown"]:
        """Return what this machine can tell of the process; another's can only be watched.

        A process id means something on one machine, from one start of it to the next, in one
        container. Where these agree the id decides, together with the time at which the process
        began, since ids are used again.
        """
        if self.host != socket.gethostname() or self.boot != _boot() or os.name != "posix":
            return "unknown"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return "gone"
        except PermissionError:  # it is there, and another user's
            pass
        started = _started(self.pid)
        if started is None or self.started is None:
            return "unknown"
        return "alive" if started == self.started else "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A lock of another process, as it was found."""

    path: Path
    token: str
    """The holder's; the number of the file where it cannot be read."""
    holder: Holder | None
    """None: the file is damaged or half written."""
    touched: float
    """When it was last touched, by the clock of the file system."""

    @property
    def silent_beats(self) -> int:
        """Return after how many missed beats the process is taken for gone."""
        rebooted = (
            self.holder is not None
            and self.holder.host == socket.gethostname()
            and None not in (self.holder.boot, _boot())
            and self.holder.boot != _boot()
        )
        return _SILENT_BEATS_REBOOTED if rebooted else _SILENT_BEATS


class FoldLock:
    """Holds a fold for this process, from `with` to its end.

    The lock is a file that appears whole, and only where there is none. Its holder touches it
    every 30 s. One that is found is judged:

    * a process of this machine: by its id and the time it began;
    * of another machine, container or start of the machine, or a file that cannot be read: by
      whether it is touched. It is watched until it is, which means it is held, or until it has
      been silent for 5 minutes, which means it is left over. Times are those of the file system
      alone, so clocks need not agree.

    A lock that is left over is inherited: its heir is whoever first makes a file named after its
    token, so there is one. An heir that dies on the way leaves an inheritance of its own.
    """

    def __init__(self, folder: Path, *, beat_seconds: float = _BEAT_SECONDS) -> None:
        """Name the lock of a fold; nothing is taken yet.

        Args:
            folder: Folder of the fold; made if it is missing.
            beat_seconds: Seconds between two touches of the file.
        """
        self.folder = Path(folder)
        self.path = self.folder / LOCK
        self._beat_seconds = beat_seconds
        self._own: Holder | None = None
        self._made: list[Path] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> FoldLock:
        """Take the lock.

        Raises:
            ConfigError: If another process holds it.
        """
        if self._own is not None:
            raise ValueError(f"{self.path}: this object holds the lock already")
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        own = Holder.present()
        draft = _write_draft(self.path, own)
        try:
            self._acquire(draft, own)
        finally:
            draft.unlink(missing_ok=True)
        self._own = own
        self._tidy()
        self._over.clear()
        self._thread = threading.Thread(target=self._beat, name="fold lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the lock back; one that is not this process's own is left alone."""
        own, self._own = self._own, None
        if own is None or own.pid != os.getpid():
            return  # a forked child has the object, but the lock is its parent's
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        if self._is_own(own):
            self.path.unlink(missing_ok=True)
        with suppress(OSError):  # what was made for the lock alone goes with it
            for path in self._made:
                path.rmdir()

    def clear(self) -> None:
        """Delete everything in the fold's folder but the lock."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self.path:
                path.unlink()

    def require_held(self) -> None:
        """Check that nobody else took the lock meanwhile; to be called before a fold is written.

        Raises:
            ConfigError: If it is gone, because this process slept for long or a person deleted it.
        """
        if self._own is not None and self._is_own(self._own):
            return
        raise ConfigError(
            f"{self.folder}: this process no longer holds the fold; it was silent for long and "
            f"another one took over, or {self.path} was deleted. Nothing more is written here. "
            "Start the same command again once no other process trains this fold."
        )

    def _acquire(self, draft: Path, own: Holder) -> None:
        """Make the lock's file, or inherit one that is left over."""
        watched: tuple[str, float] | None = None
        while not _place(draft, self.path):
            found = self._last_in_line()
            if found is None:
                continue  # given back meanwhile
            verdict = found.holder.verdict() if found.holder else "unknown"
            if verdict == "unknown":
                verdict, watched = self._watch(draft, found, watched), (found.token, found.touched)
            if verdict == "alive":
                raise ConfigError(self._refusal(found))
            if verdict == "gone" and self._inherit(draft, found, own):
                logger.warning("%s: took over the lock of %s", self.folder, _who(found.holder))
                return
            if verdict == "unknown":
                time.sleep(min(_LOOK_SECONDS, self._beat_seconds / 4))

    def _watch(
        self, draft: Path, found: _Found, before: tuple[str, float] | None
    ) -> Literal["alive", "gone", "unknown"]:
        """Judge a lock by whether it is touched."""
        if before is None:
            logger.info(
                "%s: is it still trained by %s? Looking for a sign of life, at most %.0f s",
                self.folder,
                _who(found.holder),
                found.silent_beats * self._beat_seconds,
            )
        elif before[0] == found.token and before[1] != found.touched:
            return "alive"
        os.utime(draft)
        silent = draft.stat().st_mtime - found.touched
        return "gone" if silent > found.silent_beats * self._beat_seconds else "unknown"

    def _heir_of(self, token: str) -> Path:
        return self.folder / f".{LOCK}.{token}.heir"

    def _last_in_line(self) -> _Found | None:
        """Return the lock, or the last of its heirs; None where there is no lock."""
        found = last = _look(self.path)
        while found is not None:
            last, found = found, _look(self._heir_of(found.token))
        return last

    def _inherit(self, draft: Path, found: _Found, own: Holder) -> bool:
        """Become the one heir of a lock that is left over; return whether that succeeded.

        Whoever inherits puts its own lock in the place of the first in line and only then removes
        the heirs' files. So one who reads the line while it is cleared finds, when it looks again,
        that its heir's file does not hang on the lock any more.
        """
        place = self._heir_of(found.token)
        if not _place(draft, place):
            return False
        line = list(self._line())
        if not line or line[-1].token != own.token:
            place.unlink(missing_ok=True)
            return False
        copy = _write_draft(self.path, own)
        os.replace(copy, self.path)
        for heir in line[1:]:
            heir.path.unlink(missing_ok=True)
        return True

    def _line(self) -> Iterator[_Found]:
        found = _look(self.path)
        while found is not None:
            yield found
            found = _look(self._heir_of(found.token))

    def _tidy(self) -> None:
        """Remove what processes that were killed while they waited for the lock left."""
        now = self.path.stat().st_mtime
        for rest in self.folder.glob(f".{LOCK}.*"):
            with suppress(OSError):
                if now - rest.stat().st_mtime > _SILENT_BEATS * self._beat_seconds:
                    rest.unlink()

    def _beat(self) -> None:
        """Touch the file until the lock is given back, or is another's."""
        own = self._own
        while own is not None and not self._over.wait(self._beat_seconds):
            with suppress(OSError):  # a file system that is away for a moment
                if self._is_own(own):
                    os.utime(self.path)

    def _is_own(self, own: Holder) -> bool:
        """Return whether the file is there and no other process's; damage does not change that."""
        found = _look(self.path)
        return found is not None and (found.holder is None or found.token == own.token)

    def _refusal(self, found: _Found) -> str:
        holder = found.holder
        if holder and (holder.pid, holder.host) == (os.getpid(), socket.gethostname()):
            return f"{self.folder}: this process trains the fold already, in another call."
        since = f" since {holder.taken}" if holder else ""
        command = f"\n  it runs: {holder.command}" if holder else ""
        return (
            f"{self.folder} is trained by {_who(holder)}{since}; one process trains a fold "
            "at a time. Wait until it has ended or stop it, or train under another --name. "
            f"Delete {self.path} only if you know that nothing writes there.{command}"
        )


def _who(holder: Holder | None) -> str:
    if holder is None:
        return "a process that cannot be named (its lock is damaged)"
    return f"process {holder.pid} on {holder.host}"


def _write_draft(path: Path, holder: Holder) -> Path:
    """Write a lock's content beside its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(format_json(holder.model_dump()) + "\n")
        file.flush()
        os.fsync(file.fileno())
    with suppress(OSError):
        Path(name).chmod(0o644)
    return Path(name)


def _place(draft: Path, path: Path) -> bool:
    """Give a draft's content another name, whole; return False if the name is taken.

    Where the file system has no hard links, the content is written after the name is taken; a
    reader in between sees a damaged file, which it watches.
    """
    try:
        os.link(draft, path)
        return True
    except FileExistsError:
        return False
    except OSError:
        pass
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as file:
        file.write(draft.read_bytes())
        file.flush()
        os.fsync(file.fileno())
    return True


def _look(path: Path) -> _Found | None:
    """Return the lock in a file, None where there is none."""
    try:
        with path.open("rb") as file:  # opening asks a network file system for its newest state
            status = os.fstat(file.fileno())
        holder = read(Holder, path)
    except FileNotFoundError:
        return None
    except ConfigError:
        holder = None
    if holder is None and not path.exists():
        return None
    token = holder.token if holder else f"damaged-{status.st_ino}"
    return _Found(path=path, token=token, holder=holder, touched=status.st_mtime)


def _boot() -> str | None:
    """Return an id of this start of the machine and of this name space of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return when a process started, in ticks since the machine did; None where unknown.

    One that has ended and only waits for its parent to notice has no start.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return "ended" if fields[0] in "ZX" else fields[19]
