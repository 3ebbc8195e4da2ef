"""Bundles made of bundles, in memory: models that work one after the other, or are averaged.

A chain brings an image to its own grid (canonical axes, resampled), lets every part find its labels
there, merges them and brings the label map back. What a part's network makes of the image and its
logits are gone before the next part begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from medseg.bundles.bundle import Bundle
from medseg.bundles.files import MANIFEST, file_checksum
from medseg.bundles.members import AnyBundle, Composite
from medseg.errors import BundleError, ConfigError
from medseg.execute.resources import resident_bytes
from medseg.geometry import SpatialRecord
from medseg.infer.chain_grid import Values, grid_of, merge, record_of, to_chain_grid, to_image
from medseg.infer.export import Reduced
from medseg.infer.jobs import Computed, Job, Prepared
from medseg.infer.maps import NO_MAPS
from medseg.infer.member import Member, Ready
from medseg.infer.memory import Limits
from medseg.infer.model import Model
from medseg.infer.quality import image_flags
from medseg.infer.result import Options, Result, Tta
from medseg.infer.rows import Progress, StoppedError
from medseg.infer.source import Source, read_case
from medseg.labels import LabelScheme
from medseg.postprocess import apply as apply_postprocessing
from medseg.schema.bundle import ChainManifest, EnsembleManifest

USUAL_STEP = 0.5
"""The step of whoever asks for none."""

LoadMember = Callable[[Bundle], Member]


def load_composite(
    bundle: Composite, load_member: LoadMember, *, limits: Limits, checkpoint: str
) -> Model:
    """Bring a bundle made of bundles into memory.

    Args:
        bundle: Verified.
        load_member: Brings a bundle of one model or cascade into memory.
        limits: What it may take.
        checkpoint: Which weights `load_member` takes.

    Raises:
        BundleError: If weights are missing or do not fit, or need code that is not trusted.
    """
    if isinstance(bundle.manifest, EnsembleManifest):
        members = [
            load_member(replace(member, postprocessing=bundle.postprocessing))
            for member in bundle.members.values()
            if isinstance(member, Bundle)
        ]
        return Ensemble(bundle, members, limits=limits, checkpoint=checkpoint)
    parts = {
        name: _load_part(member, load_member, limits=limits, checkpoint=checkpoint)
        for name, member in bundle.members.items()
    }
    return Chain(bundle, parts, limits=limits, checkpoint=checkpoint)


def _load_part(
    bundle: AnyBundle, load_member: LoadMember, *, limits: Limits, checkpoint: str
) -> Model:
    if isinstance(bundle, Bundle):
        return Model([load_member(bundle)], limits=limits, checkpoint=checkpoint)
    return load_composite(bundle, load_member, limits=limits, checkpoint=checkpoint)


class Ensemble(Model):
    """Several bundles in one, whose probabilities are averaged."""

    def __init__(
        self, bundle: Composite, members: Sequence[Member], *, limits: Limits, checkpoint: str
    ) -> None:
        """Take over members, which have the ensemble's postprocessing instead of their own."""
        if not isinstance(bundle.manifest, EnsembleManifest):
            raise BundleError(f"{bundle.folder}: is a {bundle.manifest.kind}, not an ensemble.")
        weights = list(bundle.manifest.weights.values())
        super().__init__(members, weights=weights, limits=limits, checkpoint=checkpoint)
        self.bundle = bundle

    @cached_property
    def sha256(self) -> str:
        """Return a checksum of everything the model is made of: of its own `bundle.json`."""
        return file_checksum(self.bundle.folder / MANIFEST)


class Chain(Model):
    """Models that work one after the other, with the face of one; safe to call from many threads.

    It gives label maps; probabilities and the like are those of its parts.
    """

    def __init__(
        self,
        bundle: Composite,
        parts: Mapping[str, Model],
        *,
        limits: Limits,
        checkpoint: str,
    ) -> None:
        """Take over the models of a chain's members, by their names."""
        if not isinstance(bundle.manifest, ChainManifest):
            raise BundleError(f"{bundle.folder}: is an {bundle.manifest.kind}, not a chain.")
        lead = next(iter(parts.values()))
        super().__init__(lead.members, limits=limits, checkpoint=checkpoint)
        self.parts = dict(parts)
        self.members = tuple(member for part in parts.values() for member in part.members)
        self.shares = ()
        self.bundle = bundle
        self.labels = LabelScheme.from_spec(bundle.spec)
        self._chain = bundle.manifest.chain
        self._stored = bundle.postprocessing
        self._turn = threading.Lock()

    @property
    def folds(self) -> tuple[str, ...]:
        """Return the folds of every part, with its name: "organs/fold_0"."""
        return tuple(f"{name}/{fold}" for name, part in self.parts.items() for fold in part.folds)

    @property
    def previous(self) -> Model | None:
        """Return None: the stages before are those of the parts."""
        return None

    @cached_property
    def sha256(self) -> str:
        """Return a checksum of everything the model is made of: of its own `bundle.json`."""
        return file_checksum(self.bundle.folder / MANIFEST)

    def options(
        self,
        maps: Collection[str] = (),
        *,
        tta: Tta = "auto",
        step: float = USUAL_STEP,
        postprocess: bool = True,
        folder: Path | None = None,
    ) -> Options:
        """Return options; what is asked for by nobody is as the chain has it.

        Raises:
            ConfigError: If an option is out of range, or a map is wanted.
        """
        wanted = Options(
            maps=frozenset(maps), tta=tta, step=step, postprocess=postprocess, folder=folder
        )
        if wanted.maps:
            raise ConfigError(
                f"{', '.join(sorted(wanted.maps))}: a chain of models merges label maps and has "
                "none. Leave it out, or predict with one part, a folder in "
                f"{self.bundle.folder / 'members'}."
            )
        return replace(
            wanted,
            tta="none" if tta == "auto" and not self._chain.mirror else tta,
            step=self._chain.step if step == USUAL_STEP else step,
        )

    def prepare(self, job: Job) -> Prepared:
        """Read a case and bring it to the grid the parts work on."""
        start = time.perf_counter()
        if job.previous_stage is not None:
            raise ConfigError("previous_stage is given, but a chain has no stage before it.")
        self._check_room(job.name, self._own_bytes + job.size_bytes)
        source = read_case(job.case, job.name)
        self._check_channels(source)
        record = record_of(source.grid, self._chain.spacing)
        self._check_room(job.name, resident_bytes() + _resample_bytes(source, record))
        image = to_chain_grid(source.channels, record, self._chain)
        return Prepared(
            name=job.name,
            readies=(Ready(image=torch.from_numpy(image), record=record),),
            grid=source.grid,
            header=source.header,
            flags=image_flags(source.channels, source.grid, self.bundle.spec.channels, None),
            seconds=time.perf_counter() - start,
        )

    def compute(
        self,
        pairs: Sequence[tuple[Job, Prepared]],
        options: Options,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[Computed | Exception]:
        """Let the parts work on prepared cases, one after the other.

        Returns:
            What came of each case, or what went wrong with it.
        """
        outcomes: list[Computed | Exception] = []
        for job, prepared in pairs:
            try:
                with self._turn:
                    outcomes.append(self._compute_one(job, prepared, options, should_stop))
            except StoppedError:
                raise
            except Exception as error:
                outcomes.append(error)
        return outcomes

    def _compute_one(
        self, job: Job, prepared: Prepared, options: Options, should_stop: Callable[[], bool]
    ) -> Computed:
        start = time.perf_counter()
        ready = prepared.readies[0]
        image, grid = ready.image.numpy(), grid_of(ready.record, self._chain.spacing)
        merged: Values = np.full(grid.shape, self.labels.background, self.labels.value_dtype)
        is_mirrored = False
        for number, steps in enumerate(self._chain.parts):
            part = self.parts[steps.member]
            told = _told(job.progress, number, len(self._chain.parts))
            own = Job(name=job.name, case=(image, grid.affine), progress=told)
            computed = _computed(part, own, options, should_stop)
            is_mirrored |= computed.is_mirrored
            found = part.finish(computed, options).segmentation
            del computed  # and with it the part's own image
            merge(merged, found, steps.values, part.labels, self.labels.background)
        if self._stored is not None and options.postprocess:
            voxel_mm3 = abs(float(np.linalg.det(grid.affine[:3, :3])))
            merged = apply_postprocessing(
                merged, self._stored, self.labels.structures, self.labels.background, voxel_mm3
            )
        return Computed(
            prepared=prepared,
            reduced=Reduced(segmentation=to_image(merged, ready.record), disagreement=None),
            maps=NO_MAPS,
            is_mirrored=is_mirrored,
            seconds=time.perf_counter() - start,
        )

    def finish(self, computed: Computed, options: Options) -> Result:
        """Measure and judge the merged label map, which has been postprocessed already."""
        result = super().finish(computed, replace(options, postprocess=False))
        return replace(result, is_postprocessed=self._stored is not None and options.postprocess)


def _computed(part: Model, job: Job, options: Options, should_stop: Callable[[], bool]) -> Computed:
    """Return what a part makes of the chain's image."""
    own = part.options(tta=options.tta, step=options.step, postprocess=options.postprocess)
    own = replace(own, folder=options.folder, disagreement=False)
    (computed,) = part.compute([(job, part.prepare(job))], own, should_stop)
    if isinstance(computed, Exception):
        raise computed
    return computed


def _told(progress: Progress | None, number: int, parts: int) -> Progress | None:
    """Return what a part tells of its tiles, as if all parts had as many."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, parts * total)


def _resample_bytes(source: Source, record: SpatialRecord) -> float:
    """Return what bringing an image to a chain's grid takes beside the image itself."""
    before, after = float(np.prod(source.grid.shape)), float(np.prod(record.shape_network))
    return 8 * (before + after) + 4 * len(source.channels) * after
