"""Train one fold: put its parts together, run the loop, leave its weights."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from medseg.api.run_folder import FoldRecord, check_record, read_record
from medseg.api.survey import described_by, has_same_content, is_unchanged, require_same
from medseg.augment.pipeline import Augmenter
from medseg.augment.settings import Mirroring, is_anisotropic, mirroring
from medseg.augment.streams import sample_seed
from medseg.data.loader import Batch, batches
from medseg.data.patches import PatchSampler, partial_annotations
from medseg.data.splits import SPLIT_FILE, Split
from medseg.data.store import CaseStore, Entry
from medseg.data.workspace import DatasetFolder
from medseg.errors import DatasetError
from medseg.execute.progress import progress_bar
from medseg.execute.resources import free_memory_bytes
from medseg.labels import LabelScheme
from medseg.losses.deep_supervision import build_loss
from medseg.models.build import build_network
from medseg.models.precision import autocast_dtype, pick_device
from medseg.models.weights import save_weights
from medseg.preprocess.keys import entry_key, index_mark
from medseg.report.figures import progress_figure
from medseg.schema.base import read, write
from medseg.schema.check import CheckReport
from medseg.schema.plans import Configuration, Plans
from medseg.schema.recipe import Recipe
from medseg.train.checkpoint import load_checkpoint, save_checkpoint
from medseg.train.journal import Journal
from medseg.train.loop import train as run_loop
from medseg.train.schedule import Length
from medseg.train.trainer import Parts, Trainer

logger = logging.getLogger(__name__)

_CHECKPOINT_SECONDS = 300.0
_CACHE_SHARE = 0.4
"""Share of the free memory that preprocessed cases may fill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedLength:
    """How long a run shall be; nothing given means as long as it was started, or as the recipe."""

    budget_seconds: float | None = None
    epochs: int | None = None
    iterations: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldRun:
    """One fold of a run, and everything its training is told."""

    folder: DatasetFolder
    plans: Plans
    """Plans with the one configuration, as the recipe changed it."""
    config: str
    recipe: Recipe
    recipe_name: str
    path: Path
    """The run's folder."""
    fold: str
    """fold_0 ... or all."""
    split: Split
    seed: int | None
    device: str
    length: RequestedLength
    started: float
    """`time.monotonic()` that the budget counts from."""
    progress: bool

    @property
    def fold_path(self) -> Path:
        """Return the fold's folder."""
        return self.path / self.fold

    @property
    def weights_path(self) -> Path:
        """Return the folder of the fold's finished weights."""
        return self.fold_path / "weights"

    @property
    def configuration(self) -> Configuration:
        """Return the configuration that is trained."""
        return self.plans.configurations[self.config]

    @property
    def mirroring(self) -> Mirroring:
        """Return what is mirrored, in training and prediction."""
        patch_size = self.configuration.patch_size
        return mirroring(
            self.recipe.augmentation,
            patch_size,
            dummy_2d=is_anisotropic(patch_size),
            left_right=self.plans.left_right,
        )


def train_fold(run: FoldRun, *, restart: bool, on_start: Callable[[], None]) -> None:
    """Train a fold to its end; go on from its last checkpoint; leave a finished fold alone.

    Args:
        run: What to train.
        restart: Throw away what the fold has.
        on_start: Called once everything is known to fit, before anything is written or deleted.
    """
    if (run.weights_path / "final.safetensors").is_file() and not restart:
        logger.info("%s is trained already; --restart trains it anew", run.fold_path)
        return
    record = _record(run, restart)
    spec = run.folder.spec()
    labels = LabelScheme.from_spec(spec)
    entries = _entries(run)
    trainer, sampler = _put_together(run, record, labels, entries)
    on_start()
    if restart:
        shutil.rmtree(run.fold_path, ignore_errors=True)
    write(run.fold_path / "run.json", record)
    write(run.fold_path / SPLIT_FILE, run.split)
    checkpoints, journal = run.fold_path / "checkpoints", Journal(run.fold_path / "journal.jsonl")
    state = load_checkpoint(checkpoints)
    if state is not None:
        trainer.load_state_dict(state)
        logger.info("going on from iteration %d", trainer.length.iteration)
    journal.cut_back(trainer.epoch)
    saver = _Saver(run, record, trainer)
    total = trainer.length.num_iterations
    with (
        progress_bar(total, f"train {run.fold}", shown=run.progress, unit="step") as bar,
        closing(batches(sampler, first=trainer.length.iteration)) as source,
    ):
        bar.update(trainer.length.iteration)
        run_loop(
            trainer,
            batches=source,
            validation_batches=lambda: _validation_batches(run, sampler, entries),
            observers=[journal, _Picture(journal, run.fold_path / "progress.png")],
            save_checkpoint=saver,
            on_iteration=lambda loss: _tick(bar, trainer, loss),
        )
    saver.finish()
    progress_figure(journal.rows(), run.fold_path / "progress.png")


def _record(run: FoldRun, restart: bool) -> FoldRecord:
    """Return what the fold was started with, or what it is started with now.

    Raises:
        ConfigError: If it was started otherwise.
    """
    planned = run.length.iterations
    if run.length.epochs is not None:
        planned = run.length.epochs * run.recipe.iterations_per_epoch
    budget = run.length.budget_seconds
    if not restart:
        check_record(
            run.fold_path, seed=run.seed, budget_seconds=budget, planned_iterations=planned
        )
        record = read_record(run.fold_path)
        if record is not None:
            return record
    if planned is None and budget is None:
        planned = run.recipe.epochs * run.recipe.iterations_per_epoch
    device = pick_device(run.device)
    dtype = autocast_dtype(device, run.recipe.precision)
    return FoldRecord(
        seed=run.seed or 0,
        planned_iterations=planned,
        budget_seconds=budget,
        device=str(device),
        precision=str(dtype or torch.float32).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def _tick(bar: Any, trainer: Trainer, loss: float | None) -> None:
    if bar.disable:
        return
    bar.total = trainer.length.estimated_iterations()
    if loss is not None:
        bar.set_postfix_str(f"loss {loss:.3f}, {trainer.length.progress:.0%}", refresh=False)
    bar.update()


def _put_together(
    run: FoldRun, record: FoldRecord, labels: LabelScheme, entries: dict[str, Entry]
) -> tuple[Trainer, PatchSampler]:
    recipe, configuration = run.recipe, run.configuration
    seed = _seed(record.seed, run.fold)
    device = pick_device(run.device)
    network = build_network(
        configuration.architecture,
        num_inputs=len(configuration.normalization),
        num_logits=labels.num_logits,
        deep_supervision=recipe.loss.deep_supervision,
        generator=torch.Generator().manual_seed(seed),
    )
    patch_size = configuration.patch_size
    augmenter = Augmenter(
        recipe.augmentation,
        patch_size,
        mask_channels=configuration.use_mask_for_norm,
        dummy_2d=is_anisotropic(patch_size),
        mirroring=_said(run),
        swaps=_swaps(run, labels),
    )
    partial = partial_annotations(run.folder.spec(), labels)
    batch_dice = recipe.loss.batch_dice
    parts = Parts(
        network=network,
        loss=build_loss(
            recipe.loss.name,
            batch_dice=configuration.batch_dice if batch_dice is None else batch_dice,
            has_regions=labels.has_regions,
            is_partial=bool(partial),
        ),
        augmenter=augmenter,
        labels=labels,
        device=device,
        dtype=autocast_dtype(device, recipe.precision),
        seed=seed,
    )
    sampler = PatchSampler(
        entries=entries,
        case_ids=run.split.train,
        patch_size=patch_size,
        read_size=lambda k: augmenter.read_size(sample_seed(seed, k)),
        batch_size=recipe.sampling.batch_size or configuration.batch_size,
        foreground_fraction=recipe.sampling.foreground_fraction,
        structures=tuple(labels.foreground.values()),
        seed=seed,
        partial=partial,
    )
    length = Length(
        num_iterations=record.planned_iterations,
        budget_seconds=record.budget_seconds,
        started=run.started,
    )
    return Trainer(recipe, parts, length), sampler


def _swaps(run: FoldRun, labels: LabelScheme) -> tuple[tuple[int, int], ...]:
    """Return the label indices that change places where mirroring exchanges left and right."""
    sides = run.plans.left_right
    return () if sides is None or sides.policy == "forbid" else labels.channel_pairs(sides.pairs)


def _said(run: FoldRun) -> Mirroring:
    """Return what is mirrored; a wish of the recipe that is not granted is said aloud."""
    asked = set(run.recipe.augmentation.mirror_axes or ())
    refused = sorted(asked - set(run.mirroring.axes))
    if refused and run.recipe.augmentation.backend != "none":
        logger.warning(
            "augmentation.mirror_axes has %s, but the plans forbid it: labels have a left and a "
            "right form. Not mirrored; left_right in the plans says otherwise.",
            ", ".join(map(str, refused)),
        )
    return run.mirroring


def _seed(seed: int, fold: str) -> int:
    """Return the seed of a fold; folds of one run differ."""
    number = fold.removeprefix("fold_")
    return seed * 1000 + (int(number) if number.isdigit() else 999)


def _entries(run: FoldRun) -> dict[str, Entry]:
    """Open the cases of the fold, in memory where they fit."""
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
    entries = {case: store.open(index[case]) for case in cases}
    needed = sum(entry.memory_bytes for entry in entries.values())
    if needed <= _CACHE_SHARE * free_memory_bytes():
        return {case: entry.loaded() for case, entry in entries.items()}
    logger.info("preprocessed cases (%.1f GB) stay on disk", needed / 1e9)
    return entries


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


def _validation_batches(
    run: FoldRun, sampler: PatchSampler, entries: dict[str, Entry]
) -> Iterable[Batch]:
    """Return the same validation patches every epoch, cut at their final size."""
    count = run.recipe.validation_iterations
    if not run.split.validation or count == 0:
        return ()
    chosen = replace(
        sampler,
        entries=entries,
        case_ids=run.split.validation,
        read_size=None,
        seed=sampler.seed + 500,
    )
    return _first(batches(chosen, first=0), count)


def _first(source: Generator[Batch], count: int) -> Iterator[Batch]:
    with closing(source) as open_source:
        yield from islice(open_source, count)


class _Picture:
    """Redraws the progress picture, at most every half minute."""

    def __init__(self, journal: Journal, path: Path) -> None:
        self._journal, self._path, self._drawn = journal, path, time.monotonic()

    def on_epoch_end(self, row: Any) -> None:
        """Redraw if it is time."""
        if time.monotonic() - self._drawn > 30:
            self._drawn = time.monotonic()
            try:
                progress_figure(self._journal.rows(), self._path)
            except OSError as error:
                logger.warning("the progress picture could not be written: %s", error)


class _Saver:
    """Writes checkpoints when it is time, the best weights when they are, the final at the end."""

    def __init__(self, run: FoldRun, record: FoldRecord, trainer: Trainer) -> None:
        self._run, self._record, self._trainer = run, record, trainer
        self._saved = time.monotonic()

    def __call__(self) -> None:
        if self._trainer.is_best:
            self._save("best")
        if time.monotonic() - self._saved > _CHECKPOINT_SECONDS:
            self._checkpoint()

    def _checkpoint(self) -> None:
        folder = self._run.fold_path / "checkpoints"
        save_checkpoint(folder, self._trainer.length.iteration, self._trainer.state_dict())
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Write the final weights and what the run was."""
        self._checkpoint()
        self._save("final")
        trained = self._record.model_copy(
            update={
                "iterations": self._trainer.length.iteration,
                "epochs": self._trainer.epoch,
                "seconds_to_last_step": self._trainer.seconds_to_last_step,
                "skipped_steps": self._trainer.num_skipped,
                "best_patch_dice": self._trainer.best_dice,
            }
        )
        write(self._run.fold_path / "run.json", trained)

    def _save(self, name: str) -> None:
        metadata = {"iteration": str(self._trainer.length.iteration), "fold": self._run.fold}
        self._run.weights_path.mkdir(parents=True, exist_ok=True)
        path = self._run.weights_path / f"{name}.safetensors"
        save_weights(path, self._trainer.weights(), metadata)


def trained_weights(run: FoldRun) -> dict[str, Path]:
    """Return checkpoint -> weight file of a fold, empty if it is not trained."""
    names = ("final", "best")
    paths = {name: run.weights_path / f"{name}.safetensors" for name in names}
    return {name: path for name, path in paths.items() if path.is_file()}
