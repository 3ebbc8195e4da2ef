"""MedNeXt: a U-Net of depthwise convolutions, inverted bottlenecks and residual resampling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medseg.models.blocks import CONVOLUTIONS, TRANSPOSED, InstanceNorm, NormMethod
from medseg.models.unet import UNet
from medseg.schema.plans import Architecture

WIDEST = 16
"""Feature channels of the paper's deepest stage, as a multiple of those at full resolution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large a MedNeXt is, stage by stage; deeper stages repeat the last entry."""

    expansions: tuple[int, ...]
    """Channels inside a block, as a multiple of its own."""
    blocks: tuple[int, ...]
    """Blocks of each stage, encoder and decoder alike."""

    def expansion(self, stage: int) -> int:
        """Return the expansion of a stage."""
        return self.expansions[min(stage, len(self.expansions) - 1)]

    def blocks_of(self, num_stages: int) -> tuple[int, ...]:
        """Return the blocks of each stage.

        Examples:
            >>> SIZES["mednext_m"].blocks_of(6)
            (3, 4, 4, 4, 4, 4)
        """
        return (self.blocks + (self.blocks[-1],) * num_stages)[:num_stages]


SIZES = {
    "mednext_s": Size(expansions=(2,), blocks=(2,)),
    "mednext_b": Size(expansions=(2, 3, 4), blocks=(2,)),
    "mednext_m": Size(expansions=(2, 3, 4), blocks=(3, 4)),
    "mednext_l": Size(expansions=(3, 4, 8), blocks=(3, 4, 8)),
}
"""Kind of network -> its size.

Source:
    Roy et al. 2023, "MedNeXt: Transformer-driven scaling of ConvNets for medical image
    segmentation", table of configurations.
"""


class MedNeXtBlock(nn.Module):
    """Depthwise convolution, norm, expansion, GELU, compression; all beside a shortcut.

    The depthwise convolution carries the stride, downwards or (`is_upward`) upwards. A transposed
    convolution of kernel k and stride s over n voxels gives (n - 1) s + 1 of the n s wanted; the
    s - 1 missing ones are zeros, in front. Where the shape or the number of channels changes, the
    shortcut is a 1x1 convolution of the same stride.

    Source:
        Roy et al. 2023; arithmetic and parameter names of the authors' blocks.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        kernel: Sequence[int],
        stride: Sequence[int],
        expansion: int,
        norm: NormMethod,
        is_upward: bool = False,
    ) -> None:
        super().__init__()
        ones, dimension = (1,) * len(kernel), len(kernel)
        plain, resampling = CONVOLUTIONS[dimension], CONVOLUTIONS[dimension]
        self.padding: tuple[int, ...] = ()
        if is_upward:
            resampling = TRANSPOSED[dimension]
            missing = [
                (step - 1, 0) for step in reversed(stride)
            ]  # functional.pad: last axis first
            self.padding = tuple(number for pair in missing for number in pair)
        stride, inside = tuple(stride), expansion * num_inputs
        margin = tuple(size // 2 for size in kernel)
        self.conv1 = resampling(
            num_inputs, num_inputs, tuple(kernel), stride, margin, groups=num_inputs
        )
        self.norm = InstanceNorm(num_inputs, norm)
        self.conv2 = plain(num_inputs, inside, ones)
        self.conv3 = plain(inside, num_outputs, ones)
        self.res_conv: nn.Module | None = None
        if is_upward or num_inputs != num_outputs or any(step != 1 for step in stride):
            self.res_conv = resampling(num_inputs, num_outputs, ones, stride)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, num_outputs, *spatial / stride) features (upward: * stride)."""
        inner = functional.gelu(self.conv2(self.norm(self.conv1(features))))
        shortcut = features if self.res_conv is None else self.res_conv(features)
        total: Tensor = self.conv3(inner) + shortcut
        return functional.pad(total, self.padding) if any(self.padding) else total


class MedNeXtStage(nn.Module):
    """Blocks one after another; those of an encoder stage open with the one that halves."""

    def __init__(self, blocks: Sequence[MedNeXtBlock], is_checkpointed: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.is_checkpointed = is_checkpointed

    def forward(self, features: Tensor) -> Tensor:
        """Return the features after all blocks."""
        for block in self.blocks:
            if self.is_checkpointed and torch.is_grad_enabled():
                features = checkpoint(block, features, use_reentrant=False)
            else:
                features = block(features)
        return features


class MedNeXtEncoder(nn.Module):
    """A 1x1 stem, then one stage per resolution."""

    def __init__(self, architecture: Architecture, num_inputs: int, norm: NormMethod) -> None:
        super().__init__()
        features = architecture.features
        ones = (1,) * len(architecture.strides[0])
        self.stem = CONVOLUTIONS[len(ones)](num_inputs, features[0], ones)
        stages = []
        for stage in range(len(features)):
            blocks = list(_blocks(architecture, stage, architecture.blocks_encoder[stage], norm))
            if stage:
                blocks.insert(0, _resampling(architecture, stage - 1, stage, norm))
            stages.append(MedNeXtStage(blocks, _is_checkpointed(architecture)))
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features of every stage, full resolution first."""
        features, skips = self.stem(images), []
        for stage in self.stages:
            features = stage(features)
            skips.append(features)
        return skips


class MedNeXtDecoder(nn.Module):
    """Climb from the bottleneck: upsample, add the skip, blocks; logits also of the bottleneck.

    Entry u of `ups` and `stages` is the u-th step up; `seg_layers` opens with the bottleneck's
    layer, so that its entry u + 1 belongs to step u.
    """

    def __init__(self, architecture: Architecture, num_logits: int, norm: NormMethod) -> None:
        super().__init__()
        features = architecture.features
        ones = (1,) * len(architecture.strides[0])
        ups, stages = [], []
        for stage in reversed(range(len(features) - 1)):
            ups.append(_resampling(architecture, stage + 1, stage, norm))
            blocks = list(_blocks(architecture, stage, architecture.blocks_decoder[stage], norm))
            stages.append(MedNeXtStage(blocks, _is_checkpointed(architecture)))
        layers = [CONVOLUTIONS[len(ones)](width, num_logits, ones) for width in features[::-1]]
        self.ups = nn.ModuleList(ups)
        self.stages = nn.ModuleList(stages)
        self.seg_layers = nn.ModuleList(layers)

    def forward(self, skips: list[Tensor], deep_supervision: bool) -> list[Tensor]:
        """Return logits, full resolution first: of every stage, or the first alone."""
        features = skips[-1]
        logits = [self.seg_layers[0](features)] if deep_supervision else []
        last = len(self.stages) - 1
        for step, skip in enumerate(reversed(skips[:-1])):
            features = self.stages[step](skip + self.ups[step](features))
            if deep_supervision or step == last:
                logits.append(self.seg_layers[step + 1](features))
        return logits[::-1]


def _blocks(
    architecture: Architecture, stage: int, count: int, norm: NormMethod
) -> Iterator[MedNeXtBlock]:
    """Yield the blocks of a stage that keep its shape."""
    width, kernel = architecture.features[stage], architecture.kernel_sizes[stage]
    for _ in range(count):
        yield MedNeXtBlock(
            width,
            width,
            kernel=kernel,
            stride=(1,) * len(kernel),
            expansion=SIZES[architecture.kind].expansion(stage),
            norm=norm,
        )


def _resampling(
    architecture: Architecture, source: int, target: int, norm: NormMethod
) -> MedNeXtBlock:
    """Return the block from one stage to the next; the deeper one says stride and kernel."""
    deeper = max(source, target)
    return MedNeXtBlock(
        architecture.features[source],
        architecture.features[target],
        kernel=architecture.kernel_sizes[deeper],
        stride=architecture.strides[deeper],
        expansion=SIZES[architecture.kind].expansion(target),
        norm=norm,
        is_upward=target < source,
    )


def _is_checkpointed(architecture: Architecture) -> bool:
    return bool(architecture.options.get("checkpointing", False))


def mednext_problems(options: dict[str, Any]) -> list[str]:
    """Return which options MedNeXt does not have, in words."""
    unknown = sorted(set(options) - {"checkpointing"})
    problems = [f"options has {name!r}; expected nothing but 'checkpointing'" for name in unknown]
    if not isinstance(options.get("checkpointing", False), bool):
        found = options["checkpointing"]
        problems.append(f"options.checkpointing is {found!r}; expected true or false")
    return problems


def mednext(
    architecture: Architecture,
    *,
    num_inputs: int,
    num_logits: int,
    deep_supervision: bool,
    norm: NormMethod,
) -> UNet:
    """Build a MedNeXt; `medseg.models.build` checks the architecture and fills the weights.

    With five stages, strides of two and one kernel size it is the paper's; otherwise strides,
    kernels and the number of stages are the plans'. The option `checkpointing` forgets what is
    inside a block and computes it again for the gradient: less memory, a third more time.

    Source:
        Roy et al. 2023; group norm with one channel a group is instance norm.
    """
    encoder = MedNeXtEncoder(architecture, num_inputs, norm)
    return UNet(encoder, MedNeXtDecoder(architecture, num_logits, norm), deep_supervision)


@torch.no_grad()
def initialize_mednext(network: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw all weights anew: uniform within 1 / sqrt(fan in), norms 1 and 0.

    Source:
        The library's own initialisation of convolutions, which the authors leave as it is.
    """
    convolutions = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for module in network.modules():
        if isinstance(module, InstanceNorm):
            module.weight.fill_(1)
            module.bias.zero_()
        elif isinstance(module, convolutions) and module.bias is not None:
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
            bound = 1 / math.sqrt(module.weight[0].numel())
            module.bias.uniform_(-bound, bound, generator=generator)
