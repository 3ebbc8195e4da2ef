"""Every kind of network against a slow functional reading of their weights, and stored numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medseg.models.build import build_network
from medseg.models.unet import UNet
from medseg.schema.plans import Architecture

LAYOUTS = {
    2: (torch.contiguous_format, torch.channels_last),
    3: (torch.contiguous_format, torch.channels_last_3d),
}


def wave(shape: tuple[int, ...], phase: float) -> Tensor:
    """Return smooth, asymmetric numbers that any machine can compute again."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.73 * count + phase + 1e-3 * count**1.5).reshape(shape)


def fill(network: UNet) -> UNet:
    """Give every parameter a wave of its own, by its place in the sorted names."""
    network.double()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(network.named_parameters())):
            values = wave(tuple(parameter.shape), 0.1 * index)
            scale = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.3
            offset = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(offset + scale * values)
    return network


def norm(features: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    axes = tuple(range(2, features.ndim))
    centred = features - features.mean(axes, keepdim=True)
    scaled = centred / ((centred**2).mean(axes, keepdim=True) + 1e-5).sqrt()
    shape = (1, -1) + (1,) * len(axes)
    return scaled * weights[f"{name}.weight"].reshape(shape) + weights[f"{name}.bias"].reshape(
        shape
    )


def leaky(features: Tensor) -> Tensor:
    return torch.where(features > 0, features, 0.01 * features)


def block(
    features: Tensor,
    weights: dict[str, Tensor],
    name: str,
    stride: tuple[int, ...] | int = 1,
) -> Tensor:
    """Return convolution and norm, without activation."""
    kernel = weights[f"{name}.conv.weight"]
    convolve = functional.conv3d if kernel.ndim == 5 else functional.conv2d
    padding = tuple((size - 1) // 2 for size in kernel.shape[2:])
    bias = weights.get(f"{name}.conv.bias")
    return norm(convolve(features, kernel, bias, stride, padding), weights, f"{name}.norm")


def stack(
    features: Tensor, weights: dict[str, Tensor], name: str, stride: tuple[int, ...] | int = 1
) -> Tensor:
    index = 0
    while f"{name}.convs.{index}.conv.weight" in weights:
        features = leaky(block(features, weights, f"{name}.convs.{index}", 1 if index else stride))
        index += 1
    return features


def residual_stage(
    features: Tensor, weights: dict[str, Tensor], name: str, stride: tuple[int, ...]
) -> Tensor:
    index = 0
    while (prefix := f"{name}.blocks.{index}") + ".conv1.conv.weight" in weights:
        step = (1,) * len(stride) if index else stride
        shortcut = features
        if set(step) != {1}:
            pool = functional.avg_pool3d if len(step) == 3 else functional.avg_pool2d
            shortcut = pool(shortcut, step)
        for place in ("skip.0", "skip.1"):
            if f"{prefix}.{place}.conv.weight" in weights:
                shortcut = block(shortcut, weights, f"{prefix}.{place}")
        inner = leaky(block(features, weights, f"{prefix}.conv1", step))
        features = leaky(block(inner, weights, f"{prefix}.conv2") + shortcut)
        index += 1
    return features


def oracle(images: Tensor, network: UNet, architecture: Architecture) -> list[Tensor]:
    """Return all logits, full resolution first, from the named weights alone."""
    weights = network.state_dict()
    three = images.ndim == 5
    skips, features = [], images
    if architecture.kind == "residual_unet":
        features = stack(features, weights, "encoder.stem")
    for stage, stride in enumerate(architecture.strides):
        if architecture.kind == "plain_unet":
            features = stack(features, weights, f"encoder.stages.{stage}.0", stride)
        else:
            features = residual_stage(features, weights, f"encoder.stages.{stage}", stride)
        skips.append(features)
    logits = []
    for step in range(len(skips) - 1):
        up = functional.conv_transpose3d if three else functional.conv_transpose2d
        name = f"decoder.transpconvs.{step}"
        stride = architecture.strides[-1 - step]
        features = up(features, weights[f"{name}.weight"], weights[f"{name}.bias"], stride)
        features = torch.cat((features, skips[-2 - step]), 1)
        features = stack(features, weights, f"decoder.stages.{step}")
        name = f"decoder.seg_layers.{step}"
        convolve = functional.conv3d if three else functional.conv2d
        logits.append(convolve(features, weights[f"{name}.weight"], weights[f"{name}.bias"]))
    return logits[::-1]


def mednext_block(
    features: Tensor, weights: dict[str, Tensor], name: str, stride: tuple[int, ...], *, up: bool
) -> Tensor:
    """Return a MedNeXt block; upwards the image is shifted by what its first voxels lack."""
    kernel = weights[f"{name}.conv1.weight"]
    three = kernel.ndim == 5
    plain = functional.conv3d if three else functional.conv2d
    climb = functional.conv_transpose3d if three else functional.conv_transpose2d
    padding = tuple(size // 2 for size in kernel.shape[2:])
    groups = kernel.shape[0]

    def resample(values: Tensor, layer: str, padding: tuple[int, ...] | int, groups: int) -> Tensor:
        weight, bias = weights[f"{name}.{layer}.weight"], weights[f"{name}.{layer}.bias"]
        if not up:
            return plain(values, weight, bias, stride, padding, 1, groups)
        return climb(values, weight, bias, stride, padding, 0, groups)

    inner = norm(resample(features, "conv1", padding, groups), weights, f"{name}.norm")
    inner = plain(inner, weights[f"{name}.conv2.weight"], weights[f"{name}.conv2.bias"])
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    total = plain(inner, weights[f"{name}.conv3.weight"], weights[f"{name}.conv3.bias"])
    if f"{name}.res_conv.weight" in weights:
        total = total + resample(features, "res_conv", 0, 1)
    else:
        total = total + features
    if not up:
        return total
    full = [size * step for size, step in zip(features.shape[2:], stride, strict=True)]
    shifted = total.new_zeros((*total.shape[:2], *full))
    inside = (slice(step - 1, None) for step in stride)
    shifted[(slice(None), slice(None), *inside)] = total
    return shifted


def mednext_oracle(images: Tensor, network: UNet, architecture: Architecture) -> list[Tensor]:
    """Return all logits, full resolution first, the bottleneck's last."""
    weights, ones = network.state_dict(), (1,) * (images.ndim - 2)
    plain = functional.conv3d if images.ndim == 5 else functional.conv2d

    def stage(features: Tensor, name: str, first: tuple[int, ...]) -> Tensor:
        index = 0
        while f"{name}.blocks.{index}.conv1.weight" in weights:
            stride = ones if index else first
            features = mednext_block(features, weights, f"{name}.blocks.{index}", stride, up=False)
            index += 1
        return features

    def layer(features: Tensor, name: str) -> Tensor:
        return plain(features, weights[f"{name}.weight"], weights[f"{name}.bias"])

    features, skips = layer(images, "encoder.stem"), []
    for index, stride in enumerate(architecture.strides):
        features = stage(features, f"encoder.stages.{index}", stride)
        skips.append(features)
    logits = [layer(features, "decoder.seg_layers.0")]
    for step in range(len(skips) - 1):
        stride = architecture.strides[-1 - step]
        up = mednext_block(features, weights, f"decoder.ups.{step}", stride, up=True)
        features = stage(up + skips[-2 - step], f"decoder.stages.{step}", ones)
        logits.append(layer(features, f"decoder.seg_layers.{step + 1}"))
    return logits[::-1]


class NetworkContract:
    """What every kind of network must do; sub-classes name the architecture and its input."""

    architecture: Architecture
    shape: tuple[int, ...]
    """(B, C, *spatial)."""
    golden: tuple[float, ...]
    """Mean, mean square and first, middle and last logit at full resolution, by nnU-Net 2.8.1 or
    the authors' MedNeXt."""
    parameter: str
    """A name that nnU-Net gives to a parameter of this network."""
    oracle = staticmethod(oracle)
    coarsest = -1
    """Last stage with logits, as a place in `strides`."""

    def build(self, **options: object) -> UNet:
        return build_network(self.architecture, num_inputs=self.shape[1], num_logits=3, **options)

    def images(self) -> Tensor:
        return wave(self.shape, 0.5)

    def test_equals_the_functional_oracle_in_both_layouts(self) -> None:
        network = fill(self.build(deep_supervision=True))
        expected = self.oracle(self.images(), network, self.architecture)
        for layout in LAYOUTS[len(self.shape) - 2]:
            network.to(memory_format=layout)
            found = network(self.images().contiguous(memory_format=layout))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)

    @pytest.mark.golden
    def test_logits_are_those_of_the_reference(self) -> None:
        logits = fill(self.build())(self.images())
        flat = logits.detach().flatten()
        found = (flat.mean(), (flat**2).mean(), flat[0], flat[len(flat) // 2], flat[-1])
        assert [float(value) for value in found] == pytest.approx(self.golden, rel=1e-6, abs=1e-7)

    def test_norm_methods_agree_in_value_and_gradient(self) -> None:
        gradients = []
        for method in ("instance", "group", "auto"):
            for layout in LAYOUTS[len(self.shape) - 2]:
                network = fill(self.build(norm=method)).to(memory_format=layout)
                images = self.images().contiguous(memory_format=layout).requires_grad_()
                (network(images) ** 2).sum().backward()
                first = next(network.parameters())
                gradients.append((images.grad, first.grad))
        for found in gradients[1:]:
            for one, other in zip(found, gradients[0], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)

    def test_deep_supervision_can_be_switched(self) -> None:
        network = fill(self.build())
        alone = network(self.images())
        network.deep_supervision = True
        logits = network(self.images())
        torch.testing.assert_close(logits[0], alone, rtol=0, atol=0)
        expected, shape = [], self.shape[2:]
        for stride in self.architecture.strides[: self.coarsest]:
            shape = tuple(size // step for size, step in zip(shape, stride, strict=True))
            expected.append((self.shape[0], 3, *shape))
        assert [tuple(each.shape) for each in logits] == expected

    def test_every_parameter_learns_under_deep_supervision(self) -> None:
        network = fill(self.build(deep_supervision=True))
        sum((logits**2).sum() for logits in network(self.images())).backward()
        silent = [
            name
            for name, parameter in network.named_parameters()
            if parameter.grad is None or not parameter.grad.abs().sum() > 0
        ]
        assert silent == []

    def test_samples_do_not_mix(self) -> None:
        network = fill(self.build())
        images = self.images()
        torch.testing.assert_close(network(images)[1:], network(images[1:]))


class UNetContract(NetworkContract):
    """What the networks that share nnU-Net's weights must do."""

    def test_parameter_names_are_nnunets(self) -> None:
        names = self.build().state_dict().keys()
        assert self.parameter in names
        assert {name.split(".")[1] for name in names if name.startswith("decoder")} == {
            "transpconvs",
            "stages",
            "seg_layers",
        }


class Case3D:
    architecture = Architecture(
        kind="plain_unet",
        features=(4, 6, 10, 10),
        kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 5, 3), (3, 3, 3)),
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 2)),
        blocks_encoder=(1, 2, 3, 2),
        blocks_decoder=(1, 2, 3),
    )
    shape = (2, 2, 8, 12, 16)


class Case2D:
    architecture = Architecture(
        kind="plain_unet",
        features=(4, 6, 10, 10),
        kernel_sizes=((3, 3), (3, 5), (3, 3), (3, 3)),
        strides=((1, 1), (2, 1), (2, 2), (1, 2)),
        blocks_encoder=(2, 1, 2, 2),
        blocks_decoder=(2, 1, 3),
    )
    shape = (3, 2, 24, 20)


def residual(architecture: Architecture) -> Architecture:
    return architecture.model_copy(update={"kind": "residual_unet"})


class TestPlain3D(Case3D, UNetContract):
    parameter = "encoder.stages.2.0.convs.1.norm.weight"
    golden = (0.354319159, 0.448556302, 0.416547738, 0.359179579, 0.604001698)


class TestPlain2D(Case2D, UNetContract):
    parameter = "decoder.stages.2.convs.1.conv.bias"
    golden = (0.347651808, 0.462953007, 0.190645043, 0.229136502, 0.820138918)


class TestResidual3D(Case3D, UNetContract):
    architecture = residual(Case3D.architecture)
    parameter = "encoder.stages.2.blocks.0.skip.1.conv.weight"
    golden = (0.344205564, 0.445269685, 1.08687772, 0.171140823, 0.950737517)


class TestResidual2D(Case2D, UNetContract):
    architecture = residual(Case2D.architecture)
    parameter = "encoder.stem.convs.0.conv.weight"
    golden = (0.337613202, 0.491788907, 0.394129406, 0.205535983, 0.316608401)


class MedNeXtContract(NetworkContract):
    oracle = staticmethod(mednext_oracle)
    coarsest = None

    def test_checkpointing_changes_neither_logits_nor_gradients(self) -> None:
        found = []
        for options in ({}, {"checkpointing": True}):
            architecture = self.architecture.model_copy(update={"options": options})
            network = build_network(architecture, num_inputs=self.shape[1], num_logits=3)
            fill(network)(self.images()).square().sum().backward()
            found.append({name: p.grad for name, p in network.named_parameters()})
        plain, checkpointed = found
        used = [name for name, gradient in plain.items() if gradient is not None]
        assert len(used) > len(plain) // 2
        assert all(torch.equal(plain[name], checkpointed[name]) for name in used)


class TestMedNeXt3D(MedNeXtContract):
    """Five stages that halve every axis: the paper's own topology."""

    architecture = Architecture(
        kind="mednext_b",
        features=(2, 4, 8, 16, 32),
        kernel_sizes=((3, 3, 3),) * 5,
        strides=((1, 1, 1), *((2, 2, 2),) * 4),
        blocks_encoder=(2, 1, 2, 1, 1),
        blocks_decoder=(1, 2, 1, 1),
    )
    shape = (2, 2, 16, 32, 48)
    golden = (0.123564716, 4.06304803, -1.03958714, 0.534966214, 6.08834787)


class TestMedNeXt2D(MedNeXtContract):
    architecture = Architecture(
        kind="mednext_s",
        features=(3, 6, 12, 24, 48),
        kernel_sizes=((5, 5),) * 5,
        strides=((1, 1), *((2, 2),) * 4),
        blocks_encoder=(2, 2, 1, 1, 2),
        blocks_decoder=(2, 1, 1, 1),
    )
    shape = (3, 2, 64, 48)
    golden = (0.198173545, 4.42685568, -0.730543858, -0.114411323, 1.86362657)


class TestMedNeXtOnAnisotropicPlans(Case3D, MedNeXtContract):
    architecture = Case3D.architecture.model_copy(
        update={"kind": "mednext_l", "features": (2, 4, 6, 6), "blocks_encoder": (1, 2, 1, 1)}
    )
    test_logits_are_those_of_the_reference = None


def test_shortcut_has_only_the_parts_it_needs() -> None:
    names = build_network(residual(Case3D.architecture), num_inputs=1, num_logits=2).state_dict()
    skips = sorted(name for name in names if ".skip." in name)
    assert skips == [
        f"encoder.stages.{stage}.blocks.0.skip.1.{rest}"
        for stage in (1, 2)
        for rest in ("conv.weight", "norm.bias", "norm.weight")
    ]
    flat = Case3D.architecture.model_copy(
        update={"kind": "residual_unet", "strides": ((1, 1, 1),) * 4}
    )
    names = build_network(flat, num_inputs=1, num_logits=2).state_dict()
    assert "encoder.stages.1.blocks.0.skip.0.conv.weight" in names
