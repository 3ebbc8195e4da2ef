"""Open one file of a case: what it is, and what is wrong with it alone."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from medseg.check.findings import Findings
from medseg.errors import DatasetError, GeometryError
from medseg.geometry import Grid
from medseg.io.companions import companions
from medseg.io.image import Stored
from medseg.io.read import read_stored
from medseg.schema.check import FileFacts

_HASHED_AT_ONCE = 2**20
_TROUBLESOME = re.compile(r"[\s'\"`$&;|<>*?\\!#]")


@dataclass(slots=True, kw_only=True, eq=False)
class Opened:
    """One file that is there."""

    facts: FileFacts
    stored: Stored | None = None
    """None where the file cannot be read."""
    grid: Grid | None = None
    """None where the header places no image."""

    @property
    def has_no_spacing(self) -> bool:
        """Return whether nothing tells how large a voxel is, so that 1 mm was assumed."""
        return self.stored is not None and not self.stored.header.has_spacing


def open_file(root: Path, name: str, role: str, found: Findings) -> Opened | None:
    """Read a file whole, once from the disk.

    Args:
        root: The dataset's folder.
        name: The file, relative to it or absolute.
        role: What it is: "segmentation", or such as "channel 1, FLAIR".
        found: Takes the problems.

    Returns:
        None where there is no such file.
    """
    path = root / name
    try:
        if path.is_dir():
            found.error(
                "not-a-file",
                f"{name}: is a folder; expected an image file ({role}). If the image lies in it, "
                "move it out and remove the folder.",
                file=name,
            )
            return None
        stamps = signature(path)
        digest = content_hash(path)
    except FileNotFoundError:
        found.error(
            "missing-file",
            f"{name} is missing ({role}). Add the file, or remove the case from the dataset.",
            file=name,
        )
        return None
    except OSError as error:
        found.error(
            "unreadable",
            f"{name}: cannot be read ({error.strerror or error}). Check the file and its access "
            "rights.",
            file=name,
        )
        return None
    facts = FileFacts(path=name, stamps=stamps, sha256=digest)
    return _read(path, facts, found)


def signature(path: Path) -> tuple[tuple[int, int, int], ...]:
    """Return size and times of an image file and its companions, see `FileFacts.stamps`.

    Raises:
        OSError: If the file cannot be looked at.
    """
    found = [file.stat() for file in (path, *companions(path))]
    return tuple((each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found)


def content_hash(path: Path) -> str:
    """Return the SHA-256 of the bytes of an image file and its companions, one after another.

    Raises:
        OSError: If one cannot be read.
    """
    digest = hashlib.sha256()
    for each in (path, *companions(path)):
        with each.open("rb") as file:
            while block := file.read(_HASHED_AT_ONCE):
                digest.update(block)
    return digest.hexdigest()


def _read(path: Path, facts: FileFacts, found: Findings) -> Opened:
    try:
        stored = read_stored(path)
    except (DatasetError, OSError) as error:
        message = str(error).replace(str(path), facts.path)
        found.error("unreadable", message, file=facts.path)
        return Opened(facts=facts)
    dtype = stored.array.dtype
    update = {"dtype": dtype.str, "slope": stored.slope, "inter": stored.inter}
    facts = facts.model_copy(update=update)
    try:
        return Opened(facts=facts, stored=stored, grid=stored.header.grid)
    except GeometryError as error:
        found.error(
            "unusable-header",
            f"{facts.path}: {error}. Correct the header of the file.",
            file=facts.path,
        )
        return Opened(facts=facts, stored=stored)


def check_storage(opened: Opened, found: Findings) -> None:
    """Report what is unusual about the way a file is stored, and its name."""
    name = opened.facts.path
    is_volume = opened.stored is not None and opened.stored.array.ndim == 3
    if opened.facts.dtype.startswith(">"):
        found.warning(
            "big-endian",
            f"{name}: stored big-endian ({opened.facts.dtype}); fine for medseg, some tools "
            "misread it.",
            file=name,
            fix="stores it in this machine's byte order" if is_volume else "",
        )
    check_name(name, found)


def report_no_spacing(name: str, image: str, words: str, found: Findings) -> None:
    """Report a picture of unknown voxel size beside an image whose voxel size is known."""
    found.error(
        "spacing",
        f"{name}: nothing tells its voxel size (1 mm is assumed), while {image} has one: {words}. "
        'Put {"spacing": [...]} in a JSON file of its name beside it.',
        file=name,
        fix=f"writes the voxel size of {image} beside it",
    )


def check_name(name: str, found: Findings) -> None:
    """Report a name that other programs may stumble over."""
    reasons = []
    foreign = sorted({letter for letter in name if not letter.isascii()})
    if foreign:
        reasons.append(f"letters that are not ASCII ({''.join(foreign)})")
    troublesome = sorted(set(_TROUBLESOME.findall(name)))
    if " " in troublesome:
        reasons.append("spaces")
        troublesome.remove(" ")
    if troublesome:
        reasons.append(f"the characters {' '.join(map(repr, troublesome))}")
    if reasons:
        found.warning(
            "name",
            f"{name!r}: its name holds {' and '.join(reasons)}; fine for medseg, other tools and "
            "scripts may fail. Rename it if you share the data.",
            file=name,
        )
