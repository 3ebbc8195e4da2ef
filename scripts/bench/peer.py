"""What the benchmarks against nnU-Net share: its folders, its commands, time and memory of both.

The peer lives in an environment of its own (`pip install torch==2.13.0 nnunetv2==2.8.1`), named by
`--peer-python`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEDSEG = (sys.executable, "-m", "medseg")


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    seconds: float
    peak_bytes: int
    """Largest resident memory of any one of its processes."""

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of two commands one after the other."""
        return Cost(self.seconds + other.seconds, max(self.peak_bytes, other.peak_bytes))

    def __str__(self) -> str:
        """Return seconds and gigabytes."""
        return f"{self.seconds:.2f} s, {self.peak_bytes / 1e9:.2f} GB"


def run(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> Cost:
    """Run a command to its end, measure it, and stop the benchmark if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
    )
    output = process.stdout.read() if process.stdout else b""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = output.decode(errors="replace")[-3000:]
        sys.exit(f"{' '.join(map(str, command))} failed:\n{said}")
    return Cost(seconds, usage.ru_maxrss * 1024)


@dataclass(frozen=True)
class Peer:
    """nnU-Net with folders of its own."""

    python: Path
    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables it finds its folders by; one thread for each process."""
        return {
            "nnUNet_raw": str(self.root / "raw"),
            "nnUNet_preprocessed": str(self.root / "preprocessed"),
            "nnUNet_results": str(self.root / "results"),
            "OMP_NUM_THREADS": "1",
        }

    def command(self, name: str, *arguments: str) -> Cost:
        """Run one of its commands, `nnUNetv2_NAME`."""
        return run([self.python.parent / f"nnUNetv2_{name}", *arguments], self.environment)

    def dataset(self, number: int, name: str) -> Path:
        """Make and return a raw data set folder."""
        folder = self.root / "raw" / f"Dataset{number:03d}_{name}"
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        return folder

    def preprocessed(self, number: int, name: str) -> Path:
        """Return the folder of its preprocessed data."""
        return self.root / "preprocessed" / f"Dataset{number:03d}_{name}"

    def link(self, decathlon: Path, number: int, name: str) -> None:
        """Make a raw data set of a Decathlon folder, its files linked."""
        folder = self.dataset(number, name)
        description = json.loads((decathlon / "dataset.json").read_text())
        for entry in description["training"]:
            case = Path(entry["image"]).name.removesuffix(".nii.gz")
            for part, target in (
                (f"imagesTr/{case}_0000.nii.gz", entry["image"]),
                (f"labelsTr/{case}.nii.gz", entry["label"]),
            ):
                (folder / part).unlink(missing_ok=True)
                (folder / part).symlink_to((decathlon / target).resolve())
        labels = {name: int(value) for value, name in description["labels"].items() if value != "0"}
        channels = list((description.get("modality") or description["channel_names"]).values())
        describe(folder, channels, {"background": 0, **labels}, len(description["training"]))

    def prepare(self, decathlon: Path, number: int, name: str) -> Path:
        """Plan and preprocess a Decathlon folder for 3d_fullres, once, and return the result."""
        folder = self.preprocessed(number, name)
        done = folder / "prepared_by_bench"
        if not done.exists():
            self.link(decathlon, number, name)
            arguments = ["-d", str(number), "-np", "2", "-npfp", "2", "-c", "3d_fullres"]
            self.command("plan_and_preprocess", *arguments)
            done.touch()
        return folder


def describe(folder: Path, channels: Sequence[str], labels: dict[str, Any], cases: int) -> None:
    """Write nnU-Net's dataset.json."""
    values = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": labels,
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(values))


def judge(what: str, *, is_met: bool) -> bool:
    """Print a line that says whether a limit is met, and return it."""
    print(f"{'met' if is_met else 'short'}: {what}", flush=True)
    return is_met


def disk_bytes(folder: Path) -> int:
    """Return the sum of the sizes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
