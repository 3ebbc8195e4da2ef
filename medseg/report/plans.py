"""Plans as a table that fits a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from medseg.schema.plans import Configuration, Plans

_WIDTH = 79
_AXES = "IJK"


def format_plans(plans: Plans) -> str:
    """Return the configurations side by side in rows, and the reasons in words."""
    axes = ", ".join(_AXES[axis] for axis in plans.network_axes)
    head = [
        f"Plans {plans.name!r} of {plans.dataset!r}; network axes: {axes} of RAS",
        f"raw images, median: {_numbers(plans.original_median_shape, 0)} voxels of "
        f"{_numbers(plans.original_median_spacing, 2)} mm",
    ]
    blocks = [_block(name, entry) for name, entry in plans.configurations.items()]
    why = [
        line
        for reason in plans.why
        for line in textwrap.wrap(reason, _WIDTH, initial_indent="- ", subsequent_indent="  ")
    ]
    parts = ["\n".join(head), *blocks, *(["Why:\n" + "\n".join(why)] if why else [])]
    return "\n\n".join(parts)


def _block(name: str, entry: Configuration) -> str:
    net = entry.architecture
    rows = {
        "spacing": f"{_numbers(entry.spacing, 2)} mm",
        "median shape": _numbers(entry.median_shape, 0),
        "patch size": _numbers(entry.patch_size, 0),
        "batch size": str(entry.batch_size),
        "normalisation": ", ".join(_schemes(entry)),
        "Dice": "over the batch" if entry.batch_dice else "per sample",
        "network": f"{net.kind}, {len(net.features)} stages",
        "features": ", ".join(str(count) for count in net.features),
        "strides": _per_stage(net.strides),
        "kernels": _per_stage(net.kernel_sizes),
    }
    if entry.previous_stage is not None:
        rows["cascade"] = f"second stage, after {entry.previous_stage}"
    lines = [
        line
        for label, text in rows.items()
        for line in textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=f"  {label:<14}",
            subsequent_indent=" " * 16,
            break_on_hyphens=False,
        )
    ]
    return "\n".join([name, *lines])


def _schemes(entry: Configuration) -> Iterable[str]:
    for scheme, masked in zip(entry.normalization, entry.use_mask_for_norm, strict=True):
        yield f"{scheme} (inside the non-zero mask)" if masked else scheme


def _numbers(values: Iterable[float], digits: int) -> str:
    return " x ".join(f"{value:.{digits}f}" for value in values)


def _per_stage(values: Iterable[tuple[int, ...]]) -> str:
    return " ".join("x".join(str(number) for number in value) for value in values)
