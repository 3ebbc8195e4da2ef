"""Describe a network of nnU-Net v1 by its weights, and give its tensors the names of medseg's.

The kernel sizes, the features and the number of blocks are read from the shapes: plans of v1 have
no kernels of the decoder's, and some trainers do not keep to what the plans say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medseg.errors import BundleError
from medseg.interop.nnunet.v1_values import problem_lines
from medseg.interop.nnunet.weights import Stored, fit, read_tensors, unwrapped, wanted_tensors
from medseg.schema.plans import Architecture

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]
_KERNELS = (1, 3)
"""Kernel sizes the original pads so that the size stays."""
_BIASES = (
    re.compile(r"decoder\.transpconvs\.\d\d?\d?\.bias"),
    re.compile(r"decoder\.seg_layers\.\d\d?\d?\.bias"),
    re.compile(r".+\.conv\.bias"),
)
"""Of transposed convolutions, outputs, and all other convolutions."""
_PARAMETER = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


@dataclass(frozen=True, slots=True, kw_only=True)
class V1Network:
    """A network, and how its weights are stored."""

    architecture: Architecture
    """In medseg's terms."""
    num_inputs: int
    """Input channels."""
    num_logits: int
    """Output channels."""
    zeros: tuple[str, ...]
    """Biases the original network does not have."""


def renamed(stored: Any, where: str) -> dict[str, Stored]:
    """Return the tensors of a state by the names of medseg's networks.

    Args:
        stored: Name -> tensor, as a checkpoint holds them.
        where: What a message names.

    Raises:
        BundleError: If they belong to no network of nnU-Net v1 that medseg has; with every name
            that has no place.
    """
    plain = unwrapped(stored, where)
    if any(name.startswith("conv_blocks_context.") for name in plain):
        name_of = _plain_names(plain)
    elif any(name.startswith("encoder.initial_conv.") for name in plain):
        name_of = _residual_names(plain)
    else:
        names = ", ".join(sorted(plain)[:3])
        raise BundleError(
            f"{where}: the weights ({names[:200]} ...) belong to no network that medseg can take "
            "over; expected a Generic_UNet or its residual-encoder variant, FabiansUNet."
        )
    result: dict[str, Stored] = {}
    problems = []
    for name, tensor in plain.items():
        ours = name_of(name)
        if ours is None:
            problems.append(f"{name} {tuple(tensor.shape)}: the network has no such part")
        elif ours and ours in result:
            problems.append(f"{name}: its place is taken by another tensor")
        elif ours:
            result[ours] = tensor
    if problems:
        raise BundleError(problem_lines(f"the weights of {where}", problems[:30]))
    return result


def _plain_names(stored: Mapping[str, Any]) -> Callable[[str], str | None]:
    """Return what names the tensors of a Generic_UNet.

    Bottleneck and decoder stages come in two halves, the second of which goes on counting.
    """
    halves: dict[tuple[str, str], int] = {}
    in_half = re.compile(r"conv_blocks_(context|localization)\.(\d\d?\d?)\.0\.blocks\.(\d\d?\d?)\.")
    for name in stored:
        if match := in_half.match(name):
            group, stage, block = match.groups()
            halves[group, stage] = max(halves.get((group, stage), 0), int(block) + 1)
    block_name = re.compile(
        r"conv_blocks_(context|localization)\.(\d\d?\d?)\.(?:([01])\.)?blocks\.(\d\d?\d?)\."
        rf"(conv|instnorm)\.{_PARAMETER}"
    )

    def name_of(name: str) -> str | None:
        if match := block_name.fullmatch(name):
            group, stage, half, block, part, parameter = match.groups()
            number = int(block) + (halves.get((group, stage), 0) if half == "1" else 0)
            is_encoder = group == "context"
            place = f"encoder.stages.{stage}.0" if is_encoder else f"decoder.stages.{stage}"
            return f"{place}.convs.{number}.{part.replace('instnorm', 'norm')}.{parameter}"
        if match := re.fullmatch(r"(tu|seg_outputs)\.(\d\d?\d?)\.(weight|bias)", name):
            layers = "transpconvs" if match[1] == "tu" else "seg_layers"
            return f"decoder.{layers}.{match[2]}.{match[3]}"
        return None

    return name_of


_RESIDUAL = [
    (rf"encoder\.initial_(conv|norm)\.{_PARAMETER}", r"encoder.stem.convs.0.\1.\2"),
    (
        rf"encoder\.stages\.(\d\d?\d?)\.convs\.(\d\d?\d?)\.(conv|norm)([12])\.{_PARAMETER}",
        r"encoder.stages.\1.blocks.\2.conv\4.\3.\5",
    ),
    (
        r"encoder\.stages\.(\d\d?\d?)\.convs\.(\d\d?\d?)\.downsample_skip\.0\.(weight|bias)",
        r"encoder.stages.\1.blocks.\2.skip.0.conv.\3",
    ),
    (
        rf"encoder\.stages\.(\d\d?\d?)\.convs\.(\d\d?\d?)\.downsample_skip\.1\.{_PARAMETER}",
        r"encoder.stages.\1.blocks.\2.skip.0.norm.\3",
    ),
    (r"decoder\.tus\.(\d\d?\d?)\.(weight|bias)", r"decoder.transpconvs.\1.\2"),
    (
        rf"decoder\.stages\.(\d\d?\d?)\.convs\.(\d\d?\d?)\.(conv|norm)\.{_PARAMETER}",
        r"decoder.stages.\1.convs.\2.\3.\4",
    ),
    (
        r"decoder\.stages\.\d\d?\d?\.convs\.\d\d?\d?\.all\.\d\d?\d?\.\w+",
        "",
    ),  # the same tensors once more
    (r"decoder\.deep_supervision_outputs\.(\d\d?\d?)\.(weight|bias)", r"decoder.seg_layers.\1.\2"),
    (r"decoder\.segmentation_output\.(weight|bias)", r"decoder.seg_layers.last.\1"),
]
"""Names of a FabiansUNet -> medseg's; nothing for copies."""


def _residual_names(stored: Mapping[str, Any]) -> Callable[[str], str | None]:
    """Return what names the tensors of a FabiansUNet."""
    last = (
        sum(re.fullmatch(r"decoder\.tus\.\d\d?\d?\.weight", name) is not None for name in stored)
        - 1
    )

    def name_of(name: str) -> str | None:
        for pattern, ours in _RESIDUAL:
            if match := re.fullmatch(pattern, name):
                return match.expand(ours).replace(".last.", f".{last}.")
        return None

    return name_of


def network_of(stored: Mapping[str, Stored], options: Mapping[str, Any], where: str) -> V1Network:
    """Return the network that tensors belong to, having checked that they fill it exactly.

    Args:
        stored: Tensors by the names of medseg's networks.
        options: What the trainer says of the network.
        where: What a message names.

    Raises:
        BundleError: With every tensor that contradicts the others, is missing or has no place.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    found = _Found(shapes)
    architecture = found.architecture(options)
    if found.problems or architecture is None:
        raise BundleError(problem_lines(f"the weights of {where}", found.problems))
    first = "encoder.stem.convs.0.conv.weight"
    if first not in shapes:
        first = "encoder.stages.0.0.convs.0.conv.weight"
    last = f"decoder.seg_layers.{len(architecture.features) - 2}.weight"
    num_inputs, num_logits = shapes[first][1], shapes.get(last, (0,))[0]
    if not num_inputs or not num_logits:
        raise BundleError(problem_lines(f"the weights of {where}", [f"{last} is missing"]))
    network = V1Network(
        architecture=architecture,
        num_inputs=num_inputs,
        num_logits=num_logits,
        zeros=_absent_biases(architecture, num_inputs, num_logits, shapes),
    )
    check_network(stored, network, where)
    return network


def check_network(stored: Mapping[str, Stored], network: V1Network, where: str) -> None:
    """Check by names and shapes that tensors fill a network exactly.

    Raises:
        BundleError: With every tensor that is missing, left over or of another shape.
    """
    fit(stored, _wanted(network), where, optional=network.zeros)


def read_network(
    stored: Mapping[str, Stored], network: V1Network, where: str
) -> dict[str, torch.Tensor]:
    """Read tensors that fill a network; the biases the original does not have are 0.

    Raises:
        BundleError: If they do not fill it after all, or are no numbers.
    """
    check_network(stored, network, where)
    fills = dict.fromkeys(network.zeros, 0.0)
    return read_tensors(stored, _wanted(network), where, fills=fills)


def _wanted(network: V1Network) -> dict[str, torch.Tensor]:
    return wanted_tensors(
        network.architecture, num_inputs=network.num_inputs, num_logits=network.num_logits
    )


def _absent_biases(
    architecture: Architecture, num_inputs: int, num_logits: int, shapes: Shapes
) -> tuple[str, ...]:
    """Return the biases that no layer of their kind has, for which 0 is the same."""
    wanted = wanted_tensors(architecture, num_inputs=num_inputs, num_logits=num_logits)
    absent: list[str] = []
    for kind in _BIASES:
        names = [name for name in wanted if kind.fullmatch(name)]
        if not any(name in shapes for name in names):
            absent += names
    return tuple(absent)


class _Found:
    """Reads an architecture off the shapes of weights, and gathers contradictions."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.problems: list[str] = []
        self.is_residual = "encoder.stem.convs.0.conv.weight" in shapes

    def architecture(self, options: Mapping[str, Any]) -> Architecture | None:
        """Return the architecture; None after noting what contradicts itself."""
        num_steps = self._count(r"decoder\.transpconvs\.(\d\d?\d?)\.weight", "decoder.transpconvs")
        num_stages = self._count(r"encoder\.stages\.(\d\d?\d?)\..+", "encoder.stages")
        if num_steps < 1 or num_stages != num_steps + 1:
            self.problems.append(
                f"{num_stages} encoder stages and {num_steps} steps up; expected one step fewer "
                "than stages, and at least one"
            )
            return None
        if self.problems:
            return None
        encoder = [self._stage(self._encoder_weight(stage)) for stage in range(num_stages)]
        decoder = [
            self._stage(rf"decoder\.stages\.{step}\.convs\.(\d\d?\d?)\.conv\.weight")
            for step in reversed(range(num_steps))
        ]
        upward = [self._stride(step) for step in reversed(range(num_steps))]
        stem = self.shapes.get("encoder.stem.convs.0.conv.weight", (0, 0))[2:]
        if self.problems:
            return None
        ones = (1,) * len(encoder[0][1])
        return Architecture(
            kind="residual_unet" if self.is_residual else "plain_unet",
            features=tuple(features for features, _, _ in encoder),
            kernel_sizes=tuple(kernel for _, kernel, _ in encoder),
            strides=(ones, *upward),
            blocks_encoder=tuple(count for _, _, count in encoder),
            blocks_decoder=tuple(count for _, _, count in decoder),
            options=self._options(options, encoder, [kernel for _, kernel, _ in decoder], stem),
        )

    def _options(
        self,
        options: Mapping[str, Any],
        encoder: Sequence[tuple[int, tuple[int, ...], int]],
        kernels: Sequence[tuple[int, ...]],
        stem: tuple[int, ...],
    ) -> dict[str, Any]:
        """Return the options of the network that differ from what is usual."""
        found: dict[str, Any] = {}
        if any(name.endswith(".norm.running_mean") for name in self.shapes):
            found["norm"] = "batch"
        elif not any(".norm." in name for name in self.shapes):
            found["norm"] = "none"
        found |= options
        if kernels != [kernel for _, kernel, _ in encoder[:-1]]:
            found["kernel_sizes_decoder"] = [list(kernel) for kernel in kernels]
        if self.is_residual:
            found["shortcut"] = "strided"
            if stem != encoder[0][1]:
                found["kernel_size_stem"] = list(stem)
        return found

    def _encoder_weight(self, stage: int) -> str:
        blocks = r"blocks\.(\d\d?\d?)\.conv1" if self.is_residual else r"0\.convs\.(\d\d?\d?)"
        return rf"encoder\.stages\.{stage}\.{blocks}\.conv\.weight"

    def _count(self, pattern: str, what: str) -> int:
        """Return how many numbers there are in names, having checked that none is left out."""
        found = {int(match[1]) for name in self.shapes if (match := re.fullmatch(pattern, name))}
        if found != set(range(len(found))):
            self.problems.append(f"{what} are numbered {sorted(found)}; expected 0, 1, ...")
        return len(found)

    def _stage(self, pattern: str) -> tuple[int, tuple[int, ...], int]:
        """Return features, kernel size and number of blocks of a stage."""
        count = self._count(pattern, pattern.split(r"\.(\d\d?\d?)")[0].replace("\\", ""))
        shapes = [shape for name, shape in self.shapes.items() if re.fullmatch(pattern, name)]
        features, kernels = {shape[:1] for shape in shapes}, {shape[2:] for shape in shapes}
        place = pattern.replace(r"(\d\d?\d?)", "*").replace("\\", "")
        if (
            len(features) != 1
            or len(kernels) != 1
            or len(shapes[0]) not in (4, 5)
            or (0,) in features
        ):
            shown = sorted(shapes)
            self.problems.append(f"{place} has the shapes {shown}; expected one, of 2 or 3 axes")
            return 1, (1, 1, 1), count
        kernel = shapes[0][2:]
        if any(size not in _KERNELS for size in kernel):
            self.problems.append(f"{place} has kernels of {kernel}; expected sizes of 1 or 3")
        return shapes[0][0], kernel, count

    def _stride(self, step: int) -> tuple[int, ...]:
        name = f"decoder.transpconvs.{step}.weight"
        stride = self.shapes[name][2:]
        if len(stride) not in (2, 3) or not 1 <= math.prod(stride) <= 2**12:
            self.problems.append(f"{name} has the shape {self.shapes[name]}; expected 2 or 3 axes")
        return stride
