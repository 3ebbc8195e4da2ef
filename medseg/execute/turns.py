"""Turns between processes of one machine that change the same files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process at a time into a `with` block; the others wait.

    A process that dies lets the next one in. Where the file system knows no such locks, nobody
    waits.

    Args:
        path: A file that is there and stays; it is not changed.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield
        return
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked: %s", path, error)
        yield
