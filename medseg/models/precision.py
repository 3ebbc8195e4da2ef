"""Which device the network runs on, and in which arithmetic."""

from __future__ import annotations

import logging

import torch

from medseg.errors import ConfigError, near_names

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def pick_device(requested: str = "auto") -> torch.device:
    """Return the device asked for; `auto` takes the first GPU, else the CPU.

    Args:
        requested: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        ConfigError: If the name is unknown or this machine has no such device.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if requested == "auto":
        return torch.device("cuda:0" if num_gpus else "mps" if has_mps else "cpu")
    available = ["cpu", *(f"cuda:{index}" for index in range(num_gpus)), *(["mps"] * has_mps)]
    name = "cuda:0" if requested == "cuda" else requested
    if name not in available:
        raise ConfigError(
            f"device is {requested!r}; this machine has: auto, {', '.join(available)}."
            f"{near_names(requested, ['auto', *available])}"
        )
    return torch.device(name)


def autocast_dtype(device: torch.device, requested: str = "auto") -> torch.dtype | None:
    """Return the type networks run in under autocast, or None for plain fp32.

    `auto` follows the hardware: bf16 on CPUs with AVX512-BF16 or AMX and on GPUs that compute
    in it, fp16 on other CUDA GPUs, fp32 elsewhere.

    Args:
        device: Where the network runs.
        requested: `auto`, `fp32`, `bf16` or `fp16`.

    Raises:
        ConfigError: If the name is unknown, or fp16 is asked of a CPU.
    """
    if requested not in PRECISIONS:
        known = list(PRECISIONS)
        raise ConfigError(
            f"precision is {requested!r}; expected one of: {', '.join(known)}."
            f"{near_names(requested, known)}"
        )
    if requested == "fp32":
        return None
    if requested == "auto":
        return _fastest(device)
    if device.type == "cpu" and requested == "fp16":
        raise ConfigError(
            "precision is 'fp16', but networks on the CPU run in fp32 or bf16; "
            "expected one of: auto, fp32, bf16."
        )
    if requested == "bf16" and not _has_bf16(device):
        logger.warning("%s emulates bf16, which is slower than fp32", device)
    return torch.float16 if requested == "fp16" else torch.bfloat16


def _fastest(device: torch.device) -> torch.dtype | None:
    if _has_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else None


def _has_bf16(device: torch.device) -> bool:
    """Return whether the device computes in bf16 rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, _no)() for name in probes)
    return False


def _no() -> bool:
    return False
