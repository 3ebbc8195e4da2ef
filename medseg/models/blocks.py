"""Building blocks of the networks: norms, convolution block, residual block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

NormMethod = Literal["auto", "instance", "group"]
"""Operation behind the instance norm, see `instance_norm`; it changes nothing but rounding."""
Norm = Literal["instance", "batch", "none"]
Activation = Literal["leaky_relu", "relu", "gelu", "mish"]
Shortcut = Literal["pooled", "strided"]

NEGATIVE_SLOPE = 0.01
EPSILON = 1e-5
_BLOCK = 1 << 20
"""Values that are worked on at a time: few enough for the cache, enough for several threads."""

LayerFactory = Callable[..., nn.Module]
CONVOLUTIONS: dict[int, LayerFactory] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, LayerFactory] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOLS: dict[int, LayerFactory] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
BATCH_NORMS: dict[int, LayerFactory] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStyle:
    """What a block has beside its convolution."""

    norm: Norm = "instance"
    """`instance`: over space; `batch`: over batch and space, by running statistics once trained;
    `none`: nothing."""
    epsilon: float = EPSILON
    """Added to the variance."""
    method: NormMethod = "auto"
    """Operation behind the instance norm."""
    activation: Activation = "leaky_relu"
    """Function after the norm."""
    slope: float = NEGATIVE_SLOPE
    """What `leaky_relu` multiplies negative values by."""
    activation_first: bool = False
    """Whether the activation comes before the norm."""

    @property
    def negative_slope(self) -> float:
        """Return the slope of the activation far below 0."""
        return self.slope if self.activation == "leaky_relu" else 0.0

    @property
    def is_fused(self) -> bool:
        """Return whether norm and activation are one operation."""
        is_usual = self.norm == "instance" and self.activation == "leaky_relu"
        return is_usual and not self.activation_first


def activate(features: Tensor, style: BlockStyle) -> Tensor:
    """Return the activated features, in their own memory where the gradient allows it."""
    if style.activation == "relu":
        return functional.relu(features, inplace=True)
    if style.activation == "gelu":
        return functional.gelu(features)
    if style.activation == "mish":  # as first published; the library's own rounds otherwise
        return features * torch.tanh(functional.softplus(features))
    return functional.leaky_relu(features, style.slope, inplace=True)


def norm_layer(channels: int, dimension: int, style: BlockStyle) -> nn.Module:
    """Return the norm of a style; without one, a layer that has no parameters and does nothing."""
    if style.norm == "batch":
        return BATCH_NORMS[dimension](channels, eps=style.epsilon)
    if style.norm == "none":
        return nn.Identity()
    return InstanceNorm(channels, style.method, style.epsilon)


class InstanceNorm(nn.Module):
    """Normalise each channel of each sample over space, then scale and shift.

    Parameters are named as those of `torch.nn.InstanceNorm3d`; only the operation that does the
    work differs, see `instance_norm`.
    """

    def __init__(
        self, channels: int, method: NormMethod = "auto", epsilon: float = EPSILON
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.method = method
        self.epsilon = epsilon

    def forward(self, features: Tensor, slope: float = 1.0) -> Tensor:
        """Return the normalised (B, C, *spatial) features, negative ones times `slope`."""
        return instance_norm(
            features, self.weight, self.bias, self.method, slope=slope, epsilon=self.epsilon
        )


def instance_norm(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    method: NormMethod = "auto",
    *,
    slope: float = 1.0,
    epsilon: float = EPSILON,
) -> Tensor:
    """Normalise (B, C, *spatial) features over space by the operation that suits their layout.

    `instance` is torch's instance norm, which returns contiguous memory whatever it was given.
    `group` is group norm with one channel a group: the same numbers to rounding, with the layout
    kept. `auto` takes `group` on the CPU, where it is the faster in both layouts, and wherever
    the features are channels-last; its gradient in channels-last memory on the CPU is computed
    by `_ChannelsLastNorm`. Negative results are multiplied by `slope` (1: no leaky ReLU).
    """
    channels_last = is_channels_last(features)
    on_cpu = features.device.type == "cpu"
    by_hand = method == "auto" and on_cpu and channels_last and torch.is_grad_enabled()
    if by_hand and not torch.compiler.is_compiling():
        result: Tensor = _ChannelsLastNorm.apply(features, weight, bias, slope, epsilon)  # type: ignore[no-untyped-call]
        return result
    if method == "instance" or (method == "auto" and not (on_cpu or channels_last)):
        result = functional.instance_norm(features, weight=weight, bias=bias, eps=epsilon)
    else:
        result = torch.group_norm(features, features.shape[1], weight, bias, epsilon)
    return result if slope == 1 else functional.leaky_relu(result, slope, inplace=True)


def is_channels_last(features: Tensor) -> bool:
    """Return whether (B, C, *spatial) memory runs over channels first, and only so."""
    layout = torch.channels_last if features.ndim == 4 else torch.channels_last_3d
    return features.is_contiguous(memory_format=layout) and not features.is_contiguous()


class _ChannelsLastNorm(torch.autograd.Function):
    """Group norm with one channel a group, and leaky ReLU; their gradient by rows of channels.

    On channels-last memory the library's backward pass costs several times its forward pass. Here
    it goes over each sample twice, for the sums and for the gradient, block by block, so that what
    one operation leaves is still in the cache for the next.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, slope: float, epsilon: float
    ) -> Tensor:
        batch, channels = features.shape[:2]
        voxels = features[0, 0].numel()
        result, mean, inverse_std = torch.native_group_norm(
            features, weight, bias, batch, channels, voxels, channels, epsilon
        )
        ctx.slope = slope
        if slope == 1:
            ctx.save_for_backward(features, weight, mean, inverse_std)
        else:
            functional.leaky_relu_(result, slope)
            ctx.save_for_backward(features, weight, mean, inverse_std, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        features, weight, mean, inverse_std, *results = ctx.saved_tensors
        exact = torch.promote_types(features.dtype, torch.float32)
        rows, rows_gradient = _rows(features), _rows(gradient)
        rows_result = [_rows(result) for result in results]
        to_rows, sums = torch.empty_like(rows), []
        step = max(1, _BLOCK // rows[0].numel())
        for some in (slice(first, first + step) for first in range(0, len(rows), step)):
            arriving = rows_gradient[some]
            if rows_result:
                arriving = torch.ops.aten.leaky_relu_backward.grad_input(
                    arriving, rows_result[0][some], ctx.slope, True, grad_input=to_rows[some]
                )
            moments = tuple(each[some].unsqueeze(1).to(exact) for each in (mean, inverse_std))
            sums.append(_norm_backward(rows[some], arriving, weight, moments, to_rows[some]))
        batch, channels, *spatial = features.shape
        to_weight, to_bias = (torch.cat(each).sum((0, 1)) for each in zip(*sums, strict=True))
        return (
            to_rows.view(batch, *spatial, channels).movedim(-1, 1),
            to_weight.to(weight.dtype),
            to_bias.to(weight.dtype),
            None,
            None,
        )


def _norm_backward(
    rows: Tensor, gradient: Tensor, weight: Tensor, moments: tuple[Tensor, ...], target: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradient of some samples' (B, voxels, C) rows to `target`, block by block.

    Args:
        rows: Features before the norm.
        gradient: Gradient of its result.
        weight: (C,).
        moments: Mean and inverse standard deviation, (B, 1, C).
        target: Where the gradient goes; it may be the memory of `gradient`.

    Returns:
        Gradient of weight and bias, (B, 1, C).
    """
    (mean, inverse_std), voxels = moments, rows.shape[1]
    to_bias, along = torch.zeros_like(mean), torch.zeros_like(mean)
    step = max(1, _BLOCK // rows.shape[2])
    blocks = [(slice(None), slice(first, first + step)) for first in range(0, voxels, step)]
    for block in blocks:
        arriving = gradient[block].to(mean.dtype)
        to_bias += arriving.sum(1, keepdim=True)
        along += (arriving * rows[block]).sum(1, keepdim=True)
    to_weight = (along - mean * to_bias) * inverse_std
    scale = weight.to(mean.dtype) * inverse_std
    slope = -scale * inverse_std * to_weight / voxels
    offset = -scale * to_bias / voxels - slope * mean
    for block in blocks:
        result = torch.addcmul(offset, gradient[block].to(mean.dtype), scale)
        target[block] = result.addcmul_(rows[block].to(mean.dtype), slope)
    return to_weight, to_bias


def _rows(features: Tensor) -> Tensor:
    """Return (B, C, *spatial) as contiguous (B, voxels, C): a view of channels-last memory."""
    return features.movedim(1, -1).flatten(1, -2).contiguous()


class ConvBlock(nn.Module):
    """Convolution, norm and, unless told otherwise, activation, in the order of the style."""

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        kernel: Sequence[int],
        stride: Sequence[int],
        style: BlockStyle,
        bias: bool = True,
        activated: bool = True,
    ) -> None:
        super().__init__()
        padding = tuple((size - 1) // 2 for size in kernel)
        convolution = CONVOLUTIONS[len(kernel)]
        self.conv = convolution(
            num_inputs, num_outputs, tuple(kernel), tuple(stride), padding, bias=bias
        )
        self.norm = norm_layer(num_outputs, len(kernel), style)
        self.style = style
        self.activated = activated

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, num_outputs, *spatial / stride) features."""
        style = self.style
        result: Tensor = self.conv(features)
        if self.activated and style.is_fused:
            result = self.norm(result, style.slope)
        elif not self.activated:
            result = self.norm(result)
        elif style.activation_first:
            result = self.norm(activate(result, style))
        else:
            result = activate(self.norm(result), style)
        return result


class StackedConvs(nn.Module):
    """Convolution blocks one after another; the first carries the stride."""

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        kernel: Sequence[int],
        stride: Sequence[int],
        count: int,
        style: BlockStyle,
    ) -> None:
        super().__init__()
        ones = (1,) * len(kernel)
        self.convs = nn.Sequential(
            *(
                ConvBlock(
                    num_outputs if index else num_inputs,
                    num_outputs,
                    kernel=kernel,
                    stride=ones if index else stride,
                    style=style,
                )
                for index in range(count)
            )
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, num_outputs, *spatial / stride) features."""
        result: Tensor = self.convs(features)
        return result


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, their sum activated.

    The `pooled` shortcut averages over the stride where there is one, and projects with a 1x1
    convolution (no bias) and a norm where the number of channels changes. In the `strided` one
    that convolution carries the stride, and it is there where either changes. Otherwise the
    shortcut is the input itself.

    Source:
        ResNet-D (He et al. 2019, "Bag of tricks"), as in nnU-Net's residual encoder presets;
        `strided` as in those of nnU-Net v1.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        kernel: Sequence[int],
        stride: Sequence[int],
        style: BlockStyle,
        shortcut: Shortcut = "pooled",
    ) -> None:
        super().__init__()
        ones = (1,) * len(kernel)
        self.style = style
        self.conv1 = ConvBlock(num_inputs, num_outputs, kernel=kernel, stride=stride, style=style)
        self.conv2 = ConvBlock(
            num_outputs, num_outputs, kernel=kernel, stride=ones, style=style, activated=False
        )
        parts: list[nn.Module] = []
        has_stride, is_pooled = any(step != 1 for step in stride), shortcut == "pooled"
        if has_stride and is_pooled:
            parts.append(POOLS[len(kernel)](tuple(stride), tuple(stride)))
        if num_inputs != num_outputs or (has_stride and not is_pooled):
            projection = ConvBlock(
                num_inputs,
                num_outputs,
                kernel=ones,
                stride=ones if is_pooled else stride,
                style=style,
                bias=False,
                activated=False,
            )
            parts.append(projection)
        self.skip = nn.Sequential(*parts)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, num_outputs, *spatial / stride) features."""
        total = self.conv2(self.conv1(features)).add_(self.skip(features))
        return activate(total, self.style)
