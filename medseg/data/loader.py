"""Batches of patches, cut by a few threads and delivered in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.data.patches import Patch, PatchSampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Patches of one optimiser step, on the host."""

    images: NDArray[np.float32]
    """(B, C, *source)."""
    segmentations: NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.int16]
    """(B, *source)."""
    outside: NDArray[np.bool_] | None
    """(B, *source) or None."""
    case_ids: tuple[str, ...]
    indices: tuple[int, ...]
    """Number of each patch in the run; seeds of its augmentation."""


def collate(patches: list[Patch]) -> Batch:
    """Stack patches into a batch."""
    outside = [patch.outside for patch in patches if patch.outside is not None]
    return Batch(
        images=np.stack([patch.image for patch in patches]),
        segmentations=np.stack([patch.segmentation for patch in patches]),
        outside=np.stack(outside) if outside else None,
        case_ids=tuple(patch.case_id for patch in patches),
        indices=tuple(patch.index for patch in patches),
    )


def batches(
    sampler: PatchSampler, *, first: int, num_threads: int = 1, prefetch: int = 3
) -> Generator[Batch]:
    """Yield batch `first`, `first + 1`, ... without end; patch k belongs to batch k // batch size.

    An exception in a thread is raised at the batch it belongs to. Closing the iterator ends the
    threads.
    """

    def cut_batch(number: int) -> Batch:
        start = number * sampler.batch_size
        return collate([sampler.draw(start + offset) for offset in range(sampler.batch_size)])

    with ThreadPoolExecutor(num_threads, thread_name_prefix="medseg-patches") as pool:
        queue: deque[Future[Batch]] = deque()
        number = first
        try:
            while True:
                while len(queue) <= prefetch:
                    queue.append(pool.submit(cut_batch, number))
                    number += 1
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()
