"""Counter-based random numbers: a sample's draws depend on its own seed and on nothing else."""

from __future__ import annotations

import numpy as np
import torch


def sample_seed(seed: int, index: int) -> int:
    """Return the seed of one sample: no two (seed, index) pairs below 2**64 share one.

    Examples:
        >>> sample_seed(1, 2)
        18446744073709551618
    """
    limit = 1 << 64
    if not (0 <= seed < limit and 0 <= index < limit):
        raise ValueError(f"seed and index must be in [0, 2**64), got {seed} and {index}")
    return seed * limit + index


def stream(seed: int) -> np.random.Generator:
    """Return the generator of a sample's parameters, on the host.

    Args:
        seed: Non-negative and below 2**128, for example from `sample_seed`.
    """
    if not 0 <= seed < 1 << 128:
        raise ValueError(f"a sample's seed must be in [0, 2**128), got {seed}")
    return np.random.Generator(np.random.Philox(key=seed))


def field_generator(seed: int, device: torch.device) -> torch.Generator:
    """Return a generator of random fields on `device`; the same seed differs between devices."""
    return torch.Generator(device=device).manual_seed(seed)


def draw_field_seed(rng: np.random.Generator) -> int:
    """Draw a seed for `field_generator`."""
    return int(rng.integers(1 << 63))


def between(uniform: float, limits: tuple[float, float]) -> float:
    """Map a uniform draw from [0, 1) to `limits`.

    Examples:
        >>> between(0.5, (1.0, 3.0))
        2.0
    """
    return limits[0] + uniform * (limits[1] - limits[0])
