"""Which parameters learn how fast: groups by depth, and those of the encoder."""

from __future__ import annotations

from torch import nn

from medseg.errors import ConfigError
from medseg.models.external import ExternalNetwork
from medseg.models.unet import UNet


def parameter_groups(
    network: nn.Module, *, layer_decay: float = 1.0
) -> list[tuple[list[nn.Parameter], float]]:
    """Return the parameters in groups, each with the factor of its learning rate.

    The depth of a stage is counted from the logit layers (0) down the decoder (full resolution 1)
    and up the encoder (the bottleneck first, full resolution last) to the stem, where it is a
    module of its own; the factor is `layer_decay ** depth`.

    Args:
        network: As `build_network` made it, not wrapped for compiling or several devices.
        layer_decay: Factor from one stage to the next, in (0, 1]; 1 makes one group of all, in
            the order of `network.parameters()`.

    Raises:
        ConfigError: If the factor is not 1 and the order of the network's layers is not known.
    """
    if layer_decay == 1:
        return [(list(network.parameters()), 1.0)]
    if not isinstance(network, UNet):
        raise ConfigError(
            f"optimizer.layer_decay is {layer_decay}, but the order of the layers of "
            f"{_name(network)} is not known; expected 1."
        )
    groups: dict[int, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        groups.setdefault(_depth(network, name), []).append(parameter)
    return [(groups[depth], layer_decay**depth) for depth in sorted(groups)]


def encoder_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the encoder, stem included.

    A network from outside has one if it names a module `encoder`.

    Raises:
        ConfigError: If the network has no such part.
    """
    inner = network.network if isinstance(network, ExternalNetwork) else network
    encoder = getattr(inner, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise ConfigError(
            f"optimizer.freeze_encoder is set, but {_name(network)} has no module 'encoder'; "
            "expected 0."
        )
    return list(encoder.parameters())


def _depth(network: UNet, name: str) -> int:
    """Return how many stages lie between a parameter and the logits."""
    part, module, *rest = name.split(".")
    if module == "seg_layers":
        return 0
    num_steps = _num_stages(network.decoder)
    if part == "decoder":
        return num_steps - int(rest[0])
    if module == "stem":
        return num_steps + _num_stages(network.encoder) + 1
    return num_steps + _num_stages(network.encoder) - int(rest[0])


def _num_stages(part: nn.Module) -> int:
    stages = part.stages
    return len(stages) if isinstance(stages, nn.ModuleList) else 0


def _name(network: nn.Module) -> str:
    kind = network.kind if isinstance(network, ExternalNetwork) else type(network).__name__
    return f"the network {kind!r}"
