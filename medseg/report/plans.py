"""Plans as a table that fits a terminal."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable

from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import Configuration, LeftRight, Plans

_WIDTH = 79
_LABEL = 16
_DIGITS = 4
_FILL = "\0"
_AXES = ("I", "J", "K")


def format_plans(plans: Plans) -> str:
    """Return the configurations, their rows one below the other, and the reasons in words."""
    head = [
        f"Plans {plans.name!r} of {plans.dataset!r}",
        *_lines(plan_rows(plans)),
    ]
    blocks = ["\n".join(_block(plans, name)) for name in plans.configurations]
    why = [
        line for reason in plans.why for line in wrapped(reason, _WIDTH, first="- ", further="  ")
    ]
    parts = ["\n".join(head), *blocks, *(["\n".join(["Why:", *why])] if why else [])]
    return "\n\n".join(parts)


def plan_rows(plans: Plans, digits: int | None = _DIGITS) -> dict[str, str]:
    """Return label -> value of what all configurations share, in words.

    Args:
        plans: The plans.
        digits: Significant digits of numbers that are not whole; None gives all.
    """
    rows = {
        "axes": f"{', '.join(_AXES[axis] for axis in plans.network_axes)} of RAS",
        "raw spacing": f"{_by(plans.original_median_spacing, digits)} mm (median)",
        "raw shape": f"{_by(plans.original_median_shape, digits)} voxels (median, cropped)",
    }
    if plans.left_right is not None:
        rows["left and right"] = _sides(plans.left_right)
    for index, item in enumerate(plans.intensity):
        rows[f"channel {index}"] = _intensity(item, digits)
    return rows


def configuration_rows(
    entry: Configuration, sides: LeftRight | None, digits: int | None = _DIGITS
) -> dict[str, str]:
    """Return label -> value of one configuration, in words.

    Args:
        entry: The configuration.
        sides: What mirroring does about labels that have sides.
        digits: Significant digits of numbers that are not whole; None gives all.
    """
    net = entry.architecture
    rows = {
        "spacing": f"{_by(entry.spacing, digits)} mm",
        "median shape": _by(entry.median_shape, digits),
        "patch size": _by(entry.patch_size, digits),
        "batch size": str(entry.batch_size),
        "normalisation": ", ".join(_schemes(entry)),
        "Dice": "over the batch" if entry.batch_dice else "per sample",
        "network": f"{net.kind}, {len(net.features)} stages",
        "features": ", ".join(str(count) for count in net.features),
        "blocks": f"encoder {_listed(net.blocks_encoder)}; decoder {_listed(net.blocks_decoder)}",
        "strides": _per_stage(net.strides),
        "kernels": _per_stage(net.kernel_sizes),
        "mirroring": _mirrored(entry, sides),
    }
    if net.options:
        rows["options"] = ", ".join(f"{name} {value}" for name, value in net.options.items())
    if entry.previous_stage is not None:
        rows["cascade"] = f"second stage, after {entry.previous_stage}"
    return rows


def _block(plans: Plans, name: str) -> list[str]:
    """Return the lines of one configuration; of one that inherits, what is its own."""
    rows = configuration_rows(plans.configurations[name], plans.left_right)
    parent = plans.inherits.get(name)
    if parent not in plans.configurations:
        return [name, *_lines(rows)]
    before = configuration_rows(plans.configurations[parent], plans.left_right)
    own = {label: text for label, text in rows.items() if text != before.get(label)}
    return [f"{name}: as {parent}{', but for' if own else ''}", *_lines(own)]


def _lines(rows: dict[str, str]) -> list[str]:
    return [
        line
        for label, text in rows.items()
        for line in wrapped(text, _WIDTH, first=f"  {label:<{_LABEL - 2}}", further=" " * _LABEL)
    ]


def wrapped(text: str, width: int, *, first: str = "", further: str = "") -> list[str]:
    """Return a text in lines of at most some columns of a terminal.

    Args:
        text: One paragraph; Chinese letters take two columns.
        width: Columns of a line.
        first: What the first line begins with.
        further: What further lines begin with.

    Examples:
        >>> wrapped("\u5de6\u80be left kidney", 9)
        ['左肾 left', 'kidney']
    """
    filled = "".join(
        letter + _FILL * (unicodedata.east_asian_width(letter) in "WF") for letter in text
    )
    lines = textwrap.wrap(
        filled, width, initial_indent=first, subsequent_indent=further, break_on_hyphens=False
    )
    return [line.replace(_FILL, "") for line in lines]


def num_columns(text: str) -> int:
    """Return the columns of a terminal a text takes."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def _sides(sides: LeftRight) -> str:
    pairs = ", ".join(f"{left} / {right}" for left, right in sides.pairs) or "no pairs"
    return f"{sides.policy} along network axis {sides.axis}: {pairs}"


def _intensity(item: IntensityStatistics, digits: int | None) -> str:
    names = {"percentile_00_5": "0.5%", "percentile_99_5": "99.5%"}
    values = {name: getattr(item, name) for name in type(item).model_fields}
    return ", ".join(f"{names.get(n, n)} {_number(v, digits)}" for n, v in values.items())


def _mirrored(entry: Configuration, sides: LeftRight | None) -> str:
    """Say in words which axes are mirrored; slices across the left-right axis show no sides."""
    if sides is None or sides.axis < 3 - entry.num_dimensions:
        return "all axes"
    if sides.policy == "forbid":
        return "all axes but I (left-right)"
    return "all axes; along I (left-right) the two labels of a pair change places"


def _schemes(entry: Configuration) -> Iterable[str]:
    for scheme, masked in zip(entry.normalization, entry.use_mask_for_norm, strict=True):
        yield f"{scheme} (inside the non-zero mask)" if masked else scheme


def _by(values: Iterable[float], digits: int | None) -> str:
    """Return numbers with some significant digits, whole numbers whole.

    Examples:
        >>> _by((0.00123456, 2.5, 12345), 4), _by([0.1 + 0.2], None)
        ('0.001235 x 2.5 x 12345', '0.30000000000000004')
    """
    return " x ".join(_number(value, digits) for value in values)


def _number(value: float, digits: int | None) -> str:
    if float(value).is_integer():
        return f"{value:.0f}"
    return repr(float(value)) if digits is None else f"{value:.{digits}g}"


def _listed(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in values)


def _per_stage(values: Iterable[tuple[int, ...]]) -> str:
    return " ".join("x".join(str(number) for number in value) for value in values)
