"""The count of operations against the layers of real networks."""

import math

import pytest
import torch

from medseg.models.build import build_network
from medseg.plan.operations import step_operations
from medseg.schema.plans import Architecture


def counted(architecture, patch, num_inputs, num_logits):
    """Oracle: run the network once, and count the products of every convolution as it happens."""
    network = build_network(architecture, num_inputs=num_inputs, num_logits=num_logits)
    counts = {}

    def count(name):
        def hook(layer, inputs, output):
            kernel = math.prod(layer.kernel_size)
            if layer.transposed:
                counts[name] = inputs[0].numel() * layer.out_channels * kernel
            else:
                counts[name] = output.numel() * layer.in_channels * kernel

        return hook

    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.modules.conv._ConvNd):
            layer.register_forward_hook(count(name))
    network.eval()
    with torch.no_grad():
        network(torch.zeros(1, num_inputs, *patch))
    return sum(counts.values())


ANISOTROPIC = {
    "features": (4, 8, 12),
    "kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 1)),
}
FLAT = {
    "features": (4, 8, 16),
    "kernel_sizes": ((3, 3),) * 3,
    "strides": ((1, 1), (2, 2), (1, 2)),
}


@pytest.mark.parametrize(
    ("topology", "patch"), [(ANISOTROPIC, (6, 12, 16)), (FLAT, (10, 24))], ids=["3d", "2d"]
)
@pytest.mark.parametrize("blocks", [((2, 2, 2), (2, 2)), ((1, 3, 2), (1, 2))])
def test_a_step_is_six_times_the_products_of_a_plain_network(topology, patch, blocks):
    net = Architecture(
        kind="plain_unet", blocks_encoder=blocks[0], blocks_decoder=blocks[1], **topology
    )
    expected = 6 * counted(net, patch, num_inputs=3, num_logits=5)
    assert step_operations(net, patch, num_inputs=3, num_logits=5) == expected
    twice = step_operations(net, patch, batch_size=2, num_inputs=3, num_logits=5)
    assert twice == 2 * expected


def test_a_residual_network_is_counted_but_for_stem_and_shortcuts():
    net = Architecture(
        kind="residual_unet", blocks_encoder=(1, 2, 3), blocks_decoder=(1, 1), **ANISOTROPIC
    )
    exact = 6 * counted(net, (6, 12, 16), num_inputs=2, num_logits=3)
    assert 0.8 * exact < step_operations(net, (6, 12, 16), num_inputs=2, num_logits=3) < 1.1 * exact
