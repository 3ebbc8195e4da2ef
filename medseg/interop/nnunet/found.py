"""Find the trained models of nnU-Net in a folder, a tree of results or a list of names.

Names alone are looked at; no file is opened. The layouts:

```text
Dataset001_Name/TRAINER__PLANS__CONFIGURATION/          version 2
  plans.json  dataset.json
  fold_0 ... | fold_all/checkpoint_final.pth, checkpoint_best.pth
  crossval_results_folds_0_1_2_3_4/postprocessing.json
CONFIGURATION/Task001_Name/TRAINER__PLANS/              version 1
  plans.pkl  postprocessing.json
  fold_0 ... | all/model_final_checkpoint.model, model_best.model, each with a .model.pkl
```
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from medseg.errors import BundleError, near_names

Version = Literal[1, 2]
CHECKPOINTS: dict[Version, dict[str, str]] = {
    1: {"model_final_checkpoint.model": "final", "model_best.model": "best"},
    2: {"checkpoint_final.pth": "final", "checkpoint_best.pth": "best"},
}
"""Version -> file in a fold's folder -> name of the checkpoint."""
_FOLDS: dict[Version, re.Pattern[str]] = {
    1: re.compile(r"fold_\d+|all"),
    2: re.compile(r"fold_\d+|fold_all"),
}
_OTHERS: dict[Version, tuple[str, ...]] = {
    1: ("plans.pkl", "postprocessing.json", "dataset.json"),
    2: ("plans.json", "dataset.json"),
}
_CROSS_VALIDATION = re.compile(r"crossval_results_folds_\w+")
_POSTPROCESSING = "postprocessing.json"
_DATASET = re.compile(r"(Dataset|Task)\d+_.+")
_DEPTH = 8
_MOST_FOLDERS = 20_000
_NOT_ENTERED = re.compile(
    r"\..*|__pycache__|validation\w*|(images|labels)(Tr|Ts|Val)|cv_niftis_\w+|gt_niftis|"
    r"gt_segmentations|pred_next_stage|predicted_next_stage|ensembles|crossval_results_\w*"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A trained model, by the names of its files."""

    version: Version
    """Of nnU-Net."""
    folder: Path
    """Folder with the plans; in a list of names, relative to where they are."""
    dataset: str = ""
    """Name of the dataset or task; empty where the folders do not say."""
    configuration: str = ""
    """Such as `3d_fullres`; empty where the folders do not say."""
    trainer: str = ""
    """Class that trained it; empty where the folders do not say."""
    plans: str = ""
    """Name of its plans; empty where the folders do not say."""
    weights: Mapping[str, Mapping[str, str]]
    """Fold ("fold_0" ... or "all") -> checkpoint ("final", "best") -> file, relative to the
    folder."""
    others: tuple[str, ...] = ()
    """Files beside the weights that say something about the model, relative to the folder."""

    @property
    def folds(self) -> tuple[str, ...]:
        """Return the folds that have weights, in order; "all" last."""
        return tuple(self.weights)

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Return the checkpoints that some fold has, "final" first."""
        return tuple(c for c in ("final", "best") if any(c in w for w in self.weights.values()))

    def select_folds(self, folds: Sequence[str | int] | None) -> tuple[str, ...]:
        """Return fold names for what a user wrote (0, "0", "fold_0", "all", "fold_all").

        None takes every numbered fold, or "all" where it is the only one.

        Raises:
            BundleError: If a fold has no weights here.
        """
        if folds is None:
            return tuple(fold for fold in self.folds if fold != "all") or self.folds
        wanted = dict.fromkeys(_fold_name(str(fold)) for fold in folds)
        missing = [fold for fold in wanted if fold not in self.weights]
        if missing or not wanted:
            raise BundleError(
                f"{self.folder}: no weights for {', '.join(missing) or 'an empty list of folds'}; "
                f"it holds {', '.join(self.folds)}. Ask for those."
            )
        return tuple(wanted)


def find_models(root: Path) -> list[Found]:
    """Return the models in a folder, at any depth that nnU-Net's own trees have.

    Links to folders are not followed, and folders of images and predictions not entered.

    Args:
        root: A tree of results, the folder of one model, of one fold, or a file of a model; of a
            fold or a checkpoint the model is returned with that alone.

    Raises:
        BundleError: If there is no such file or folder, or far too many folders.
    """
    root = Path(root)
    if not root.exists():
        raise BundleError(f"{root}: no such file or folder; expected a trained model of nnU-Net.")
    for base, alone in _bases(root.absolute()):
        paths = list(_walk(base)) if alone is None else [*alone, *_beside(base)]
        if found := models_in(paths, above=base):
            return found
    return []


def models_in(paths: Iterable[str], above: Path | None = None) -> list[Found]:
    """Return the models among names of files, such as those in a zip.

    Args:
        paths: Relative, with forward slashes, in any order.
        above: Folder they are in, whose names tell more; the models' folders begin with it.
    """
    places: dict[tuple[tuple[str, ...], Version], dict[str, dict[str, str]]] = {}
    names: dict[tuple[str, ...], list[str]] = {}
    for path in (PurePosixPath(path) for path in sorted(paths)):
        if path.is_absolute() or ".." in path.parts:
            continue
        for version, checkpoint in _checkpoint(path):
            folds = places.setdefault((path.parts[:-2], version), {})
            folds.setdefault(_fold_name(path.parts[-2]), {})[checkpoint] = "/".join(path.parts[-2:])
        for depth in (1, 2):
            names.setdefault(path.parts[:-depth], []).append("/".join(path.parts[-depth:]))
    return [
        _found(version, parts, folds, names.get(parts, []), above)
        for (parts, version), folds in sorted(places.items())
    ]


def needed_files(
    found: Found,
    folds: Sequence[str | int] | None = None,
    checkpoints: Sequence[str] = ("final", "best"),
) -> tuple[str, ...]:
    """Return the files that have to be there to read a model, relative to its folder.

    Args:
        found: The model.
        folds: As `Found.select_folds` takes them.
        checkpoints: Those of the folds that are wanted, where they are present.

    Raises:
        BundleError: If a fold has no weights here.
    """
    chosen = [
        file
        for fold in found.select_folds(folds)
        for checkpoint, file in found.weights[fold].items()
        if checkpoint in checkpoints
    ]
    beside = [f"{file}.pkl" for file in chosen] if found.version == 1 else []
    return (*found.others, *sorted(chosen + beside))


def choose_model(models: Sequence[Found], origin: str, **wanted: str | None) -> Found:
    """Return the one model that a user means.

    Args:
        models: Those there are.
        origin: What the message calls the place.
        wanted: `dataset`, `configuration`, `trainer` or `plans` -> what a user wrote; a dataset
            also by its number. None: any.

    Raises:
        BundleError: If none or several fit, with all of them.
    """
    asked = {name: value for name, value in wanted.items() if value is not None}
    fitting = [m for m in models if all(_is_meant(m, n, v) for n, v in asked.items())]
    if len(fitting) == 1:
        return fitting[0]
    what = " and ".join(f"{name} {value!r}" for name, value in asked.items()) or "one model"
    listed = [f"  {describe(model)}" for model in fitting or models] or ["  nothing"]
    near = [near_names(v, sorted({getattr(m, n) for m in models})) for n, v in asked.items()]
    raise BundleError(
        "\n".join(
            [
                f"{origin}: {len(fitting) or 'no'} models fit {what}; expected one of:",
                *listed,
                "Name dataset, configuration, trainer or plans, or give the folder of one."
                + ("" if fitting else "".join(near)),
            ]
        )
    )


def describe(found: Found) -> str:
    """Return a line about a model: what its folders say, its folds and checkpoints."""
    known = [found.dataset, found.configuration, found.trainer, found.plans]
    name = " ".join(part for part in known if part) or str(found.folder)
    return (
        f"{name} (nnU-Net version {found.version}; folds: {', '.join(found.folds)}; "
        f"checkpoints: {', '.join(found.checkpoints)})"
    )


def _is_meant(found: Found, name: str, value: str) -> bool:
    own = getattr(found, name)
    if name == "dataset" and value.isdigit():
        number = re.match(r"(?:Dataset|Task)(\d+)_", own)
        return number is not None and int(number[1]) == int(value)
    return bool(own == value)


def _fold_name(name: str) -> str:
    """Return medseg's name of a fold, however it was written.

    >>> _fold_name("3"), _fold_name("fold_3"), _fold_name("fold_all"), _fold_name("all")
    ('fold_3', 'fold_3', 'all', 'all')
    """
    return f"fold_{name}" if name.isdigit() else "all" if name == "fold_all" else name


def _checkpoint(path: PurePosixPath) -> Iterator[tuple[Version, str]]:
    if len(path.parts) < 2:
        return
    for version, checkpoints in CHECKPOINTS.items():
        if path.name in checkpoints and _FOLDS[version].fullmatch(path.parent.name):
            yield version, checkpoints[path.name]


def _found(
    version: Version,
    parts: tuple[str, ...],
    weights: dict[str, dict[str, str]],
    names: list[str],
    above: Path | None,
) -> Found:
    folder = Path(*parts) if above is None else above.joinpath(*parts)
    ordered = sorted(weights, key=lambda fold: (fold == "all", _number(fold)))
    return Found(
        version=version,
        folder=folder,
        **_named(version, folder.parts),
        weights={
            fold: {c: weights[fold][c] for c in ("final", "best") if c in weights[fold]}
            for fold in ordered
        },
        others=tuple(sorted(name for name in set(names) if _says_something(version, name))),
    )


def _number(fold: str) -> int:
    return int(fold.removeprefix("fold_")) if fold != "all" else 0


def _says_something(version: Version, name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if not folder:
        return file in _OTHERS[version]
    is_cross_validation = _CROSS_VALIDATION.fullmatch(folder) is not None
    return version == 2 and file == _POSTPROCESSING and is_cross_validation


def _named(version: Version, parts: tuple[str, ...]) -> dict[str, str]:
    """Return what the names of a model's folder and of those above it say."""
    own, parent, grandparent = ("", "", "", *parts)[:-4:-1]
    pieces = own.split("__")
    is_usual = len(pieces) == (3 if version == 2 else 2) and all(pieces)
    named = dict(zip(("trainer", "plans", "configuration"), pieces, strict=False))
    named = named if is_usual else {}
    if is_usual or _DATASET.fullmatch(parent):
        named["dataset"] = parent
        if version == 1:
            named["configuration"] = grandparent
    return named


def _bases(root: Path) -> Iterator[tuple[Path, list[str] | None]]:
    """Yield where to look: a folder, and of it either everything or some files alone."""
    if root.is_dir():
        is_fold = any(pattern.fullmatch(root.name) for pattern in _FOLDS.values())
        if is_fold:
            yield root.parent, [f"{root.name}/{name}" for name in sorted(os.listdir(root))]
        yield root, None
    elif root.name.endswith(".model.pkl"):
        yield root.parent.parent, [f"{root.parent.name}/{root.name.removesuffix('.pkl')}"]
    elif any(root.name in checkpoints for checkpoints in CHECKPOINTS.values()):
        yield root.parent.parent, [f"{root.parent.name}/{root.name}"]
    elif any(root.name in others for others in _OTHERS.values()):
        yield root.parent, None


def _beside(folder: Path) -> list[str]:
    """Return the files of a model's folder that say something about it, without its weights."""
    return [name for name in _walk(folder, depth=0) if _checkpoint_names().isdisjoint({name})]


def _checkpoint_names() -> set[str]:
    return {name for checkpoints in CHECKPOINTS.values() for name in checkpoints}


def _walk(root: Path, depth: int = _DEPTH) -> Iterator[str]:
    """Yield the relative names of files that belong to models."""
    wanted = _checkpoint_names().union(*_OTHERS.values())
    waiting, seen = [(root, "", 0)], 0
    while waiting:
        folder, before, level = waiting.pop()
        seen += 1
        if seen > _MOST_FOLDERS:
            raise BundleError(
                f"{root}: holds more than {_MOST_FOLDERS} folders; name the folder of the model, "
                "or one nearer to it."
            )
        for name, is_folder in _entries(folder):
            if not is_folder:
                if name in wanted:
                    yield f"{before}{name}"
            elif _CROSS_VALIDATION.fullmatch(name):
                if (folder / name / _POSTPROCESSING).is_file():
                    yield f"{before}{name}/{_POSTPROCESSING}"
            elif level < depth and not _NOT_ENTERED.fullmatch(name):
                waiting.append((folder / name, f"{before}{name}/", level + 1))


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """Return name and kind of what a folder holds; what may not be read holds nothing."""
    try:
        with os.scandir(folder) as entries:
            return [
                (entry.name, entry.is_dir(follow_symlinks=False))
                for entry in entries
                if entry.is_file() or entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return []
