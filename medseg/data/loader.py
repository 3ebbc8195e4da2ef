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

    patches: tuple[Patch, ...]
    """Patches may differ in size: each holds what its own augmentation reads."""

    @property
    def case_ids(self) -> tuple[str, ...]:
        """Return the case of each patch."""
        return tuple(patch.case_id for patch in self.patches)

    @property
    def indices(self) -> tuple[int, ...]:
        """Return the number of each patch in the run, the seed of its augmentation."""
        return tuple(patch.index for patch in self.patches)

    @property
    def annotated(self) -> NDArray[np.bool_] | None:
        """Return (B, L) whether the structure of each logit channel was annotated in each patch.

        None: everything was annotated in all of them.
        """
        masks = [patch.annotated for patch in self.patches]
        num_logits = max((len(mask) for mask in masks if mask is not None), default=None)
        if num_logits is None:
            return None
        return np.array([(True,) * num_logits if mask is None else mask for mask in masks])


def batches(
    sampler: PatchSampler, *, first: int, num_threads: int = 1, prefetch: int = 3
) -> Generator[Batch]:
    """Yield batch `first`, `first + 1`, ... without end; patch k belongs to batch k // batch size.

    An exception in a thread is raised at the batch it belongs to. Closing the iterator ends the
    threads.
    """

    def cut_batch(number: int) -> Batch:
        start = number * sampler.batch_size
        return Batch(patches=tuple(map(sampler.draw, range(start, start + sampler.batch_size))))

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
