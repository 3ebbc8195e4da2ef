#!/usr/bin/env python3
"""Time the forward pass that prediction consists of: images at once, compiled, in float32.

    python scripts/bench/forward.py [--threads 1] [--rounds 7] [--batches 1,2,4,8]

The network is nnU-Net's plan for Hippocampus: plain U-Net with 32, 64, 128 and 256 features, tiles
of 40x56x40, in evaluation mode. Printed is processor time per image (all threads together), which
other programs disturb little: medians, all forms in turn. It says whether batches and compiling
would make prediction on a CPU quicker (docs/benchmarks.md has the answer).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from medseg.models.build import build_network
from medseg.models.precision import autocast_dtype
from medseg.schema.plans import Architecture

TILE = (40, 56, 40)
PLAN = Architecture(
    kind="plain_unet",
    features=(32, 64, 128, 256),
    kernel_sizes=((3, 3, 3),) * 4,
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    blocks_encoder=(2,) * 4,
    blocks_decoder=(2,) * 3,
)


def main() -> None:
    """Time every form in turn and print medians."""
    options = _options()
    torch.set_num_threads(options.threads)
    network = build_network(
        PLAN, num_inputs=1, num_logits=3, patch_size=TILE, generator=torch.Generator()
    )
    network = network.eval().requires_grad_(False).use_channels_last()
    dtype = autocast_dtype(torch.device("cpu"))
    print(f"{'float32' if dtype is None else dtype}, {options.threads} threads")
    compiled = torch.compile(network)
    forms: dict[str, Callable[[], float]] = {
        f"{size} at once": lambda size=size: _timed(network, size, dtype)
        for size in options.batches
    }
    forms["1 at once, compiled"] = lambda: _timed(compiled, 1, dtype)
    forms["1 at once, float32"] = lambda: _timed(network, 1, None)
    start = time.perf_counter()
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(options.rounds + 1):
        for name, form in forms.items():
            seconds = form()
            if number:  # the first warms up and compiles
                times[name].append(seconds)
        if not number:
            print(f"warmed up and compiled in {time.perf_counter() - start:.0f} s", flush=True)
    for name, found in times.items():
        print(f"{name:>20}: {statistics.median(found):.4f} s an image")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", default="1,2,4,8")
    options = parser.parse_args()
    options.batches = [int(size) for size in options.batches.split(",")]
    return options


def _timed(network: torch.nn.Module, size: int, dtype: torch.dtype | None) -> float:
    """Return the processor seconds per image of one forward pass."""
    images = torch.randn((size, 1, *TILE))
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        start = time.process_time()
        network(images)
        return (time.process_time() - start) / size


if __name__ == "__main__":
    main()
