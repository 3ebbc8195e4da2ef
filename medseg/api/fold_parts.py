"""The parts of a fold's training, put together from recipe and plans."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from medseg.api.fold_run import FoldRun
from medseg.api.run_folder import FoldRecord
from medseg.augment.pipeline import Augmenter
from medseg.augment.settings import is_anisotropic
from medseg.augment.streams import sample_seed
from medseg.data.loader import Batch, batches, loader_threads
from medseg.data.patches import PatchSampler, partial_annotations
from medseg.data.store import Entry
from medseg.labels import LabelScheme
from medseg.losses.deep_supervision import build_loss
from medseg.models.build import build_network
from medseg.models.precision import autocast_dtype, pick_device
from medseg.train.feed import Preparer, Samples, feed
from medseg.train.schedule import Length
from medseg.train.timing import Clock
from medseg.train.trainer import Parts, Trainer

logger = logging.getLogger(__name__)

_VALIDATION_SEED = 500
"""Added to a fold's seed for its validation patches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldParts:
    """A trainer, and what feeds it."""

    trainer: Trainer
    sampler: PatchSampler
    preparer: Preparer
    validation: PatchSampler | None
    """Cuts validation patches; None: there are none."""
    validation_batches: int
    num_sharing: int
    """Processes that share this machine's processors."""

    def samples(self) -> Generator[Samples]:
        """Yield augmented training batches from the trainer's next iteration on, without end."""
        source = self._batches(self.sampler, first=self.trainer.length.iteration)
        return feed(source, self.preparer, self.trainer.clock)

    def validation_samples(self) -> Iterator[Samples]:
        """Yield the validation batches, the same in every epoch."""
        if self.validation is None:
            return
        device = self.trainer.parts.device
        with closing(self._batches(self.validation, first=0)) as source:
            chosen = islice(source, self.validation_batches)
            yield from feed(chosen, self.preparer, Clock(device), augment=False)

    def _batches(self, sampler: PatchSampler, *, first: int) -> Generator[Batch]:
        """Return batches on the host, cut by this process's share of the processors."""
        threads = loader_threads(self.num_sharing)
        return batches(sampler, first=first, num_threads=threads, finish=self.preparer.pinned)


def put_together(
    run: FoldRun,
    record: FoldRecord,
    entries: dict[str, Entry],
    previous: Mapping[str, Any] | None = None,
) -> FoldParts:
    """Build the network, the loss, the augmentation and the sampler of a fold; nothing is run.

    Args:
        run: The fold.
        record: What was settled at its start.
        entries: Its preprocessed cases.
        previous: Case id -> (*spatial) labels that the stage before found, in a cascade.

    Raises:
        ConfigError: If the recipe does not fit the plans.
    """
    labels = LabelScheme.from_spec(run.folder.spec())
    recipe, seed, device = run.recipe, fold_seed(record.seed, run.fold), pick_device(run.device)
    augmenter = _augmenter(run, labels)
    inputs = len(run.configuration.normalization) + labels.num_previous(run.configuration)
    parts = Parts(
        num_inputs=inputs,
        network=build_network(
            run.configuration.architecture,
            num_inputs=inputs,
            num_logits=labels.num_logits,
            patch_size=run.configuration.patch_size,
            deep_supervision=recipe.loss.deep_supervision,
            generator=torch.Generator().manual_seed(seed),
        ),
        loss=_loss(run, labels),
        labels=labels,
        device=device,
        dtype=autocast_dtype(device, record.precision_name),
        processes=run.processes,
    )
    length = Length(
        num_iterations=record.stretch.planned_iterations,
        budget_seconds=record.stretch.budget_seconds,
        started=run.started,
    )
    sampler = _sampler(run, labels, entries, seed, augmenter, previous)
    return FoldParts(
        trainer=Trainer(recipe, parts, length),
        sampler=sampler,
        preparer=Preparer(augmenter, labels, device, seed),
        validation=_validation_sampler(run, sampler),
        validation_batches=recipe.validation_iterations,
        num_sharing=run.num_sharing,
    )


def fold_seed(seed: int, fold: str) -> int:
    """Return the seed of a fold; folds of one run differ."""
    number = fold.removeprefix("fold_")
    return seed * 1000 + (int(number) if number.isdigit() else 999)


def _loss(run: FoldRun, labels: LabelScheme) -> Any:
    recipe = run.recipe.loss
    is_partial = bool(partial_annotations(run.folder.spec(), labels))
    planned = run.configuration.batch_dice
    return build_loss(
        recipe.name,
        batch_dice=planned if recipe.batch_dice is None else recipe.batch_dice,
        has_regions=labels.has_regions,
        is_partial=is_partial,
        options=recipe.options,
    )


def _augmenter(run: FoldRun, labels: LabelScheme) -> Augmenter:
    _say_refused_axes(run)
    sides = run.plans.left_right
    swaps = sides is not None and sides.policy != "forbid"
    return Augmenter(
        run.recipe.augmentation,
        run.configuration.patch_size,
        mask_channels=run.configuration.use_mask_for_norm,
        dummy_2d=is_anisotropic(run.configuration.patch_size),
        mirroring=run.mirroring,
        swaps=labels.channel_pairs(sides.pairs) if sides is not None and swaps else (),
        num_previous=labels.num_previous(run.configuration),
    )


def _say_refused_axes(run: FoldRun) -> None:
    """Say aloud that a wish of the recipe is not granted."""
    asked = set(run.recipe.augmentation.mirror_axes or ())
    refused = sorted(asked - set(run.mirroring.axes))
    if refused and run.recipe.augmentation.backend != "none":
        logger.warning(
            "augmentation.mirror_axes has %s, but the plans forbid it: labels have a left and a "
            "right form. Not mirrored; left_right in the plans says otherwise.",
            ", ".join(map(str, refused)),
        )


def _sampler(
    run: FoldRun,
    labels: LabelScheme,
    entries: dict[str, Entry],
    seed: int,
    augmenter: Augmenter,
    previous: Mapping[str, Any] | None,
) -> PatchSampler:
    sampling = run.recipe.sampling
    return PatchSampler(
        entries=entries,
        case_ids=run.split.train,
        patch_size=run.configuration.patch_size,
        read_size=lambda k: augmenter.read_size(sample_seed(seed, k)),
        batch_size=run.batch_size,
        foreground_fraction=sampling.foreground_fraction,
        foreground_from=sampling.foreground_from,
        foreground_unit=sampling.foreground_unit,
        structures=tuple(labels.foreground.values()),
        seed=seed,
        partial=partial_annotations(run.folder.spec(), labels),
        previous=previous,
        positions=run.processes.positions(run.batch_size),
    )


def _validation_sampler(run: FoldRun, sampler: PatchSampler) -> PatchSampler | None:
    """Return what cuts the same validation patches every epoch, at their final size."""
    if not run.split.validation or run.recipe.validation_iterations == 0:
        return None
    seed = sampler.seed + _VALIDATION_SEED
    return replace(sampler, case_ids=run.split.validation, read_size=None, seed=seed)
