"""Constants of a loss, as a recipe gives them: `loss.options`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

from medseg.errors import ConfigError, near_names
from medseg.losses.compound import LossFactory
from medseg.schema.base import is_number

_GIVEN_BY_OTHERS = ("batch_dice", "has_regions")
"""Arguments of every factory: of the plans or `loss.batch_dice`, and of the labels."""

_Rule = tuple[Callable[[Any], bool], str]

_WEIGHT: _Rule = (lambda value: is_number(value) and value >= 0, "a number, at least 0")
_RULES: dict[str, _Rule] = {
    "squared": (lambda value: isinstance(value, bool), "true or false"),
    "smooth": (lambda value: is_number(value) and value > 0, "a number above 0"),
    "k": (lambda value: is_number(value) and 0 < value <= 100, "percent, above 0, at most 100"),
    "gamma": _WEIGHT,
    "alpha": _WEIGHT,
    "beta": _WEIGHT,
}
"""Option of a built-in loss -> whether a value will do, and what is expected; weights apart."""


def check_options(
    name: str, factory: LossFactory, options: Mapping[str, Any], *, is_built_in: bool
) -> None:
    """Refuse options a loss does not have, and of a built-in loss values that will not do.

    Raises:
        ConfigError: Listing every problem.
    """
    known = _options_of(factory)
    problems = []
    for key, value in options.items():
        if known is not None and key not in known:
            problems.append(_unknown(name, key, known))
        elif is_built_in:
            is_right, expected = _RULES.get(key, _WEIGHT)
            if not is_right(value):
                problems.append(f"loss.options.{key} is {value!r}; expected {expected}.")
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n".join([f"{len(problems)} problems in loss.options:", *problems]))


def _options_of(factory: LossFactory) -> list[str] | None:
    """Return the names of a factory's options; None if it takes any, or does not say."""
    try:
        parameters = signature(factory).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(each.kind == Parameter.VAR_KEYWORD for each in parameters):
        return None
    named = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    names = [each.name for each in parameters if each.kind in named]
    return sorted(each for each in names if each not in _GIVEN_BY_OTHERS)


def _unknown(name: str, key: str, known: list[str]) -> str:
    if key == "batch_dice":
        return "loss.options.batch_dice is no option; set loss.batch_dice."
    if key == "has_regions":
        return "loss.options.has_regions is no option; the dataset's labels decide it. Remove it."
    options = ", ".join(known) or "none"
    return (
        f"loss.options.{key} is no option of {name!r}; it has: {options}.{near_names(key, known)}"
    )
