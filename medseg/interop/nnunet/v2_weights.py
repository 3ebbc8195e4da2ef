"""Checkpoints of nnU-Net v2: what they say of a model, and its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import BundleError
from medseg.interop.nnunet.torch_file import TorchFile
from medseg.interop.nnunet.v2_values import printable, shown
from medseg.interop.nnunet.weights import (
    Stored,
    copies_of_blocks,
    fit,
    read_tensors,
    unwrapped,
    wanted_tensors,
    without_copies,
)
from medseg.schema.plans import Architecture

if TYPE_CHECKING:
    import torch

_WEIGHTS = "network_weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint says beside its weights; nothing of it is trusted."""

    path: Path
    """The file."""
    trainer: str
    """Class that trained it; empty where it does not say."""
    configuration: str | None
    """Name of its configuration, where it says."""
    mirror_axes: Any
    """Axes that may be mirrored."""
    plans: Any
    """A copy of the plans, where it holds one."""
    dataset: Any
    """A copy of `dataset.json`, where it holds one."""
    has_running_statistics: bool
    """Whether its norms are batch norms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What weights have to fill."""

    architecture: Architecture
    """In medseg's terms."""
    num_inputs: int
    """Input channels."""
    num_logits: int
    """Output channels."""
    has_biases: bool = True
    """Whether the original's convolutions have biases."""
    has_scales: bool = True
    """Whether the original's norms have weights."""

    def wanted(self) -> dict[str, torch.Tensor]:
        """Return the tensors it needs, without memory."""
        return wanted_tensors(
            self.architecture, num_inputs=self.num_inputs, num_logits=self.num_logits
        )

    def fills(self, names: Iterable[str]) -> dict[str, float]:
        """Return the value of every tensor that the original does without."""
        result: dict[str, float] = {}
        for name in names:
            layer, _, kind = name.rpartition(".")
            is_convolution = layer.endswith(".conv") or layer.startswith("decoder.transpconvs.")
            if is_convolution and kind == "bias" and not self.has_biases:
                result[name] = 0.0
            elif layer.endswith(".norm") and kind in ("weight", "bias") and not self.has_scales:
                result[name] = 1.0 if kind == "weight" else 0.0
            elif kind == "num_batches_tracked":  # not in files of old releases of torch
                result[name] = 0.0
        return result


def read_checkpoint(path: Path) -> Checkpoint:
    """Read all of a checkpoint but its tensors.

    Raises:
        BundleError: If it is damaged or no checkpoint.
    """
    with TorchFile(path) as file:
        content, stored = file.content, _stored(file, path)
    arguments = content.get("init_args")
    arguments = arguments if isinstance(arguments, dict) else {}
    trainer, configuration = content.get("trainer_name"), arguments.get("configuration")
    return Checkpoint(
        path=path,
        trainer=printable(trainer) if isinstance(trainer, str) else "",
        configuration=configuration if isinstance(configuration, str) else None,
        mirror_axes=content.get("inference_allowed_mirroring_axes"),
        plans=arguments.get("plans"),
        dataset=arguments.get("dataset_json"),
        has_running_statistics=any(name.endswith(".running_mean") for name in stored),
    )


def check_weights(path: Path, network: Network) -> None:
    """Check by names and shapes that a checkpoint fills a network; no tensor is read.

    Raises:
        BundleError: With every tensor that does not fit.
    """
    with TorchFile(path) as file:
        _fitting(_stored(file, path), network, path)


def read_weights(path: Path, network: Network) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint; nothing else in it is read.

    Raises:
        BundleError: If they do not fill the network, or contradict each other.
    """
    with TorchFile(path) as file:
        stored = _stored(file, path)
        plain, wanted, fills = _fitting(stored, network, path)
        tensors = read_tensors(plain, wanted, str(path), fills=fills)
        _check_copies(stored, tensors, path)
    return tensors


def _stored(file: TorchFile, path: Path) -> dict[str, Stored]:
    content = file.content
    if not isinstance(content, dict) or _WEIGHTS not in content:
        found = sorted(map(str, content)) if isinstance(content, dict) else content
        raise BundleError(
            f"{path}: holds {shown(found)}; expected a checkpoint of nnU-Net version 2, which has "
            f"{_WEIGHTS}."
        )
    return unwrapped(content[_WEIGHTS], str(path))


def _fitting(
    stored: Mapping[str, Stored], network: Network, path: Path
) -> tuple[dict[str, Stored], dict[str, torch.Tensor], dict[str, float]]:
    """Return the tensors without copies, those that are wanted, and what fills the missing."""
    plain = without_copies(stored, copies_of_blocks(stored), str(path))
    wanted = network.wanted()
    fills = network.fills(wanted)
    fit(plain, wanted, str(path), optional=fills)
    return plain, wanted, fills


def _check_copies(
    stored: Mapping[str, Stored], tensors: Mapping[str, torch.Tensor], path: Path
) -> None:
    """Refuse weights that say two different things of one parameter."""
    import torch

    different = [
        name
        for name, original in copies_of_blocks(stored).items()
        if not torch.equal(stored[name].read().to(tensors[original].dtype), tensors[original])
    ]
    if different:
        raise BundleError(
            f"{path}: {len(different)} tensors repeat others under a second name with different "
            f"values, such as {different[0]!r}; which one counts is not known. Expected the "
            "checkpoint of a training, as it was written."
        )
