#!/usr/bin/env python3
"""Time the default augmentation against batchgeneratorsv2, one thread each.

    python scripts/bench/augment.py [--peer-python PY] [--rounds 5]

A sample is one channel with a segmentation of three labels. Both sides run the full default set
with nnU-Net's probabilities, on the patch that their own loader would cut, and take turns; what is
printed is processor time for each sample, so that other programs on the machine count little. Of
each side the median of its rounds' means is compared.

Each limit is judged on a line that begins with "met" or "short"; that needs --peer-python. Exit
status 0 if all that were judged are met, 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import augment_probe
import torch
from peer import judge

from medseg.augment.pipeline import Augmenter
from medseg.augment.sample import centre
from medseg.augment.streams import sample_seed
from medseg.schema.recipe import AugmentationRecipe

MIN_SPEED = 3.0
"""How many times batchgeneratorsv2's throughput."""
PATCHES = {(40, 56, 40): 120, (128, 128, 128): 30}
"""Patch -> samples in each round."""


class Ours:
    """The augmentation of this package."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[Augmenter, torch.Tensor, torch.Tensor]] = {}

    def seconds(self, patch: tuple[int, ...], count: int, seed: int) -> list[float]:
        """Return the processor time of each sample, after a few to warm up."""
        if patch not in self._known:
            augmenter = Augmenter(
                AugmentationRecipe(), patch, mask_channels=(False,), dummy_2d=False
            )
            source = augmenter.source_size
            self._known[patch] = (
                augmenter,
                torch.from_numpy(augment_probe.image(source)[None]),
                torch.from_numpy(augment_probe.labels(source)).to(torch.uint8),
            )
            self.seconds(patch, 40, 0)
        augmenter, image, labels = self._known[patch]
        found = []
        for index in range(count):
            key = sample_seed(seed, index)
            size = augmenter.read_size(key)
            cut = [centre(array, size).contiguous() for array in (image, labels)]
            start = time.thread_time()
            augmenter(cut[:1], cut[1:], None, seeds=[key])
            found.append(time.thread_time() - start)
        return found


class Theirs:
    """nnU-Net's transforms, in a process of the peer's environment."""

    def __init__(self, python: Path) -> None:
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("augment_peer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def seconds(self, patch: tuple[int, ...], count: int, seed: int) -> list[float]:
        """Return the processor time of each sample."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the peer's process has no pipes")
        self._process.stdin.write(json.dumps({"patch": patch, "count": count, "seed": seed}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit("the peer's process ended; its message is above")
        found: list[float] = json.loads(answer)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sides: dict[str, Ours | Theirs] = {"medseg": Ours()}
    if options.peer_python is not None:
        sides["batchgeneratorsv2"] = Theirs(options.peer_python)
    verdicts = [_compare(sides, patch, count, options.rounds) for patch, count in PATCHES.items()]
    if isinstance(theirs := sides.get("batchgeneratorsv2"), Theirs):
        theirs.close()
    return 0 if all(verdicts) else 1


def _compare(
    sides: dict[str, Ours | Theirs], patch: tuple[int, ...], count: int, rounds: int
) -> bool:
    """Measure all sides in turn; return whether the limit is met, or was not judged."""
    means: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            means[name].append(1e3 * statistics.fmean(side.seconds(patch, count, number + 1)))
    size = "x".join(map(str, patch))
    for name, values in means.items():
        rest = ", ".join(f"{value:.2f}" for value in values)
        print(f"{size} {name}: median {statistics.median(values):.2f} ms a sample ({rest})")
    if "batchgeneratorsv2" not in means:
        print("not judged without --peer-python: the ratio")
        return True
    return judge_ratio(size, *(statistics.median(values) for values in means.values()))


def judge_ratio(size: str, ours: float, theirs: float) -> bool:
    """Judge the throughput against batchgeneratorsv2's, both in milliseconds for each sample."""
    ratio = theirs / ours
    return judge(
        f"{size}: {ratio:.1f} times the throughput, at least {MIN_SPEED:g} wanted",
        is_met=ratio >= MIN_SPEED,
    )


if __name__ == "__main__":
    sys.exit(main())
