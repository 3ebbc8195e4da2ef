"""Pack a bundle into one file for sharing, and unpack it again; both whole or not at all.

```text
FILE.zip
  DATASET__CONFIGURATION/bundle.json     and every file it lists, those of its members too; the
                                         same bundle always gives the same bytes
```
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from medseg.api.models import resolve
from medseg.bundles.files import MANIFEST, MEMBERS, file_checksum, written_whole
from medseg.bundles.members import read_any, write_ensemble
from medseg.bundles.tree import all_files, listed_in, member_names
from medseg.data.workspace import DEFAULT_WORKSPACE
from medseg.errors import BundleError, ConfigError
from medseg.io.archive import Archive
from medseg.io.space import full_disk_named, require_space

_ENDING = ".zip"
_DATE = (1980, 1, 1, 0, 0, 0)
"""The earliest a zip archive can say; the same always, so that the archive is."""
_UNIX = 3
_PLAIN_FILE = 0o100644 << 16
_BLOCK = 2**20
_LONGEST_MANIFEST = 16 * 2**20


def pack(
    model: str | Path, output: str | Path, *, workspace: str | Path = DEFAULT_WORKSPACE
) -> Path:
    """Write a bundle as one zip archive, read it back, and only then give it its name.

    Args:
        model: As `medseg.load` takes it.
        output: The archive; one that is there already is replaced.
        workspace: Folder that holds what is imported on the fly and what was fetched.

    Returns:
        The archive.

    Raises:
        ConfigError: If `output` is no name of a zip archive.
        BundleError: If there is no bundle, it is damaged, or what was written cannot be read back.
        DatasetError: If the disk is too small.
    """
    output = Path(output)
    if output.suffix.lower() != _ENDING or output.is_dir():
        raise ConfigError(f"{output}: expected a file name that ends in {_ENDING}.")
    folder = resolve(model, workspace)
    top = _verified_name(folder)
    files = dict(sorted(all_files(folder)))
    files[MANIFEST] = file_checksum(folder / MANIFEST)
    require_space(output, sum((folder / name).stat().st_size for name in files))
    output.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.", suffix=".part")
    part = Path(name)
    try:
        with full_disk_named(output), os.fdopen(handle, "w+b") as file:
            _write(file, folder, tuple(files), top)
            file.flush()
            os.fsync(file.fileno())
        _check(part, files, top, output)
        part.chmod(0o644)
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    return output


def unpack(archive: str | Path, output: str | Path) -> Path:
    """Unpack a bundle, and give it its place once every checksum is right.

    Args:
        archive: What `pack` wrote, or a zip archive of a bundle's folder made by hand.
        output: Folder for the bundle: new, empty, or an earlier bundle, which is replaced.

    Returns:
        The bundle's folder.

    Raises:
        BundleError: If the archive holds no bundle, is unsafe or damaged, or `output` holds
            something else. Nothing is left behind.
    """
    output = Path(output)
    with written_whole(output) as part, Archive(Path(archive)) as opened:
        root = _root(opened, archive)
        scratch = part / "unpacked"
        opened.extract(_wanted(opened, root), scratch)
        found = scratch.joinpath(*root.parts)
        try:
            read_any(found)
        except BundleError as error:
            text = str(error).replace(str(found), f"{archive}")
            raise BundleError(f"{text} Nothing was unpacked.") from None
        for path in found.iterdir():
            path.rename(part / path.name)
        shutil.rmtree(scratch)
    return output


def join(
    models: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    workspace: str | Path = DEFAULT_WORKSPACE,
) -> Path:
    """Write an ensemble: a bundle of models whose probabilities are averaged.

    Args:
        models: As `medseg.load` takes them, at least two, for the same channels and labels.
        output: Folder for the bundle; an earlier bundle there is replaced.
        weights: Share of each; None: equal ones.
        workspace: Folder that holds what is imported on the fly and what was fetched.

    Raises:
        ConfigError: If there are fewer than two, or weights make no sense.
        BundleError: If a model is missing, or they do not go together.
    """
    if len(models) < 2 or (weights is not None and len(weights) != len(models)):
        raise ConfigError(
            f"got {len(models)} models and {'no' if weights is None else len(weights)} weights; "
            "expected at least two models, and a weight for each or none."
        )
    members = {f"model_{n}": resolve(model, workspace) for n, model in enumerate(models)}
    shares = None if weights is None else dict(zip(members, weights, strict=True))
    return write_ensemble(Path(output), members=members, weights=shares).folder


@contextmanager
def opened_bundle(model: str | Path, workspace: str | Path = DEFAULT_WORKSPACE) -> Iterator[Path]:
    """Give the folder of a bundle; that of an archive or an import lies there for a while.

    Args:
        model: As `medseg.load` takes it.
        workspace: Folder that holds what is imported on the fly and what was fetched.

    Raises:
        BundleError: If there is none, or the archive is unsafe or damaged.
    """
    path = Path(model)
    with tempfile.TemporaryDirectory(prefix="medseg_") as scratch:
        yield resolve(path, scratch if path.exists() else workspace)


def _write(file: object, folder: Path, names: tuple[str, ...], top: str) -> None:
    """Write the archive: weights as they are, they do not pack; the rest packed."""
    with zipfile.ZipFile(file, "w") as archive:  # type: ignore[call-overload]
        for name in names:
            path = folder / name
            entry = zipfile.ZipInfo(f"{top}/{name}", date_time=_DATE)
            entry.create_system, entry.external_attr = _UNIX, _PLAIN_FILE
            is_text = path.suffix == ".json"
            entry.compress_type = zipfile.ZIP_DEFLATED if is_text else zipfile.ZIP_STORED
            entry.file_size = path.stat().st_size  # decides whether 64-bit lengths are needed
            with path.open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, _BLOCK)


def _check(part: Path, files: dict[str, str], top: str, output: Path) -> None:
    """Read an archive back as a recipient would."""
    with Archive(part) as archive:
        problems = [
            f"  {name}: not read back as it was written"
            for name, sha256 in files.items()
            if _digest_in(archive, f"{top}/{name}") != sha256
        ]
    if problems:
        what = f"{output}: was not written well, and is not kept:"
        raise BundleError("\n".join([what, *problems, "Check the disk, and pack again."]))


def _digest_in(archive: Archive, name: str) -> str:
    digest = hashlib.sha256()
    with archive.open(name) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _verified_name(folder: Path) -> str:
    """Verify a bundle, and return the name of its folder in an archive: what it says it is."""
    bundle = read_any(folder)
    name = f"{bundle.spec.name}__{bundle.configuration_name}"
    return re.sub(r"[^\w.-]+", "_", name).strip(".") or "bundle"


def _root(archive: Archive, where: str | Path) -> PurePosixPath:
    """Return the folder in an archive that is the bundle: the one nearest to its top.

    Raises:
        BundleError: If there is none, or more than one.
    """
    folders = [
        PurePosixPath(name).parent
        for name in archive.names()
        if PurePosixPath(name).name == MANIFEST and MEMBERS not in PurePosixPath(name).parts
    ]
    nearest = min((len(folder.parts) for folder in folders), default=0)
    found = [folder for folder in folders if len(folder.parts) == nearest]
    if len(found) == 1:
        return found[0]
    what = "several bundles" if found else "no bundle"
    names = ", ".join(sorted(map(str, found)) or archive.names()[:8])
    raise BundleError(
        f"{where}: holds {what} ({names}); expected one folder with {MANIFEST}. A model of another "
        "program is taken over with 'import'."
    )


def _wanted(archive: Archive, root: PurePosixPath) -> list[str]:
    """Return the files of an archive that belong to the bundle, as its manifests list them."""
    known, wanted = set(archive.names()), []
    folders = [root]
    while folders:
        folder = folders.pop()
        manifest = str(folder / MANIFEST)
        if manifest not in known:
            continue  # it is found missing when the bundle is verified
        listed = _listed(archive, manifest)
        wanted += [manifest, *(str(folder / name) for name in listed)]
        folders += [folder / MEMBERS / member for member in member_names(listed)]
    return [name for name in dict.fromkeys(wanted) if name in known]


def _listed(archive: Archive, manifest: str) -> dict[str, str]:
    try:
        values = json.loads(archive.read(manifest, _LONGEST_MANIFEST))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{manifest} in the archive: not valid JSON ({error}).") from None
    return listed_in(values, f"{manifest} in the archive")
