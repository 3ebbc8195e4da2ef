"""MedNeXt: the published sizes, and first weights."""

from __future__ import annotations

import math

import pytest
import torch

from medseg.errors import ConfigError
from medseg.models.build import build_network
from medseg.models.mednext import SIZES, mednext
from medseg.schema.plans import Architecture

PUBLISHED = {
    ("mednext_s", 3): 5.6e6,
    ("mednext_s", 5): 5.9e6,
    ("mednext_b", 3): 10.5e6,
    ("mednext_b", 5): 11.0e6,
    ("mednext_m", 3): 17.6e6,
    ("mednext_m", 5): 18.3e6,
    ("mednext_l", 3): 61.8e6,
    ("mednext_l", 5): 63.0e6,
}
"""Kind and kernel -> parameters, as the paper rounds (or cuts) them."""


def architecture(kind: str, kernel: int, base: int = 32, dimension: int = 3) -> Architecture:
    blocks = SIZES[kind].blocks_of(5)
    return Architecture(
        kind=kind,
        features=tuple(base * 2**stage for stage in range(5)),
        kernel_sizes=((kernel,) * dimension,) * 5,
        strides=((1,) * dimension, *((2,) * dimension,) * 4),
        blocks_encoder=blocks,
        blocks_decoder=blocks[:-1],
    )


@pytest.mark.parametrize(("kind", "kernel"), PUBLISHED)
def test_number_of_parameters_is_the_published_one(kind: str, kernel: int) -> None:
    with torch.device("meta"):
        network = mednext(
            architecture(kind, kernel),
            num_inputs=1,
            num_logits=3,
            deep_supervision=True,
            norm="auto",
        )
    found = sum(parameter.numel() for parameter in network.parameters())
    assert found == pytest.approx(PUBLISHED[kind, kernel], abs=0.1e6)


def test_weights_are_uniform_within_the_inverse_root_of_the_fan_in() -> None:
    described = architecture("mednext_b", 3, base=4)
    before = torch.get_rng_state()
    first, second = (
        build_network(
            described, num_inputs=2, num_logits=3, generator=torch.Generator().manual_seed(4)
        ).state_dict()
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, weight in first.items():
        if "norm" in name:
            assert torch.all(weight == (1.0 if name.endswith("weight") else 0.0)), name
            continue
        bound = 1 / math.sqrt(first[name.replace("bias", "weight")][0].numel())
        assert weight.abs().max() <= bound, name
        if weight.numel() > 2000:
            assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_transposed_convolutions_leave_zeros_only_in_front_of_halved_axes() -> None:
    network = build_network(
        Architecture(
            kind="mednext_s",
            features=(4, 8),
            kernel_sizes=((1, 3, 3), (3, 3, 3)),
            strides=((1, 1, 1), (1, 2, 2)),
            blocks_encoder=(1, 1),
            blocks_decoder=(1,),
        ),
        num_inputs=1,
        num_logits=2,
    )
    up = network.decoder.ups[0](torch.randn(1, 8, 3, 4, 5))
    assert up.shape == (1, 4, 3, 8, 10)
    empty = (up == 0).all(1)[0]
    expected = torch.zeros(3, 8, 10, dtype=torch.bool)
    expected[:, 0] = True
    expected[:, :, 0] = True
    assert torch.equal(empty, expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"width": 3}, "options has 'width'; expected nothing but 'checkpointing'"),
        ({"checkpointing": "yes"}, "options.checkpointing is 'yes'; expected true or false"),
    ],
)
def test_options_it_does_not_have_are_refused(options: dict[str, object], match: str) -> None:
    described = architecture("mednext_s", 3).model_copy(update={"options": options})
    with pytest.raises(ConfigError, match=match):
        build_network(described, num_inputs=1, num_logits=2)
