"""All files of a bundle of any kind, those of the bundles it is made of too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from medseg.bundles.files import MANIFEST, MEMBERS
from medseg.errors import BundleError, ConfigError
from medseg.schema.base import read_json


def listed_in(values: Any, where: str) -> dict[str, str]:
    """Return file -> sha256 as a manifest lists them.

    Args:
        values: The content of a `bundle.json`.
        where: What a message calls it.

    Raises:
        BundleError: If it has no such list.
    """
    listed = values.get("sha256") if isinstance(values, Mapping) else None
    if isinstance(listed, dict) and all(isinstance(text, str) for text in listed.values()):
        return listed
    raise BundleError(
        f"{where}: has no sha256 of the bundle's files; expected file -> checksum. Copy or "
        "download the bundle again."
    )


def listed_files(folder: Path) -> dict[str, str]:
    """Return file -> sha256 of a bundle's own files, and of its members' manifests.

    Raises:
        BundleError: If the manifest is missing or has no such list.
    """
    try:
        return listed_in(read_json(folder / MANIFEST), str(folder / MANIFEST))
    except ConfigError as error:
        raise BundleError(f"{error}") from None


def member_names(listed: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the bundles that a bundle is made of.

    Examples:
        >>> member_names({"plans.json": "ab", "members/previous/bundle.json": "cd"})
        ('previous',)
    """
    paths = [PurePosixPath(name).parts for name in listed]
    return tuple(
        sorted(parts[1] for parts in paths if (*parts[:1], *parts[2:]) == (MEMBERS, MANIFEST))
    )


def all_files(folder: Path, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield path below the folder, and sha256, of every file; an empty one for the first manifest.

    Raises:
        BundleError: If a manifest is missing or has no list.
    """
    if not prefix:
        yield MANIFEST, ""
    listed = listed_files(folder)
    for name, sha256 in sorted(listed.items()):
        yield f"{prefix}{name}", sha256
    for member in member_names(listed):
        yield from all_files(folder / MEMBERS / member, f"{prefix}{MEMBERS}/{member}/")
