"""The preprocessed cases of a fold: opened, and known to be what the dataset holds now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from medseg.api.fold_run import FoldRun
from medseg.api.survey import described_by, has_same_content, is_unchanged, require_same
from medseg.data.cache import open_entries
from medseg.data.store import CaseStore, Entry
from medseg.errors import DatasetError
from medseg.execute.resources import free_memory_bytes
from medseg.labels import LabelScheme
from medseg.preprocess.keys import entry_key, index_mark
from medseg.schema.base import read
from medseg.schema.check import CheckReport

_CACHE_SHARE = 0.4
"""Share of the free memory that preprocessed cases may fill."""


def open_cases(run: FoldRun) -> dict[str, Entry]:
    """Open the cases of the fold, in memory as far as they fit.

    Raises:
        DatasetError: If cases are not preprocessed, or not as they are now.
    """
    store = CaseStore(run.folder.store_path)
    mark = index_mark(run.plans, run.configuration)
    index = store.read_index(f"{run.plans.name}__{run.config}", mark)
    cases = [*run.split.train, *run.split.validation]
    missing = [case for case in cases if case not in index]
    if missing:
        raise DatasetError(
            f"{len(missing)} cases have not been preprocessed for {run.config!r}: "
            f"{', '.join(missing[:5])}. Run 'medseg preprocess' again."
        )
    _require_current(run, {case: index[case] for case in cases})
    return open_entries(
        store,
        index,
        cases,
        free_bytes=int(_CACHE_SHARE * free_memory_bytes() / run.num_sharing),
    )


def _require_current(run: FoldRun, index: Mapping[str, str]) -> None:
    """Refuse entries made from other files or labels than the dataset has now.

    Files are compared by size and time, and by their bytes where these differ. Those of training
    cases may be gone, since the store has what is needed; those of validation cases are read at
    the end.

    Raises:
        DatasetError: With the cases.
    """
    spec, validation = run.folder.spec(), run.split.validation
    labels = LabelScheme.from_spec(spec)
    report = read(CheckReport, run.folder.check_path)
    require_same(spec, report.skipped, described_by(spec))
    root = Path(spec.source)
    gone = {case for case in index if not all((root / f).is_file() for f in spec.cases[case].files)}
    if missing := sorted(gone & set(validation)):
        raise DatasetError(
            f"files of {len(missing)} validation cases of {run.fold} are missing below "
            f"{spec.source}: {', '.join(missing[:5])}. They are read after training; put them "
            "back, or give the new path of the dataset to 'medseg plan-and-preprocess'."
        )
    facts = report.cases
    stale = [
        case
        for case, key in index.items()
        if case not in facts
        or entry_key(facts[case], labels, run.plans, run.configuration) != key
        or not (
            case in gone
            or is_unchanged(spec, case, facts[case])
            or has_same_content(spec, case, facts[case])
        )
    ]
    if stale:
        raise DatasetError(
            f"{len(stale)} cases were preprocessed for {run.config!r} before their files or the "
            f"labels of the dataset changed: {', '.join(sorted(stale)[:5])}. "
            "Run 'medseg plan-and-preprocess' again."
        )
