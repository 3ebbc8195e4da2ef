"""Every form in which a user may name a model, and the models themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from medseg.bundles.bundle import MANIFEST, find_bundle
from medseg.bundles.files import file_checksum
from medseg.data.workspace import DEFAULT_WORKSPACE, FETCHED, IMPORTED
from medseg.errors import BundleError, near_names

if TYPE_CHECKING:
    from medseg.infer.model import Model


def load(  # noqa: PLR0913 - all but the path by keyword
    path: str | Path | Sequence[str | Path],
    *,
    device: str = "auto",
    mode: Literal["default", "exact"] = "default",
    folds: Sequence[str | int] | str | int | None = None,
    checkpoint: str = "final",
    weights: Sequence[float] | None = None,
    max_memory: str | int | None = None,
    max_vram: str | int | None = None,
    trust_code: bool = False,
    workspace: str | Path = DEFAULT_WORKSPACE,
) -> Model:
    """Load a model, or several whose probabilities are averaged, and keep all in memory.

    The first stage of a cascade is loaded with the same folds, and is always its "final" weights,
    on whose findings the second stage was trained.

    Args:
        path: Bundle, run, zip of a bundle, model of nnU-Net (a folder or zip; it is imported into
            the workspace the first time), or the name of a model that was fetched; or several.
        device: "auto", "cpu", "cuda:N" or "mps".
        mode: "exact" computes as the program that trained the model does, in float32, one tile at
            a time and whole volumes in memory.
        folds: Folds to average (0, "fold_0", "all" ...); None takes all a bundle has.
        checkpoint: "final" or "best".
        weights: Share of each of several models; None: equal ones.
        max_memory: Memory the process may take, such as "4GB"; None: what is free.
        max_vram: Memory of the GPU that may be taken; None: what is free.
        trust_code: Import a network given as "package.module:Name", which runs that code.
        workspace: Folder that holds what is imported on the fly.

    Raises:
        BundleError: If there is no model, it is damaged or unsafe, it lacks the weights asked for,
            it needs code that is not trusted, or models do not go together.
        ConfigError: If an option is out of range.
    """
    from medseg.infer.loading import load as load_bundles

    paths = [path] if isinstance(path, (str, Path)) else list(path)
    return load_bundles(
        [resolve(entry, workspace) for entry in paths],
        device=device,
        mode=mode,
        folds=folds,
        checkpoint=checkpoint,
        weights=weights,
        max_memory=max_memory,
        max_vram=max_vram,
        trust_code=trust_code,
    )


def resolve(model: str | Path, workspace: str | Path = DEFAULT_WORKSPACE) -> Path:
    """Return the folder of the bundle that a user means.

    Args:
        model: As `load` takes it.
        workspace: Folder that holds what is imported on the fly and what was fetched.

    Raises:
        BundleError: If there is no model, saying what is there and what was expected.
    """
    path, workspace = Path(model), Path(workspace)
    if not path.exists():
        return _fetched(str(model), workspace)
    if path.is_file() and path.suffix.lower() == ".zip":
        return _of_archive(path, workspace)
    try:
        return find_bundle(path)
    except BundleError:
        from medseg.api.importing import imported, is_nnunet

        if not path.is_dir() or not is_nnunet(path):
            raise
    return imported(path, workspace / IMPORTED)


def _of_archive(path: Path, workspace: Path) -> Path:
    """Return a bundle that was packed, unpacked into the workspace, or a model of nnU-Net."""
    from medseg.api.importing import cached, imported
    from medseg.api.packing import unpack
    from medseg.io.archive import Archive

    with Archive(path) as archive:
        is_bundle = any(name.split("/")[-1] == MANIFEST for name in archive.names())
    if not is_bundle:
        return imported(path, workspace / IMPORTED)
    folder = workspace / IMPORTED / file_checksum(path)
    return cached(folder, lambda output: unpack(path, output))


def _fetched(name: str, workspace: Path) -> Path:
    """Return the bundle of a model that was fetched by its name."""
    from medseg.api.catalogue import read_catalogue

    known = [entry.name for entry in read_catalogue().models]
    if name not in known:
        raise BundleError(
            f"{name}: no such file or folder, nor the name of a public model ('medseg models "
            f"list').{near_names(name, known)}"
        )
    folder = workspace / FETCHED / name
    if not (folder / MANIFEST).is_file():
        raise BundleError(
            f"{name}: a public model that has not been fetched. Run 'medseg models fetch {name}'."
        )
    return folder
