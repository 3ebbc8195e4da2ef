"""Sliding-window prediction of one preprocessed image, whole.

Shape letters: C image channels, L logit channels, n0 n1 n2 network axes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from medseg.errors import BundleError
from medseg.infer.rows import Layout, LogitRows, NotFiniteError, Progress, Volume
from medseg.infer.runner import make_runner

logger = logging.getLogger(__name__)


def predict_logits(  # noqa: PLR0913 - the whole recipe of a prediction, all but three by keyword
    networks: Sequence[nn.Module],
    image: torch.Tensor,
    tile: tuple[int, ...],
    *,
    num_logits: int,
    previous: torch.Tensor | None = None,
    num_previous: int = 0,
    mirror_axes: Sequence[int] = (),
    swap_axes: Sequence[int] = (),
    swaps: Sequence[tuple[int, int]] = (),
    step: float = 0.5,
    tile_batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Predict an image in overlapping tiles.

    The logits of a voxel are the mean over networks and mirrorings, and the Gaussian-weighted mean
    over the tiles that hold it. Sums are float32 whatever the arithmetic of the network. An image
    smaller than the tile is padded with zeros, which are cut off again.

    Args:
        networks: Networks on `device`, one per fold; they are put into evaluation mode for the
            call. A network that returns a list (deep supervision) gives its first entry.
        image: Preprocessed image (C, n0, n1, n2), float32, on any device.
        tile: Tile size in voxels; two entries for a 2D configuration, which runs on the slices
            along network axis 0.
        num_logits: Channels the networks return (L).
        previous: (n0, n1, n2) label indices that the stage before found, in a cascade; the networks
            take them after the image as `num_previous` channels, one for each index from 1.
        num_previous: How many indices that are.
        mirror_axes: Axes of the tile that are mirrored, in all combinations.
        swap_axes: Axes of the tile whose mirroring exchanges left and right.
        swaps: Pairs of channels, left and right form of the same thing, that change places in the
            logits of an image whose left and right were exchanged.
        step: Largest shift between tiles, as a fraction of the tile in (0, 1].
        tile_batch: Images the networks are given at once.
        device: Where the networks are.
        dtype: Autocast type of the networks; None computes in float32.
        progress: Called with (tiles done, tiles in total) after every batch.

    Returns:
        Logits (L, n0, n1, n2), float32, on the CPU.

    Raises:
        ValueError: If shapes, axes or numbers do not fit together.
        BundleError: If the networks return values that are not finite, in float32 too.

    Source:
        Behaviour of nnU-Net v2's predictor, with float32 in place of its float16 sums.
    """
    _check(networks, image, tile, tile_batch)
    for name, axes in (("mirror_axes", mirror_axes), ("swap_axes", swap_axes)):
        if any(not 0 <= axis < len(tile) for axis in axes):
            raise ValueError(f"{name} must be axes of the tile {tile}, got {tuple(axes)}")
    _check_previous(image, previous, num_previous)
    volume, layout = Volume.of(image, tile, previous), Layout(batch=tile_batch)
    for attempt in dict.fromkeys((dtype, None)):
        runner = make_runner(
            networks, num_channels=len(image), num_logits=num_logits, num_previous=num_previous,
            mirror_axes=mirror_axes, swap_axes=swap_axes, swaps=swaps, device=device,
            dtype=attempt,
        )  # fmt: skip
        rows = LogitRows(runner, volume, layout, step=step, progress=progress)
        try:
            return rows.rows(0, rows.shape[rows.axis]).contiguous().cpu()
        except NotFiniteError:
            if attempt is not None:
                logger.warning("the network overflowed in %s; predicting again in float32", attempt)
    raise not_finite()


def not_finite() -> BundleError:
    """Return the error for networks that give no numbers, in float32 too."""
    return BundleError(
        "the network returned values that are not finite (NaN or infinity) for a finite image; "
        "the weights are unusable. Use another checkpoint or train again."
    )


def _check(
    networks: Sequence[nn.Module],
    image: torch.Tensor,
    tile: tuple[int, ...],
    tile_batch: int,
) -> None:
    if not networks:
        raise ValueError("at least one network is needed, got none")
    if image.ndim != 4 or image.dtype != torch.float32:
        raise ValueError(
            f"image must be float32 (C, n0, n1, n2), got {image.dtype} {tuple(image.shape)}"
        )
    if not torch.isfinite(image.sum()):
        raise ValueError("image holds values that are not finite")
    if len(tile) not in (2, 3) or min(tile) < 1:
        raise ValueError(f"tile must have 2 or 3 positive entries, got {tile}")
    if tile_batch < 1:
        raise ValueError(f"tile_batch must be at least 1, got {tile_batch}")


def _check_previous(image: torch.Tensor, previous: torch.Tensor | None, num_previous: int) -> None:
    if (previous is None) != (num_previous == 0):
        found = "nothing" if previous is None else "a label map"
        raise ValueError(f"num_previous is {num_previous}, the stage before gave {found}")
    if previous is not None and (previous.is_floating_point() or previous.shape != image.shape[1:]):
        raise ValueError(
            f"previous must hold integers of shape {tuple(image.shape[1:])}, got {previous.dtype} "
            f"{tuple(previous.shape)}"
        )
