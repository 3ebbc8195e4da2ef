"""Cross-validation splits: nnU-Net's own, written once and honoured from then on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from medseg.errors import ConfigError
from medseg.schema.base import Schema, read_json, write_json

logger = logging.getLogger(__name__)

NUM_FOLDS = 5
_SEED = 12345


class Split(Schema):
    """One fold's case ids."""

    train: tuple[str, ...]
    """Cases the network learns from."""
    validation: tuple[str, ...]
    """Cases it is judged on."""


def make_splits(case_ids: Sequence[str], num_folds: int = NUM_FOLDS) -> list[Split]:
    """Return shuffled K-fold splits of the sorted ids.

    Source:
        The splits of nnU-Net v2: scikit-learn's `KFold(shuffle=True, random_state=12345)`.

    Examples:
        >>> [split.validation for split in make_splits(["a", "b", "c", "d", "e"])]
        [('a',), ('e',), ('d',), ('b',), ('c',)]
    """
    ids = np.array(sorted(case_ids))
    num_folds = min(num_folds, len(ids))
    if num_folds < 2:
        raise ConfigError(
            f"cross-validation needs at least 2 cases, got {len(ids)}. "
            "Train on everything with the fold 'all'."
        )
    order = np.arange(len(ids))
    np.random.RandomState(_SEED).shuffle(order)
    splits = []
    for part in np.array_split(order, num_folds):
        held_out = np.zeros(len(ids), bool)
        held_out[part] = True
        splits.append(
            Split(train=tuple(ids[~held_out].tolist()), validation=tuple(ids[held_out].tolist()))
        )
    return splits


def read_or_make_splits(path: Path, case_ids: Sequence[str]) -> list[Split]:
    """Return the splits in `path`; make and write them where there is no file yet.

    Raises:
        ConfigError: If the file does not fit, names unknown cases, or puts one case on both sides.
    """
    if not path.exists():
        splits = make_splits(case_ids)
        write_json(path, [split.model_dump(mode="json") for split in splits])
        return splits
    return _checked(read_splits(path), path, set(case_ids))


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
        return TypeAdapter(list[Split]).validate_python(values)
    except ValidationError as error:
        raise ConfigError(
            f"{path}: {error.error_count()} problems; expected a list of "
            '{"train": [ids], "validation": [ids]}. Correct or delete the file.'
        ) from None


def _checked(splits: list[Split], path: Path, known: set[str]) -> list[Split]:
    problems = []
    for number, split in enumerate(splits):
        unknown = sorted((set(split.train) | set(split.validation)) - known)
        if unknown:
            problems.append(f"  fold {number}: unknown cases {', '.join(unknown[:5])}")
        both = sorted(set(split.train) & set(split.validation))
        if both:
            problems.append(f"  fold {number}: in train and validation {', '.join(both[:5])}")
        if not split.train:
            problems.append(f"  fold {number}: no training case")
    used = {case for split in splits for case in (*split.train, *split.validation)}
    if known - used:
        logger.warning(
            "%s: %d cases are in no fold and take no part: %s",
            path, len(known - used), ", ".join(sorted(known - used)[:5]),
        )  # fmt: skip
    if problems:
        raise ConfigError("\n".join([f"{path}: the splits do not fit the dataset", *problems]))
    return splits
