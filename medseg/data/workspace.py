"""Where things lie in a workspace: the one owner of its folder names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from medseg.errors import ConfigError, DatasetError, near_names
from medseg.schema.base import read
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import Fingerprint
from medseg.schema.plans import Plans, read_plans

DEFAULT_WORKSPACE = "medseg_work"
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
    def fingerprint_path(self) -> Path:
        """Return the path of `fingerprint.json`."""
        return self.path / "fingerprint.json"

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
        """Return the folder of a dataset that is read from `source`."""
        return DatasetFolder(self.root / "datasets" / source.resolve().name)

    def find(self, dataset: str | Path) -> tuple[DatasetFolder, Path | None]:
        """Resolve DATASET: a path to raw data, a name, or nnU-Net's number.

        Returns:
            The dataset's folder and, where DATASET is a path, the raw data.

        Raises:
            DatasetError: If nothing fits, or more than one does.
        """
        text, path = str(dataset), Path(dataset)
        known = self._known()
        if text in known:
            return DatasetFolder(known[text]), None
        if text.isdigit():
            fitting = [name for name in known if _number(name) == int(text)]
            if len(fitting) == 1:
                return DatasetFolder(known[fitting[0]]), None
            if fitting:
                raise DatasetError(
                    f"dataset number {text} fits {', '.join(fitting)}; give the name instead."
                )
        if path.is_dir():
            return self._unclaimed(path), path
        names = f"known names: {', '.join(known)}" if known else "it holds no dataset yet"
        raise DatasetError(
            f"no dataset {text!r}: it is neither a folder nor a name or number in the workspace "
            f"{self.root} ({names}).{near_names(text, list(known))} "
            "Give the path of the raw data once: medseg plan-and-preprocess PATH."
        )

    def _unclaimed(self, source: Path) -> DatasetFolder:
        """Return the source's folder, unless another source of the same name has it."""
        folder = self.folder_of(source)
        if folder.spec_path.is_file():
            owner = folder.spec().source
            if Path(owner) != source.resolve() and Path(owner).is_dir():
                raise DatasetError(
                    f"the workspace {self.root} already holds a dataset named {folder.path.name!r} "
                    f"read from {owner}, not from {source.resolve()}. Rename the folder, or use "
                    "another --workspace."
                )
        return folder

    def _known(self) -> dict[str, Path]:
        folder = self.root / "datasets"
        if not folder.is_dir():
            return {}
        return {p.name: p for p in sorted(folder.iterdir()) if (p / "dataset.json").is_file()}


def _number(name: str) -> int | None:
    match = _NUMBERED.match(name)
    return int(match["number"]) if match else None
