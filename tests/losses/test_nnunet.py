"""The losses are those of nnU-Net, in value and gradient, wherever it has them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg.losses.compound import LOSSES

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "loss_reference.py"
REFERENCE = json.loads(Path(__file__).with_name("reference_nnunet.json").read_text())


def title(entry: dict[str, Any]) -> str:
    return "-".join(str(value) for key, value in entry.items() if key not in ("value", "slope"))


@pytest.mark.golden
@pytest.mark.parametrize("entry", REFERENCE["entries"], ids=title)
def test_value_and_gradient_are_nnunets(entry: dict[str, Any]) -> None:
    script = runpy.run_path(str(SCRIPT))
    logits, labels, regions, valid = script["inputs"](entry["space"])
    loss = LOSSES[entry["name"]](
        batch_dice=entry["batch_dice"], has_regions=entry["has_regions"], **entry["options"]
    )
    target = regions if entry["has_regions"] else labels
    found = loss(logits.requires_grad_(), target, valid if entry["masked"] else None)
    (gradient,) = torch.autograd.grad(found, logits)
    assert float(found.detach()) == pytest.approx(entry["value"], rel=1e-5)
    assert script["slope"](gradient) == pytest.approx(entry["slope"], rel=1e-5, abs=1e-7)


def test_the_reference_covers_what_nnunet_has() -> None:
    covered = {(entry["name"], entry["has_regions"]) for entry in REFERENCE["entries"]}
    names = ("dice", "ce", "dice_ce", "dice_topk")
    assert covered == {*((name, False) for name in names), ("dice_bce", True)}
    assert REFERENCE["made_by"]["nnunetv2"] == "2.8.1"
