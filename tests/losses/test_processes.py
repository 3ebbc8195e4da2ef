"""The loss of a batch that is divided between processes is that of the whole batch."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed

from medseg.losses.compound import LOSSES
from medseg.losses.deep_supervision import build_loss
from medseg.losses.sums import over_processes

SCRIPT = Path(__file__).with_name("in_processes.py")
SIZES = {2: 3, 3: 5}
"""Number of processes -> samples of the batch, which it does not divide."""
MASKED = ((2, False), (2, True), (3, True))
"""Number of processes, and whether there are masks and samples annotated in part."""
SPACES = ((4, 6, 3), (2, 3, 3), (1, 3, 3))
LOGITS = 3
OPTIONS: dict[str, dict[str, Any]] = {"dice_topk": {"k": 23}, "dice_focal": {"gamma": 1.5}}

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)


def batch(samples: int, *, has_regions: bool, is_masked: bool) -> dict[str, Tensor]:
    """Return logits of three resolutions, target and masks; samples differ in all of them.

    Only the first is annotated in part, so that one process knows of it and the others do not.
    """
    generator = torch.Generator().manual_seed(samples)
    arrays = {
        f"logits_{n}": torch.randn(
            (samples, LOGITS, *space), generator=generator, dtype=torch.float64
        )
        * torch.arange(1, samples + 1).view(-1, 1, 1, 1, 1)
        for n, space in enumerate(SPACES)
    }
    chance = torch.rand((samples, *SPACES[0]), generator=generator)
    labels = (chance > 0.5).long() + (chance > 0.8).long()
    labels[1] = 0
    if is_masked:
        labels[0] = labels[0].clamp_max(1)
    arrays["target"] = labels
    if has_regions:
        arrays["target"] = torch.stack([labels >= 1, labels == 2, chance < 0.2], 1)
    if is_masked:
        arrays["valid"] = torch.rand(labels.shape, generator=generator) > 0.3
        arrays["valid"][1] = False
        arrays["annotated"] = torch.ones((samples, LOGITS), dtype=torch.bool)
        arrays["annotated"][0, 2] = False
    return arrays


def every_case() -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    cases = []
    for name, batch_dice, has_regions, (size, is_masked) in itertools.product(
        LOSSES, (False, True), (False, True), MASKED
    ):
        case = {
            "name": name,
            "options": OPTIONS.get(name, {}),
            "batch_dice": batch_dice,
            "has_regions": has_regions,
            "processes": size,
            "resolutions": len(SPACES),
        }
        cases.append((case, batch(SIZES[size], has_regions=has_regions, is_masked=is_masked)))
    return cases


def whole(case: dict[str, Any], arrays: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return loss and gradients in one process, without deep supervision's last resolution."""
    logits = [arrays[f"logits_{n}"].clone().requires_grad_() for n in range(len(SPACES))]
    loss = build_loss(
        case["name"],
        batch_dice=case["batch_dice"],
        has_regions=case["has_regions"],
        options=case["options"],
    )
    value = loss(logits, arrays["target"], arrays.get("valid"), arrays.get("annotated"))
    return value.detach(), torch.autograd.grad(value, logits[:-1])


def run_processes(folder: Path) -> None:
    commands = [[sys.executable, str(SCRIPT), str(rank), str(folder)] for rank in range(max(SIZES))]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * len(running), errors


def test_processes_have_the_loss_and_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    """Every loss, uneven batches, masks, samples in part; what data-parallel training averages."""
    cases = every_case()
    (tmp_path / "cases.json").write_text(json.dumps([case for case, _ in cases]))
    for number, (_, arrays) in enumerate(cases):
        np.savez(
            tmp_path / f"{number}.npz", **{name: each.numpy() for name, each in arrays.items()}
        )
    run_processes(tmp_path)
    for number, (case, arrays) in enumerate(cases):
        loss, gradients = whole(case, arrays)
        size = case["processes"]
        assert any(each.abs().max() > 1e-4 for each in gradients)
        for rank in range(size):
            found = np.load(tmp_path / f"{number}.{rank}.npz")
            assert float(found["loss"]) == pytest.approx(float(loss), rel=1e-9), case
            for n, gradient in enumerate(gradients):
                np.testing.assert_allclose(
                    found[f"logits_{n}"] / size,
                    gradient[rank::size].numpy(),
                    rtol=1e-7,
                    atol=1e-12,
                    err_msg=f"{case}, rank {rank}, resolution {n}",
                )


def test_without_a_process_group_a_sum_is_what_it_was() -> None:
    values = torch.tensor([1.0, 2.0])
    assert over_processes(values) is values


@pytest.mark.parametrize("name", LOSSES)
def test_all_resolutions_travel_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One exchange for a loss, whatever its terms; the hardest voxels need theirs first."""
    sent = []
    monkeypatch.setattr("medseg.losses.sums._are_several", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", lambda values: sent.append(values.numel()))
    arrays = batch(3, has_regions=False, is_masked=True)
    arrays = {key: each.float() if key[0] == "l" else each for key, each in arrays.items()}
    case = {"name": name, "batch_dice": True, "has_regions": False, "options": {}}
    whole(case, arrays)
    forward_and_back = sent[-2:]
    assert len(set(forward_and_back)) == 1
    resolutions = len(SPACES) - 1
    digits = 3 if name == "dice_topk" else 0
    assert len(sent) == 2 + digits * resolutions
