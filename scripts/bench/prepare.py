#!/usr/bin/env python3
"""Time check, fingerprint, plan and preprocess of a Decathlon folder against nnU-Net.

    python scripts/bench/prepare.py HIPPOCAMPUS --peer-python PY [--repeats 3]

Both sides do the same: check every case, fingerprint, plan, preprocess 2d and 3d_fullres, with two
processes each. The sides alternate; medians are printed, the disk space of what they leave, and
what adding one case to all but one takes (seconds beyond the imports, processes started, whether
torch was imported).

Each limit is judged on a line that begins with "met" or "short"; those against nnU-Net need
--peer-python. Exit status 0 if all that were judged are met, 1 if not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peer import MEDSEG, Cost, Peer, disk_bytes, judge, run

MIN_SPEED = 6.0
"""How many times faster than nnU-Net."""
MAX_SPACE = 0.6
"""Disk space, as a share of nnU-Net's."""
MAX_GROW_SECONDS = 1.5
"""What one more case may take beyond the imports."""
CONFIGURATIONS = ("2d", "3d_fullres")
GROW = """
import json, sys, time
import medseg, medseg.api.prepare, medseg.cli.main
start = time.perf_counter()
medseg.api.prepare.plan_and_preprocess(
    sys.argv[1], workspace=sys.argv[2], configurations=["2d", "3d_fullres"]
)
seconds = time.perf_counter() - start
import resource
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
pool = "concurrent.futures.process" in sys.modules and children > 0
print(json.dumps({"seconds": seconds, "torch": "torch" in sys.modules, "pool": pool}))
"""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        verdicts = _compare(options.dataset, root, options.peer_python, options.repeats)
        verdicts += _grow(options.dataset, root, options.repeats)
    return 0 if all(verdicts) else 1


def _compare(dataset: Path, root: Path, peer_python: Path | None, repeats: int) -> list[bool]:
    """Measure both sides and return which limits are met; none without the peer."""
    ours: list[Cost] = []
    theirs: list[Cost] = []
    peer = Peer(peer_python, root / "peer") if peer_python else None
    if peer is not None:
        peer.link(dataset, 4, "Peer")
    for _ in range(repeats):
        shutil.rmtree(root / "work", ignore_errors=True)
        chosen = [part for name in CONFIGURATIONS for part in ("-c", name)]
        command = [*MEDSEG, "--workspace", root / "work", "plan-and-preprocess", dataset, *chosen]
        ours.append(run([*command, "--workers", "2"]))
        if peer is not None:
            shutil.rmtree(peer.preprocessed(4, "Peer"), ignore_errors=True)
            arguments = ["-d", "4", "--verify_dataset_integrity", "-np", "2", "2", "-npfp", "2"]
            theirs.append(peer.command("plan_and_preprocess", *arguments, "-c", *CONFIGURATIONS))
    print("medseg: ", "; ".join(map(str, ours)))
    space = disk_bytes(root / "work")
    print(f"medseg:  median {_median(ours):.2f} s, {space / 1e6:.1f} MB on disk")
    if peer is None:
        print("not judged without --peer-python: speed and disk space")
        return []
    their_space = disk_bytes(peer.preprocessed(4, "Peer"))
    print("nnU-Net:", "; ".join(map(str, theirs)))
    print(f"nnU-Net: median {_median(theirs):.2f} s, {their_space / 1e6:.1f} MB on disk")
    return judge_ratios(_median(theirs) / _median(ours), space / their_space)


def judge_ratios(speed: float, share: float) -> list[bool]:
    """Judge speed and disk space against nnU-Net's."""
    return [
        judge(
            f"{speed:.1f} times faster, at least {MIN_SPEED:g} wanted", is_met=speed >= MIN_SPEED
        ),
        judge(
            f"{share:.2f} of the disk space, at most {MAX_SPACE:g} wanted",
            is_met=share <= MAX_SPACE,
        ),
    ]


def _median(costs: list[Cost]) -> float:
    return statistics.median(cost.seconds for cost in costs)


def _grow(dataset: Path, root: Path, repeats: int) -> list[bool]:
    """Measure what adding the last case takes and return which limits are met."""
    description = json.loads((dataset / "dataset.json").read_text())
    runs = []
    for repeat in range(repeats):
        copy, work = root / f"grow{repeat}" / dataset.name, root / f"grow{repeat}" / "work"
        shutil.copytree(dataset, copy)
        entries = description["training"]
        (copy / "dataset.json").write_text(json.dumps({**description, "training": entries[:-1]}))
        arguments = [sys.executable, "-c", GROW, str(copy), str(work)]
        subprocess.run(arguments, check=True, capture_output=True)
        (copy / "dataset.json").write_text(json.dumps(description))
        start = time.perf_counter()
        grown = subprocess.run(arguments, check=True, capture_output=True, text=True)
        found = json.loads(grown.stdout)
        runs.append(found)
        print(
            f"one more case to {len(entries) - 1}: {found['seconds']:.2f} s beyond the imports "
            f"({time.perf_counter() - start:.2f} s in all), torch imported: {found['torch']}, "
            f"pool started: {found['pool']}"
        )
        print("   ", grown.stderr.strip().replace("\n", "\n    "))
    return judge_growth(runs)


def judge_growth(runs: Sequence[dict[str, Any]]) -> list[bool]:
    """Judge what one more case took in each run."""
    seconds = statistics.median(found["seconds"] for found in runs)
    return [
        judge(
            f"one more case: median {seconds:.2f} s beyond the imports, less than "
            f"{MAX_GROW_SECONDS:g} wanted",
            is_met=seconds < MAX_GROW_SECONDS,
        ),
        *(
            judge(f"one more case: {words}", is_met=not any(found[key] for found in runs))
            for key, words in (("torch", "torch is not imported"), ("pool", "no pool is started"))
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
