"""Losses of samples that are annotated in part: what was not drawn is neither right nor wrong."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

from medseg.errors import ConfigError
from medseg.losses.compound import LOSSES, Loss
from medseg.losses.deep_supervision import build_loss, nearest
from tests.losses.oracle import slow_loss

SHAPE = (3, 4, 5, 6)
"""Batch and space."""
LOGITS = 4
ANNOTATED = torch.tensor(
    [
        [True, False, True, False],
        [True, True, True, True],
        [True, False, False, True],
    ]
)
"""Labels: the background, then three; regions: the same rows without the first entry."""
NAMES = tuple(LOSSES)


def logits(channels: int = LOGITS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (SHAPE[0], channels, *SHAPE[1:])
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 2


def labels(annotated: Tensor = ANNOTATED) -> Tensor:
    """Return labels; what was not annotated is background."""
    generator = torch.Generator().manual_seed(2)
    found = torch.randint(0, LOGITS, SHAPE, generator=generator)
    for sample, row in enumerate(annotated.tolist()):
        for label, is_drawn in enumerate(row):
            if not is_drawn:
                found[sample][found[sample] == label] = 0
    return found


def regions() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    chance = torch.tensor([0.5, 0.2, 0.05]).reshape(1, 3, 1, 1, 1)
    return torch.rand(SHAPE[0], 3, *SHAPE[1:], generator=generator) < chance


def mask() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(4)) > 0.3


def given(has_regions: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, target and what was annotated."""
    if has_regions:
        return logits(3), regions(), ANNOTATED[:, 1:]
    return logits(), labels(), ANNOTATED


def build(name: str, *, has_regions: bool, batch_dice: bool = False) -> Loss:
    return LOSSES[name](batch_dice=batch_dice, has_regions=has_regions)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("has_regions", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_everything_annotated_is_the_plain_loss(
    name: str, has_regions: bool, batch_dice: bool
) -> None:
    found, target, annotated = given(has_regions)
    loss = build(name, has_regions=has_regions, batch_dice=batch_dice)
    for valid in (None, mask()):
        values = found.clone().requires_grad_()
        plain = loss(values, target, valid)
        partial = loss(values, target, valid, torch.ones_like(annotated))
        torch.testing.assert_close(partial, plain, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(each, values)[0] for each in (plain, partial)]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_dice", [False, True])
def test_labels_that_were_not_annotated_are_not_pushed_down_in_the_background(
    name: str, batch_dice: bool
) -> None:
    """There they may be present; a descent must not lower them. The plain loss does."""
    found, target, annotated = given(has_regions=False)
    loss = build(name, has_regions=False, batch_dice=batch_dice)

    def of_unknown(partial: Tensor | None) -> Tensor:
        values = found.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(values, target, None, partial), values)
        is_unknown = (target == 0).unsqueeze(1) & ~annotated.reshape(3, LOGITS, 1, 1, 1)
        return gradient[is_unknown]

    assert of_unknown(annotated).max() <= 1e-12
    if name not in ("dice", "tversky"):
        assert of_unknown(None).max() > 1e-4


def test_chances_move_freely_between_the_background_and_what_was_not_annotated() -> None:
    """Cross-entropy asks only for their sum: from one to the other nothing changes."""
    loss = build("ce", has_regions=False)
    target = torch.zeros((1, 2), dtype=torch.int64)
    annotated = torch.tensor([[True, False, True]])
    chances = torch.tensor([[0.7, 0.1, 0.2], [0.2, 0.6, 0.2]], dtype=torch.float64)
    found = chances.log().T.unsqueeze(0)
    expected = -torch.tensor(0.8).log().item()
    assert float(loss(found, target, None, annotated)) == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_regions_that_were_not_annotated_get_no_gradient(name: str) -> None:
    found, target, annotated = given(has_regions=True)
    for batch_dice in (False, True):
        loss = build(name, has_regions=True, batch_dice=batch_dice)
        values = found.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(values, target, mask(), annotated), values)
        assert gradient[~annotated].abs().max() == 0
        assert (gradient[annotated].flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("has_regions", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_a_structure_no_sample_was_annotated_for_is_left_out_of_the_mean(
    has_regions: bool, batch_dice: bool
) -> None:
    """Its Dice would be that of an empty structure, and no number of samples would mend it."""
    found, target, annotated = given(has_regions)
    column = 0 if has_regions else 1
    annotated = annotated.clone()
    annotated[:, column] = False
    kept = [channel for channel in range(annotated.shape[1]) if channel != column]
    loss = build("dice", has_regions=has_regions, batch_dice=batch_dice)
    if has_regions:
        expected = loss(found[:, kept], target[:, kept], None, annotated[:, kept])
    else:
        expected_value = slow_loss("dice", (found, target, None, annotated), batch_dice)
        expected = torch.tensor(expected_value, dtype=torch.float64)
    torch.testing.assert_close(loss(found, target, None, annotated), expected)


@pytest.mark.parametrize("has_regions", [False, True])
def test_low_precision_logits_are_computed_in_fp32(has_regions: bool) -> None:
    found, target, annotated = given(has_regions)
    coarse = found.to(torch.bfloat16)
    loss = build("dice_ce", has_regions=has_regions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(coarse, target, None, annotated)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value, loss(coarse.float(), target, None, annotated), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("has_regions", [False, True])
def test_every_resolution_knows_what_was_annotated(has_regions: bool) -> None:
    found, target, annotated = given(has_regions)
    coarse = found[..., 1::2, ::2, 1::3]
    loss = build_loss("dice_ce", batch_dice=True, has_regions=has_regions, is_partial=True)
    single = build("dice_ce", has_regions=has_regions, batch_dice=True)
    pyramid = [found, coarse, coarse[..., :1]]
    small = nearest(target, coarse.shape[2:])
    expected = 2 / 3 * single(found, target, None, annotated) + 1 / 3 * single(
        coarse, small, None, annotated
    )
    torch.testing.assert_close(loss(pyramid, target, None, annotated), expected)
    torch.testing.assert_close(
        loss(found, target, None, annotated), single(found, target, None, annotated)
    )


def test_own_losses_need_the_argument_only_where_cases_are_partial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("own_partial_losses")
    module.Plain = lambda **options: lambda logits, target, valid: logits.mean()
    module.Aware = lambda **options: lambda logits, target, valid, annotated=None: logits.mean()
    monkeypatch.setitem(sys.modules, "own_partial_losses", module)
    for name, is_partial in (("Plain", False), ("Aware", False), ("Aware", True)):
        build_loss(
            f"own_partial_losses:{name}",
            batch_dice=True,
            has_regions=False,
            is_partial=is_partial,
        )
    with pytest.raises(ConfigError, match="takes no argument 'annotated'"):
        build_loss("own_partial_losses:Plain", batch_dice=True, has_regions=False, is_partial=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("has_regions", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_the_device_gives_the_numbers_of_the_host(
    name: str, has_regions: bool, batch_dice: bool
) -> None:
    host = [*given(has_regions), mask()]
    device = [each.cuda() for each in host]
    loss = build(name, has_regions=has_regions, batch_dice=batch_dice)
    expected = loss(host[0], host[1], host[3], host[2])
    loss(device[0], device[1], device[3], device[2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(device[0], device[1], device[3], device[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(value.cpu(), expected)
