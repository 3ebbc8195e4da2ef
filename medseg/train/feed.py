"""Batches of patches become samples on the training device, on CUDA one batch ahead of the network.

On CUDA the preparation has a stream of its own: while the network works on one batch, the next is
copied from pinned memory and augmented. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.augment.pipeline import Augmenter
from medseg.augment.previous import one_hot
from medseg.augment.streams import sample_seed
from medseg.data.loader import Batch
from medseg.data.patches import Patch
from medseg.labels import LabelScheme
from medseg.train.annotation import batch_annotated


class Clock(Protocol):
    """Measures the parts of a step."""

    def part(self, name: str) -> AbstractContextManager[Any]:
        """Count what happens inside the block as part `name`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """A batch on the device."""

    images: Tensor
    """(B, C, *spatial); in a cascade the structures of the stage before are the last channels."""
    target: Tensor
    """Labels (B, *spatial), or regions (B, R, *spatial)."""
    valid: Tensor | None
    """(B, *spatial) voxels that count; None: all."""
    annotated: Tensor | None
    """(B, L) structures that were annotated; None: all."""
    case_ids: tuple[str, ...]
    """The case of each sample."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return what lies on the device."""
        values = (getattr(self, entry.name) for entry in fields(self))
        return tuple(value for value in values if isinstance(value, Tensor))


class Streams(Protocol):
    """A queue of the device beside the one on which the network works."""

    def aside(self) -> AbstractContextManager[Any]:
        """Put what is asked of the device inside the block into the queue beside."""

    def mark(self) -> Any:
        """Return a mark of the place that the queue beside has reached."""

    def hand_over(self, samples: Samples, mark: Any) -> Samples:
        """Let the present queue go on only from the mark, and use the samples safely from there."""


class CudaStreams:
    """The preparation's own stream on a CUDA device, kept as long as the run.

    Memory of the samples belongs to that stream. It is told that the network's stream uses them, so
    that it is not taken for the next samples before the network is done with it.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the stream; what was asked of the device so far comes first."""
        self._device = device
        self._side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._side.wait_stream(torch.cuda.current_stream(device))

    def aside(self) -> AbstractContextManager[Any]:
        """Put what is asked of the device inside the block into the stream beside."""
        context: AbstractContextManager[Any] = torch.cuda.stream(self._side)
        return context

    def mark(self) -> Any:
        """Return a mark of the place that the stream beside has reached."""
        return self._side.record_event()

    def hand_over(self, samples: Samples, mark: Any) -> Samples:
        """Let the present stream wait for the mark, and say that it uses the samples."""
        present = torch.cuda.current_stream(self._device)
        present.wait_event(mark)
        for tensor in samples.tensors:
            tensor.record_stream(present)
        return samples


@dataclass(slots=True)
class Preparer:
    """Moves a batch to the device and turns labels into targets; augments it in training."""

    augmenter: Augmenter
    labels: LabelScheme
    device: torch.device
    seed: int
    """Seed of the run; with the number of a patch it is the seed of its augmentation."""
    streams: Streams | None = field(init=False)
    """Where the preparation runs beside the network; None: it takes turns with it."""

    def __post_init__(self) -> None:
        """Make the stream of a CUDA device."""
        self.streams = CudaStreams(self.device) if self.device.type == "cuda" else None

    def __call__(self, batch: Batch, *, augment: bool) -> Samples:
        """Return the samples of a batch."""
        patches = batch.patches
        images = [self._moved(patch.image) for patch in patches]
        segmentations = [self._moved(torch_labels(patch.segmentation)) for patch in patches]
        found = [self._moved(torch_labels(p.previous)) for p in patches if p.previous is not None]
        if augment:
            seeds = [sample_seed(self.seed, index) for index in batch.indices]
            annotated = batch_annotated(batch, self.labels, self.augmenter, seeds)
            masks = [self._moved(p.outside) for p in patches if p.outside is not None]
            image, segmentation, _ = self.augmenter(
                images, segmentations, masks or None, seeds=seeds, previous=found or None
            )
        else:
            annotated = batch_annotated(batch, self.labels)
            image, segmentation = torch.stack(images), torch.stack(segmentations)
            if found:
                masks = [one_hot(torch.stack(found), self.augmenter.num_previous)]
                image = torch.cat([image, *masks], dim=1)
        target, valid = self.labels.target(segmentation)
        return Samples(
            images=image,
            target=target,
            valid=valid,
            annotated=None if annotated is None else self._moved(annotated),
            case_ids=batch.case_ids,
        )

    def pinned(self, patch: Patch) -> Patch:
        """Return a patch in pinned memory, where it is to be copied to CUDA.

        Meant for the threads that cut patches (`finish` of `batches`).
        """
        if self.device.type != "cuda":
            return patch
        with torch.cuda.device(self.device):
            return placed(patch, _pinned)

    def _moved(self, array: NDArray[Any]) -> Tensor:
        """Return an array on the device; a copy to CUDA waits for nothing."""
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        if not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def torch_labels(labels: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Return labels in an integer type that torch computes with (it lacks most unsigned ones)."""
    return labels.astype(np.int32) if labels.dtype == np.uint16 else labels


def placed(patch: Patch, place: Callable[[NDArray[Any]], NDArray[Any]]) -> Patch:
    """Return a patch whose arrays `place` has put elsewhere, labels in a type of torch."""
    return replace(
        patch,
        image=place(patch.image),
        segmentation=place(torch_labels(patch.segmentation)),
        outside=None if patch.outside is None else place(patch.outside),
        previous=None if patch.previous is None else place(torch_labels(patch.previous)),
    )


def _pinned(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array in pinned memory, which lives as long as the array."""
    pinned: NDArray[Any] = torch.from_numpy(array).pin_memory().numpy()
    return pinned


def feed(
    batches: Iterator[Batch], preparer: Preparer, clock: Clock, *, augment: bool = True
) -> Generator[Samples]:
    """Yield the samples of each batch; closing it closes `batches`.

    On the CPU they are made where they are asked for. On CUDA the batch after is asked for before
    one is handed out, so that the device prepares it while the network works on the other. An
    exception is raised at the batch it belongs to.

    Args:
        batches: Batches on the host.
        preparer: Makes samples of them.
        clock: Told of the parts "wait" (for patches) and "augment".
        augment: Whether this is training.
    """
    try:
        if preparer.streams is None:
            for batch in _waited_for(batches, clock):
                with clock.part("augment"):
                    samples = preparer(batch, augment=augment)
                yield samples
        else:
            source = _prepared(_waited_for(batches, clock), preparer, clock, augment)
            yield from _one_ahead(source, preparer.streams)
    finally:
        close: Callable[[], None] | None = getattr(batches, "close", None)
        if close is not None:
            close()


def _waited_for(batches: Iterator[Batch], clock: Clock) -> Iterator[Batch]:
    while True:
        with clock.part("wait"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _prepared(
    batches: Iterator[Batch], preparer: Preparer, clock: Clock, augment: bool
) -> Iterator[tuple[Samples, Any]]:
    """Yield the samples of each batch, made on the stream beside, and the mark of their end."""
    streams = preparer.streams
    if streams is None:
        raise ValueError("the preparer has no stream of its own")
    for batch in batches:
        with streams.aside():
            with clock.part("augment"):
                samples = preparer(batch, augment=augment)
            mark = streams.mark()
        yield samples, mark


def _one_ahead(source: Iterator[tuple[Samples, Any]], streams: Streams) -> Iterator[Samples]:
    """Yield what comes, each only when the next was asked for; an exception keeps its place."""
    held = next(source, None)
    while held is not None:
        following, error = None, None
        try:
            following = next(source, None)
        except Exception as caught:  # raised below, at the batch that it belongs to
            error = caught
        yield streams.hand_over(*held)
        if error is not None:
            raise error
        held = following
