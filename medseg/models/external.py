"""Networks from outside: any "package.module:Name" that maps images to logits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from medseg.errors import BundleError, ConfigError, near_names
from medseg.schema.plans import Architecture

PLACEHOLDERS = ("$num_inputs", "$num_logits", "$patch_size", "$num_axes")
"""Texts in `options` that stand for what the network is built for."""


class ExternalNetwork(nn.Module):
    """A network from outside, with the switches that the built-in ones have.

    It has no logits of lower resolutions, so `deep_supervision` stays off, and it computes in the
    memory layout its author had in mind unless it brings a `use_channels_last` of its own.
    """

    def __init__(self, network: nn.Module, kind: str, num_logits: int) -> None:
        super().__init__()
        self.network = network
        self.kind = kind
        self.num_logits = num_logits
        self.deep_supervision = False

    def use_channels_last(self) -> ExternalNetwork:
        """Let the network choose the layout if it can."""
        own = getattr(self.network, "use_channels_last", None)
        if callable(own):
            own()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, L, *spatial) logits of (B, C, *spatial) images.

        Raises:
            ConfigError: If the network returns anything else.
        """
        logits = self.network(images)
        expected = (images.shape[0], self.num_logits, *images.shape[2:])
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            raise ConfigError(
                f"network.kind is {self.kind!r}, which returned {_described(logits)} for images of "
                f"shape {tuple(images.shape)}; expected one tensor of logits (B, L, *spatial), "
                f"here {expected}. Correct network.options, or wrap the network."
            )
        return logits


def external_network(
    architecture: Architecture,
    *,
    num_inputs: int,
    num_logits: int,
    patch_size: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> ExternalNetwork:
    """Build a network from outside.

    The object is called with the architecture's options as keywords, in which the texts
    `$num_inputs`, `$num_logits`, `$patch_size` (a tuple) and `$num_axes` stand for these values.
    The first two are also handed over as `num_inputs=` and `num_logits=` unless an option asks
    for them.

    Args:
        architecture: Its `kind` is "package.module:Name".
        num_inputs: Input channels C.
        num_logits: Logit channels L.
        patch_size: Training patch in voxels.
        generator: Source of the weights: torch's global one is seeded from it and put back.

    Raises:
        ConfigError: If it cannot be imported or called so, or is no network.
    """
    factory = imported(architecture.kind)
    size = None if patch_size is None else tuple(int(length) for length in patch_size)
    values = dict(
        zip(PLACEHOLDERS, (num_inputs, num_logits, size, *architecture.num_axes), strict=True)
    )
    keywords = _keywords(architecture, values)
    try:
        inspect.signature(factory).bind(**keywords)
    except TypeError as error:
        raise ConfigError(
            f"network.kind is {architecture.kind!r}, which cannot be called with "
            f"{', '.join(f'{name}={value!r}' for name, value in keywords.items())}: {error}. "
            "Correct network.options; its arguments may be called "
            f"{', '.join(PLACEHOLDERS)} by any names."
        ) from None
    except ValueError:
        pass  # a signature that cannot be read
    with torch.random.fork_rng(devices=(), enabled=generator is not None):
        if generator is not None:
            seed = torch.randint(2**62, (), generator=generator)
            torch.default_generator.manual_seed(int(seed))
        network = factory(**keywords)
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"network.kind is {architecture.kind!r}, which made a {type(network).__name__}; "
            "expected a torch.nn.Module."
        )
    return ExternalNetwork(network, architecture.kind, num_logits)


def require_trust(kind: str, trust_code: bool) -> None:
    """Refuse to run code that a bundle names, unless its reader trusts it.

    Raises:
        BundleError: If the network is no built-in one and the code is not trusted.
    """
    if ":" in kind and not trust_code:
        raise BundleError(
            f"the network is {kind!r}, Python code from outside medseg, which loading would run. "
            "If you know and trust that code, pass trust_code=True (--trust-code)."
        )


def imported(kind: str) -> Any:
    """Return the object behind "package.module:Name".

    Raises:
        ConfigError: If the module does not import or has no such name.
    """
    module_name, _, name = kind.partition(":")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"network.kind is {kind!r}, which does not import ({error}); expected a module on the "
            "Python path. Install its package, or set PYTHONPATH."
        ) from None
    if not hasattr(module, name):
        known = [each for each in vars(module) if not each.startswith("_")]
        raise ConfigError(
            f"network.kind is {kind!r}, but {module_name} has no {name!r}.{near_names(name, known)}"
        )
    return getattr(module, name)


def _keywords(architecture: Architecture, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of the call: the options with values in place of placeholders."""
    asked = {text for text in architecture.options.values() if isinstance(text, str)}
    unknown = sorted(text for text in asked if text.startswith("$") and text not in values)
    if unknown:
        raise ConfigError(
            f"network.options has {', '.join(unknown)}; expected one of: {', '.join(values)}."
        )
    if "$patch_size" in asked and values["$patch_size"] is None:
        raise ConfigError("network.options asks for $patch_size, which is not known here.")
    given = {
        name: values[option] if isinstance(option, str) and option in values else option
        for name, option in architecture.options.items()
    }
    own = {text.removeprefix("$"): values[text] for text in PLACEHOLDERS[:2] if text not in asked}
    return {**own, **given}


def _described(logits: Any) -> str:
    if isinstance(logits, Tensor):
        return f"a tensor of shape {tuple(logits.shape)}"
    return f"a {type(logits).__name__}"
