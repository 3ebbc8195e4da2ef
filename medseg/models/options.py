"""What a U-Net may be told beside its topology: norm, activation, kernels of its own.

`architecture.options` of the kinds `plain_unet` and `residual_unet`, all of them optional:

- `norm`, `epsilon`, `activation`, `slope`, `activation_first`: see `BlockStyle`.
- `kernel_sizes_decoder`: kernel size of each decoder stage and axis, full resolution first.
- `kernel_size_stem`, `shortcut`: of the residual encoder alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from medseg.errors import near_names
from medseg.models.blocks import Activation, BlockStyle, Norm, NormMethod, Shortcut
from medseg.schema.base import is_number
from medseg.schema.plans import Architecture

_STYLE = ("norm", "epsilon", "activation", "slope", "activation_first")
_RESIDUAL = ("kernel_size_stem", "shortcut")
_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": get_args(Norm),
    "activation": get_args(Activation),
    "shortcut": get_args(Shortcut),
}
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epsilon": (lambda value: is_number(value) and value > 0, "a positive number"),
    "slope": (lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "activation_first": (lambda value: isinstance(value, bool), "true or false"),
}
_IDLE = (("slope", "activation", "leaky_relu"), ("epsilon", "norm", "instance or batch"))
"""Options that say nothing unless another one has a certain value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetOptions:
    """The options of a U-Net, with what they are where nothing is said."""

    style: BlockStyle
    """Of every block."""
    kernel_sizes_decoder: tuple[tuple[int, ...], ...]
    """Kernel size of each decoder stage and axis, full resolution first; otherwise those of the
    encoder."""
    kernel_size_stem: tuple[int, ...]
    """Kernel size of the residual encoder's stem; otherwise that of its first stage."""
    shortcut: Shortcut
    """What the residual blocks' shortcuts are made of, see `ResidualBlock`."""


def unet_options(architecture: Architecture, method: NormMethod = "auto") -> UNetOptions:
    """Return the options of an architecture that has no problems.

    Args:
        architecture: A plain or residual U-Net.
        method: Operation behind the instance norm.
    """
    options = architecture.options
    style = {name: options[name] for name in _STYLE if name in options}
    kernels = options.get("kernel_sizes_decoder", architecture.kernel_sizes[:-1])
    return UNetOptions(
        style=BlockStyle(**style, method=method),
        kernel_sizes_decoder=tuple(tuple(kernel) for kernel in kernels),
        kernel_size_stem=tuple(options.get("kernel_size_stem", architecture.kernel_sizes[0])),
        shortcut=options.get("shortcut", "pooled"),
    )


def unet_problems(architecture: Architecture) -> list[str]:
    """Return what is wrong with the options of a U-Net, in words; empty if nothing is.

    Examples:
        >>> net = Architecture(
        ...     kind="plain_unet", features=(4, 8), kernel_sizes=((3, 3), (3, 3)),
        ...     strides=((1, 1), (2, 2)), blocks_encoder=(1, 1), blocks_decoder=(1,),
        ...     options={"norm": "batch", "slope": 0.2, "activation": "relu"},
        ... )
        >>> unet_problems(net)
        ["options.slope is 0.2, but options.activation is 'relu'; expected leaky_relu, or no slope"]
    """
    options = architecture.options
    known = [*_STYLE, "kernel_sizes_decoder"]
    known += _RESIDUAL if architecture.kind == "residual_unet" else ()
    problems = [
        f"options has {name!r}; {architecture.kind} knows: {', '.join(known)}."
        f"{near_names(name, known)}"
        for name in options
        if name not in known
    ]
    given = {name: options[name] for name in known if name in options}
    for name, value in given.items():
        if name in _CHOICES and value not in _CHOICES[name]:
            choices = list(_CHOICES[name])
            problems.append(
                f"options.{name} is {value!r}; expected one of: {', '.join(choices)}."
                f"{near_names(str(value), choices)}"
            )
        elif name in _CHECKS and not _CHECKS[name][0](value):
            problems.append(f"options.{name} is {value!r}; expected {_CHECKS[name][1]}")
    return problems + _idle_problems(given) + _kernel_problems(architecture, given)


def _idle_problems(given: dict[str, Any]) -> list[str]:
    """Return which options nothing in the network would follow."""
    style = BlockStyle()
    return [
        f"options.{name} is {given[name]!r}, but options.{other} is {value!r}; "
        f"expected {wanted}, or no {name}"
        for name, other, wanted in _IDLE
        if name in given
        if (value := given.get(other, getattr(style, other))) in _CHOICES[other]
        if value not in wanted.split(" or ")
    ]


def _kernel_problems(architecture: Architecture, given: dict[str, Any]) -> list[str]:
    num_axes = len(architecture.strides[0]) if architecture.strides else 0
    wanted = f"{num_axes} odd sizes"
    problems = []
    if "kernel_size_stem" in given and not _is_kernel(given["kernel_size_stem"], num_axes):
        problems.append(
            f"options.kernel_size_stem is {given['kernel_size_stem']!r}; expected {wanted}"
        )
    if "kernel_sizes_decoder" in given:
        kernels, expected = given["kernel_sizes_decoder"], len(architecture.features) - 1
        is_list = isinstance(kernels, (list, tuple)) and len(kernels) == expected
        if not is_list or not all(_is_kernel(kernel, num_axes) for kernel in kernels):
            problems.append(
                f"options.kernel_sizes_decoder is {kernels!r}; expected {expected} entries, one "
                f"fewer than features, of {wanted} each"
            )
    return problems


def _is_kernel(value: Any, num_axes: int) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) == num_axes
    return is_list and all(type(size) is int and size > 0 and size % 2 for size in value)
