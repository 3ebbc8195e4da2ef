"""Time the resampling of one volume against scikit-image, alternating both.

    python scripts/bench/resample.py [--repeats 5]

Prints both medians, their ratio and the largest absolute difference.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.transform import resize as skimage_resize

from medseg.resample import resize

BEFORE, AFTER = (100, 256, 256), (130, 200, 200)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and result of one call."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side")
    repeats = parser.parse_args().repeats
    rng = np.random.default_rng(0)
    volume = ndimage.gaussian_filter(rng.normal(size=BEFORE), 1).astype(np.float32)
    volume = volume * 40 + rng.normal(size=BEFORE).astype(np.float32)
    first, _ = timed(lambda: resize(volume[None], AFTER))
    ours, theirs, difference = [], [], 0.0
    for _ in range(repeats):
        seconds, result = timed(lambda: resize(volume[None], AFTER)[0])
        ours.append(seconds)
        seconds, expected = timed(
            lambda: skimage_resize(volume, AFTER, 3, mode="edge", anti_aliasing=False)
        )
        theirs.append(seconds)
        difference = max(difference, float(np.abs(result - expected).max()))
    fast, slow = statistics.median(ours), statistics.median(theirs)
    print(f"{BEFORE} -> {AFTER}, order 3, medians of {repeats}")
    print(f"scikit-image  {slow:8.3f} s")
    print(f"medseg        {fast:8.3f} s   (first call {first:.3f} s)")
    print(f"ratio         {slow / fast:8.1f}")
    print(f"largest absolute difference {difference:.2e} on a range of {np.ptp(volume):.1f}")


if __name__ == "__main__":
    main()
