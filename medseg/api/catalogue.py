"""Public models by name: find them, download them, import them."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.api.download import Paths, checksum_problem, download
from medseg.bundles.files import MANIFEST, file_checksum
from medseg.data.workspace import DEFAULT_WORKSPACE, DOWNLOADS, FETCHED
from medseg.errors import BundleError, ConfigError, near_names
from medseg.schema.base import read
from medseg.schema.catalogue import Catalogue, CatalogueEntry

CATALOGUE = Path(__file__).with_name("catalogue.json")
"""The catalogue that comes with medseg."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A model that was fetched."""

    entry: CatalogueEntry
    """What the catalogue says of it."""
    archive: Path
    """The archive it was imported from."""
    sha256: str
    """Checksum of the archive, as it was found."""
    bundle: Path
    """The bundle that was made of it."""


def read_catalogue(path: Path = CATALOGUE) -> Catalogue:
    """Read a catalogue.

    Raises:
        ConfigError: With every problem of the file.
    """
    return read(Catalogue, path)


def matching(word: str, catalogue: Catalogue) -> tuple[CatalogueEntry, ...]:
    """Return the models whose name, task, images, labels or format hold a word.

    Args:
        word: Upper or lower case, spaces or underscores; the empty word is everywhere.
        catalogue: Where to look.
    """
    return tuple(one for one in catalogue.models if _folded(word) in _text(one))


def find_model(name: str, catalogue: Catalogue) -> CatalogueEntry:
    """Return one entry of a catalogue.

    Raises:
        ConfigError: If there is none of this name.
    """
    entries = {one.name: one for one in catalogue.models}
    if name in entries:
        return entries[name]
    alike = [one.name for one in matching(name, catalogue)]
    shown = alike if 0 < len(alike) <= _MAX_ALIKE else []
    hint = f" It is found in: {', '.join(shown)}." if shown else near_names(name, list(entries))
    raise ConfigError(
        f"no model {name!r} in the catalogue of {len(entries)}; 'models list' shows them.{hint}"
    )


def fetch(  # noqa: PLR0913 - what, where to and from, and what to do with it, by keyword
    name: str,
    output: str | Path | None = None,
    *,
    mirror: str | Path | None = None,
    configuration: str | None = None,
    workspace: str | Path = DEFAULT_WORKSPACE,
    progress: bool = False,
    catalogue: Catalogue | None = None,
    importer: Callable[..., Any] | None = None,
) -> Fetched:
    """Download a public model, verify it and import it; interrupted, the same call goes on.

    Args:
        name: Name in the catalogue.
        output: Folder for the bundle: new, empty, or an earlier bundle, which is replaced; None:
            the workspace's, where `medseg.load` finds it by its name.
        mirror: Folder that holds the archive under the last name of its address; nothing is
            downloaded then.
        configuration: Which model of the archive; None where it holds one.
        workspace: Folder that holds what medseg makes; the archive goes to its `downloads`.
        progress: Show a progress bar on standard error.
        catalogue: Where the name stands; None: the catalogue that comes with medseg.
        importer: What makes a bundle of an archive; None: that of nnU-Net's models.

    Raises:
        ConfigError: If the name or the configuration is unknown.
        BundleError: If the archive cannot be had, is not what was published, cannot be imported,
            or `output` holds something else.
        DatasetError: If the disk is too small.
    """
    entry = find_model(name, read_catalogue() if catalogue is None else catalogue)
    _check_configuration(entry, configuration)
    output = Path(workspace) / FETCHED / name if output is None else Path(output)
    _require_place(output)
    if mirror is None:
        archive = Path(workspace) / DOWNLOADS / entry.file_name
        record = download(
            entry.address,
            archive,
            checksum=entry.checksum,
            size_bytes=entry.size_bytes,
            progress=progress,
        )
        _require_archive(archive, entry)
        sha256 = record.sha256
    else:
        archive = _mirrored(entry, Path(mirror))
        sha256 = file_checksum(archive)
    own = _import_totalsegmentator if entry.format == "totalsegmentator" else _import_nnunet
    (importer or own)(archive, output, configuration=configuration)
    return Fetched(entry=entry, archive=archive, sha256=sha256, bundle=output)


_MAX_ALIKE = 6


def _folded(text: str) -> str:
    return text.casefold().replace("_", " ")


def _text(entry: CatalogueEntry) -> str:
    words = (entry.name, entry.task, entry.format, *entry.modality, *entry.labels)
    return _folded("\n".join(words))


def _check_configuration(entry: CatalogueEntry, configuration: str | None) -> None:
    known = list(entry.configurations)
    if configuration is not None and known and configuration not in known:
        raise ConfigError(
            f"{entry.name}: has no configuration {configuration!r}; expected one of: "
            f"{', '.join(known)}.{near_names(configuration, known)}"
        )


def _require_place(output: Path) -> None:
    """Refuse a place that no bundle can be written to, before anything is downloaded."""
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not is_free and not (output / MANIFEST).is_file():
        raise BundleError(
            f"{output}: is there already, and no bundle; nothing was downloaded. Choose another "
            "folder."
        )


def _require_archive(archive: Path, entry: CatalogueEntry) -> None:
    """Forget a download that is no archive, such as a page that says the server is down."""
    if zipfile.is_zipfile(archive):
        return
    size = archive.stat().st_size
    archive.unlink()
    Paths(file=archive).record.unlink(missing_ok=True)
    raise BundleError(
        f"{entry.address}: the server sent {size} bytes that are no whole zip archive; they were "
        "not kept. Open the address in a browser to see what it says."
    )


def _mirrored(entry: CatalogueEntry, mirror: Path) -> Path:
    """Return the archive in a folder, once it is known to be what was published."""
    archive = mirror / entry.file_name
    if not archive.is_file():
        found = sorted(path.name for path in mirror.glob("*")) if mirror.is_dir() else []
        there = f"it holds {len(found)} other files" if found else "nothing is there"
        raise BundleError(
            f"{archive}: no such file; {there}. Expected the file of {entry.address}."
            f"{near_names(entry.file_name, found)}"
        )
    if entry.size_bytes is not None and archive.stat().st_size != entry.size_bytes:
        raise BundleError(
            f"{archive}: has {archive.stat().st_size} bytes, expected {entry.size_bytes}. Copy it "
            "again."
        )
    if (problem := checksum_problem(archive, entry.checksum)) is not None:
        raise BundleError(f"{archive}: is not the published file: {problem}. Copy it again.")
    return archive


def _import_nnunet(archive: Path, output: Path, *, configuration: str | None) -> None:
    from medseg.api.importing import import_nnunet

    import_nnunet(archive, output, configuration=configuration)


def _import_totalsegmentator(archive: Path, output: Path, *, configuration: str | None) -> None:
    """Import the task an archive holds; a part of a larger one becomes a plain bundle."""
    from medseg.api.importing import import_totalsegmentator
    from medseg.interop.totalsegmentator import Task, read_tasks
    from medseg.io.archive import Archive

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".import-") as scratch:
        with Archive(archive) as opened:
            opened.extract(opened.names(), Path(scratch))
        tasks = [task.name for task in read_tasks(Path(scratch)) if isinstance(task, Task)]
        if len(tasks) == 1:
            import_totalsegmentator(scratch, output, task=tasks[0])
            return
    _import_nnunet(archive, output, configuration=configuration)
