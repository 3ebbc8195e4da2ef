"""Batches of patches, cut by a few threads and delivered in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.data.patches import Patch, PatchSampler
from medseg.execute.resources import num_cpus

_MAX_THREADS = 8


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


def loader_threads(num_processes: int = 1) -> int:
    """Return how many threads cut patches: all processors but one, at most 8.

    Args:
        num_processes: Processes that train on this machine and share its processors.
    """
    return max(1, min(_MAX_THREADS, num_cpus() // num_processes - 1))


def batches(
    sampler: PatchSampler,
    *,
    first: int,
    num_threads: int | None = None,
    prefetch: int = 3,
    finish: Callable[[Patch], Patch] | None = None,
) -> Generator[Batch]:
    """Yield batch `first`, `first + 1`, ... without end; patch k belongs to batch k // batch size.

    An exception in a thread is raised at the batch it belongs to. Closing the iterator ends the
    threads.

    Args:
        sampler: Cuts the patches.
        first: Number of the first batch.
        num_threads: Threads that cut patches; None: as many as `loader_threads` says.
        prefetch: Batches that are cut ahead, at most.
        finish: Done to each patch in the thread that cut it, such as moving it to pinned memory.
    """

    def cut_patch(number: int) -> Patch:
        patch = sampler.draw(number)
        return patch if finish is None else finish(patch)

    with ThreadPoolExecutor(
        num_threads or loader_threads(), thread_name_prefix="medseg-patches"
    ) as pool:
        queue: deque[list[Future[Patch]]] = deque()
        number = first
        try:
            while True:
                while len(queue) <= prefetch:
                    queue.append([pool.submit(cut_patch, k) for k in sampler.numbers(number)])
                    number += 1
                yield Batch(patches=tuple(future.result() for future in queue.popleft()))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
