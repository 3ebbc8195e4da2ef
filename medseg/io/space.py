"""Room on the disk: asked for before a large file is written, and named where it runs out."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medseg.errors import DatasetError
from medseg.execute.sizes import size_words

_FULL = (errno.ENOSPC, errno.EDQUOT)


def require_space(path: Path, needed_bytes: int) -> None:
    """Check that a file of some size fits on its disk.

    Args:
        path: The file; its folder need not exist yet.
        needed_bytes: Its size.

    Raises:
        DatasetError: If the disk has less room left, with both numbers.
    """
    folder = path.parent.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DatasetError(
            f"{path}: needs {size_words(needed_bytes)} ({needed_bytes} bytes), and {folder} has "
            f"{size_words(free)} ({free} bytes) left. Free some space, choose another output "
            "folder, or ask for less to be saved."
        )


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn the system's error of a full disk into one that names the file and what to do.

    Raises:
        DatasetError: If the disk, or what the user may have of it, is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DatasetError(
            f"{path}: not written, the disk is full ({error.strerror}); nothing of the file is "
            "left. Free some space or choose another output folder, and run again."
        ) from None
