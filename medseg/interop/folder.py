"""Folders that other programs read: they appear whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medseg.errors import ConfigError

OwnFiles = Callable[[Path], set[str] | None]
"""Folder -> names of the files that an earlier export left there; None: there is none."""


def require_replaceable(folder: Path, own_files: OwnFiles) -> None:
    """Refuse a place where an export would destroy something that is not an export.

    Raises:
        ConfigError: If the folder is a file, or holds anything but an earlier export.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; expected a new or empty folder for the export.")
    found = {path.name for path in folder.iterdir()} - {"__pycache__"}
    own = own_files(folder) if found else set()
    foreign = sorted(found if own is None else found - own)
    if foreign:
        shown = ", ".join(foreign[:5]) + (" ..." if len(foreign) > 5 else "")
        what = "is not an earlier export" if own is None else "holds more than an earlier export"
        raise ConfigError(
            f"{folder}: {what} ({shown}); expected a new or empty folder, or an export to "
            "replace. Choose another place."
        )


@contextmanager
def whole_folder(folder: Path, own_files: OwnFiles) -> Iterator[Path]:
    """Yield a new folder that takes its place when the block ends, and is removed if it fails.

    Args:
        folder: Where the export goes; an earlier one there is replaced.
        own_files: How an earlier export is told.

    Raises:
        ConfigError: If something else is there.
    """
    folder = folder.resolve()
    require_replaceable(folder, own_files)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
