"""Fit the tensors of a foreign file to a network: every one is used, every parameter is filled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from medseg.errors import BundleError
from medseg.schema.plans import Architecture

if TYPE_CHECKING:
    import torch

_WRAPPERS = ("module.", "_orig_mod.")
"""Put before names by data-parallel and compiled networks."""
_LISTED = 30
_ADVICE = "Expected the checkpoint of a training; copy or download it again."
_OTHER_NETWORK = (
    "Use the plans and the dataset.json that the weights were trained with; a network that other "
    "code has built cannot be taken over."
)


class Stored(Protocol):
    """A tensor in a file, of which nothing is read before it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape."""
        ...

    def read(self) -> torch.Tensor:
        """Return its values."""
        ...


def wanted_tensors(
    architecture: Architecture, *, num_inputs: int, num_logits: int
) -> dict[str, torch.Tensor]:
    """Return the tensors a network needs, by name: their shape and type, without any memory.

    Raises:
        BundleError: If the architecture contradicts itself.
    """
    import torch

    from medseg.models.build import NETWORKS, architecture_problems

    if problems := architecture_problems(architecture):
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise BundleError(f"the network of these plans cannot be built:\n{lines}")
    with torch.device("meta"):
        network = NETWORKS[architecture.kind](
            architecture,
            num_inputs=num_inputs,
            num_logits=num_logits,
            deep_supervision=False,
            norm="auto",
        )
    return dict(network.state_dict())


def unwrapped(stored: Mapping[str, Any], where: str) -> dict[str, Stored]:
    """Return tensors by the names a network gives them, whatever it was wrapped in.

    Raises:
        BundleError: If it is no table of tensors, or two names become one.
    """
    if not isinstance(stored, Mapping) or not stored:
        raise BundleError(f"{where}: holds no table of weights. {_ADVICE}")
    result: dict[str, Stored] = {}
    for name, tensor in stored.items():
        if not isinstance(name, str) or not hasattr(tensor, "read"):
            raise BundleError(f"{where}: weight {name!r} is no tensor. {_ADVICE}")
        plain = name
        while plain.startswith(_WRAPPERS):
            plain = plain.split(".", 1)[1]
        if plain in result:
            raise BundleError(f"{where}: holds {plain!r} twice, the second as {name!r}. {_ADVICE}")
        result[plain] = tensor
    return result


def without_copies(
    stored: Mapping[str, Stored], originals: Mapping[str, str], where: str
) -> dict[str, Stored]:
    """Leave out tensors that are stored a second time under another name.

    Args:
        stored: All of them.
        originals: Name of a copy -> name of what it repeats; others are no copies.
        where: What a message names.

    Returns:
        The others; where only the copy is there, it takes the original's name.

    Raises:
        BundleError: If a copy has another shape than what it repeats.
    """
    result = {name: tensor for name, tensor in stored.items() if name not in originals}
    problems = []
    for name, original in originals.items():
        shape, copied = tuple(stored[name].shape), result.setdefault(original, stored[name])
        if shape != tuple(copied.shape):
            problems.append(f"{name} has shape {shape}, {original} {tuple(copied.shape)}")
    _refuse(where, problems, "that should be the same twice are not", _ADVICE)
    return result


def fit(
    stored: Mapping[str, Stored],
    wanted: Mapping[str, torch.Tensor],
    where: str,
    *,
    optional: Iterable[str] = (),
) -> None:
    """Check by names and shapes that tensors fill a network exactly.

    Args:
        stored: Tensors by the network's names.
        wanted: As `wanted_tensors` returns them.
        where: What a message names.
        optional: Those that may be missing, because the original network has none.

    Raises:
        BundleError: With every tensor that is missing, left over or of another shape.
    """
    may_lack = set(optional)
    problems = [
        *(
            f"missing: {name} {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name not in stored and name not in may_lack
        ),
        *(
            f"left over: {name} {tuple(tensor.shape)}"
            for name, tensor in stored.items()
            if name not in wanted
        ),
        *(
            f"{name} has shape {tuple(stored[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in stored and tuple(stored[name].shape) != tuple(tensor.shape)
        ),
    ]
    what = f"of {len(wanted)} do not fit the network that the plans describe"
    _refuse(where, problems, what, _OTHER_NETWORK)


def read_tensors(
    stored: Mapping[str, Stored],
    wanted: Mapping[str, torch.Tensor],
    where: str,
    *,
    fills: Mapping[str, float] | None = None,
) -> dict[str, torch.Tensor]:
    """Read tensors that fit, in the network's types and order.

    Args:
        stored: As `fit` has found them right.
        wanted: As `wanted_tensors` returns them.
        where: What a message names.
        fills: Name -> value for all of a tensor that is not stored.

    Raises:
        BundleError: If values are not numbers, with every tensor that holds such.
    """
    import torch

    result, problems = {}, []
    for name, tensor in wanted.items():
        if name not in stored:
            value = (fills or {})[name]
            result[name] = torch.full(tensor.shape, value, dtype=tensor.dtype)
            continue
        values = stored[name].read()
        if values.is_complex() or values.is_quantized or values.layout != torch.strided:
            problems.append(f"{name} is of type {values.dtype}, expected {tensor.dtype}")
            continue
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            problems.append(f"{name} holds values that are infinite or not a number")
        result[name] = values.detach().to(tensor.dtype)
    _refuse(where, problems, "are not usable", _ADVICE)
    return result


def copies_of_blocks(names: Iterable[str]) -> dict[str, str]:
    """Return which names of nnU-Net version 2 repeat others: copy -> original.

    Each block stores its convolution and its norm again in `all_modules`, the decoder the whole
    encoder again.

    >>> copies_of_blocks(["decoder.encoder.stem.convs.0.all_modules.2.bias", "encoder.a.bias"])
    {'decoder.encoder.stem.convs.0.all_modules.2.bias': 'encoder.stem.convs.0.norm.bias'}
    """
    found = {}
    for name in names:
        original = name.removeprefix("decoder.") if name.startswith("decoder.encoder.") else name
        match = re.fullmatch(r"(.+\.)all_modules\.(\d+)\.(\w+)", original)
        if match is not None:
            original = f"{match[1]}{'norm' if int(match[2]) else 'conv'}.{match[3]}"
        if original != name:
            found[name] = original
    return found


def _refuse(where: str, problems: list[str], what: str, advice: str) -> None:
    if problems:
        count = f"{len(problems)} tensor{'s' if len(problems) > 1 else ''}"
        lines = [f"  {problem}" for problem in problems[:_LISTED]]
        more = len(problems) - len(lines)
        lines += [f"  and {more} more"] if more else []
        raise BundleError(
            "\n".join(
                [
                    f"{where}: {count} {what}:",
                    *lines,
                    advice,
                ]
            )
        )
