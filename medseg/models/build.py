"""Turn the description of a network into the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import nn

from medseg.errors import ConfigError
from medseg.models.blocks import (
    CONVOLUTIONS,
    NEGATIVE_SLOPE,
    InstanceNorm,
    NormMethod,
    ResidualBlock,
)
from medseg.models.external import ExternalNetwork, external_network, require_trust
from medseg.models.mednext import SIZES, initialize_mednext, mednext, mednext_problems
from medseg.models.options import unet_options, unet_problems
from medseg.models.residual_unet import residual_unet
from medseg.models.unet import UNet, plain_unet
from medseg.schema.plans import Architecture, kind_problem

NETWORKS: dict[str, Callable[..., UNet]] = {
    "plain_unet": plain_unet,
    "residual_unet": residual_unet,
    **dict.fromkeys(SIZES, mednext),
}
"""Value of `architecture.kind` -> builder."""
Network: TypeAlias = UNet | ExternalNetwork
"""What `build_network` builds."""


def build_network(  # noqa: PLR0913 - each is one fact about the network
    architecture: Architecture,
    *,
    num_inputs: int,
    num_logits: int,
    patch_size: Sequence[int] | None = None,
    deep_supervision: bool = False,
    norm: NormMethod = "auto",
    generator: torch.Generator | None = None,
    trust_code: bool = True,
) -> Network:
    """Build a network on the CPU with freshly drawn weights.

    Args:
        architecture: The network's description.
        num_inputs: Input channels C.
        num_logits: Logit channels L.
        patch_size: Training patch in voxels; only networks from outside may ask for it.
        deep_supervision: Whether the network returns the logits of every decoder stage; the
            attribute of that name can be switched later. Networks from outside have one output.
        norm: Operation behind the instance norm, where that is the network's norm; `instance` is
            the original one.
        generator: Source of the weights; None draws from torch's global one, and nothing else
            does.
        trust_code: Whether a network from outside, "package.module:Name", may be imported and
            run; what reads bundles of unknown origin says no.

    Returns:
        The network: (B, C, *spatial) images -> (B, L, *spatial) logits, or a list of logits,
        full resolution first.

    Raises:
        ConfigError: If the description contradicts itself, with every problem.
        BundleError: If the network is code from outside that is not trusted.
    """
    problems = architecture_problems(architecture)
    if num_inputs < 1 or num_logits < 1:
        problems.append(
            f"num_inputs and num_logits are {num_inputs} and {num_logits}; expected at least 1"
        )
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        lines = [f"{count} in the architecture of the network:", *(f"  {p}" for p in problems)]
        raise ConfigError("\n".join([*lines, "Correct the plans, or plan again."]))
    channels = {"num_inputs": num_inputs, "num_logits": num_logits}
    if architecture.is_external:
        require_trust(architecture.kind, trust_code)
        return external_network(
            architecture, **channels, patch_size=patch_size, generator=generator
        )
    builder = NETWORKS[architecture.kind]
    with torch.device("meta"):
        network = builder(architecture, **channels, deep_supervision=deep_supervision, norm=norm)
    # as `to_empty` does, whose `empty_like` of a meta tensor imports for 0.4 s
    network._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))  # type: ignore[no-untyped-call]
    if architecture.kind in SIZES:
        initialize_mednext(network, generator)
    else:
        initialize(network, generator, unet_options(architecture).style.negative_slope)
    return network


@torch.no_grad()
def initialize(
    network: nn.Module,
    generator: torch.Generator | None = None,
    slope: float = NEGATIVE_SLOPE,
) -> None:
    """Draw all weights anew: He-normal for a leaky ReLU of that slope, biases 0, norms 1 and 0.

    The last norm of a residual block starts at 0, so each block starts as its shortcut. What
    batch norms remember of the data is forgotten.

    Source:
        He et al. 2015; initialisation of nnU-Net v2's networks.
    """
    convolutions = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for module in network.modules():
        if isinstance(module, convolutions):
            nn.init.kaiming_normal_(module.weight, a=slope, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, InstanceNorm):
            module.weight.fill_(1)
            module.bias.zero_()
        elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            module.reset_parameters()
    for module in network.modules():
        last = module.conv2.norm if isinstance(module, ResidualBlock) else None
        if isinstance(last, (InstanceNorm, nn.BatchNorm2d, nn.BatchNorm3d)):
            last.weight.zero_()


def architecture_problems(architecture: Architecture) -> list[str]:
    """Return what contradicts itself in a description, in words; empty if nothing does."""
    problems = []
    if (problem := kind_problem(architecture.kind)) is not None:
        problems.append(f"kind is {architecture.kind!r}; {problem}")
    if architecture.kind in SIZES:
        problems += mednext_problems(architecture.options)
    elif not architecture.is_external:
        problems += unet_problems(architecture)
    num_stages = len(architecture.features)
    if num_stages < 2:
        problems.append(f"features has {num_stages} entries; expected at least 2 stages")
    lengths = {
        "kernel_sizes": num_stages,
        "strides": num_stages,
        "blocks_encoder": num_stages,
        "blocks_decoder": num_stages - 1,
    }
    for name, expected in lengths.items():
        found = len(getattr(architecture, name))
        if found != expected:
            problems.append(
                f"{name} has {found} entries; expected {expected}, as features has {num_stages}"
            )
    for name in ("features", "blocks_encoder", "blocks_decoder"):
        values = getattr(architecture, name)
        if any(value < 1 for value in values):
            problems.append(f"{name} is {list(values)}; expected positive numbers")
    return problems + _axis_problems(architecture)


def _axis_problems(architecture: Architecture) -> list[str]:
    problems = []
    kernels, strides = architecture.kernel_sizes, architecture.strides
    dimensions = sorted({len(entry) for entry in (*kernels, *strides)})
    if len(dimensions) != 1 or dimensions[0] not in CONVOLUTIONS:
        problems.append(
            f"kernel_sizes and strides have entries for {dimensions} axes; "
            "expected 2 everywhere or 3 everywhere"
        )
    if any(size < 1 or size % 2 == 0 for kernel in kernels for size in kernel):
        problems.append(f"kernel_sizes is {[list(k) for k in kernels]}; expected odd sizes")
    if any(step < 1 for stride in strides for step in stride):
        problems.append(f"strides is {[list(s) for s in strides]}; expected positive numbers")
    elif strides and any(step != 1 for step in strides[0]):
        problems.append(f"strides opens with {list(strides[0])}; expected ones, full resolution")
    return problems
