"""Groups by depth: every parameter once, the stem slowest; and what belongs to the encoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg.errors import ConfigError
from medseg.models.build import build_network
from medseg.models.external import ExternalNetwork
from medseg.models.groups import encoder_parameters, parameter_groups
from medseg.schema.plans import Architecture

BASE = Architecture(
    kind="plain_unet",
    features=(4, 6, 8),
    kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    blocks_encoder=(1, 2, 1),
    blocks_decoder=(1, 2),
)
COMMON = {
    "decoder.seg_layers.0": 0,
    "decoder.seg_layers.1": 0,
    "decoder.stages.1": 1,
    "decoder.stages.0": 2,
    "encoder.stages.2": 3,
    "encoder.stages.1": 4,
    "encoder.stages.0": 5,
}
CLIMB = {"decoder.transpconvs.1": 1, "decoder.transpconvs.0": 2}
DEPTHS = {
    "plain_unet": {**COMMON, **CLIMB},
    "residual_unet": {**COMMON, **CLIMB, "encoder.stem": 6},
    "mednext_s": {
        **COMMON,
        "decoder.seg_layers.2": 0,
        "decoder.ups.1": 1,
        "decoder.ups.0": 2,
        "encoder.stem": 6,
    },
}


@pytest.mark.parametrize("kind", DEPTHS)
def test_depth_is_counted_from_the_logits_to_the_stem(kind: str) -> None:
    network = build_network(
        BASE.model_copy(update={"kind": kind}), num_inputs=2, num_logits=3, deep_supervision=True
    )
    groups = parameter_groups(network, layer_decay=0.5)
    factor_of = {id(p): factor for parameters, factor in groups for p in parameters}
    count = sum(len(parameters) for parameters, _ in groups)
    assert count == len(factor_of) == len(list(network.parameters()))
    met = set()
    for name, parameter in network.named_parameters():
        (prefix,) = [each for each in DEPTHS[kind] if name.startswith(f"{each}.")]
        met.add(prefix)
        assert factor_of[id(parameter)] == 0.5 ** DEPTHS[kind][prefix], name
    assert met == set(DEPTHS[kind])


def test_one_rate_for_all_is_one_group_in_order() -> None:
    network = build_network(BASE, num_inputs=1, num_logits=2)
    ((parameters, factor),) = parameter_groups(network, layer_decay=1.0)
    assert factor == 1
    assert [id(p) for p in parameters] == [id(p) for p in network.parameters()]


@pytest.mark.parametrize("kind", DEPTHS)
def test_encoder_is_all_that_comes_before_the_decoder(kind: str) -> None:
    network = build_network(BASE.model_copy(update={"kind": kind}), num_inputs=1, num_logits=2)
    found = {id(parameter) for parameter in encoder_parameters(network)}
    expected = {id(p) for name, p in network.named_parameters() if name.startswith("encoder")}
    assert found == expected
    assert 0 < len(found) < len(list(network.parameters()))


def test_networks_from_outside_are_refused_unless_they_name_an_encoder() -> None:
    bare = ExternalNetwork(nn.Conv3d(1, 2, 1), "here:Bare", 2)
    assert len(parameter_groups(bare, layer_decay=1.0)) == 1
    with pytest.raises(ConfigError, match=r"optimizer\.layer_decay is 0\.8, but .*'here:Bare'"):
        parameter_groups(bare, layer_decay=0.8)
    with pytest.raises(ConfigError, match=r"optimizer\.freeze_encoder is set.*'here:Bare'"):
        encoder_parameters(bare)
    inner = nn.Sequential()
    inner.add_module("encoder", nn.Conv3d(1, 4, 3))
    inner.add_module("head", nn.Conv3d(4, 2, 1))
    named = ExternalNetwork(inner, "here:Named", 2)
    weight, bias = encoder_parameters(named)
    assert isinstance(inner.encoder, nn.Conv3d)
    assert torch.equal(weight, inner.encoder.weight)
    assert bias.shape == (4,)
