"""Load models once, then predict: one case or many, from files or from memory."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.bundles.bundle import MANIFEST
from medseg.bundles.members import AnyBundle
from medseg.errors import BundleError, ConfigError, DatasetError, MedsegError, case_context
from medseg.execute.resources import free_memory_bytes, resident_bytes
from medseg.execute.sizes import size_words
from medseg.geometry import SpatialRecord
from medseg.infer import pipeline
from medseg.infer.engine import Engine, Work
from medseg.infer.export import volumes_ml
from medseg.infer.jobs import Computed, Job, Prepared
from medseg.infer.maps import NO_MAPS, ArrayMaps, Maps
from medseg.infer.member import Member
from medseg.infer.memory import FREE_SHARE, Limits
from medseg.infer.quality import disagreement_flags, image_flags, segmentation_flags
from medseg.infer.result import MAPS, CaseError, Options, Result, Tta
from medseg.infer.source import (
    Case,
    Source,
    bytes_in_memory,
    case_name,
    read_case,
    read_label_map,
)
from medseg.postprocess import apply as apply_postprocessing

logger = logging.getLogger(__name__)

T = TypeVar("T")

_AHEAD = 0.1
"""Under a memory limit, images are read ahead while they are smaller than this part of it."""


class Model:
    """Networks in memory with all that is needed to use them; safe to call from many threads."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        weights: Sequence[float] | None = None,
        limits: Limits | None = None,
        checkpoint: str = "final",
    ) -> None:
        """Take over members, the first of which leads.

        Raises:
            BundleError: If members do not go together.
            ConfigError: If weights make no sense.
        """
        same_kind(members)
        self.members = tuple(members)
        self.bundle: AnyBundle = members[0].bundle
        self.labels = members[0].labels
        self.device, self.checkpoint = members[0].device, checkpoint
        self.limits = limits or Limits()
        self._own_bytes = resident_bytes()
        room = self.limits.memory_bytes
        if room is not None and room < self._own_bytes:
            raise ConfigError(
                f"max_memory is {size_words(room)}, and {size_words(self._own_bytes)} are taken by "
                "the program and its networks alone; expected more, such as 4GB."
            )
        if any(m.bundle.postprocessing != self.bundle.postprocessing for m in members):
            logger.warning(
                "the postprocessing of %s is applied to the mean; that of the other models is not",
                self.bundle.folder,
            )
        self.shares = _shares(weights, len(members))
        self._engine = Engine(members, self.shares, self.limits)

    @property
    def folds(self) -> tuple[str, ...]:
        """Return the folds that are averaged; of several bundles with their place: "0/fold_1"."""
        if len(self.members) == 1:
            return self.members[0].folds
        return tuple(
            f"{number}/{fold}" for number, member in enumerate(self.members)
            for fold in member.folds
        )  # fmt: skip

    @property
    def previous(self) -> Model | None:
        """Return the stage before the first member, in a cascade."""
        before = self.members[0].previous
        return None if before is None else Model([before], limits=self.limits)

    @cached_property
    def sha256(self) -> str:
        """Return a checksum of everything the model is made of: of its `bundle.json` files."""
        manifests = [(member.bundle.folder / MANIFEST).read_bytes() for member in self.members]
        if len(manifests) == 1:
            return hashlib.sha256(manifests[0]).hexdigest()
        parts = [hashlib.sha256(manifest).digest() for manifest in manifests]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    @property
    def precision(self) -> str:
        """Return the arithmetic of the networks."""
        dtype = self.members[0].dtype
        return "float32" if dtype is None else str(dtype).removeprefix("torch.")

    def predict(  # noqa: PLR0913 - all but the case by keyword
        self,
        case: Case,
        *,
        previous_stage: Case | None = None,
        probabilities: bool = False,
        entropy: bool = False,
        disagreement: bool = False,
        tta: Tta = "auto",
        step: float = 0.5,
        postprocess: bool = True,
    ) -> Result:
        """Segment one case.

        Args:
            case: Path, list of channel paths (one case), tuple (array (C,I,J,K) or (I,J,K),
                affine), SimpleITK image, nibabel image, or a list of such images.
            previous_stage: In a cascade, a label map on the image's grid that takes the place of
                what the first stage finds: a path, an array (I,J,K) or an image object.
            probabilities: Also return the probabilities of every channel.
            entropy: Also return how undecided the networks are.
            disagreement: Also return how many networks decide otherwise than their mean.
            tta: "flips" averages over mirrored images, "none" does not; "auto" does on a GPU, and
                on the CPU where it takes no more than minutes.
            step: Largest shift between tiles, as a fraction of the tile.
            postprocess: Apply the postprocessing that is stored in the bundle.

        Raises:
            DatasetError: If the case cannot be read or has the wrong number of channels.
            ConfigError: If an option is out of range, or memory does not suffice.
        """
        wanted = _wanted(probabilities=probabilities, entropy=entropy, disagreement=disagreement)
        options = self.options(wanted, tta=tta, step=step, postprocess=postprocess)
        job = Job(name=case_name(case), case=case, previous_stage=previous_stage)
        with case_context(job.name):
            (computed,) = self.compute([(job, self.prepare(job))], options)
            if isinstance(computed, Exception):
                raise computed
            return self.finish(computed, options)

    def predict_many(
        self,
        cases: Iterable[Case],
        *,
        probabilities: bool = False,
        entropy: bool = False,
        disagreement: bool = False,
        tta: Tta = "auto",
        step: float = 0.5,
        postprocess: bool = True,
    ) -> Iterator[Result | CaseError]:
        """Segment cases, in order; a bad case becomes a `CaseError`.

        While the networks work on one case, a thread reads and prepares the next, and another
        finishes the one before.

        Args:
            cases: Cases as `predict` takes them.
            probabilities: As in `predict`.
            entropy: As in `predict`.
            disagreement: As in `predict`.
            tta: As in `predict`.
            step: As in `predict`.
            postprocess: As in `predict`.
        """
        if isinstance(cases, (str, Path)):
            raise TypeError(f"cases is {str(cases)!r}; expected several cases, such as a list")
        wanted = _wanted(probabilities=probabilities, entropy=entropy, disagreement=disagreement)
        options = self.options(wanted, tta=tta, step=step, postprocess=postprocess)
        jobs = (
            Job(
                name=case_name(case, fallback=f"case {number}"),
                case=case,
                size_bytes=bytes_in_memory(case),
            )
            for number, case in enumerate(cases)
        )
        return self.run(
            jobs, options, finish=lambda job, result: result,
            fail=lambda job, error: CaseError(case=job.name, message=error_words(error)),
        )  # fmt: skip

    def run(
        self,
        jobs: Iterable[Job],
        options: Options,
        *,
        finish: Callable[[Job, Result], T],
        fail: Callable[[Job, Exception], T],
    ) -> Iterator[T]:
        """Predict jobs in three stages side by side, and yield what became of each, in order.

        Args:
            jobs: What is to be predicted.
            options: How.
            finish: Called with each result, in the last stage's thread.
            fail: Called with what went wrong with a job.
        """
        stop = threading.Event()
        stages: pipeline.Stages[Job, T] = pipeline.Stages(
            prepare=self.prepare,
            compute=lambda pairs: self.compute(pairs, options, stop.is_set),
            finish=lambda job, computed: finish(job, self.finish(computed, options)),
            fail=fail,
            size=lambda job: job.size_bytes,
            together=self.members[0].batch if self.limits == Limits() else 1,
        )
        room = self.limits.memory_bytes
        gate = pipeline.Gate(
            FREE_SHARE * free_memory_bytes() if room is None else _AHEAD * (room - self._own_bytes)
        )
        return pipeline.run(jobs, stages, stop, gate)

    def prepare(self, job: Job) -> Prepared:
        """Read a case and bring it into the network frame of every member."""
        start = time.perf_counter()
        self._check_room(job.name, self._own_bytes + job.size_bytes)
        source = read_case(job.case, job.name)
        self._check_channels(source)
        for member in self.members:
            self._check_room(job.name, resident_bytes() + member.preprocess_bytes(source))
        told = None
        if job.previous_stage is not None:
            told = read_label_map(job.previous_stage, source)
        return Prepared(
            name=job.name,
            readies=tuple(member.ready(source, told) for member in self.members),
            grid=source.grid,
            header=source.header,
            flags=image_flags(
                source.channels, source.grid, self.bundle.spec.channels, self.bundle.training
            ),
            seconds=time.perf_counter() - start,
        )

    def compute(
        self,
        pairs: Sequence[tuple[Job, Prepared]],
        options: Options,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[Computed | Exception]:
        """Run the networks on prepared cases and bring what they find to the images' grids.

        Small images that are ready together share batches where batches are of any use.

        Returns:
            What came of each case, or what went wrong with it: a `BundleError` where the networks
            return values that are not finite, a `ConfigError` where memory does not suffice.
        """
        start = time.perf_counter()
        works = [self._work(job, prepared, options, should_stop) for job, prepared in pairs]
        able = [work for work in works if isinstance(work, Work)]
        found = iter(self._engine.reduce_together(able))
        seconds = (time.perf_counter() - start) / len(pairs)
        outcomes: list[Computed | Exception] = []
        for work in works:
            if isinstance(work, Exception):
                outcomes.append(work)
                continue
            outcome = next(found)
            if isinstance(outcome, Exception):
                outcomes.append(outcome)
                continue
            outcomes.append(
                Computed(
                    prepared=work.prepared,
                    reduced=outcome,
                    maps=work.maps,
                    is_mirrored=bool(self._mirror_axes(work.prepared, options)),
                    seconds=seconds,
                )
            )
        return outcomes

    def _work(
        self, job: Job, prepared: Prepared, options: Options, should_stop: Callable[[], bool]
    ) -> Work | Exception:
        """Return what the engine works on, or what went wrong where its maps should go."""
        maps: Maps = NO_MAPS
        try:
            if job.maps_of is not None:
                maps = job.maps_of(prepared)
            elif options.maps:
                maps = ArrayMaps(options.maps, prepared.grid.shape, self.labels.num_logits)
        except Exception as error:
            return error
        return Work(
            prepared=prepared,
            options=options,
            maps=maps,
            progress=job.progress,
            should_stop=should_stop,
        )

    def _mirror_axes(self, prepared: Prepared, options: Options) -> tuple[int, ...]:
        return self.members[0].mirror_axes(prepared.readies[0].image, options)

    def finish(self, computed: Computed, options: Options) -> Result:
        """Postprocess, measure and judge what the networks found."""
        start = time.perf_counter()
        prepared, found = computed.prepared, computed.reduced.segmentation
        affine, stored = prepared.grid.affine, self.bundle.postprocessing
        if stored is not None and options.postprocess:
            found = apply_postprocessing(
                found,
                stored,
                self.labels.structures,
                self.labels.background,
                prepared.grid.voxel_mm3,
            )
        volumes = volumes_ml(found, affine, self.labels)
        flags = prepared.flags + segmentation_flags(
            found, affine, self.labels.structures, volumes, self.bundle.training
        )
        if computed.reduced.disagreement is not None:
            flags += disagreement_flags(computed.reduced.disagreement)
        arrays = getattr(computed.maps, "arrays", {})
        return Result(
            case=prepared.name,
            segmentation=found,
            **{kind: arrays.get(kind) for kind in MAPS},
            affine=affine,
            labels=dict(self.bundle.spec.labels),
            volumes_ml=volumes,
            flags=flags,
            record=prepared.readies[0].record,
            header=prepared.header,
            entries=self.entries,
            is_mirrored=computed.is_mirrored,
            is_postprocessed=stored is not None and options.postprocess,
            seconds={
                "prepare": prepared.seconds,
                "network": computed.seconds,
                "finish": time.perf_counter() - start,
            },
        )

    @property
    def entries(self) -> Any:
        """Return names and colours of the label values."""
        from medseg.infer.outputs import label_entries

        return label_entries(self.labels)

    def network_logits(
        self,
        image: torch.Tensor,
        record: SpatialRecord,
        options: Options,
        *,
        name: str = "case",
        previous: NDArray[np.unsignedinteger[Any]] | None = None,
    ) -> torch.Tensor:
        """Return the first bundle's logits in the network frame, see `Engine.network_logits`."""
        return self._engine.network_logits(image, record, options, name=name, previous=previous)

    def options(
        self,
        maps: Collection[str] = (),
        *,
        tta: Tta = "auto",
        step: float = 0.5,
        postprocess: bool = True,
        folder: Path | None = None,
    ) -> Options:
        """Return options, having checked that the model can do what they ask for.

        Raises:
            ConfigError: If an option is out of range, or there is nobody to disagree.
        """
        networks = sum(len(member.networks) for member in self.members)
        if "disagreement" in maps and networks < 2:
            raise ConfigError(
                "disagreement needs several networks, the model has one; leave it out of the "
                "maps to save, or take a model of several folds."
            )
        return Options(
            maps=frozenset(maps),
            tta=tta,
            step=step,
            disagreement=networks > 1,
            postprocess=postprocess,
            folder=folder,
        )

    def _check_room(self, name: str, needed: float) -> None:
        room = self.limits.memory_bytes
        if room is not None and needed > room:
            raise ConfigError(
                f"case {name!r}: reading and preprocessing take about {size_words(needed)} of "
                f"memory, {size_words(room)} may be taken. Raise --max-memory."
            )

    def _check_channels(self, source: Source) -> None:
        names = self.bundle.spec.channels
        if len(source.channels) != len(names):
            raise DatasetError(
                f"case {source.name!r}: got {len(source.channels)} channel"
                f"{'s' if len(source.channels) > 1 else ''}, expected {len(names)} "
                f"({', '.join(names)}). Give one image per channel, in this order; an array is "
                "(C, I, J, K)."
            )


def _wanted(**wanted: bool) -> frozenset[str]:
    return frozenset(name for name, is_wanted in wanted.items() if is_wanted)


def _shares(weights: Sequence[float] | None, number: int) -> tuple[float, ...]:
    """Return the share of each of several models, with a sum of 1."""
    values = [1.0] * number if weights is None else [float(weight) for weight in weights]
    if len(values) != number or min(values) < 0 or not 0 < sum(values) < float("inf"):
        raise ConfigError(
            f"weights are {', '.join(f'{value:g}' for value in values) or 'none'}; expected "
            f"{number} number{'s' * (number > 1)} of at least 0, one for each model, not all 0."
        )
    return tuple(value / sum(values) for value in values)


def error_words(error: Exception) -> str:
    """Return what went wrong with a case, for a table."""
    return str(error) if isinstance(error, MedsegError) else f"{type(error).__name__}: {error}"


def same_kind(members: Sequence[Member]) -> None:
    """Check that members take the same images and give the same labels.

    Raises:
        BundleError: With everything that differs.
    """
    lead, problems = members[0], []
    for other in members[1:]:
        pairs = {
            "channels": (lead.bundle.spec.channels, other.bundle.spec.channels),
            "labels": (lead.bundle.spec.labels, other.bundle.spec.labels),
            "regions_class_order": (
                lead.bundle.spec.regions_class_order,
                other.bundle.spec.regions_class_order,
            ),
        }
        problems += [
            f"  {other.bundle.folder}: {what} is {found}, expected {expected}"
            for what, (expected, found) in pairs.items()
            if expected != found
        ]
    if problems:
        raise BundleError(
            "\n".join(
                [f"models that are averaged must agree with the first, {lead.bundle.folder}:",
                 *problems, "Leave these out, or predict with each on its own."]
            )
        )  # fmt: skip
