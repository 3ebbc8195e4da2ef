"""The weight files: safetensors, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from medseg.errors import BundleError
from medseg.schema.base import write_bytes


def save_weights(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors and text to a safetensors file, atomically.

    Tensors that share memory are written separately; memory layouts are not kept.

    Args:
        path: The file; its folder is made if need be.
        tensors: Name -> tensor, on any device.
        metadata: Name -> text, kept in the file's header.
    """
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().to("cpu").contiguous()
        storage = copy.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != copy.nbytes:
            copy = copy.clone()
        seen.add(copy.untyped_storage().data_ptr())
        plain[name] = copy
    write_bytes(Path(path), safetensors.torch.save(plain, dict(metadata or {})))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a weight file to the CPU.

    Raises:
        BundleError: If the file is missing or damaged.
    """
    tensors, _ = _read(path)
    return tensors


def load_metadata(path: Path) -> dict[str, str]:
    """Read the text in a weight file's header, without its tensors.

    Raises:
        BundleError: If the file is missing or damaged.
    """
    _, metadata = _read(path, with_tensors=False)
    return metadata


def _read(path: Path, with_tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not Path(path).is_file():
        raise BundleError(f"{path}: no such file; expected weights in safetensors format.")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys() if with_tensors else ()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise BundleError(
            f"{path}: not a whole safetensors file ({error}). Copy or train it again."
        ) from None


@torch.no_grad()
def load_into(network: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy weights into a network; if anything does not fit, copy nothing.

    Args:
        network: Any network; its layout, device and precision stay.
        tensors: Name -> tensor, as `network.state_dict()` names them.
        origin: Where the tensors come from, for the error.

    Raises:
        BundleError: With every tensor that is missing, unexpected or of another shape.
    """
    wanted = network.state_dict()
    problems = [
        *(f"missing {name} {_shape(wanted[name])}" for name in wanted if name not in tensors),
        *(f"unexpected {name} {_shape(tensors[name])}" for name in tensors if name not in wanted),
        *(
            f"{name} has shape {_shape(tensors[name])}, expected {_shape(wanted[name])}"
            for name in wanted
            if name in tensors and tensors[name].shape != wanted[name].shape
        ),
    ]
    if problems:
        count = f"{len(problems)} tensor{'s' if len(problems) > 1 else ''}"
        lines = [f"{origin}: {count} of {len(wanted)} do not fit the network:"]
        lines += [f"  {problem}" for problem in problems]
        lines.append("Use the plans and the dataset.json that the weights were trained with.")
        raise BundleError("\n".join(lines))
    for name, tensor in wanted.items():
        tensor.copy_(tensors[name])


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
