"""What was annotated in each sample of a batch, after its augmentation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.augment.pipeline import Augmenter
from medseg.data.loader import Batch
from medseg.labels import LabelScheme


def batch_annotated(
    batch: Batch, labels: LabelScheme, augmenter: Augmenter | None = None, seeds: Sequence[int] = ()
) -> NDArray[np.bool_] | None:
    """Return which structures were annotated in each sample; None if all were in all of them.

    Args:
        batch: Patches, which know their cases.
        labels: What the logit channels are.
        augmenter: What is done to the patches. Where it exchanges left and right, a case in which
            only the left one was drawn becomes a sample in which only the right one was.
        seeds: The seed of each sample's augmentation.

    Returns:
        (B, L), or None.
    """
    annotated = batch.annotated
    if annotated is None or augmenter is None or not augmenter.swaps:
        return annotated
    partners = exchanged_channels(labels, augmenter.swaps)
    for row, seed in enumerate(seeds):
        if not annotated[row].all() and augmenter.swaps_sides(seed):
            annotated[row] = annotated[row][partners]
    return annotated


def exchanged_channels(labels: LabelScheme, swaps: Sequence[tuple[int, int]]) -> list[int]:
    """Return for each logit channel the one whose structure becomes it when sides change places.

    A structure that no other becomes keeps its own channel.

    Args:
        labels: What the logit channels are.
        swaps: Pairs of indices that change places.

    Examples:
        >>> names = {"background": 0, "left eye": 4, "right eye": 9, "nose": 5}
        >>> exchanged_channels(LabelScheme(labels=names), [(1, 3)])
        [0, 3, 2, 1]
    """
    other = {first: second for pair in swaps for first, second in (pair, pair[::-1])}
    found = {frozenset(indices): name for name, indices in labels.foreground.items()}
    partners = list(range(labels.num_logits))
    for name, indices in labels.foreground.items():
        swapped = frozenset(other.get(index, index) for index in indices)
        partners[labels.channels[name]] = labels.channels[found.get(swapped, name)]
    return partners
