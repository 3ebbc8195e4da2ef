"""How many arithmetic operations a training step takes, from numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from medseg.schema.plans import Architecture

STEP_PER_FORWARD = 3
"""Forward pass, gradient of the features, gradient of the weights: three times the forward pass."""


def step_operations(
    architecture: Architecture,
    patch_size: Sequence[int],
    *,
    batch_size: int = 1,
    num_inputs: int = 1,
    num_logits: int = 2,
) -> int:
    """Return the additions and multiplications of one training step's convolutions.

    Counted are the convolutions of encoder and decoder (two for each residual block), the
    transposed convolutions and the logits at full resolution; stem, shortcuts and deep supervision
    add a few percent and are left out, as is everything that is no convolution.

    Args:
        architecture: The network.
        patch_size: Input in voxels, one entry per axis.
        batch_size: Patches of a step.
        num_inputs: Channels of the input.
        num_logits: Channels of the output.

    Examples:
        >>> net = Architecture(
        ...     kind="plain_unet", features=(4, 8), kernel_sizes=((3, 3), (3, 3)),
        ...     strides=((1, 1), (2, 2)), blocks_encoder=(1, 1), blocks_decoder=(1,),
        ... )
        >>> step_operations(net, (8, 6))  # 6 * (48 (36 + 32 + 288 + 8) + 12 * 288)
        125568
    """
    features = architecture.features
    size, products = [int(length) for length in patch_size], 0
    for stage, stride in enumerate(architecture.strides):
        size = [length // step for length, step in zip(size, stride, strict=True)]
        kernel = math.prod(architecture.kernel_sizes[stage])
        width = features[stage]
        before = features[stage - 1] if stage else num_inputs
        per_voxel = kernel * width * (before + (_convolutions(architecture, stage) - 1) * width)
        if stage < len(architecture.blocks_decoder):
            further = architecture.blocks_decoder[stage] - 1
            per_voxel += width * features[stage + 1] + kernel * width * width * (2 + further)
        if stage == 0:
            per_voxel += width * num_logits
        products += per_voxel * math.prod(size)
    return 2 * STEP_PER_FORWARD * batch_size * products


def _convolutions(architecture: Architecture, stage: int) -> int:
    """Return the convolutions with a full kernel of one encoder stage."""
    blocks = architecture.blocks_encoder[stage]
    return 2 * blocks if architecture.kind == "residual_unet" else blocks
