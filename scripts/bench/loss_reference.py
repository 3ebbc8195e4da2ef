#!/usr/bin/env python3
"""Write the losses of nnU-Net, and their gradients, for fixed inputs.

    PEER_PYTHON scripts/bench/loss_reference.py tests/losses/reference_nnunet.json

PEER_PYTHON is the interpreter of an environment with nnunetv2. `tests/losses/test_nnunet.py`
compares medseg's losses with the file, and imports `inputs` and `slope` from here.

An entry has the loss's name and options in medseg, how it was called, its value, and its `slope`:
the gradient of the logits, multiplied by fixed numbers and added up.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SPACES = {"3d": (5, 7, 6), "2d": (9, 11)}
SAMPLES, LOGITS = 3, 4
IGNORE = LOGITS


def inputs(space: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits, labels, regions and valid voxels, made of integers alone.

    Logits lie between -5 and 5, float32, no two alike (nnU-Net chooses between equal voxels by
    chance); labels (B, *spatial); regions (B, L, *spatial); sample 2 has no label 2.
    """
    shape = SPACES[space]
    voxels = np.arange(SAMPLES * int(np.prod(shape)))
    labels = ((voxels * voxels // 7 + voxels // 11) % 9 % LOGITS).reshape(SAMPLES, *shape)
    labels[2][labels[2] == 2] = 0
    places = np.arange(SAMPLES * LOGITS * int(np.prod(shape))).reshape(SAMPLES, LOGITS, *shape)
    logits = (places**3 % 20021 - 10010) / 2048
    regions = np.stack([labels >= 1, labels >= 2, labels == 3, places[:, 0] % 5 == 0], 1)
    valid = (voxels * 13 % 10 > 2).reshape(labels.shape)
    return (
        torch.from_numpy(logits).float(),
        torch.from_numpy(labels),
        torch.from_numpy(regions),
        torch.from_numpy(valid),
    )


def slope(gradient: Tensor) -> float:
    """Return the sum of a gradient times fixed numbers between -1 and 1."""
    numbers = torch.arange(gradient.numel(), dtype=torch.float64) * 29 % 64 / 32 - 1
    return float((gradient.double().flatten() * numbers).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    torch.set_num_threads(1)
    entries = [*_labels(), *_regions()]
    made_by = {name: version(name) for name in ("nnunetv2", "torch")}
    file.write_text(json.dumps({"made_by": made_by, "entries": entries}, indent=1) + "\n")
    print(f"{len(entries)} losses in {file}")


def _labels() -> list[dict[str, Any]]:
    """Measure the losses of nnU-Net's trainers for labels, as these build them."""
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss, DC_and_topk_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
    from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss, TopKLoss
    from nnunetv2.utilities.helpers import softmax_helper_dim1

    entries = []
    for space, batch_dice, masked in product(SPACES, (False, True), (False, True)):
        called = {"space": space, "batch_dice": batch_dice, "masked": masked}
        dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
        ignore = IGNORE if masked else None
        for weights in ((1, 1), (0.25, 2)):
            loss = DC_and_CE_loss(
                dice, {}, weights[1], weights[0], ignore, MemoryEfficientSoftDiceLoss
            )
            options = {"weight_dice": weights[0], "weight_ce": weights[1]}
            entries.append(_entry("dice_ce", options, called, loss))
        if not masked:
            plain = MemoryEfficientSoftDiceLoss(softmax_helper_dim1, **dice)
            entries.append(_entry("dice", {}, called, plain))
            for k in (10, 35):
                loss = DC_and_topk_loss(dice, {"k": k, "label_smoothing": 0})
                entries.append(_entry("dice_topk", {"k": k}, called, loss))
                options = {"k": k, "weight_dice": 0}
                entries.append(_entry("dice_topk", options, called, TopKLoss(k=k)))
            entries.append(_entry("ce", {}, called, RobustCrossEntropyLoss()))
    return entries


def _regions() -> list[dict[str, Any]]:
    """Measure the loss of nnU-Net's trainer for regions.

    With an ignore label the cross-entropy is left out: it then adds regions up, medseg does not.
    """
    from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    entries = []
    for space, batch_dice, masked in product(SPACES, (False, True), (False, True)):
        called = {"space": space, "batch_dice": batch_dice, "masked": masked}
        dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": True, "ddp": False}
        for weight_ce in (0,) if masked else (1, 0.5):
            loss = DC_and_BCE_loss(
                {}, dice, weight_ce, 1, masked, dice_class=MemoryEfficientSoftDiceLoss
            )
            options = {"weight_bce": weight_ce}
            entries.append(_entry("dice_bce", options, called, loss, has_regions=True))
    return entries


def _entry(
    name: str,
    options: dict[str, float],
    called: dict[str, Any],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    has_regions: bool = False,
) -> dict[str, Any]:
    """Call a loss of nnU-Net with what its trainer would give it."""
    logits, labels, regions, valid = inputs(called["space"])
    target = labels.unsqueeze(1)
    if has_regions:
        target = torch.cat([regions, ~valid.unsqueeze(1)], 1) if called["masked"] else regions
    elif called["masked"]:
        target = torch.where(valid.unsqueeze(1), target, IGNORE)
    logits.requires_grad_()
    value = loss(logits, target)
    (gradient,) = torch.autograd.grad(value, logits)
    found = {"value": float(value.detach()), "slope": slope(gradient)}
    return {"name": name, "options": options, "has_regions": has_regions, **called, **found}


if __name__ == "__main__":
    main()
