"""Cascades: the stage before is trained first, and what it finds becomes input of the next one.

What the second stage learns from are predictions for cases the first stage was not trained on:
each case is predicted by the fold of the first stage in which it is a validation case.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medseg.api.run_folder import read_split
from medseg.bundles.bundle import Bundle, find_bundle, read_bundle, weights_name
from medseg.data.label_file import LabelFile, open_labels, write_labels
from medseg.data.splits import Split, propose_splits
from medseg.data.store import CaseStore, digest
from medseg.errors import BundleError, DatasetError, PlanError, case_context
from medseg.execute.progress import progress_bar
from medseg.execute.resources import free_memory_bytes
from medseg.infer.export import indices_for_next_stage
from medseg.infer.loading import load
from medseg.infer.model import Model
from medseg.infer.parts import Held, Part
from medseg.infer.result import Options
from medseg.labels import LabelScheme
from medseg.preprocess.keys import entry_key, index_mark
from medseg.schema.base import read
from medseg.schema.check import CheckReport
from medseg.schema.plans import Configuration, Plans

if TYPE_CHECKING:
    from medseg.api.fold_run import FoldRun

logger = logging.getLogger(__name__)

_VERSION = 1
"""Raise when the same weights would give other label maps, so that old ones are not used."""
_OPTIONS = Options(tta="flips")
_CACHE_SHARE = 0.1
"""Share of the free memory that label maps of the stage before may fill."""
_MAX_LISTED = 5


def previous_bundle(run: FoldRun) -> Path | None:
    """Return where the run of the stage before has its bundle; None outside cascades."""
    path = _previous_path(run)
    return None if path is None else path / "bundle"


def ensure_previous_stage(
    run: FoldRun, splits: Mapping[str, Split], *, train: Callable[[str], object]
) -> None:
    """Train the stage before where weights of it are lacking; outside cascades do nothing.

    A numbered fold needs every numbered fold of the stage before, the fold "all" needs "all".
    Folds that are trained are left as they are.

    Args:
        run: The run of the second stage.
        splits: Its folds that are to be trained.
        train: Trains a fold of the stage before, or "cv", with the options of this run.

    Raises:
        DatasetError: If the second stage's cases are not preprocessed, which is found out first.
        PlanError: If the stage before is the second stage of a cascade itself.
    """
    before = run.configuration.previous_stage
    if before is None:
        return
    _refuse_longer_chains(run, before)
    cases = {case for split in splits.values() for case in (*split.train, *split.validation)}
    _current_keys(run, run.plans, run.config, sorted(cases))
    wanted = {"all"} & set(splits)
    if numbered := set(splits) - wanted:
        settled = propose_splits(run.folder.splits_path, run.folder.spec()).splits
        numbered |= {f"fold_{number}" for number in range(len(settled))}
    trained = _trained_folds(run)
    for fold, names in (("cv", numbered), ("all", wanted)):
        if missing := sorted(names - trained):
            logger.info(
                "%s learns from what %s finds: %s of %s is trained first, with the same recipe "
                "and options", run.config, before, ", ".join(missing), before,
            )  # fmt: skip
            train(fold)


def previous_segmentations(run: FoldRun) -> dict[str, Any] | None:
    """Return what the stage before finds in every case of a fold; None outside cascades.

    A case is predicted by the fold of the stage before that held it out, mirrored in all ways. The
    label maps are kept beside that fold and made anew where its weights, the case or the grid have
    changed. With several processes the main one predicts.

    Args:
        run: A fold of the second stage.

    Returns:
        Case id -> (*spatial) label indices on the grid of the second stage's network: arrays
        where all of them fit into memory, else `LabelFile`s, which are read where they are sliced.

    Raises:
        BundleError: If the stage before is not trained, or does not fit.
        DatasetError: If cases are not preprocessed, or the stage before was trained on a case that
            this fold is validated with.
    """
    if run.configuration.previous_stage is None:
        return None
    made: dict[str, list[str]] = run.processes.from_main(lambda: _make(run))
    found = {case: _opened(Path(path), key) for case, (path, key) in made.items()}
    needed = sum(labels.memory_bytes for labels in found.values())
    if needed <= _CACHE_SHARE * free_memory_bytes() / run.num_sharing:
        return {case: labels[...] for case, labels in found.items()}
    return dict(found)


def _make(run: FoldRun) -> dict[str, list[str]]:
    """Predict what is lacking; return the file of each case and the mark it was made with."""
    folder = previous_bundle(run) or run.path
    bundle = read_bundle(find_bundle(folder))
    _require_fitting(run, bundle)
    cases = [*run.split.train, *run.split.validation]
    first = _current_keys(run, bundle.plans, bundle.configuration_name, cases)
    second = _current_keys(run, run.plans, run.config, cases)
    sources = _sources(run, bundle)
    made = {
        case: [
            str(folder.parent / fold / "next_stage" / run.config / f"{case}.b2nd"),
            _mark(bundle, fold, first[case], second[case]),
        ]
        for case, fold in sources.items()
    }
    lacking = [case for case, (path, key) in made.items() if open_labels(Path(path), key) is None]
    title = f"predict {bundle.configuration_name} for {run.config}"
    store = CaseStore(run.folder.store_path)
    with progress_bar(len(lacking), title, shown=run.progress and bool(lacking)) as bar:
        for fold in sorted({sources[case] for case in lacking}):
            model = load(bundle.folder, device=run.device, folds=[fold], trust_code=True)
            for case in (case for case in lacking if sources[case] == fold):
                path, key = made[case]
                with case_context(case):
                    found = _predict(model, store, first[case], second[case], case)
                chunk = run.configuration.patch_size
                write_labels(Path(path), found, chunk=chunk, made_with=key)
                bar.update()
    return made


def _require_fitting(run: FoldRun, bundle: Bundle) -> None:
    """Refuse a stage before whose channels, labels or axes are others.

    Raises:
        BundleError: With everything that differs.
    """
    spec = run.folder.spec()
    pairs = {
        "channels": (bundle.spec.channels, spec.channels),
        "labels": (LabelScheme.from_spec(bundle.spec).values, LabelScheme.from_spec(spec).values),
        "network_axes": (bundle.plans.network_axes, run.plans.network_axes),
    }
    problems = [
        f"  {what}: trained with {found}, now {now}"
        for what, (found, now) in pairs.items()
        if found != now
    ]
    if problems:
        advice = f"Train {bundle.configuration_name!r} anew with --restart, or give a --name."
        raise BundleError("\n".join([f"{bundle.folder}: the dataset changed:", *problems, advice]))


def _predict(
    model: Model, store: CaseStore, first: str, second: str, case: str
) -> np.ndarray[tuple[int, ...], np.dtype[np.unsignedinteger[Any]]]:
    """Return the label indices of one case on the second stage's grid.

    Args:
        model: The stage before.
        store: Preprocessed cases.
        first: Key of the case as the stage before sees it.
        second: Key of the case as the second stage sees it.
        case: What the log calls it.
    """
    entry, target = store.open(first), store.open(second)
    image = torch.from_numpy(np.asarray(entry.image[...], dtype=np.float32))
    logits = model.network_logits(image, entry.record, _OPTIONS, name=case)
    semantics = model.members[0].bundle.manifest.semantics
    part = Part(source=Held(logits), record=entry.record, semantics=semantics)
    return indices_for_next_stage(part, target.record, model.labels)


def _opened(path: Path, key: str) -> LabelFile:
    found = open_labels(path, key)
    if found is None:
        raise DatasetError(
            f"{path}: was written just now and is gone or changed. Does another process train the "
            "stage before? Wait for it, and start again."
        )
    return found


def _mark(bundle: Bundle, fold: str, first: str, second: str) -> str:
    """Return the mark of everything a label map depends on."""
    files = [weights_name(fold, "final"), "plans.json", "dataset.json"]
    sums = [bundle.manifest.sha256[name] for name in files]
    semantics = bundle.manifest.semantics.model_dump(mode="json")
    options = [_OPTIONS.tta, _OPTIONS.step]
    return digest([_VERSION, sums, semantics, options, first, second])


def _sources(run: FoldRun, bundle: Bundle) -> dict[str, str]:
    """Return case id -> the fold of the stage before that predicts it.

    Raises:
        BundleError: If the stage before lacks the fold.
        DatasetError: If it was trained on cases this fold is validated with.
    """
    (own,) = bundle.select_folds([run.fold])
    splits = {fold: read_split(bundle.folder.parent / fold) for fold in bundle.manifest.folds}
    held_out = {
        case: fold
        for fold, split in splits.items()
        if split is not None and fold != "all"
        for case in split.validation
    }
    seen = splits[own]
    if seen is not None and (leaked := set(run.split.validation) & set(seen.train)):
        raise DatasetError(
            f"{bundle.folder.parent / own}: was trained on {_listed(leaked)}, with which {own} of "
            f"{run.config!r} is validated: the splits have changed since. Train "
            f"{bundle.configuration_name!r} anew with --restart, or give the new runs a --name."
        )
    cases = [*run.split.train, *run.split.validation]
    unseen = {case: held_out.get(case, own) for case in cases} | dict.fromkeys(
        run.split.validation, own
    )
    lacking = [case for case in run.split.train if case not in held_out]
    if not lacking:
        return unseen
    logger.warning(
        "%s learns from predictions of %s for cases %s was trained on (%s): no fold held them "
        "out. They are better than those for new images will be.",
        run.config, bundle.configuration_name, own, _listed(lacking),
    )  # fmt: skip
    return dict.fromkeys(cases, own) if own == "all" else unseen


def _current_keys(run: FoldRun, plans: Plans, config: str, cases: Iterable[str]) -> dict[str, str]:
    """Return the store's key of each case, having checked that it is what the dataset holds now.

    Raises:
        DatasetError: If cases are not preprocessed for these plans, or not as they are now.
    """
    cases, configuration = tuple(cases), plans.configuration(config)
    index = CaseStore(run.folder.store_path).read_index(
        f"{plans.name}__{config}", index_mark(plans, configuration)
    )
    labels = LabelScheme.from_spec(run.folder.spec())
    facts = read(CheckReport, run.folder.check_path).cases
    stale = [
        case
        for case in cases
        if case not in index
        or case not in facts
        or index[case] != entry_key(facts[case], labels, plans, configuration)
    ]
    if stale:
        raise DatasetError(
            f"{_listed(stale)} not preprocessed for {config!r}, or before the files or labels "
            "changed. Run 'medseg plan-and-preprocess' again."
        )
    return {case: index[case] for case in cases}


def _refuse_longer_chains(run: FoldRun, before: str) -> None:
    plans_name, _, _ = run.path.name.partition(f"__{run.config}__")
    first: Configuration = run.folder.plans(plans_name).configuration(before)
    if first.previous_stage is not None:
        raise PlanError(
            f"{run.config!r} comes after {before!r}, which comes after {first.previous_stage!r}; "
            "expected a cascade of two stages. Correct previous_stage in the plans."
        )


def _previous_path(run: FoldRun) -> Path | None:
    """Return the folder of the run of the stage before: the same plans, recipe and name."""
    before = run.configuration.previous_stage
    if before is None:
        return None
    plans_name, _, name = run.path.name.partition(f"__{run.config}__")
    return run.folder.run_path(plans_name, before, name)


def _trained_folds(run: FoldRun) -> set[str]:
    """Return the folds the bundle of the stage before holds; none where there is no whole one."""
    folder = previous_bundle(run)
    if folder is None or not folder.is_dir():
        return set()
    try:
        return set(read_bundle(folder).manifest.folds)
    except BundleError as error:
        logger.warning("%s", error)
        return set()


def _listed(cases: Iterable[str]) -> str:
    names = sorted(cases)
    shown = ", ".join(names[:_MAX_LISTED]) + (" ..." if len(names) > _MAX_LISTED else "")
    return f"{len(names)} case{'s' * (len(names) > 1)} ({shown})"
