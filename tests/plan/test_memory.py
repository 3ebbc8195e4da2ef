"""The closed formula against stored counts of nnU-Net's networks and against our own networks."""

import pytest

from medseg.plan.memory import feature_map_voxels
from medseg.schema.plans import Architecture

# (kind, patch, features, strides, encoder, decoder, logits, count); counts are those of
# `compute_conv_feature_map_size` of dynamic-network-architectures 0.4.4.
STORED = [
    (
        "plain_unet",
        (40, 56, 48),
        (32, 64, 128, 256),
        ((1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 2, 2)),
        (2,) * 4,
        (2,) * 3,
        3,
        23_116_800,
    ),
    (
        "plain_unet",
        (96, 160),
        (32, 64, 128, 256, 512, 512),
        ((1, 1), (2, 2), (2, 2), (2, 2), (2, 2), (1, 2)),
        (2,) * 6,
        (2,) * 5,
        7,
        4_899_840,
    ),
    (
        "residual_unet",
        (20, 128, 160),
        (32, 64, 128, 256, 320, 320),
        ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 1, 2)),
        (1, 3, 4, 6, 6, 6),
        (1,) * 5,
        5,
        153_484_800,
    ),
    (
        "residual_unet",
        (64, 48),
        (32, 64, 128),
        ((1, 1), (2, 2), (2, 1)),
        (1, 3, 4),
        (1, 1),
        2,
        1_382_400,
    ),
]


@pytest.mark.parametrize(
    ("kind", "patch", "features", "strides", "encoder", "decoder", "logits", "expected"), STORED
)
def test_equals_the_stored_counts(
    kind, patch, features, strides, encoder, decoder, logits, expected
):
    found = feature_map_voxels(
        kind,
        patch,
        features=features,
        strides=strides,
        blocks_encoder=encoder,
        blocks_decoder=decoder,
        num_logits=logits,
    )
    assert found == expected


@pytest.mark.parametrize("kind", ["plain_unet", "residual_unet"])
def test_equals_what_the_convolutions_of_a_real_network_put_out(kind):
    """Oracle: run a small network and add up what every convolution returns.

    Every stage changes its number of channels, so that each residual shortcut is a convolution.
    """
    import torch
    from torch import nn

    from medseg.models.build import build_network

    architecture = Architecture(
        kind=kind,
        features=(3, 5, 7),
        kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 1)),
        blocks_encoder=(1, 2, 3),
        blocks_decoder=(2, 1),
    )
    network = build_network(architecture, num_inputs=2, num_logits=4)
    counts = []
    convolutions = (nn.Conv3d, nn.ConvTranspose3d)
    for module in network.modules():
        if isinstance(module, convolutions):
            module.register_forward_hook(lambda _m, _i, output: counts.append(output.numel()))
    with torch.no_grad():
        network(torch.zeros(1, 2, 4, 8, 6))
    assert feature_map_voxels(
        kind,
        (4, 8, 6),
        features=architecture.features,
        strides=architecture.strides,
        blocks_encoder=architecture.blocks_encoder,
        blocks_decoder=architecture.blocks_decoder,
        num_logits=4,
    ) == sum(counts)
