"""Building blocks of the networks: instance norm, convolution block, residual block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

NormMethod = Literal["auto", "instance", "group"]

NEGATIVE_SLOPE = 0.01
EPSILON = 1e-5
_BLOCK = 1 << 20
"""Values that are worked on at a time: few enough for the cache, enough for several threads."""

LayerFactory = Callable[..., nn.Module]
CONVOLUTIONS: dict[int, LayerFactory] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, LayerFactory] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOLS: dict[int, LayerFactory] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}


class InstanceNorm(nn.Module):
    """Normalise each channel of each sample over space, then scale and shift.

    Parameters are named as those of `torch.nn.InstanceNorm3d`; only the operation that does the
    work differs, see `instance_norm`.
    """

    def __init__(self, channels: int, method: NormMethod = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.method = method

    def forward(self, features: Tensor, slope: float = 1.0) -> Tensor:
        """Return the normalised (B, C, *spatial) features, negative ones times `slope`."""
        return instance_norm(features, self.weight, self.bias, self.method, slope=slope)


def instance_norm(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    method: NormMethod = "auto",
    *,
    slope: float = 1.0,
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
        result: Tensor = _ChannelsLastNorm.apply(features, weight, bias, slope)  # type: ignore[no-untyped-call]
        return result
    if method == "instance" or (method == "auto" and not (on_cpu or channels_last)):
        result = functional.instance_norm(features, weight=weight, bias=bias, eps=EPSILON)
    else:
        result = torch.group_norm(features, features.shape[1], weight, bias, EPSILON)
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
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, slope: float) -> Tensor:
        batch, channels = features.shape[:2]
        voxels = features[0, 0].numel()
        result, mean, inverse_std = torch.native_group_norm(
            features, weight, bias, batch, channels, voxels, channels, EPSILON
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
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
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
    """Convolution, instance norm and, unless told otherwise, leaky ReLU."""

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        kernel: Sequence[int],
        stride: Sequence[int],
        norm: NormMethod,
        bias: bool = True,
        activated: bool = True,
    ) -> None:
        super().__init__()
        padding = tuple((size - 1) // 2 for size in kernel)
        convolution = CONVOLUTIONS[len(kernel)]
        self.conv = convolution(
            num_inputs, num_outputs, tuple(kernel), tuple(stride), padding, bias=bias
        )
        self.norm = InstanceNorm(num_outputs, norm)
        self.activated = activated

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, num_outputs, *spatial / stride) features."""
        result: Tensor = self.norm(self.conv(features), NEGATIVE_SLOPE if self.activated else 1.0)
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
        norm: NormMethod,
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
                    norm=norm,
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

    The shortcut averages over the stride where there is one, and projects with a 1x1 convolution
    (no bias) and a norm where the number of channels changes; otherwise it is the input itself.

    Source:
        ResNet-D (He et al. 2019, "Bag of tricks"), as in nnU-Net's residual encoder presets.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        kernel: Sequence[int],
        stride: Sequence[int],
        norm: NormMethod,
    ) -> None:
        super().__init__()
        ones = (1,) * len(kernel)
        self.conv1 = ConvBlock(num_inputs, num_outputs, kernel=kernel, stride=stride, norm=norm)
        self.conv2 = ConvBlock(
            num_outputs, num_outputs, kernel=kernel, stride=ones, norm=norm, activated=False
        )
        shortcut: list[nn.Module] = []
        if any(step != 1 for step in stride):
            shortcut.append(POOLS[len(kernel)](tuple(stride), tuple(stride)))
        if num_inputs != num_outputs:
            projection = ConvBlock(
                num_inputs,
                num_outputs,
                kernel=ones,
                stride=ones,
                norm=norm,
                bias=False,
                activated=False,
            )
            shortcut.append(projection)
        self.skip = nn.Sequential(*shortcut)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, num_outputs, *spatial / stride) features."""
        total = self.conv2(self.conv1(features)).add_(self.skip(features))
        return functional.leaky_relu(total, NEGATIVE_SLOPE, inplace=True)
