"""The files of a bundle: their checksums, and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TypeVar

from medseg.errors import BundleError, ConfigError
from medseg.schema.base import Schema, read, read_json

MANIFEST = "bundle.json"
MEMBERS = "members"
"""Folder of the bundles that a bundle is made of."""
S = TypeVar("S", bound=Schema)


def member_manifest(name: str) -> str:
    """Return the relative path of a member's `bundle.json`.

    Examples:
        >>> member_manifest("organs")
        'members/organs/bundle.json'
    """
    return f"{MEMBERS}/{name}/{MANIFEST}"


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes its place once the block has ended well.

    A bundle that is there already is replaced whole.

    Raises:
        BundleError: If `folder` holds something that is not a bundle.
    """
    _check_place(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        part.chmod(0o755)
        yield part
        _replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_place(folder: Path) -> None:
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_free and not (folder / MANIFEST).is_file():
        raise BundleError(
            f"{folder}: will not be replaced by a bundle, because it is none "
            f"({described(folder)}). Choose another place."
        )


def _replace(part: Path, folder: Path) -> None:
    """Rename a finished folder into place; what was there comes back if that fails."""
    if not folder.exists():
        part.rename(folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".old"))
    try:
        folder.rename(old / folder.name)
        try:
            part.rename(folder)
        except BaseException:
            (old / folder.name).rename(folder)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def described(path: Path) -> str:
    """Return in words what lies at a place."""
    if not path.exists():
        return "no such file or folder"
    if path.is_file():
        return f"a file of {path.stat().st_size} bytes"
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return "an empty folder"
    return f"a folder with {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"


def copy_bundle(folder: Path, target: Path) -> None:
    """Copy a verified bundle's own files and those of its members, and nothing beside them."""
    for name in (MANIFEST, *read_json(folder / MANIFEST)["sha256"]):
        if name != MANIFEST and PurePosixPath(name).name == MANIFEST:
            place = PurePosixPath(name).parent
            copy_bundle(folder / place, target / place)
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _link(folder / name, target / name)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name where the disk can, else copy it; bundles are never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def checksums(folder: Path) -> dict[str, str]:
    """Return the checksum of every file; of a member that of its manifest, which has the others."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        name.as_posix(): file_checksum(path)
        for name, path in sorted(files.items())
        if name.parts[0] != MEMBERS or (len(name.parts) == 3 and name.name == MANIFEST)
    }


def file_checksum(path: Path, algorithm: str = "sha256") -> str:
    """Return the checksum of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def verify(folder: Path, sha256: Mapping[str, str], needed: Iterable[str]) -> None:
    """Check every listed file of a bundle, and that none is left out of the list.

    Args:
        folder: The bundle.
        sha256: File (relative path) -> checksum, as its manifest has them.
        needed: Files such a bundle always has.

    Raises:
        BundleError: With every damaged file.
    """
    problems = [
        f"  {name}: {problem}"
        for name, expected in sorted(sha256.items())
        if (problem := _file_problem(folder, name, expected)) is not None
    ]
    problems += [f"  {name}: not listed" for name in needed if name not in sha256]
    if problems:
        count = f"{len(problems)} damaged file{'s' if len(problems) > 1 else ''}"
        hint = "Copy or download the bundle again."
        raise BundleError("\n".join([f"{folder}: {count}", *problems, hint]))


def _file_problem(folder: Path, name: str, expected: str) -> str | None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return "lies outside the bundle"
    path = folder / relative
    if not path.is_file():
        return "missing"
    found = file_checksum(path)
    if found != expected:
        return f"sha256 is {found[:12]}..., expected {expected[:12]}..."
    return None


def read_part(schema: type[S], path: Path) -> S:
    """Read a file of a bundle.

    Raises:
        BundleError: If it is missing or does not fit the schema.
    """
    try:
        return read(schema, path)
    except ConfigError as error:
        raise BundleError(f"{error}") from None


def read_listed(schema: type[S], path: Path, sha256: Mapping[str, str]) -> S | None:
    """Read a file that not every bundle has; one that is not listed is not the bundle's."""
    return read_part(schema, path) if path.name in sha256 else None


def kind_of(folder: Path) -> str:
    """Return the kind of the bundle at a place, as it says itself.

    Raises:
        BundleError: If there is none, or its manifest is not a JSON object.
    """
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder}: not a bundle ({described(folder)}); expected {MANIFEST}.")
    try:
        values = read_json(folder / MANIFEST)
    except ConfigError as error:
        raise BundleError(f"{error}") from None
    return str(values.get("kind", "single")) if isinstance(values, dict) else "single"
