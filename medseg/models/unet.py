"""The plain U-Net: strided convolutions down, transposed convolutions up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medseg.models.blocks import (
    CONVOLUTIONS,
    TRANSPOSED,
    BlockStyle,
    NormMethod,
    StackedConvs,
)
from medseg.models.options import UNetOptions, unet_options
from medseg.schema.plans import Architecture


class PlainEncoder(nn.Module):
    """Stages of convolution blocks, each opened by a strided convolution."""

    def __init__(self, architecture: Architecture, num_inputs: int, style: BlockStyle) -> None:
        super().__init__()
        stages = []
        for stage, features in enumerate(architecture.features):
            convs = StackedConvs(
                num_inputs,
                features,
                kernel=architecture.kernel_sizes[stage],
                stride=architecture.strides[stage],
                count=architecture.blocks_encoder[stage],
                style=style,
            )
            stages.append(nn.Sequential(convs))
            num_inputs = features
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features of every stage, full resolution first."""
        skips = []
        for stage in self.stages:
            images = stage(images)
            skips.append(images)
        return skips


class Decoder(nn.Module):
    """Climb from the bottleneck: upsample, join the skip, convolve; one logit layer a stage.

    Entry u of each list is the u-th step up, so 0 is the one above the bottleneck. The logit
    layers of all steps always exist, so that weights load with and without deep supervision.
    """

    def __init__(self, architecture: Architecture, num_logits: int, options: UNetOptions) -> None:
        super().__init__()
        dimension = len(architecture.strides[0])
        ones = (1,) * dimension
        transposed, stages, logit_layers = [], [], []
        for stage in reversed(range(len(architecture.features) - 1)):
            features, stride = architecture.features[stage], architecture.strides[stage + 1]
            below = architecture.features[stage + 1]
            transposed.append(TRANSPOSED[dimension](below, features, stride, stride))
            convs = StackedConvs(
                2 * features,
                features,
                kernel=options.kernel_sizes_decoder[stage],
                stride=ones,
                count=architecture.blocks_decoder[stage],
                style=options.style,
            )
            stages.append(convs)
            logit_layers.append(CONVOLUTIONS[dimension](features, num_logits, ones))
        self.transpconvs = nn.ModuleList(transposed)
        self.stages = nn.ModuleList(stages)
        self.seg_layers = nn.ModuleList(logit_layers)

    def forward(self, skips: list[Tensor], deep_supervision: bool) -> list[Tensor]:
        """Return logits, full resolution first: of every stage, or the first alone."""
        features, logits = skips[-1], []
        last = len(self.stages) - 1
        for step, skip in enumerate(reversed(skips[:-1])):
            features = self.transpconvs[step](features)
            features = self.stages[step](torch.cat((features, skip), 1))
            if deep_supervision or step == last:
                logits.append(self.seg_layers[step](features))
        return logits[::-1]


class UNet(nn.Module):
    """An encoder, and the decoder that turns its features into logits.

    `deep_supervision` may be switched at any time: on, the network returns the logits of every
    decoder stage, full resolution first; off, the full-resolution logits alone.
    `use_channels_last` changes the layout the network computes in, not its results.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, deep_supervision: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.deep_supervision = deep_supervision
        self.layout = torch.contiguous_format

    def use_channels_last(self) -> UNet:
        """Compute in channels-last memory from now on, the faster layout for convolutions."""
        is_3d = any(isinstance(part, nn.Conv3d) for part in self.modules())
        self.layout = torch.channels_last_3d if is_3d else torch.channels_last
        self.to(memory_format=self.layout)  # type: ignore[call-overload]
        return self

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Return (B, L, *spatial) logits of (B, C, *spatial) images, or a list of them.

        Every axis must be divisible by the product of its strides.
        """
        images = images.contiguous(memory_format=self.layout)
        logits: list[Tensor] = self.decoder(self.encoder(images), self.deep_supervision)
        return logits if self.deep_supervision else logits[0]


def plain_unet(
    architecture: Architecture,
    *,
    num_inputs: int,
    num_logits: int,
    deep_supervision: bool,
    norm: NormMethod,
) -> UNet:
    """Build a plain U-Net; `medseg.models.build` checks the architecture and fills the weights.

    Source:
        Parameter names and arithmetic of nnU-Net v2's plain convolutional U-Net.
    """
    options = unet_options(architecture, norm)
    encoder = PlainEncoder(architecture, num_inputs, options.style)
    return UNet(encoder, Decoder(architecture, num_logits, options), deep_supervision)
