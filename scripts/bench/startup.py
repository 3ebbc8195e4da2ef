"""Time `import medseg` and `medseg --help` beyond the interpreter's own start.

Usage: python scripts/bench/startup.py [--repeats 9]

The interpreter alone, the import and the command are run in turn; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    commands = {
        "interpreter": [sys.executable, "-c", "pass"],
        "import medseg": [sys.executable, "-c", "import medseg"],
        "medseg --help": [sys.executable, "-m", "medseg", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(parser.parse_args().repeats + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    for name, value in median.items():
        beyond = value - median["interpreter"]
        print(f"{name:<14} {value:.3f} s, beyond the interpreter {beyond:.3f} s")


if __name__ == "__main__":
    main()
