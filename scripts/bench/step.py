"""Time forward and backward of a small 3D U-Net, one line per repeat.

Usage: [GOMP_SPINCOUNT=N] [OMP_WAIT_POLICY=PASSIVE] python scripts/bench/step.py

The network is that of the recipe `fast` on Hippocampus (16 to 128 features, patch 32x48x32, batch
3). Run it with other environments in turn, alone and beside another busy process, to see what
waiting threads cost.
"""

from __future__ import annotations

import statistics
import time

import torch

from medseg.models.build import build_network
from medseg.schema.plans import Architecture


def main() -> None:
    stages = 4
    architecture = Architecture(
        kind="plain_unet",
        features=tuple(16 * 2**stage for stage in range(stages)),
        kernel_sizes=((3, 3, 3),) * stages,
        strides=((1, 1, 1), *((2, 2, 2),) * (stages - 1)),
        blocks_encoder=(2,) * stages,
        blocks_decoder=(2,) * (stages - 1),
    )
    network = build_network(architecture, num_inputs=1, num_logits=3).use_channels_last().train()
    images = torch.randn(3, 1, 32, 48, 32)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        logits = network(images)
        logits.square().mean().backward()
        network.zero_grad()
        seconds.append(time.perf_counter() - start)
    print(f"{torch.get_num_threads()} threads, median {statistics.median(seconds[1:]):.2f} s, all:")
    print(" ".join(f"{value:.2f}" for value in seconds))


if __name__ == "__main__":
    main()
