"""Which files there are: one look into each folder, none at each file."""

from __future__ import annotations

import os
from pathlib import Path


class Listing:
    """The files of a folder and of those below it, remembered from the first look.

    Names are relative to the folder, with "/" between their parts, or absolute.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._folders: dict[str, frozenset[str] | None] = {}

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder, sorted; hidden files are left out.

        Raises:
            FileNotFoundError: If there is no such folder.
        """
        found = self._look(folder)
        if found is None:
            raise FileNotFoundError(self.root / folder)
        return sorted(name for name in found if not name.startswith("."))

    def has_folder(self, folder: str) -> bool:
        """Return whether there is such a folder."""
        return self._look(folder) is not None

    def has_file(self, name: str) -> bool:
        """Return whether there is such a file; a folder of that name is none.

        A name that was not listed is asked for once more, since some file systems know one file
        under several spellings (upper and lower case, composed letters).
        """
        folder, _, last = name.rpartition("/")
        found = self._look(folder)
        return (found is not None and last in found) or (self.root / name).is_file()

    def _look(self, folder: str) -> frozenset[str] | None:
        if folder not in self._folders:
            try:
                with os.scandir(self.root / folder) as entries:
                    self._folders[folder] = frozenset(e.name for e in entries if e.is_file())
            except (FileNotFoundError, NotADirectoryError):
                self._folders[folder] = None
        return self._folders[folder]
