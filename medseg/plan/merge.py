"""Configurations a person added to plans, kept where plans are made anew."""

from __future__ import annotations

from typing import Any

from medseg.errors import PlanError
from medseg.schema.base import validate
from medseg.schema.plans import Plans

PLANNED = ("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres")
"""Names the planner gives; configurations of every other name are a person's own."""


def keep_own_configurations(old: Plans, new: Plans) -> Plans:
    """Return the new plans with the configurations that a person had added to the old ones.

    An own configuration that inherits goes on to inherit: what it said itself stays, what it took
    from its parent follows the new plans. One that stands alone is kept as it is. Edits of the
    planner's own configurations are not kept.

    Args:
        old: Plans as they were, edited perhaps.
        new: Plans made anew.

    Raises:
        PlanError: With every own configuration that does not fit the new plans.

    Source:
        nnU-Net 2.8.1 keeps configurations of names it did not plan, too; also those that it had
        planned itself before.
    """
    own = [name for name in old.configurations if name not in {*PLANNED, *new.configurations}]
    if not own:
        return new
    _check(old, new, own)
    entries = old.model_dump(mode="json")["configurations"]
    values = new.model_dump(mode="json")
    values["configurations"] |= {name: entries[name] for name in own}
    values["why"] += [_reason(name, entries[name]) for name in own]
    return validate(Plans, values, f"plans {new.name!r} of {new.dataset!r}")


def _reason(name: str, entry: dict[str, Any]) -> str:
    changed = ", ".join(key.replace("_", " ") for key in entry if key != "inherits_from")
    if "inherits_from" in entry:
        differs = f", but for {changed}" if changed else ""
        return f"{name}: kept from the plans before, as {entry['inherits_from']}{differs}."
    return f"{name}: kept from the plans before, as it was."


def _check(old: Plans, new: Plans, own: list[str]) -> None:
    problems = []
    kept = {*own, *new.configurations}
    channels = len(new.intensity)
    for name in own:
        configuration = old.configurations[name]
        parent, previous = old.inherits.get(name), configuration.previous_stage
        problems += [
            f"  {name!r} needs {other!r}, which the new plans do not hold"
            for other in dict.fromkeys((parent, previous))
            if other is not None and other not in kept
        ]
        if parent is None and len(configuration.normalization) != channels:
            problems.append(
                f"  {name!r} is for {len(configuration.normalization)} channels, the new plans are "
                f"for {channels}"
            )
    if old.network_axes != new.network_axes:
        problems.append(
            f"  {', '.join(map(repr, own))}: written for the axis order {old.network_axes}, the "
            f"new plans have {new.network_axes}"
        )
    if problems:
        raise PlanError(
            "\n".join(
                [
                    f"plans {new.name!r} of {new.dataset!r} hold configurations of your own that "
                    "do not fit new plans:",
                    *problems,
                    "Take them out of the file (or correct them), then plan again.",
                ]
            )
        )
