"""How much a network needs, from numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence


def feature_map_voxels(
    kind: str,
    patch_size: Sequence[int],
    *,
    features: Sequence[int],
    strides: Sequence[Sequence[int]],
    blocks_encoder: Sequence[int],
    blocks_decoder: Sequence[int],
    num_logits: int,
) -> int:
    """Return the number of values that all convolutions of a U-Net put out for one sample.

    Counted are the convolutions of the encoder (of a residual encoder also its stem, two for each
    block, and one for the shortcut of each stage's first block, where it is no identity), the
    transposed convolutions, the convolutions of the decoder, and the logits at full resolution.

    Args:
        kind: Kind of network, `plain_unet` or `residual_unet`.
        patch_size: Input in voxels, one entry per axis.
        features: Feature channels of each stage, full resolution first.
        strides: Stride of each stage and axis.
        blocks_encoder: Convolutions (plain) or residual blocks of each encoder stage.
        blocks_decoder: Convolutions of each decoder stage, full resolution first.
        num_logits: Channels of the output.

    Source:
        Equal to `compute_conv_feature_map_size` of the networks nnU-Net 2.8.1 plans with, which
        are without deep supervision there.

    Examples:
        >>> feature_map_voxels(
        ...     "plain_unet", (8, 6), features=(4, 8), strides=((1, 1), (2, 2)),
        ...     blocks_encoder=(2, 2), blocks_decoder=(2,), num_logits=3,
        ... )
        1296
    """
    volumes = _stage_volumes(patch_size, strides)
    total = num_logits * volumes[0]
    for stage, (channels, volume) in enumerate(zip(features, volumes, strict=True)):
        convolutions = blocks_encoder[stage]
        if kind == "residual_unet":
            stem = stage == 0
            shortcut = stage > 0 and (
                channels != features[stage - 1] or any(step != 1 for step in strides[stage])
            )
            convolutions = 2 * convolutions + stem + shortcut
        if stage < len(blocks_decoder):
            convolutions += blocks_decoder[stage] + 1
        total += convolutions * channels * volume
    return total


def _stage_volumes(patch_size: Sequence[int], strides: Sequence[Sequence[int]]) -> list[int]:
    size, volumes = [int(length) for length in patch_size], []
    for stride in strides:
        size = [length // step for length, step in zip(size, stride, strict=True)]
        volumes.append(math.prod(size))
    return volumes
