"""Patches that are the same in every environment, and what is measured of augmented ones.

Needs numpy alone, so that both sides of a comparison use it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_PREVIOUS = 3
"""Labels above 0."""
NUM_QUANTILES = 25
PATCH = (12, 16, 14)
PREVIOUS_PATCH = (16, 22, 19)
SPATIAL = {
    "3d": ((10, 14, 12), False, 30.0),
    "2d": ((14, 12), False, 180.0),
    "2d_elongated": ((20, 12), False, 15.0),
    "dummy_2d": ((4, 14, 12), True, 180.0),
}
"""Name -> patch, whether it is deformed in its slices only, and nnU-Net's largest angle."""
SOURCE_FACTOR = 2.7
"""A source this much larger than its patch holds every rotation and zoom, so nothing is padded."""

Array = NDArray[Any]


def image(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return intensities with waves of several lengths, mean 0.2 and standard deviation 1.1."""
    grid = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in shape), indexing="ij")
    total = np.zeros(shape)
    for number, place in enumerate(grid, start=1):
        total += np.sin(0.21 * number * place + number)
        total += 0.5 * np.sin(0.9 * place + 0.35 * number * grid[0])
    code = sum((17 * number + 5) * place for number, place in enumerate(grid))
    total += 0.4 * np.sign(np.sin(0.11 * code)) + 0.6 * np.sin(code % 97)
    total = (total - total.mean()) / total.std() * 1.1 + 0.2
    return total.astype(np.float32)


def images(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return two channels, the second flatter and reversed."""
    first = image(shape)
    return np.stack([first, np.flip(first) * np.float32(0.8) + np.float32(0.1)])


def labels(shape: tuple[int, ...]) -> NDArray[np.int16]:
    """Return a large label 1, a label 2 of several parts beside it, and small spots of label 3."""
    grid = np.meshgrid(*((np.arange(n) - (n - 1) / 2) for n in shape), indexing="ij")
    sizes = [1.0 + 0.3 * number for number in range(len(shape))]
    radius = sum((place * size) ** 2 for place, size in zip(grid, sizes, strict=True))
    edge = min(shape) / 2
    found = (radius < (0.8 * edge) ** 2).astype(np.int16)
    wave = np.prod([np.sin(place * 5.0 / edge + 0.7) for place in grid], axis=0)
    found[(wave > 0.45) & (radius > (0.5 * edge) ** 2)] = 2
    spots = np.prod([np.cos(place * 11.0 / edge) for place in grid], axis=0)
    found[spots > 0.55] = 3
    return found


def ramps(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return one channel for each axis that says how far along it a voxel lies."""
    return np.indices(shape).astype(np.float32)


def source_shape(name: str) -> tuple[int, ...]:
    """Return the size of a source that holds all a patch of `SPATIAL` can read.

    It exceeds the patch by an even number, so that both share their centre.
    """
    patch, dummy_2d, _ = SPATIAL[name]
    margin = round((SOURCE_FACTOR - 1) / 2 * max(patch))
    return tuple(n if dummy_2d and not k else n + 2 * margin for k, n in enumerate(patch))


def centre(array: Array, size: tuple[int, ...]) -> Array:
    """Return the centred box of `size` over the last axes."""
    first = array.ndim - len(size)
    starts = [n // 2 - wanted // 2 for n, wanted in zip(array.shape[first:], size, strict=True)]
    box = (slice(start, start + n) for start, n in zip(starts, size, strict=True))
    return array[(..., *box)]


def whole_sample(shape: tuple[int, ...]) -> tuple[Array, Array, Array, Array]:
    """Return images, labels, what is outside, and what a stage before found, shifted a little."""
    found = labels(shape)
    outside = np.indices(shape)[0] >= shape[0] // 2 + 3
    return images(shape), np.where(outside, 0, found), outside, np.roll(found, 1, axis=1)


def of_intensities(after: Array, before: Array) -> dict[str, float]:
    """Measure a changed image (2, *patch) against what it was before.

    Nothing is said of a channel that is as it was.
    """
    found: dict[str, float] = {}
    changes = np.abs(after.astype(np.float64) - before).mean(tuple(range(1, after.ndim)))
    if (changes > 1e-6).all():
        found["ratio_of_changes"] = float(changes[0] / changes[1])
    for name, change, new, old in zip("ab", changes, after, before, strict=True):
        if change > 1e-6:
            found |= {f"{key}_{name}": value for key, value in _of_channel(new, old).items()}
            found[f"change_{name}"] = float(change)
    return found


def _of_channel(new: Array, old: Array) -> dict[str, float]:
    new, old = new.astype(np.float64), old.astype(np.float64)
    steps = [np.diff(new, axis=axis) for axis in range(new.ndim)]
    bends = [np.diff(new, n=2, axis=axis) for axis in range(new.ndim)]
    return {
        "mean": float(new.mean()),
        "std": float(new.std()),
        "min": float(new.min()),
        "max": float(new.max()),
        "gradient_energy": float(sum((step**2).mean() for step in steps)),
        "high_frequency_energy": float(sum((bend**2).mean() for bend in bends)),
        "anisotropy": float((bends[0] ** 2).mean() / (bends[-1] ** 2).mean()),
        "correlation": float(np.corrcoef(new.ravel(), old.ravel())[0, 1]),
    }


def of_positions(positions: Array) -> dict[str, float]:
    """Measure where a deformed patch reads, from its `ramps` (axes, *patch).

    The first axis is left out where it is not deformed. Angles are in degrees.
    """
    axes = range(1, positions.ndim)
    centre = tuple(n // 2 for n in positions.shape[1:])
    ends = [
        [
            positions[
                (slice(None), *(k if a == axis else c for a, c in zip(axes, centre, strict=True)))
            ]
            for k in (-1, 0)
        ]
        for axis in axes
    ]
    steps = [
        (last.astype(np.float64) - first) / (positions.shape[axis] - 1)
        for axis, (last, first) in zip(axes, ends, strict=True)
    ]
    matrix = np.stack(steps, axis=1)
    if len(matrix) == 3 and positions.shape[1] == 4:
        matrix = matrix[1:, 1:]
    zoom = abs(np.linalg.det(matrix)) ** (1 / len(matrix))
    turn = matrix / zoom
    if len(turn) == 2:
        return {"zoom": float(zoom), "angle_0": _degrees(turn[1, 0], turn[0, 0])}
    return {
        "zoom": float(zoom),
        "angle_0": _degrees(turn[2, 1], turn[2, 2]),
        "angle_1": _degrees(-turn[2, 0], float(np.hypot(turn[2, 1], turn[2, 2]))),
        "angle_2": _degrees(turn[1, 0], turn[0, 0]),
    }


def _degrees(sine: float, cosine: float) -> float:
    return float(np.degrees(np.arctan2(sine, cosine)))


def of_labels(found: Array) -> dict[str, float]:
    """Measure the share of a patch that each label has."""
    return {f"share_{value}": float((found == value).mean()) for value in range(1, 4)}


def of_structures(after: Array, before: Array) -> dict[str, float]:
    """Measure corrupted one-hot structures (3, *patch) against what they were before."""
    found = {}
    for number, (new, old) in enumerate(zip(after > 0.5, before > 0.5, strict=True), start=1):
        if (new != old).any():
            found[f"volume_{number}"] = float(new.sum())
            found[f"lost_{number}"] = float((old & ~new).sum())
    if found:
        found["any"] = float((after > 0.5).any(0).sum())
        found["changed"] = float((after != before).any(tuple(range(1, after.ndim))).sum())
    return found


def of_everything(after: Array, found: Array, before: Array) -> dict[str, float]:
    """Measure an image with structures (2 + 3, *patch) and its labels after all transforms."""
    rows = {f"volume_{k}": float((after[1 + k] > 0.5).sum()) for k in range(1, 4)}
    rows |= of_labels(found)
    for name, new, old in zip("ab", after, before, strict=False):
        rows |= {f"{key}_{name}": value for key, value in _of_channel(new, old).items()}
    rows["outside"] = float((after[1] == 0).mean())
    return rows


def corrupted(after: Array, before: Array) -> dict[str, bool]:
    """Return which structures (3, *patch) are not as they were."""
    differ = (after != before).any(tuple(range(1, after.ndim)))
    found = {f"structure_{number}": bool(one) for number, one in enumerate(differ, start=1)}
    return found | {"any": bool(differ.any()), "all": bool(differ.all())}


def mirror_shares(patches: Iterable[Array]) -> dict[str, float]:
    """Return how often each set of axes of a patch of `ramps` is reversed."""
    reversed_axes = [mirrored_axes(patch) for patch in patches]
    sets = [tuple(bool(k >> axis & 1) for axis in range(3)) for k in range(8)]
    return {
        "".join(str(axis) for axis in range(3) if one[axis]) or "none": reversed_axes.count(one)
        / len(reversed_axes)
        for one in sets
    }


def mirrored_axes(positions: Array) -> tuple[bool, ...]:
    """Return for each axis whether a patch of `ramps` is reversed along it."""
    return tuple(bool(channel.flat[0] > channel.flat[-1]) for channel in positions)


def shares(outcomes: Iterable[dict[str, bool]]) -> dict[str, float]:
    """Return how often each outcome came true."""
    rows = list(outcomes)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def changed(after: Array, before: Array) -> dict[str, bool]:
    """Return which channels (2, *patch) are not as they were."""
    first, second = (np.abs(a - b).max() > 1e-6 for a, b in zip(after, before, strict=True))
    return {"first": bool(first), "second": bool(second), "both": bool(first and second)}


def moved(positions: Array) -> dict[str, bool]:
    """Return whether a patch of `ramps` was turned and zoomed."""
    found = of_positions(positions)
    turns = any(abs(value) > 0.02 for name, value in found.items() if name != "zoom")
    zooms = abs(found["zoom"] - 1) > 1e-4
    return {"turned": turns, "zoomed": zooms, "both": turns and zooms}


def collect(rows: Iterable[dict[str, float]]) -> dict[str, list[float]]:
    """Return all values of each measurement."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return values


def quantiles(values: list[float]) -> list[float]:
    """Return the smallest value, quantiles, and the largest value.

    Quantile k is the smallest value that at least (k + 0.5) / NUM_QUANTILES of all do not exceed.
    """
    levels = (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
    found = np.quantile(np.array(values), levels, method="inverted_cdf")
    return [float(f"{value:.6g}") for value in (min(values), *found, max(values))]


def distance(values: list[float], reference: list[float]) -> float:
    """Return the largest difference of two distribution functions, at the reference's quantiles.

    Values that differ by rounding alone count as equal.
    """
    ordered = np.sort(np.array(values))
    marks = np.array(reference[1:-1])
    levels = (np.arange(len(marks)) + 0.5) / len(marks)
    slack = _slack(reference)
    upto = np.searchsorted(ordered, marks + slack, side="right") / len(ordered)
    below = np.searchsorted(ordered, marks - slack, side="left") / len(ordered)
    return float(max((levels - upto).max(), (below - levels).max()))


def beyond(values: list[float], reference: list[float]) -> float:
    """Return the share of values below the reference's smallest or above its largest one."""
    slack, found = _slack(reference), np.array(values)
    return float(((found < reference[0] - slack) | (found > reference[-1] + slack)).mean())


def reaches_tails(values: list[float], reference: list[float]) -> bool:
    """Return whether any value is in the reference's lowest 2 % and any in its highest 2 %."""
    slack = _slack(reference)
    return min(values) <= reference[1] + slack and max(values) >= reference[-2] - slack


def _slack(reference: list[float]) -> float:
    return 1e-5 + 1e-4 * (reference[-2] - reference[1])


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with one line for each list of numbers."""
    lines = json.dumps(content, indent=1).splitlines()
    joined: list[str] = []
    for line in lines:
        is_number = line.strip().rstrip(",").lstrip("-")[:1].isdigit()
        if joined and (is_number or line.strip().startswith("]")) and "[" in joined[-1]:
            joined[-1] += line.strip() + (" " if line.strip().endswith(",") and is_number else "")
        else:
            joined.append(line)
    path.write_text("\n".join(joined) + "\n")
