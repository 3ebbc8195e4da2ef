"""Options of a loss: passed on, and refused in words where they make no sense."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from medseg.api.recipes import read_recipe
from medseg.errors import ConfigError
from medseg.losses.compound import LOSSES
from medseg.losses.deep_supervision import build_loss


def build(name: str, **options: Any) -> Any:
    return build_loss(name, batch_dice=True, has_regions=False, options=options)


def test_options_reach_the_loss() -> None:
    logits = torch.randn((2, 3, 4, 5), generator=torch.Generator().manual_seed(1))
    target = torch.arange(40).reshape(2, 4, 5) % 3
    expected = LOSSES["dice_focal"](batch_dice=True, has_regions=False, gamma=1.5, smooth=1)
    found = build("dice_focal", gamma=1.5, smooth=1)(logits, target)
    torch.testing.assert_close(found, expected(logits, target))
    assert float(found) != pytest.approx(float(build("dice_focal")(logits, target)), rel=1e-3)


def test_unknown_options_are_listed_with_what_there_is() -> None:
    with pytest.raises(ConfigError) as raised:
        build("dice_focal", gama=2, smooth=-1, weight_dice=1, weight_ce=1, squared="yes")
    lines = str(raised.value).splitlines()
    assert lines[0] == "4 problems in loss.options:"
    assert lines[1] == (
        "loss.options.gama is no option of 'dice_focal'; it has: gamma, smooth, squared, "
        "weight_dice, weight_focal. Did you mean 'gamma'?"
    )
    assert lines[2] == "loss.options.smooth is -1; expected a number above 0."
    assert lines[3].startswith("loss.options.weight_ce is no option of 'dice_focal'")
    assert lines[4] == "loss.options.squared is 'yes'; expected true or false."


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ce", {"gamma": 2}, "gamma is no option of 'ce'; it has: none"),
        ("dice_topk", {"k": 0}, "k is 0; expected percent, above 0, at most 100"),
        ("dice_topk", {"k": 100.5}, r"k is 100\.5; expected percent"),
        ("dice_topk", {"k": "10"}, "k is '10'; expected percent"),
        ("dice_ce", {"weight_ce": float("nan")}, "weight_ce is nan; expected a number, at least 0"),
        ("dice_ce", {"weight_dice": True}, "weight_dice is True; expected a number"),
        ("dice_focal", {"gamma": -0.5}, r"gamma is -0\.5; expected a number, at least 0"),
        ("tversky", {"alpha": 0, "beta": 0}, "alpha and beta are both 0"),
        ("dice_ce", {"weight_dice": 0, "weight_ce": 0}, "every weight is 0"),
        ("dice", {"batch_dice": False}, r"batch_dice is no option; set loss\.batch_dice"),
        ("dice", {"has_regions": True}, "has_regions is no option; the dataset's labels"),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_every_option_of_every_loss_has_bounds(name: str) -> None:
    """No number is infinite, and nothing is told by a word."""
    with pytest.raises(ConfigError) as raised:
        build(name, none_such=1)
    options = str(raised.value).split("it has: ")[1].split(".")[0].split(", ")
    for option in options if options != ["none"] else []:
        for value in (float("inf"), "many", None, [1]):
            with pytest.raises(ConfigError, match=rf"loss\.options\.{option} is .*expected"):
                build(name, **{option: value})


def test_own_losses_have_their_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(*, batch_dice: bool, has_regions: bool, power: Any = 1) -> Any:
        if power == "odd":
            raise ValueError("power must be even")
        return lambda logits, target, valid: logits.mean() ** power

    module = types.ModuleType("own_options")
    module.Narrow = narrow
    module.Wide = lambda **options: lambda logits, target, valid: logits.mean() * options["factor"]
    monkeypatch.setitem(sys.modules, "own_options", module)
    logits, target = torch.full((1, 2, 3), 4.0), torch.zeros((1, 3), dtype=torch.int64)
    assert float(build("own_options:Narrow", power=2)(logits, target)) == 16
    assert float(build("own_options:Wide", factor=0.5)(logits, target)) == 2
    with pytest.raises(ConfigError, match=r"powr is no option .*Did you mean 'power'\?"):
        build("own_options:Narrow", powr=2)
    with pytest.raises(ConfigError, match="cannot be built: power must be even"):
        build("own_options:Narrow", power="odd")


def test_options_can_be_set_one_by_one() -> None:
    changes = ["loss.name=dice_topk", "loss.options.k=20", "loss.options.weight_dice=0"]
    recipe = read_recipe("default", changes).loss
    assert recipe.options == {"k": 20, "weight_dice": 0}
    assert build(recipe.name, **recipe.options).loss.terms[1][1].k == 20
    with pytest.raises(ConfigError, match=r"Did you mean 'options'\?"):
        read_recipe("default", ["loss.option.k=20"])
