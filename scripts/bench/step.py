"""Time forward and backward of a 3D U-Net on the CPU, one line per repeat.

Usage: [GOMP_SPINCOUNT=N] [OMP_WAIT_POLICY=PASSIVE] python scripts/bench/step.py
       python scripts/bench/step.py PLANS.json CONFIGURATION

The network is that of the recipe `fast` on Hippocampus (16 to 128 features, patch 32x48x32, batch
3), or a planned one. Run it with other environments in turn, alone and beside another busy
process, to see what waiting threads cost.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from pathlib import Path

import torch

from medseg.models.build import build_network
from medseg.plan.operations import step_operations
from medseg.schema.plans import Architecture, read_plans

NUM_INPUTS, NUM_LOGITS = 1, 3


def fast_on_hippocampus() -> tuple[Architecture, tuple[int, ...], int]:
    """Return network, patch and batch of the recipe `fast`."""
    stages = 4
    architecture = Architecture(
        kind="plain_unet",
        features=tuple(16 * 2**stage for stage in range(stages)),
        kernel_sizes=((3, 3, 3),) * stages,
        strides=((1, 1, 1), *((2, 2, 2),) * (stages - 1)),
        blocks_encoder=(2,) * stages,
        blocks_decoder=(2,) * (stages - 1),
    )
    return architecture, (32, 48, 32), 3


def planned(path: Path, name: str) -> tuple[Architecture, tuple[int, ...], int]:
    """Return network, patch and batch of a configuration."""
    configuration = read_plans(path).configuration(name)
    return configuration.architecture, configuration.patch_size, configuration.batch_size


def main(arguments: list[str]) -> None:
    """Time eight steps."""
    if len(arguments) == 2:
        architecture, patch, batch = planned(Path(arguments[0]), arguments[1])
    else:
        architecture, patch, batch = fast_on_hippocampus()
    network = build_network(architecture, num_inputs=NUM_INPUTS, num_logits=NUM_LOGITS)
    network = network.use_channels_last().train()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images = torch.randn(batch, NUM_INPUTS, *patch)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        logits = network(images)
        logits.square().mean().backward()
        network.zero_grad()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    operations = step_operations(
        architecture, patch, batch_size=batch, num_inputs=NUM_INPUTS, num_logits=NUM_LOGITS
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"patch {patch}, batch {batch}: {operations / 1e9:.0f} billion operations")
    print(f"memory {before / 1e6:.2f} GB before the first step, at most {peak / 1e6:.2f} GB")
    print(f"{torch.get_num_threads()} threads, {operations / median / 1e9:.0f} billion a second")
    print(f"median {median:.2f} s, all:")
    print(" ".join(f"{value:.2f}" for value in seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
