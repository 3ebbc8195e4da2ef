"""The residual-encoder U-Net: a stem and residual stages down, the plain decoder up."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from medseg.models.blocks import NormMethod, ResidualBlock, StackedConvs
from medseg.models.options import UNetOptions, unet_options
from medseg.models.unet import Decoder, UNet
from medseg.schema.plans import Architecture


class ResidualStage(nn.Module):
    """Residual blocks one after another; the first carries the stride."""

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        kernel: Sequence[int],
        stride: Sequence[int],
        count: int,
        options: UNetOptions,
    ) -> None:
        super().__init__()
        ones = (1,) * len(kernel)
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(
                    num_outputs if index else num_inputs,
                    num_outputs,
                    kernel=kernel,
                    stride=ones if index else stride,
                    style=options.style,
                    shortcut=options.shortcut,
                )
                for index in range(count)
            )
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, num_outputs, *spatial / stride) features."""
        result: Tensor = self.blocks(features)
        return result


class ResidualEncoder(nn.Module):
    """A stem of one convolution block, then one residual stage per resolution."""

    def __init__(self, architecture: Architecture, num_inputs: int, options: UNetOptions) -> None:
        super().__init__()
        num_inputs_stage = architecture.features[0]
        self.stem = StackedConvs(
            num_inputs,
            num_inputs_stage,
            kernel=options.kernel_size_stem,
            stride=(1,) * len(architecture.strides[0]),
            count=1,
            style=options.style,
        )
        stages = []
        for stage, features in enumerate(architecture.features):
            blocks = ResidualStage(
                num_inputs_stage,
                features,
                kernel=architecture.kernel_sizes[stage],
                stride=architecture.strides[stage],
                count=architecture.blocks_encoder[stage],
                options=options,
            )
            stages.append(blocks)
            num_inputs_stage = features
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features of every stage, full resolution first."""
        features, skips = self.stem(images), []
        for stage in self.stages:
            features = stage(features)
            skips.append(features)
        return skips


def residual_unet(
    architecture: Architecture,
    *,
    num_inputs: int,
    num_logits: int,
    deep_supervision: bool,
    norm: NormMethod,
) -> UNet:
    """Build a residual-encoder U-Net; `medseg.models.build` checks and fills it.

    Source:
        Parameter names and arithmetic of nnU-Net v2's residual encoder U-Net.
    """
    options = unet_options(architecture, norm)
    encoder = ResidualEncoder(architecture, num_inputs, options)
    return UNet(encoder, Decoder(architecture, num_logits, options), deep_supervision)
