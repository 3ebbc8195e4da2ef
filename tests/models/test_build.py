"""Building: initial weights, reproducibility, and descriptions that contradict themselves."""

from __future__ import annotations

import math

import pytest
import torch

from medseg.errors import ConfigError
from medseg.models.build import NETWORKS, build_network
from medseg.schema.plans import KINDS, Architecture

PLAIN = Architecture(
    kind="plain_unet",
    features=(16, 24, 40),
    kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    blocks_encoder=(2, 2, 2),
    blocks_decoder=(1, 2),
)
RESIDUAL = PLAIN.model_copy(update={"kind": "residual_unet"})


def test_weights_are_he_normal_and_biases_zero() -> None:
    network = build_network(PLAIN, num_inputs=2, num_logits=3)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            expected = 1.0 if name.endswith("norm.weight") else 0.0
            assert torch.all(parameter == expected), name
        elif parameter.numel() > 2000:
            fan_in = parameter[0].numel()
            expected = math.sqrt(2 / (1 + 0.01**2) / fan_in)
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.08), name


def test_residual_blocks_start_as_their_shortcut() -> None:
    weights = build_network(RESIDUAL, num_inputs=2, num_logits=3).state_dict()
    last = [value for name, value in weights.items() if name.endswith("conv2.norm.weight")]
    assert len(last) == 6
    assert all(bool((value == 0).all()) for value in last)
    others = [v for n, v in weights.items() if n.endswith("norm.weight") and "conv2" not in n]
    assert all(bool((value == 1).all()) for value in others)


@pytest.mark.parametrize("architecture", [PLAIN, RESIDUAL])
def test_generator_alone_decides_the_weights(architecture: Architecture) -> None:
    before = torch.get_rng_state()
    first, second = (
        build_network(
            architecture,
            num_inputs=1,
            num_logits=2,
            generator=torch.Generator().manual_seed(5),
        ).state_dict()
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_global_seed_decides_without_generator() -> None:
    torch.manual_seed(11)
    first = build_network(PLAIN, num_inputs=1, num_logits=2).state_dict()
    torch.manual_seed(11)
    second = build_network(PLAIN, num_inputs=1, num_logits=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_kind_of_the_schema_is_built() -> None:
    assert set(NETWORKS) == set(KINDS)
    for kind in KINDS:
        Architecture.model_validate({**PLAIN.model_dump(), "kind": kind})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"features": (16,)}, "at least 2 stages"),
        ({"strides": PLAIN.strides[:2]}, "strides has 2 entries; expected 3"),
        ({"blocks_decoder": (1, 2, 3)}, "blocks_decoder has 3 entries; expected 2"),
        ({"blocks_encoder": (1, 0, 3)}, r"blocks_encoder is \[1, 0, 3\]; expected positive"),
        ({"kernel_sizes": ((3, 3),) * 3}, "expected 2 everywhere or 3 everywhere"),
        ({"kernel_sizes": ((3, 3, 2),) * 3}, "expected odd sizes"),
        ({"strides": ((1, 2, 1),) * 3}, r"strides opens with \[1, 2, 1\]"),
        ({"strides": ((0, 1, 1),) * 3}, "expected positive numbers"),
        ({"kind": "plain_unit"}, "kind is 'plain_unit'.*Did you mean 'plain_unet'"),
        ({"options": {"width": 3}}, "options has 'width'; plain_unet knows"),
    ],
)
def test_contradictions_are_named(change: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build_network(PLAIN.model_copy(update=change), num_inputs=1, num_logits=2)


def test_all_contradictions_come_at_once() -> None:
    broken = PLAIN.model_copy(update={"features": (16, -1, 3), "blocks_decoder": (1,)})
    with pytest.raises(ConfigError, match="3 problems in the architecture") as caught:
        build_network(broken, num_inputs=0, num_logits=2)
    message = str(caught.value)
    assert "num_inputs" in message
    assert "blocks_decoder" in message
    assert "features is [16, -1, 3]" in message
