"""Cross-validation splits: nnU-Net's own or by group, made once and honoured from then on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from medseg.data.patients import find_patients
from medseg.errors import ConfigError
from medseg.schema.base import Schema, read_json, write_json
from medseg.schema.dataset import CaseFiles, DatasetSpec

NUM_FOLDS = 5
_BINDING = "splits_final.json"
"""Split file in the dataset's folder, as nnU-Net calls it: honoured, or refused with a reason."""
PROVIDED = (_BINDING, "splits.json")
"""Split files that may lie in the dataset's folder; any program may have left the second one."""
SPLIT_FILE = "split.json"
"""File in a fold's folder: the split it was started with."""
_SEED = 12345
_MAX_LISTED = 5

Cases = Mapping[str, CaseFiles]


class Split(Schema):
    """One fold's case ids."""

    train: tuple[str, ...]
    """Cases the network learns from."""
    validation: tuple[str, ...]
    """Cases it is judged on."""
    left_out: tuple[str, ...] | None = None
    """Cases on neither side, on purpose; None where nobody said so: then a case that is named
    nowhere is not known to be new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The splits of a dataset as it is now."""

    splits: list[Split]
    messages: tuple[str, ...]
    """What changed, and what a person should look at."""
    is_changed: bool
    """Whether they are others than those in the workspace."""


def settle_splits(path: Path, spec: DatasetSpec) -> tuple[list[Split], tuple[str, ...]]:
    """Return the splits of a dataset and what there is to say; write them if they changed.

    See `propose_splits`; nothing is written for a dataset that is too small to be split.
    """
    settled = propose_splits(path, spec)
    if settled.is_changed:
        write_json(path, [split.model_dump(mode="json") for split in settled.splits])
    return settled.splits, settled.messages


def propose_splits(path: Path, spec: DatasetSpec) -> Settled:
    """Return the splits of a dataset without writing them.

    Folds that the dataset gives for its cases win; then the splits in `path`; then a split file
    in the dataset's folder, ours or nnU-Net's. Cases that are new since then join the smallest
    validation fold, or that of their group; cases that are gone are removed. Without any of
    these, splits are made (`make_splits`).

    Args:
        path: `splits.json` of the workspace, there or not.
        spec: The dataset as it is now; cases without a segmentation take no part.

    Raises:
        ConfigError: If a split file does not fit the dataset.
    """
    cases = {case: files for case, files in spec.cases.items() if files.segmentation}
    before = read_splits(path) if path.is_file() else None
    messages: list[str] = []
    if any(files.fold is not None for files in cases.values()):
        splits = _given_splits(cases)
        if before is not None and _sides(before) != _sides(splits):
            messages.append("the folds given for the cases replace those of splits.json")
    elif before is not None:
        splits = _kept_up(before, cases, str(path), messages)
    elif (provided := _provided(spec, path, cases, messages)) is not None:
        splits = provided
    elif len(_units(cases)) < 2:
        messages.append(f"{_counted(len(cases), 'case')} cannot be split; train the fold 'all'")
        return Settled(splits=[], messages=tuple(messages), is_changed=False)
    else:
        splits = make_splits(cases)
    messages += _leaks(splits, cases)
    return Settled(splits=splits, messages=tuple(messages), is_changed=splits != before)


def make_splits(cases: Cases | Sequence[str], num_folds: int = NUM_FOLDS) -> list[Split]:
    """Return new splits.

    Where cases share a group or have a stratum, whole groups are dealt out so that folds hold
    their share of every stratum and as many cases as can be. Otherwise the sorted ids are
    shuffled and cut.

    Args:
        cases: Ids, or id -> files with group and stratum.
        num_folds: Folds; fewer where there are fewer cases or groups.

    Raises:
        ConfigError: If there are fewer than two cases or groups.

    Source:
        Without groups and strata the splits of nnU-Net v2: scikit-learn's
        `KFold(shuffle=True, random_state=12345)`.

    Examples:
        >>> [split.validation for split in make_splits(["a", "b", "c", "d", "e"])]
        [('a',), ('e',), ('d',), ('b',), ('c',)]
    """
    known = cases if isinstance(cases, Mapping) else dict.fromkeys(cases)
    units = _units(known)
    num_folds = min(num_folds, len(units))
    if num_folds < 2:
        what = "cases" if len(units) == len(known) else "groups"
        raise ConfigError(
            f"cross-validation needs at least 2 {what}, got {len(units)}. "
            "Train on everything with the fold 'all'."
        )
    strata = {case: files.stratum if files else None for case, files in known.items()}
    if len(units) == len(known) and not any(strata.values()):
        folds = _shuffled(sorted(known), num_folds)
    else:
        folds = _dealt(units, strata, num_folds)
    return _splits_of(folds, known)


def read_splits(path: Path) -> list[Split]:
    """Read a split file, ours or nnU-Net's (which says "val").

    Raises:
        ConfigError: If it is not a list of such splits.
    """
    values = read_json(path)
    if isinstance(values, list):
        values = [
            {"validation" if key == "val" else key: ids for key, ids in item.items()}
            if isinstance(item, dict)
            else item
            for item in values
        ]
    try:
        splits = TypeAdapter(list[Split]).validate_python(values)
    except ValidationError as error:
        raise ConfigError(
            f"{path}: {error.error_count()} problems; expected a list of "
            '{"train": [ids], "validation": [ids]}. Correct or delete the file.'
        ) from None
    if not splits:
        raise ConfigError(f"{path}: holds no split. Correct or delete the file.")
    return splits


def _units(cases: Mapping[str, CaseFiles | None]) -> dict[str, list[str]]:
    """Return what must stay together: group -> cases; a case without a group is one by itself."""
    units: dict[str, list[str]] = {}
    for case, files in sorted(cases.items()):
        key = f"case {case}" if files is None or files.group is None else f"group {files.group}"
        units.setdefault(key, []).append(case)
    return units


def _shuffled(ids: Sequence[str], num_folds: int) -> list[list[str]]:
    order = np.arange(len(ids))
    np.random.RandomState(_SEED).shuffle(order)
    return [[ids[n] for n in sorted(part)] for part in np.array_split(order, num_folds)]


def _dealt(
    units: Mapping[str, Sequence[str]], strata: Mapping[str, str | None], num_folds: int
) -> list[list[str]]:
    """Deal out whole units, the largest first, each to the fold it unbalances least.

    The unbalance is the sum over strata of the squares of the folds' shares of them; among equals
    the fold with the fewest cases, then units, takes the unit.

    Source:
        Behaviour of scikit-learn's `StratifiedGroupKFold`, with another measure of balance.
    """
    totals = Counter(strata[case] for cases in units.values() for case in cases)
    shuffled = np.random.RandomState(_SEED).permutation(len(units))
    order = sorted((list(units.values())[n] for n in shuffled), key=len, reverse=True)
    counts: list[Counter[str | None]] = [Counter() for _ in range(num_folds)]
    taken = [0] * num_folds
    folds: list[list[str]] = [[] for _ in range(num_folds)]
    for cases in order:
        added = Counter(strata[case] for case in cases)

        def cost(fold: int, added: Counter[str | None] = added) -> tuple[float, int, int, int]:
            found = counts[fold]
            grown = sum((2 * found[s] * n + n * n) / totals[s] ** 2 for s, n in added.items())
            return round(grown, 12), len(folds[fold]), taken[fold], fold

        chosen = min(range(num_folds), key=cost)
        counts[chosen] += added
        taken[chosen] += 1
        folds[chosen] += cases
    return folds


def _splits_of(folds: Sequence[Sequence[str]], cases: Iterable[str]) -> list[Split]:
    """Return the splits that validate each fold once and train on all the others."""
    ids = sorted(cases)
    held_out = [set(fold) for fold in folds]
    return [
        Split(
            train=tuple(case for case in ids if case not in held),
            validation=tuple(case for case in ids if case in held),
            left_out=(),
        )
        for held in held_out
    ]


def _given_splits(cases: Cases) -> list[Split]:
    """Return the splits whose folds the dataset gives; cases without one join the others.

    Raises:
        ConfigError: If the numbers leave out a fold, or there is only one.
    """
    numbers = sorted({files.fold for files in cases.values() if files.fold is not None})
    if numbers != list(range(len(numbers))) or len(numbers) < 2:
        raise ConfigError(
            f"the folds given for the cases are {', '.join(map(str, numbers))}; expected 0, 1, "
            "... without gaps, at least two. Correct the column 'fold' of the manifest."
        )
    folds: list[list[str]] = [[] for _ in numbers]
    for case, files in cases.items():
        if files.fold is not None:
            folds[files.fold].append(case)
    rest = [case for case, files in sorted(cases.items()) if files.fold is None]
    _join(folds, rest, cases)
    return _splits_of(folds, cases)


def _provided(
    spec: DatasetSpec, path: Path, cases: Cases, messages: list[str]
) -> list[Split] | None:
    """Return the splits of a file that came with the dataset; None where there is none.

    Raises:
        ConfigError: If a `splits_final.json` does not fit. A `splits.json` is passed over then.
    """
    folders = [Path(spec.description).parent] if spec.description else []
    folders += [Path(spec.source)] if spec.source else []
    candidates = dict.fromkeys(folder / name for folder in folders for name in PROVIDED)
    for file in candidates:
        if file == path or not file.is_file():
            continue
        told = [f"splits are those of {file}"]
        try:
            splits = _kept_up(read_splits(file), cases, str(file), told)
        except ConfigError as error:
            if file.name == _BINDING:
                raise
            reason = " ".join(str(error).removeprefix(f"{file}: ").split())
            messages.append(
                f"{file} is passed over, it holds no splits of this dataset ({reason}); splits "
                f"that must be used are called {_BINDING}"
            )
            continue
        messages += told
        return splits
    return None


def _kept_up(splits: list[Split], cases: Cases, where: str, messages: list[str]) -> list[Split]:
    """Return splits of an earlier time for the cases there are now.

    Raises:
        ConfigError: If they do not fit.
    """
    _check(splits, where, set(cases))
    named = {case for split in splits for case in (*split.train, *split.validation)}
    gone = sorted(named - set(cases))
    if gone:
        messages.append(f"{_counted(len(gone), 'case')} no longer there: {_listed(gone)}")
    splits = [_only(split, cases) for split in splits]
    named &= set(cases)
    is_marked = all(split.left_out is not None for split in splits)
    known = named | {case for split in splits for case in split.left_out or ()}
    new = sorted(set(cases) - known)
    if is_marked and new and _is_partition(splits, named):
        return _grown(splits, new, cases, messages)
    if new:
        messages.append(
            f"{_counted(len(new), 'case')} in no fold of {where}, and out of training: "
            f"{_listed(new)}"
        )
    return [_marked(split, cases) for split in splits]


def _check(splits: list[Split], where: str, known: set[str]) -> None:
    problems = []
    for number, split in enumerate(splits):
        both = sorted(set(split.train) & set(split.validation))
        if both:
            problems.append(f"  fold {number}: in train and validation {_listed(both)}")
        if not set(split.train) & known:
            found = f" (it names {_listed(split.train)})" if split.train else ""
            problems.append(f"  fold {number}: no training case of the dataset{found}")
        elif split.validation and not set(split.validation) & known:
            problems.append(
                f"  fold {number}: no validation case of the dataset (it names "
                f"{_listed(split.validation)})"
            )
    if problems:
        advice = "Correct the file, or delete it to have new splits made."
        raise ConfigError(
            "\n".join([f"{where}: the splits do not fit the dataset", *problems, advice])
        )


def _only(split: Split, cases: Cases) -> Split:
    def kept(ids: Sequence[str]) -> tuple[str, ...]:
        return tuple(case for case in ids if case in cases)

    left_out = None if split.left_out is None else kept(split.left_out)
    return Split(train=kept(split.train), validation=kept(split.validation), left_out=left_out)


def _marked(split: Split, cases: Cases) -> Split:
    """Return a split that says which of the cases are left out of it."""
    sides = {*split.train, *split.validation}
    left_out = tuple(case for case in sorted(cases) if case not in sides)
    return split.model_copy(update={"left_out": left_out})


def _is_partition(splits: list[Split], named: set[str]) -> bool:
    """Return whether every case is validated once and trains all the other folds."""
    validated = [case for split in splits for case in split.validation]
    return sorted(validated) == sorted(named) and all(
        set(split.train) == named - set(split.validation) for split in splits
    )


def _grown(
    splits: list[Split], new: Sequence[str], cases: Cases, messages: list[str]
) -> list[Split]:
    """Return the splits with new cases in them, the order of the others kept."""
    folds = [list(split.validation) for split in splits]
    joined = _join(folds, new, cases)
    shown = [f"{case} -> fold {fold}" for case, fold in joined.items()]
    messages.append(
        f"{_counted(len(new), 'new case')} joined the validation of a fold: {_listed(shown)}; "
        "folds that were started before keep their own split"
    )
    return [
        Split(
            train=(*split.train, *(case for case in new if joined[case] != number)),
            validation=tuple(folds[number]),
            left_out=split.left_out,
        )
        for number, split in enumerate(splits)
    ]


def _join(folds: list[list[str]], new: Sequence[str], cases: Cases) -> dict[str, int]:
    """Add cases to the folds of their groups, or else to the smallest; return where they went."""
    home = {
        cases[case].group: number
        for number, fold in reversed(list(enumerate(folds)))
        for case in fold
        if cases[case].group is not None
    }
    joined: dict[str, int] = {}
    for members in _units({case: cases[case] for case in new}).values():
        group = cases[members[0]].group
        smallest = min(range(len(folds)), key=lambda number: (len(folds[number]), number))
        number = home.get(group, smallest) if group is not None else smallest
        folds[number] += members
        joined |= dict.fromkeys(members, number)
    return {case: joined[case] for case in new}


def _leaks(splits: list[Split], cases: Cases) -> list[str]:
    """Return a warning where one patient is on both sides of a split."""
    groups = {case: files.group for case, files in cases.items() if files.group is not None}
    patients = groups or find_patients(cases)
    torn: dict[str, None] = {}
    for split in splits:
        train = {patients[case] for case in split.train if case in patients}
        shared = (patients[case] for case in split.validation if case in patients)
        torn |= dict.fromkeys(patient for patient in shared if patient in train)
    if not torn:
        return []
    first = next(iter(torn))
    examples = _listed([case for case in sorted(patients) if patients[case] == first], 3)
    more = "" if len(torn) == 1 else f", and {_counted(len(torn) - 1, 'more')}"
    if groups:
        return [
            f"the splits tear apart group {first!r} ({examples}){more}: validation will look "
            "better than it is. Delete splits.json to have them made by group."
        ]
    return [
        f"{examples} look like the same patient, in training and in validation{more}: validation "
        "may look better than it is. Give the cases a 'group' in a manifest (medseg dataset init), "
        "then delete splits.json."
    ]


def _sides(splits: list[Split]) -> list[tuple[set[str], set[str]]]:
    return [(set(split.train), set(split.validation)) for split in splits]


def _counted(number: int, what: str) -> str:
    plural = "" if number == 1 or what == "more" else "s"
    return f"{number} {what}{plural}"


def _listed(items: Sequence[str], limit: int = _MAX_LISTED) -> str:
    more = ["..."] if len(items) > limit else []
    return ", ".join([*items[:limit], *more])
