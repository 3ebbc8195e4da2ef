"""Where things lie in a workspace: the one owner of its folder names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from medseg.data.layouts.names import MANIFEST, MANIFESTS, dataset_name
from medseg.errors import ConfigError, DatasetError, near_names
from medseg.schema.base import read, read_json
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import Fingerprint
from medseg.schema.plans import Plans, read_plans

DEFAULT_WORKSPACE = "medseg_work"
IMPORTED, FETCHED, DOWNLOADS = "imported", "models", "downloads"
"""Folders for models imported on the fly, those of the catalogue, and archives they came in."""
_NUMBERED = re.compile(r"^(?:Dataset|Task)0*(?P<number>\d+)_")


@dataclass(frozen=True, slots=True)
class DatasetFolder:
    """`WORK/datasets/NAME`: everything medseg made from one dataset."""

    path: Path

    @property
    def spec_path(self) -> Path:
        """Return the path of `dataset.json`."""
        return self.path / "dataset.json"

    @property
    def manifest_path(self) -> Path:
        """Return the path of a manifest that could not be written beside the data."""
        return self.path / MANIFEST

    @property
    def fingerprint_path(self) -> Path:
        """Return the path of `fingerprint.json`."""
        return self.path / "fingerprint.json"

    @property
    def check_path(self) -> Path:
        """Return the path of `check.json`."""
        return self.path / "check.json"

    @property
    def statistics_path(self) -> Path:
        """Return the path of the intensities that were drawn from each case."""
        return self.path / "statistics.npz"

    @property
    def splits_path(self) -> Path:
        """Return the path of `splits.json`."""
        return self.path / "splits.json"

    @property
    def store_path(self) -> Path:
        """Return the folder of the store of preprocessed cases."""
        return self.path / "store"

    def plans_path(self, plans: str) -> Path:
        """Return the path of a plans file."""
        return self.path / "plans" / f"{plans}.json"

    def run_path(self, plans: str, configuration: str, name: str) -> Path:
        """Return the folder of a run; `name` is the recipe's, or one's own."""
        return self.path / "runs" / f"{plans}__{configuration}__{name}"

    def spec(self) -> DatasetSpec:
        """Return the dataset's description."""
        return read(DatasetSpec, self.spec_path)

    def fingerprint(self) -> Fingerprint:
        """Return the dataset's fingerprint.

        Raises:
            DatasetError: If it has not been made yet.
        """
        if not self.fingerprint_path.is_file():
            raise DatasetError(
                f"dataset {self.path.name!r} has no fingerprint yet "
                f"({self.fingerprint_path} is missing). Run 'medseg fingerprint' first."
            )
        return read(Fingerprint, self.fingerprint_path)

    def plans(self, name: str) -> Plans:
        """Return plans by name.

        Raises:
            ConfigError: If there are none of that name.
        """
        path = self.plans_path(name)
        if not path.is_file():
            known = sorted(item.stem for item in path.parent.glob("*.json"))
            held = f"expected one of: {', '.join(known)}" if known else "there are no plans yet"
            raise ConfigError(
                f"dataset {self.path.name!r} has no plans {name!r}; {held}."
                f"{near_names(name, known)} Run 'medseg plan-and-preprocess' first."
            )
        return read_plans(path)


@dataclass(frozen=True, slots=True)
class Workspace:
    """`--workspace`: the folder that holds what medseg makes."""

    root: Path

    def folder_of(self, source: Path) -> DatasetFolder:
        """Return the folder of a dataset that is read from `source`, a folder or a manifest."""
        return DatasetFolder(self.root / "datasets" / dataset_name(source.resolve()))

    def find(self, dataset: str | Path) -> tuple[DatasetFolder, Path | None]:
        """Resolve DATASET: a path to raw data or a manifest, a name, or nnU-Net's number.

        Returns:
            The dataset's folder and what `read_dataset` is to be given: the path, or the manifest
            kept in the workspace; None where DATASET is a name whose description was read before.

        Raises:
            DatasetError: If nothing fits, or more than one does: a name in the workspace that is
                also the path of other data is refused.
        """
        text, path = str(dataset), Path(dataset)
        known = self._known()
        if text in known:
            return self._named(text, path)
        if text.isdigit():
            fitting = [name for name in known if _number(name) == int(text)]
            if len(fitting) == 1:
                return self._named(fitting[0], path)
            if fitting:
                raise DatasetError(
                    f"dataset number {text} fits {', '.join(fitting)}; give the name instead."
                )
        if path.is_dir() or path.is_file():
            return self._at(path)
        names = f"known names: {', '.join(known)}" if known else "it holds no dataset yet"
        raise DatasetError(
            f"no dataset {text!r}: it is neither a folder nor a name or number in the workspace "
            f"{self.root} ({names}).{near_names(text, list(known))} "
            "Give the path of the raw data once: medseg plan-and-preprocess PATH."
        )

    def _named(self, name: str, path: Path) -> tuple[DatasetFolder, Path | None]:
        """Return a dataset by its name, unless what was given is the path of other data too."""
        folder = DatasetFolder(self.root / "datasets" / name)
        if path.exists() and not _belongs(path, folder):
            raise DatasetError(
                f"{str(path)!r} is the dataset {name!r} in the workspace {self.root}, read from "
                f"{_origin(folder)}, and it is {path.resolve()} too. For the one in the workspace, "
                "run the command in another folder; for the other, rename it or use another "
                "--workspace."
            )
        return folder, folder.manifest_path if folder.manifest_path.is_file() else None

    def _at(self, path: Path) -> tuple[DatasetFolder, Path]:
        """Return the folder of what lies at a path, unless another source of that name has it."""
        folder = self.folder_of(path)
        source = path
        if _describes(folder.manifest_path, path) and not _has_manifest(path):
            source = folder.manifest_path
        if folder.spec_path.is_file():
            spec = folder.spec()
            owner = Path(spec.description or spec.source)
            if not _is_same(spec, path.resolve()) and owner.exists():
                raise DatasetError(
                    f"the workspace {self.root} already holds a dataset named "
                    f"{folder.path.name!r} read from {owner}, not from {path.resolve()}. Rename "
                    "one of the two, or use another --workspace."
                )
        return folder, source

    def _known(self) -> dict[str, Path]:
        folder = self.root / "datasets"
        if not folder.is_dir():
            return {}
        return {
            path.name: path
            for path in sorted(folder.iterdir())
            if (path / "dataset.json").is_file() or (path / MANIFEST).is_file()
        }


def _belongs(path: Path, folder: DatasetFolder) -> bool:
    """Return whether a path is what a known dataset was read from, or its folder here."""
    if path.resolve() == folder.path.resolve() or _describes(folder.manifest_path, path):
        return True
    return folder.spec_path.is_file() and _is_same(folder.spec(), path.resolve())


def _origin(folder: DatasetFolder) -> str:
    """Return where a known dataset was read from."""
    if not folder.spec_path.is_file():
        return str(folder.manifest_path)
    spec = folder.spec()
    return spec.description or spec.source


def _is_same(spec: DatasetSpec, path: Path) -> bool:
    """Return whether a folder or a manifest is what a dataset was read from."""
    owner, folder = Path(spec.description or spec.source), path if path.is_dir() else path.parent
    return path == owner or folder in (owner, owner.parent, Path(spec.source))


def _has_manifest(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MANIFESTS)


def _describes(manifest: Path, folder: Path) -> bool:
    """Return whether a manifest in the workspace is that of a folder."""
    if not manifest.is_file():
        return False
    values = read_json(manifest)
    described = values.get("folder") if isinstance(values, dict) else None
    return isinstance(described, str) and Path(described) == folder.resolve()


def _number(name: str) -> int | None:
    match = _NUMBERED.match(name)
    return int(match["number"]) if match else None
