"""The golden loss curve: a seeded tiny run gives the stored numbers.

A change that is not meant to alter numbers leaves this file alone. One that is runs
`python -m pytest tests/train/test_golden.py` and stores the losses the failure shows.
"""

from __future__ import annotations

import pytest

from medseg.schema.recipe import Recipe

GOLDEN = {
    "sgd": [
        1.34817,
        1.30045,
        1.26731,
        1.23672,
        1.10524,
        1.12389,
        0.99465,
        0.90205,
        0.89045,
        0.81965,
        0.85565,
        0.81468,
    ],
    "adamw": [
        1.34817,
        1.33356,
        1.32548,
        1.31225,
        1.17724,
        1.21828,
        1.13494,
        1.01126,
        1.02312,
        0.99637,
        1.05666,
        1.03574,
    ],
}
RECIPES = {
    "sgd": {"optimizer": {"name": "sgd", "lr": 0.01}, "schedule": {"name": "poly"}},
    "adamw": {
        "optimizer": {"name": "adamw", "lr": 0.003, "weight_decay": 0.01},
        "schedule": {"name": "cosine", "warmup": 0.2, "per": "iteration"},
        "ema": 0.9,
    },
}


@pytest.mark.golden
@pytest.mark.parametrize("name", GOLDEN)
def test_loss_curve_is_the_stored_one(tiny, name):
    recipe = Recipe(epochs=4, iterations_per_epoch=3, precision="fp32", **RECIPES[name])
    run = tiny(recipe, seed=11)
    losses = []
    for _ in range(4):
        losses += run.steps(3)
        run.trainer.end_epoch({"mean_patch_dice": None, "elapsed_seconds": 0.0, "skipped_steps": 0})
    found = [round(loss, 5) for loss in losses]
    assert found == pytest.approx(GOLDEN[name], abs=1e-3), str(found)
