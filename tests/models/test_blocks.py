"""The instance norm: one result, whatever the operation and the memory layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medseg.models import blocks
from medseg.models.blocks import (
    EPSILON,
    BlockStyle,
    ConvBlock,
    InstanceNorm,
    instance_norm,
    is_channels_last,
)

LAYOUTS = (torch.contiguous_format, torch.channels_last_3d)


def features(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(2, 3, 4, 6, 5, generator=generator, dtype=torch.float64)
    scale = torch.tensor([1.0, 20.0, 0.1], dtype=torch.float64).reshape(1, 3, 1, 1, 1)
    return (values * scale + 3 * scale).to(dtype)


def parameters(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor([1.0, -0.5, 2.0], dtype=dtype, requires_grad=True),
        torch.tensor([0.0, 0.3, -1.0], dtype=dtype, requires_grad=True),
    )


def gradients(values: Tensor, method: str) -> list[Tensor]:
    weight, bias = parameters(values.dtype)
    values = values.detach().requires_grad_()
    result = instance_norm(values, weight, bias, method)
    generator = torch.Generator().manual_seed(4)
    pull = torch.randn(result.shape, generator=generator, dtype=torch.float64)
    return list(torch.autograd.grad(result, (values, weight, bias), pull.to(result.dtype)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["auto", "group", "instance"])
def test_value_and_gradient_are_those_of_torchs_instance_norm(
    method: str, layout: torch.memory_format
) -> None:
    weight, bias = parameters()
    values = features().contiguous(memory_format=layout)
    expected = functional.instance_norm(features(), weight=weight, bias=bias, eps=EPSILON)
    torch.testing.assert_close(instance_norm(values, weight, bias, method), expected)
    wanted_all = gradients(features(), "instance")
    for found, wanted in zip(gradients(values, method), wanted_all, strict=True):
        torch.testing.assert_close(found, wanted)


def test_gradient_written_by_hand_is_the_numerical_one() -> None:
    weight, bias = parameters()
    values = features().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    assert torch.autograd.gradcheck(instance_norm, (values, weight, bias), atol=1e-5)


@pytest.mark.parametrize("block", [7, 200, 1 << 20])
@pytest.mark.parametrize("slope", [0.01, 1.0])
def test_activated_norm_is_the_norm_and_then_the_activation_whatever_the_block(
    monkeypatch: pytest.MonkeyPatch, slope: float, block: int
) -> None:
    """Blocks of parts of a sample, of one sample, and of all of them (360 values each)."""
    monkeypatch.setattr(blocks, "_BLOCK", block)
    pull = torch.linspace(-1, 2, features().numel(), dtype=torch.float64).reshape(features().shape)
    found = []
    for layout in LAYOUTS:
        weight, bias = parameters()
        values = features().contiguous(memory_format=layout).requires_grad_()
        result = instance_norm(values, weight, bias, slope=slope)
        found.append((result, *torch.autograd.grad(result, (values, weight, bias), pull)))
    weight, bias = parameters()
    values = features().requires_grad_()
    plain = functional.instance_norm(values, weight=weight, bias=bias, eps=EPSILON)
    expected = torch.where(plain > 0, plain, slope * plain)
    wanted = (expected, *torch.autograd.grad(expected, (values, weight, bias), pull))
    for each in found:
        for one, other in zip(each, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("block", [100, 1 << 20])
def test_gradient_in_low_precision_is_computed_in_float32(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", block)
    weight, bias = parameters(torch.float32)
    values = features(torch.bfloat16).contiguous(memory_format=torch.channels_last_3d)
    low = values.clone().requires_grad_()
    generator = torch.Generator().manual_seed(4)
    pull = torch.randn(values.shape, generator=generator).bfloat16()
    found = torch.autograd.grad(
        instance_norm(low, weight, bias, slope=0.01), (low, weight, bias), pull
    )
    assert [each.dtype for each in found] == [torch.bfloat16, torch.float32, torch.float32]
    exact = values.double().requires_grad_()
    plain = functional.instance_norm(exact, weight=weight.double(), bias=bias.double(), eps=EPSILON)
    activated = functional.leaky_relu(plain, 0.01)
    wanted = torch.autograd.grad(activated, (exact, weight, bias), pull.double())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0.02, atol=0.02)


def test_gradient_arriving_in_another_layout_is_understood() -> None:
    weight, bias = parameters()
    values = features().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    pull = torch.linspace(-1, 2, values.numel(), dtype=torch.float64).reshape(values.shape)
    (found,) = torch.autograd.grad(instance_norm(values, weight, bias), values, pull)
    plain = features().requires_grad_()
    (wanted,) = torch.autograd.grad(instance_norm(plain, weight, bias), plain, pull)
    torch.testing.assert_close(found, wanted)


def test_layout_is_kept() -> None:
    weight, bias = parameters()
    values = features().contiguous(memory_format=torch.channels_last_3d)
    assert is_channels_last(instance_norm(values, weight, bias))
    assert is_channels_last(instance_norm(values, weight.detach(), bias.detach(), "group"))
    assert is_channels_last(gradients(values, "auto")[0])
    assert not is_channels_last(features())


def test_two_dimensional_layout_is_recognised() -> None:
    flat = features()[:, :, 0].contiguous(memory_format=torch.channels_last)
    assert is_channels_last(flat)
    weight, bias = parameters()
    expected = functional.instance_norm(flat, weight=weight, bias=bias, eps=EPSILON)
    torch.testing.assert_close(instance_norm(flat, weight, bias), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_low_precision_stays_close(layout: torch.memory_format) -> None:
    values = features(torch.bfloat16).contiguous(memory_format=layout)
    weight, bias = parameters(torch.float32)
    result = instance_norm(values.requires_grad_(), weight, bias)
    assert result.dtype == torch.bfloat16
    expected = instance_norm(values.detach().double(), weight.double(), bias.double(), "instance")
    torch.testing.assert_close(result.double(), expected, rtol=0.02, atol=0.02)
    found = torch.autograd.grad(result.float().square().sum(), (values, weight))
    assert found[0].dtype == torch.bfloat16
    exact = values.detach().double().requires_grad_()
    again = instance_norm(exact, weight.double(), bias.double(), "instance")
    wanted = torch.autograd.grad(again.square().sum(), (exact, weight))
    torch.testing.assert_close(found[1], wanted[1], rtol=0.02, atol=1.0)


def test_parameters_are_named_as_torchs() -> None:
    expected = torch.nn.InstanceNorm3d(3, affine=True).state_dict()
    found = InstanceNorm(3).state_dict()
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        name: tuple(value.shape) for name, value in expected.items()
    }


def test_block_without_activation_lets_negatives_through() -> None:
    options = {"kernel": (1, 3, 5), "stride": (1, 1, 2), "style": BlockStyle()}
    torch.manual_seed(0)
    block = ConvBlock(3, 4, **options).double()
    raw = ConvBlock(3, 4, activated=False, **options).double()
    raw.load_state_dict(block.state_dict())
    activated, plain = block(features()), raw(features())
    assert activated.shape == (2, 4, 4, 6, 3)
    assert plain.min() < -1
    torch.testing.assert_close(activated, functional.leaky_relu(plain, 0.01))


def test_a_single_voxel_is_normalised_alike_in_any_batch():
    """The bottleneck of a small tile may be one voxel; alone it is as good as in a batch."""
    features = torch.randn(2, 5, 1, 1, 1)
    weight, bias = torch.randn(5), torch.randn(5)
    together = instance_norm(features, weight, bias)
    alone = torch.cat([instance_norm(one[None], weight, bias) for one in features])
    torch.testing.assert_close(together, bias.expand(2, 5)[..., None, None, None].clone())
    torch.testing.assert_close(alone, together)
