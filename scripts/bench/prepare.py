#!/usr/bin/env python3
"""Time check, fingerprint, plan and preprocess of a Decathlon folder against nnU-Net.

    python scripts/bench/prepare.py HIPPOCAMPUS --peer-python PY [--repeats 3]

Both sides do the same: check every case, fingerprint, plan, preprocess 2d and 3d_fullres, with two
processes where they use several. The sides alternate; medians are printed, the disk space of what
they leave, and what adding one case to all but one takes (seconds beyond the imports, processes
started, whether torch was imported).
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
from pathlib import Path

from peer import MEDSEG, Cost, Peer, describe, disk_bytes, run

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
        _compare(options.dataset, root, options.peer_python, options.repeats)
        _grow(options.dataset, root, options.repeats)
    return 0


def _compare(dataset: Path, root: Path, peer_python: Path | None, repeats: int) -> None:
    ours: list[Cost] = []
    theirs: list[Cost] = []
    peer = Peer(peer_python, root / "peer") if peer_python else None
    if peer is not None:
        _raw(dataset, peer)
    for _ in range(repeats):
        shutil.rmtree(root / "work", ignore_errors=True)
        chosen = [part for name in CONFIGURATIONS for part in ("-c", name)]
        command = [*MEDSEG, "--workspace", root / "work", "plan-and-preprocess", dataset, *chosen]
        ours.append(run(command))
        if peer is not None:
            shutil.rmtree(peer.preprocessed(4, "Peer"), ignore_errors=True)
            arguments = ["-d", "4", "--verify_dataset_integrity", "-np", "2", "2", "-npfp", "2"]
            theirs.append(peer.command("plan_and_preprocess", *arguments, "-c", *CONFIGURATIONS))
    print("medseg: ", "; ".join(map(str, ours)))
    space = disk_bytes(root / "work")
    print(f"medseg:  median {_median(ours):.2f} s, {space / 1e6:.1f} MB on disk")
    if peer is not None:
        their_space = disk_bytes(peer.preprocessed(4, "Peer"))
        print("nnU-Net:", "; ".join(map(str, theirs)))
        print(f"nnU-Net: median {_median(theirs):.2f} s, {their_space / 1e6:.1f} MB on disk")
        print(
            f"ratio: {_median(theirs) / _median(ours):.1f} times faster, "
            f"{space / their_space:.2f} of the disk space"
        )


def _median(costs: list[Cost]) -> float:
    return statistics.median(cost.seconds for cost in costs)


def _raw(dataset: Path, peer: Peer) -> None:
    folder = peer.dataset(4, "Peer")
    description = json.loads((dataset / "dataset.json").read_text())
    for entry in description["training"]:
        name = Path(entry["image"]).name.removesuffix(".nii.gz")
        (folder / f"imagesTr/{name}_0000.nii.gz").symlink_to((dataset / entry["image"]).resolve())
        (folder / f"labelsTr/{name}.nii.gz").symlink_to((dataset / entry["label"]).resolve())
    labels = {name: int(value) for value, name in description["labels"].items() if value != "0"}
    channels = list((description.get("modality") or description["channel_names"]).values())
    describe(folder, channels, {"background": 0, **labels}, len(description["training"]))


def _grow(dataset: Path, root: Path, repeats: int) -> None:
    """Measure what adding the last case takes."""
    description = json.loads((dataset / "dataset.json").read_text())
    seconds = []
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
        seconds.append(found["seconds"])
        print(
            f"one more case to {len(entries) - 1}: {found['seconds']:.2f} s beyond the imports "
            f"({time.perf_counter() - start:.2f} s in all), torch imported: {found['torch']}, "
            f"pool started: {found['pool']}"
        )
        print("   ", grown.stderr.strip().replace("\n", "\n    "))
    print(f"one more case: median {statistics.median(seconds):.2f} s beyond the imports")


if __name__ == "__main__":
    sys.exit(main())
