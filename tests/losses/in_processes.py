"""What one process of `test_processes.py` does: its share of every case, in groups of two sizes.

    python in_processes.py RANK FOLDER

FOLDER has cases.json (a list; "name", "options", "has_regions", "batch_dice", "processes",
"has_valid") and for case n `n.npz` (logits of each resolution, target, valid, annotated). Writes
n.RANK.npz: the loss, and the gradients of this process's samples, whose mean over processes
data-parallel training takes.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from medseg.losses.deep_supervision import build_loss


def share(case, arrays, rank):
    """Return the loss of the global batch, and the gradients of every `processes`-th sample."""
    own = slice(rank, None, case["processes"])
    take = {name: torch.from_numpy(array[own]) for name, array in arrays.items()}
    logits = [take[f"logits_{n}"].requires_grad_() for n in range(case["resolutions"])]
    annotated = take.get("annotated")
    if annotated is not None and annotated.all():
        annotated = None  # as in a batch none of whose samples is annotated in part
    loss = build_loss(
        case["name"],
        batch_dice=case["batch_dice"],
        has_regions=case["has_regions"],
        options=case["options"],
    )
    value = loss(logits, take["target"], take.get("valid"), annotated)
    gradients = torch.autograd.grad(value, logits, allow_unused=True)
    found = {f"logits_{n}": each for n, each in enumerate(gradients) if each is not None}
    return value, found


def main(rank, folder):
    torch.set_num_threads(1)
    cases = list(enumerate(json.loads((folder / "cases.json").read_text())))
    for size in sorted({case["processes"] for _, case in cases}):
        if rank >= size:
            continue
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/group_{size}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=60),
        )
        for number, case in cases:
            if case["processes"] == size:
                value, gradients = share(case, np.load(folder / f"{number}.npz"), rank)
                arrays = {name: each.numpy() for name, each in gradients.items()}
                np.savez(folder / f"{number}.{rank}.npz", loss=value.detach().numpy(), **arrays)
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
