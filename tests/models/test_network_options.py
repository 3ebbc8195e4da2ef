"""U-Nets with options: each option against torch's own layers put one after another."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.models.adapt import take_over
from medseg.models.blocks import BlockStyle, ResidualBlock, activate
from medseg.models.build import build_network
from medseg.models.groups import parameter_groups
from medseg.models.options import unet_options
from medseg.models.unet import UNet
from medseg.models.weights import load_into, load_weights, save_weights
from medseg.schema.plans import Architecture

SHAPES = {2: (3, 2, 12, 8), 3: (2, 2, 4, 12, 8)}
LAYOUTS = {
    2: (torch.contiguous_format, torch.channels_last),
    3: (torch.contiguous_format, torch.channels_last_3d),
}
KERNELS = {"kernel_sizes_decoder": [[3, 3, 1], [1, 5, 3]]}
STEM = {"kernel_size_stem": [3, 1, 5]}
FEW = (
    {},
    {"norm": "batch", "epsilon": 0.5},
    {"norm": "batch", "activation": "relu", "activation_first": True},
    KERNELS,
)
EACH = (
    {"norm": "batch"},
    {"norm": "none"},
    {"epsilon": 0.5},
    {"activation": "relu"},
    {"activation": "gelu"},
    {"activation": "mish"},
    {"slope": 0.3},
    {"slope": 0},
    {"activation_first": True},
)
RESIDUAL = (
    {"norm": "none", "activation": "gelu"},
    {"activation_first": True},
    STEM,
    {"shortcut": "strided"},
    {"shortcut": "strided", "norm": "batch"},
)
CASES = [
    (kind, dimension, options)
    for kind, dimension, several in (
        ("plain_unet", 2, FEW),
        ("plain_unet", 3, (*FEW, *EACH)),
        ("residual_unet", 2, (*FEW, *RESIDUAL[2:])),
        ("residual_unet", 3, (*FEW, *RESIDUAL)),
    )
    for options in several
]


def flat(options: dict[str, object]) -> dict[str, object]:
    """Return the options without the first axis of every kernel."""
    result = dict(options)
    if "kernel_sizes_decoder" in result:
        result["kernel_sizes_decoder"] = [kernel[1:] for kernel in result["kernel_sizes_decoder"]]
    if "kernel_size_stem" in result:
        result["kernel_size_stem"] = result["kernel_size_stem"][1:]
    return result


def architecture(kind: str, dimension: int, options: dict[str, object]) -> Architecture:
    """Three stages: the stride alone changes at the last, the features as well at the second."""
    return Architecture(
        kind=kind,
        features=(4, 6, 6),
        kernel_sizes=tuple(k[-dimension:] for k in ((1, 3, 3), (3, 3, 5), (3, 1, 3))),
        strides=tuple(s[-dimension:] for s in ((1, 1, 1), (1, 2, 2), (2, 2, 1))),
        blocks_encoder=(1, 2, 2),
        blocks_decoder=(2, 1),
        options=options if dimension == 3 else flat(options),
    )


def build(plan: Architecture, **changes: object) -> UNet:
    """Return a network in double precision whose every number is drawn, statistics included."""
    generator = torch.Generator().manual_seed(7)
    network = build_network(
        plan, num_inputs=2, num_logits=3, deep_supervision=True, generator=generator, **changes
    ).double()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(5)
            elif tensor.ndim == 1:
                lowest = 0.5 if name.endswith(("norm.weight", "running_var")) else -0.5
                tensor.copy_(lowest + torch.rand(tensor.shape, generator=generator))
    return network


def images(dimension: int) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    shape = SHAPES[dimension]
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5


class Oracle:
    """The same network of torch's own layers, taken by name: slow, nothing shared or fused."""

    def __init__(self, plan: Architecture, network: UNet) -> None:
        self.plan, self.options, self.axes = plan, plan.options, len(plan.strides[0])
        self.network, self.layers = network, {}

    def layer(self, kind: str, *arguments: object, **more: object) -> nn.Module:
        return getattr(nn, f"{kind}{self.axes}d")(*arguments, **more)

    def loaded(self, name: str, module: nn.Module) -> nn.Module:
        """Return the module with the network's values of that name, and remember it."""
        values = self.network.state_dict()
        module.to(next(iter(values.values())).dtype).train(self.network.training)
        module.load_state_dict({key: values[f"{name}.{key}"] for key in module.state_dict()})
        self.layers[name] = module
        return module

    def activation(self) -> nn.Module:
        names = {"relu": nn.ReLU, "gelu": nn.GELU, "mish": nn.Mish}
        if (name := self.options.get("activation", "leaky_relu")) in names:
            return names[name]()
        return nn.LeakyReLU(self.options.get("slope", 0.01))

    def norm(self, width: int) -> nn.Module:
        epsilon = self.options.get("epsilon", 1e-5)
        kind = self.options.get("norm", "instance")
        if kind == "none":
            return nn.Identity()
        if kind == "batch":
            return self.layer("BatchNorm", width, eps=epsilon)
        return self.layer("InstanceNorm", width, eps=epsilon, affine=True)

    def block(self, name, widths, kernel, stride=1, *, bias=True, activated=True) -> nn.Module:
        padding = tuple(size // 2 for size in kernel)
        conv = self.layer("Conv", *widths, tuple(kernel), stride, padding, bias=bias)
        layers = [("conv", conv), ("norm", self.norm(widths[1])), ("act", self.activation())]
        if not activated:
            del layers[2]
        elif self.options.get("activation_first", False):
            layers[1], layers[2] = layers[2], layers[1]
        return self.loaded(name, nn.Sequential(OrderedDict(layers)))

    def shortcut(self, name, widths, stride) -> nn.Module:
        has_stride, ones = any(step != 1 for step in stride), (1,) * self.axes
        how = {"bias": False, "activated": False}
        if self.options.get("shortcut", "pooled") == "strided":
            is_there = has_stride or widths[0] != widths[1]
            return (
                self.block(f"{name}.0", widths, ones, stride, **how) if is_there else nn.Identity()
            )
        parts = [self.layer("AvgPool", stride, stride)] if has_stride else []
        if widths[0] != widths[1]:
            parts.append(self.block(f"{name}.{len(parts)}", widths, ones, **how))
        return nn.Sequential(*parts)

    def stage(self, features: Tensor, stage: int, before: int) -> Tensor:
        plan, name = self.plan, f"encoder.stages.{stage}"
        for index in range(plan.blocks_encoder[stage]):
            widths = (plan.features[stage] if index else before, plan.features[stage])
            kernel, ones = plan.kernel_sizes[stage], (1,) * self.axes
            stride = ones if index else plan.strides[stage]
            if plan.kind == "plain_unet":
                features = self.block(f"{name}.0.convs.{index}", widths, kernel, stride)(features)
                continue
            block = f"{name}.blocks.{index}"
            inner = self.block(f"{block}.conv1", widths, kernel, stride)(features)
            last = self.block(f"{block}.conv2", widths[1:] * 2, kernel, activated=False)
            beside = self.shortcut(f"{block}.skip", widths, stride)
            features = self.activation()(last(inner) + beside(features))
        return features

    def __call__(self, features: Tensor) -> list[Tensor]:
        plan, before, skips, logits = self.plan, 2, [], []
        if plan.kind == "residual_unet":
            kernel = self.options.get("kernel_size_stem", plan.kernel_sizes[0])
            before = plan.features[0]
            features = self.block("encoder.stem.convs.0", (2, before), kernel)(features)
        for stage, width in enumerate(plan.features):
            features, before = self.stage(features, stage, before), width
            skips.append(features)
        kernels = self.options.get("kernel_sizes_decoder", plan.kernel_sizes[:-1])
        for step, stage in enumerate((1, 0)):
            width, stride = plan.features[stage], plan.strides[stage + 1]
            climb = self.layer("ConvTranspose", plan.features[stage + 1], width, stride, stride)
            features = self.loaded(f"decoder.transpconvs.{step}", climb)(features)
            features = torch.cat((features, skips[stage]), 1)
            for index in range(plan.blocks_decoder[stage]):
                widths, name = (width if index else 2 * width, width), f"decoder.stages.{step}"
                features = self.block(f"{name}.convs.{index}", widths, kernels[stage])(features)
            last = self.loaded(f"decoder.seg_layers.{step}", self.layer("Conv", width, 3, 1))
            logits.insert(0, last(features))
        return logits

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, module in self.layers.items()
            for key, value in module.state_dict(keep_vars=True).items()
        }


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize(("kind", "dimension", "options"), CASES)
def test_each_option_is_torchs_layers_one_after_another(
    kind: str, dimension: int, options: dict[str, object], is_training: bool
) -> None:
    """Logits, gradients and what batch norms remember, in both memory layouts."""
    plan = architecture(kind, dimension, options)
    for layout in LAYOUTS[dimension]:
        network = build(plan).train(is_training).to(memory_format=layout)
        oracle = Oracle(plan, copy.deepcopy(network))
        inputs = images(dimension)
        expected = oracle(inputs)
        found = network(inputs.contiguous(memory_format=layout))
        assert_same(found, expected)
        sum((logits**2).sum() for logits in found).backward()
        sum((logits**2).sum() for logits in expected).backward()
        wanted, own = oracle.tensors(), network.state_dict(keep_vars=True)
        assert wanted.keys() == own.keys()
        assert_same(list(own.values()), [wanted[name] for name in own])
        learned = [name for name, tensor in own.items() if isinstance(tensor, nn.Parameter)]
        for name in learned:
            torch.testing.assert_close(own[name].grad, wanted[name].grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "dimension", "options"), CASES)
def test_exact_networks_repeat_torchs_layers_to_the_last_bit(
    kind: str, dimension: int, options: dict[str, object]
) -> None:
    plan = architecture(kind, dimension, options)
    network = build(plan, norm="instance").float().eval().requires_grad_(False)
    inputs = images(dimension).float()
    found, expected = network(inputs), Oracle(plan, network)(inputs)
    if options.get("activation") == "mish":  # torch's own rounds otherwise than its definition
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_mish_is_its_definition_to_the_last_bit() -> None:
    values = torch.linspace(-30, 30, 4001)
    expected = values * torch.tanh(functional.softplus(values))
    assert torch.equal(activate(values.clone(), BlockStyle(activation="mish")), expected)


@pytest.mark.parametrize(("kind", "dimension", "options"), CASES)
def test_each_option_makes_another_network(
    kind: str, dimension: int, options: dict[str, object]
) -> None:
    usual, other = architecture(kind, dimension, {}), architecture(kind, dimension, options)
    networks = [build(plan).eval() for plan in (usual, other)]
    shapes = [{n: v.shape for n, v in each.state_dict().items()} for each in networks]
    logits = [each(images(dimension))[0] for each in networks]
    is_same = shapes[0] == shapes[1] and torch.equal(*logits)
    assert is_same == (not options)


@pytest.mark.parametrize("kind", ["plain_unet", "residual_unet"])
def test_defaults_said_aloud_are_the_defaults(kind: str) -> None:
    """Names, random numbers and logits, byte by byte."""
    usual = architecture(kind, 3, {})
    aloud = {
        "norm": "instance",
        "epsilon": 1e-5,
        "activation": "leaky_relu",
        "slope": 0.01,
        "activation_first": False,
        "kernel_sizes_decoder": [[1, 3, 3], [3, 3, 5]],
    }
    if kind == "residual_unet":
        aloud |= {"kernel_size_stem": [1, 3, 3], "shortcut": "pooled"}
    spoken = usual.model_copy(update={"options": aloud})
    assert unet_options(usual) == unet_options(spoken)
    first, second = build(usual), build(spoken)
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert torch.equal(first(images(3))[0], second(images(3))[0])


def test_names_are_nnunets() -> None:
    plan = architecture("residual_unet", 3, {"norm": "batch", "shortcut": "strided"})
    names = set(build(plan).state_dict())
    for name in (
        "encoder.stem.convs.0.norm.running_mean",
        "encoder.stages.0.blocks.0.conv1.norm.num_batches_tracked",
        "encoder.stages.1.blocks.0.skip.0.conv.weight",
        "encoder.stages.2.blocks.0.skip.0.norm.running_var",
        "decoder.stages.1.convs.1.norm.weight",
    ):
        assert name in names
    assert not any("skip.1" in name or "blocks.1.skip" in name for name in names)
    assert "encoder.stages.1.blocks.0.skip.0.conv.bias" not in names
    bare = build(architecture("residual_unet", 3, {"norm": "none"})).state_dict()
    assert not any("norm" in name for name in bare)


def test_batch_norms_start_as_torchs_whatever_the_memory_held() -> None:
    plan = architecture("residual_unet", 3, {"norm": "batch"})
    state = build_network(plan, num_inputs=2, num_logits=3).state_dict()
    usual = {"running_mean": 0, "bias": 0, "running_var": 1, "num_batches_tracked": 0}
    for name, tensor in state.items():
        if ".norm." in name:
            part = name.rsplit(".", 1)[1]
            expected = usual.get(part, 0 if "conv2" in name else 1)
            assert torch.all(tensor == expected), name
    assert state["encoder.stem.convs.0.norm.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "slope"),
    [({}, 0.01), ({"slope": 0.6}, 0.6), ({"activation": "relu"}, 0), ({"activation": "gelu"}, 0)],
)
def test_first_weights_follow_the_activation(options: dict[str, object], slope: float) -> None:
    plan = architecture("plain_unet", 3, options).model_copy(update={"features": (16, 24, 40)})
    network = build_network(plan, num_inputs=2, num_logits=3)
    weight = network.encoder.stages[2][0].convs[1].conv.weight
    expected = math.sqrt(2 / (1 + slope**2) / weight[0].numel())
    assert float(weight.detach().std()) == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("kind", ["plain_unet", "residual_unet"])
def test_a_trained_batch_norm_comes_back_from_its_file(kind: str, tmp_path: Path) -> None:
    plan = architecture(kind, 3, {"norm": "batch", "activation_first": True})
    network, other = build(plan), build_network(plan, num_inputs=2, num_logits=3).double()
    network.train()(images(3))
    save_weights(tmp_path / "final.safetensors", network.state_dict())
    other.deep_supervision = True
    load_into(other, load_weights(tmp_path / "final.safetensors"), "final")
    found, expected = other.state_dict(), network.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    counts = [value for name, value in found.items() if name.endswith("num_batches_tracked")]
    assert counts
    assert all(int(count) == 6 and count.dtype == torch.int64 for count in counts)
    assert_same(other.eval()(images(3)), network.eval()(images(3)))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(other.train()(images(3)), other.eval()(images(3)), strict=True)
    )


def test_batch_norms_are_taken_over_with_what_they_remember() -> None:
    plan = architecture("residual_unet", 2, {"norm": "batch", "shortcut": "strided"})
    trained, network = build(plan), build_network(plan, num_inputs=2, num_logits=3).double()
    report = take_over(network, trained.state_dict())
    assert set(report.taken) == set(trained.state_dict())
    found = network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in trained.state_dict().items())
    usual = build(architecture("residual_unet", 2, {"shortcut": "strided"}))
    report = take_over(usual, trained.state_dict())
    assert {name.rsplit(".", 1)[1] for name in report.skipped} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


@pytest.mark.parametrize("options", [{"norm": "batch", "shortcut": "strided"}, {"norm": "none"}])
def test_every_parameter_has_its_learning_rate(options: dict[str, object]) -> None:
    network = build(architecture("residual_unet", 3, options))
    groups = parameter_groups(network, layer_decay=0.5)
    found = [id(parameter) for parameters, _ in groups for parameter in parameters]
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in network.parameters()}
    factor_of = {id(p): factor for parameters, factor in groups for p in parameters}
    assert {factor_of[id(p)] for p in network.encoder.stem.parameters()} == {0.5**6}


@pytest.mark.parametrize(
    "style",
    [
        BlockStyle(),
        BlockStyle(norm="batch", activation="mish", activation_first=True),
    ],
)
def test_training_step_is_traced_whole(style: BlockStyle) -> None:
    """What a compiler is given has no gaps, and computes the same step."""
    found = []
    for is_traced in (False, True):
        torch.compiler.reset()
        torch.manual_seed(9)
        block = ResidualBlock(
            2, 3, kernel=(3, 1), stride=(1, 2), style=style, shortcut="strided"
        ).double()
        step = torch.compile(block, backend="aot_eager", fullgraph=True) if is_traced else block
        step(images(2)).square().sum().backward()
        found.append([*block.state_dict().values(), *(p.grad for p in block.parameters())])
    assert_same(found[1], found[0])


@pytest.mark.parametrize("layout", LAYOUTS[3])
@pytest.mark.parametrize("options", [{"norm": "batch"}, {"activation": "mish"}, {"norm": "none"}])
def test_low_precision_stays_close(options: dict[str, object], layout: torch.memory_format) -> None:
    plan = architecture("plain_unet", 3, options)
    network = build(plan).float().train().to(memory_format=layout)
    inputs = images(3).float()
    expected = Oracle(plan, copy.deepcopy(network))(inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = network(inputs.contiguous(memory_format=layout))[0]
    assert found.dtype == torch.bfloat16
    found.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.encoder.parameters())
    error = (found.float() - expected).square().mean().sqrt()
    assert 0 < error < 0.05 * expected.square().mean().sqrt()
