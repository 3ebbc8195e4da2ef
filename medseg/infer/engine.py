"""The networks of one or several bundles at work on one image."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.errors import MedsegError
from medseg.execute.resources import free_memory_bytes, resident_bytes
from medseg.geometry import SpatialRecord
from medseg.infer.exact import on_image_grid
from medseg.infer.export import Reduced, reduce_parts
from medseg.infer.jobs import Prepared
from medseg.infer.maps import Maps
from medseg.infer.member import Member, Ready, Task
from medseg.infer.memory import FREE_SHARE, Arrangement, Export, Limits, arrange
from medseg.infer.parts import Part
from medseg.infer.predictor import not_finite
from medseg.infer.result import Options
from medseg.infer.rows import (
    Layout,
    NotFiniteError,
    Progress,
    StoppedError,
    evaluate_together,
)
from medseg.infer.tiles import num_tiles

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SMALL = 4
"""Images of more batches than this gain nothing from sharing them."""

_SLOW_MAPS = 4.0
"""Maps are written slice by slice along K; cut along another axis they take much longer, so its
windows must be this much smaller to be chosen."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Work:
    """One image, and how its labels are to be made."""

    prepared: Prepared
    options: Options
    maps: Maps
    progress: Progress | None = None
    should_stop: Callable[[], bool] = lambda: False


class NotTogetherError(Exception):
    """Images that are predicted each alone."""


class Engine:
    """Members that work on one image after another; safe to call from many threads."""

    def __init__(self, members: Sequence[Member], shares: Sequence[float], limits: Limits) -> None:
        """Take over members.

        Args:
            members: At least one, for the same channels and labels.
            shares: Share of each in the mean, with a sum of 1.
            limits: What they may take.
        """
        self.members, self.limits = tuple(members), limits
        self._shares, self._lock = tuple(shares), threading.Lock()
        self._labels, self._device = members[0].labels, members[0].device
        self._dtype, self._has_told = members[0].dtype, False

    def reduce(self, work: Work) -> Reduced:
        """Run the networks and bring what they find to the image's grid.

        Raises:
            BundleError: If the networks return values that are not finite, in float32 too.
            ConfigError: If memory does not suffice.
            StoppedError: If somebody asked to stop.
        """
        with self._lock:
            try:
                return _finite(self._dtype, lambda dtype: self._attempt(work, dtype))
            except torch.OutOfMemoryError:
                if self._device.type != "cuda":
                    raise
                logger.warning("%s is full; sums are kept in main memory", self._device)
            torch.cuda.empty_cache()
            return _finite(self._dtype, lambda dtype: self._attempt(work, dtype, on_host=True))

    def reduce_together(self, works: Sequence[Work]) -> list[Reduced | Exception]:
        """Do the same for several small images, whose tiles share batches.

        Images that are large, mirrored differently, or too much together are predicted alone.

        Returns:
            What became of each image.

        Raises:
            StoppedError: If somebody asked to stop.
        """
        if len(works) < 2:
            return [self._alone(work) for work in works]
        with self._lock:
            try:
                return list(self._together(works))
            except (
                NotTogetherError,
                NotFiniteError,
                MedsegError,
                torch.OutOfMemoryError,
            ) as reason:
                logger.debug("images are predicted one by one (%s)", type(reason).__name__)
        return [self._alone(work) for work in works]

    def _alone(self, work: Work) -> Reduced | Exception:
        try:
            return self.reduce(work)
        except StoppedError:
            raise
        except Exception as error:
            return error

    def _together(self, works: Sequence[Work]) -> Iterator[Reduced]:
        found = [self._arranged(work, on_host=False) for work in works]
        self._check_together(works, found)
        parts = [
            list(self._parts(work, each, self._dtype))
            for work, each in zip(works, found, strict=True)
        ]
        for members in zip(*parts, strict=True):
            evaluate_together([part.source for part in members])
        for work, own in zip(works, parts, strict=True):
            yield reduce_parts(own, self._labels, work.maps)

    def _check_together(self, works: Sequence[Work], found: Sequence[Arrangement]) -> None:
        """Check that images are small, mirrored alike and fit into memory together.

        In exact mode each is predicted alone.

        Raises:
            NotTogetherError: If not.
        """
        if any(member.is_exact for member in self.members):
            raise NotTogetherError
        resident = resident_bytes()
        need = sum(each.need_bytes - resident for each in found)
        fits = need <= FREE_SHARE * free_memory_bytes() and all(each.is_plain for each in found)
        mirrorings = {
            tuple(
                member.mirror_axes(ready.image, work.options)
                for member, ready in zip(self.members, work.prepared.readies, strict=True)
            )
            for work in works
        }
        pairs = [
            (member, ready)
            for work in works
            for member, ready in zip(self.members, work.prepared.readies, strict=True)
        ]
        step = works[0].options.step
        are_small = all(
            num_tiles(ready.image.shape[1:], member.tile, step) <= _SMALL * member.batch
            for member, ready in pairs
        )
        if self.limits != Limits() or not (fits and are_small and len(mirrorings) == 1):
            raise NotTogetherError

    def network_logits(
        self,
        image: torch.Tensor,
        record: SpatialRecord,
        options: Options,
        *,
        name: str = "case",
        previous: NDArray[np.unsignedinteger[Any]] | None = None,
    ) -> torch.Tensor:
        """Return the first member's logits of a preprocessed image, in the network frame.

        Args:
            image: (C, n0, n1, n2) float32, preprocessed for the bundle's configuration.
            record: How it was.
            options: Mirroring and tiles.
            name: What the log calls the case.
            previous: (n0, n1, n2) label indices that the stage before found, in a cascade.

        Returns:
            (L, n0, n1, n2) float32, on the CPU.
        """
        ready = Ready(image=image, record=record, told=previous)

        def made(dtype: torch.dtype | None) -> torch.Tensor:
            layout = Layout(batch=self.members[0].batch)
            task = Task(name=name, options=options, layout=layout, dtype=dtype)
            found = self.members[0].part(ready, task).source
            return found.rows(0, found.shape[0])[: self._labels.num_logits].float().contiguous()

        with self._lock:
            return _finite(self._dtype, made)

    def _attempt(self, work: Work, dtype: torch.dtype | None, *, on_host: bool = False) -> Reduced:
        """Reduce in one arithmetic; on the host the sums do not touch the GPU."""
        found = self._arranged(work, on_host=on_host)
        if not found.is_plain or (self.limits != Limits() and not self._has_told):
            self._has_told = True
            logger.info("case %s: %s", work.prepared.name, found.words)
        parts = list(self._parts(work, found, dtype, on_host=on_host))
        if self.members[0].is_exact:
            parts = [on_image_grid(part) for part in parts]
        return reduce_parts(parts, self._labels, work.maps)

    def _parts(
        self,
        work: Work,
        found: Arrangement,
        dtype: torch.dtype | None,
        *,
        on_host: bool = False,
    ) -> Iterator[Part]:
        """Yield what each member says; the stages before have spoken by then."""
        rows = zip(self.members, work.prepared.readies, self._shares, found.layouts, strict=True)
        for member, ready, share, layout in rows:
            task = Task(
                name=work.prepared.name,
                options=work.options,
                layout=replace(layout, scratch=work.options.folder),
                dtype=dtype,
                progress=work.progress,
                should_stop=work.should_stop,
            )
            informed = member.informed(ready, task, self._stage_layout(work, on_host=on_host))
            yield member.part(informed, task, share)

    def _arranged(self, work: Work, *, on_host: bool) -> Arrangement:
        requests = [
            member.request(ready, work.options)
            for member, ready in zip(self.members, work.prepared.readies, strict=True)
        ]
        device = torch.device("cpu") if on_host else self._device
        writes_maps = work.options.in_files and "probabilities" in work.options.maps
        return arrange(
            requests,
            self._export(work),
            self.limits,
            device,
            preferred=2,
            preference=_SLOW_MAPS if writes_maps else 1.01,
        )

    def _stage_layout(
        self, work: Work, *, on_host: bool
    ) -> Callable[[Member, Ready, SpatialRecord], Layout]:
        """Return what gives the layout of a stage before; its slabs are of the next one's grid."""

        def layout(member: Member, ready: Ready, target: SpatialRecord) -> Layout:
            a, b, c = target.shape_network
            request = member.request(ready, replace(work.options, disagreement=False))
            order = [target.axes.index(axis) for axis in range(3)]
            i, j, k = (target.shape_network[d] for d in order)
            export = replace(self._export(work), num_models=1, shape_image=(i, j, k))
            found = arrange(
                [replace(request, shape_cropped=(a, b, c))],
                export,
                self.limits,
                torch.device("cpu") if on_host else self._device,
            )
            if not found.is_plain:
                logger.info("case %s, first stage: %s", work.prepared.name, found.words)
            return replace(found.layouts[0], scratch=work.options.folder)

        return layout

    def _export(self, work: Work) -> Export:
        options, shape = work.options, work.prepared.grid.shape
        voxels = int(np.prod(shape))
        channels = {"probabilities": 0 if options.in_files else self._labels.num_logits}
        item = 2 if options.in_files else 4
        return Export(
            shape_image=shape,
            num_logits=self._labels.num_logits,
            label_bytes=self._labels.value_dtype.itemsize,
            map_bytes=sum(item * voxels * channels.get(kind, 1) for kind in options.maps),
            num_models=len(self.members),
        )


def _finite(dtype: torch.dtype | None, make: Callable[[torch.dtype | None], T]) -> T:
    """Return what is made, in float32 if the autocast type overflowed."""
    for attempt in dict.fromkeys((dtype, None)):
        try:
            return make(attempt)
        except NotFiniteError:
            if attempt is not None:
                logger.warning("the network overflowed in %s; predicting again in float32", attempt)
    raise not_finite()
