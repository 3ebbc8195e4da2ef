"""Which preprocessed cases are held in memory, and which are read patch by patch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from medseg.data.store import CaseStore, Entry
from medseg.execute.resources import num_cpus

logger = logging.getLogger(__name__)

_MAX_READERS = 8


def open_entries(
    store: CaseStore, index: Mapping[str, str], cases: Iterable[str], *, free_bytes: int
) -> dict[str, Entry]:
    """Open cases, as many of them in memory as fit; the others are read where they are sliced.

    The smallest cases come first: a patch takes about as long to read from any of them, and so the
    largest number of patches needs no reading.

    Args:
        store: Holds the cases.
        index: Case id -> key in the store.
        cases: Case ids.
        free_bytes: Memory that their arrays may take.

    Returns:
        Case id -> entry, in the order of `cases`.

    Raises:
        DatasetError: If one cannot be read.
    """
    entries = {case: store.open(index[case]) for case in cases}
    chosen = held_cases({case: entry.memory_bytes for case, entry in entries.items()}, free_bytes)
    with ThreadPoolExecutor(min(_MAX_READERS, num_cpus())) as pool:
        try:
            loaded = dict(
                zip(chosen, pool.map(lambda case: entries[case].loaded(), chosen), strict=True)
            )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    left = sum(entry.memory_bytes for case, entry in entries.items() if case not in loaded)
    if left:
        logger.info(
            "%d of %d preprocessed cases are held in memory, the others (%.1f GB) are read from "
            "the disk patch by patch",
            len(loaded),
            len(entries),
            left / 1e9,
        )
    return {case: loaded.get(case, entry) for case, entry in entries.items()}


def held_cases(sizes: Mapping[str, int], free_bytes: int) -> list[str]:
    """Return which cases to hold in memory: the smallest, as long as they fit.

    Args:
        sizes: Case id -> bytes.
        free_bytes: What all of them together may take.

    Examples:
        >>> held_cases({"a": 50, "b": 20, "c": 40}, 65)
        ['b', 'c']
    """
    chosen, used = [], 0
    for case in sorted(sizes, key=lambda case: (sizes[case], case)):
        used += sizes[case]
        if used > free_bytes:
            break
        chosen.append(case)
    return chosen
