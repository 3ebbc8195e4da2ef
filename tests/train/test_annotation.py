"""Cases annotated in part, on their way through a step and a validation."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from medseg.data.loader import Batch, batches
from medseg.data.patches import Annotation, Patch
from medseg.labels import LabelScheme
from medseg.losses.deep_supervision import build_loss
from medseg.train.annotation import batch_annotated, exchanged_channels

SIDES = LabelScheme(
    labels={"left lung": 8, "background": 0, "heart": 5, "right lung": 3, "right eye": 9}
)
"""Indices: right lung 1, heart 2, left lung 3, right eye 4."""
REGIONS = LabelScheme(
    labels={"background": 0, "lungs": (3, 8), "left lung": 8, "right lung": 3, "heart": 5},
    regions_class_order=(3, 8, 3, 5),
)
"""Indices: right lung 1, heart 2, left lung 3."""
TINY_REGIONS = LabelScheme(
    labels={"background": 0, "organ": (1, 2), "lesion": (2,)}, regions_class_order=(1, 2)
)


class Swapping:
    """An augmenter that exchanges left and right where the seed is odd."""

    def __init__(self, *swaps):
        self.swaps = swaps

    def swaps_sides(self, seed):
        return seed % 2 == 1


def batch_of(*annotated):
    nothing = np.zeros((1, 2, 2, 2), np.float32)
    return Batch(
        patches=tuple(
            Patch(
                image=nothing,
                segmentation=nothing[0].astype(np.uint8),
                outside=None,
                case_id=f"case_{index}",
                index=index,
                annotated=mask,
            )
            for index, mask in enumerate(annotated)
        )
    )


def test_partners_are_found_by_what_structures_are_made_of():
    assert exchanged_channels(SIDES, [(1, 3)]) == [0, 3, 2, 1, 4]
    assert exchanged_channels(SIDES, []) == [0, 1, 2, 3, 4]
    assert exchanged_channels(REGIONS, [(3, 1)]) == [0, 2, 1, 3]  # both lungs stay both lungs


def test_where_sides_change_places_so_does_what_was_annotated():
    left, both = (True, False, False, True, True), (True, True, False, True, True)
    right = (True, True, False, False, True)
    batch = batch_of(left, left, both, None, right, right)
    seeds = [0, 1, 3, 1, 2, 5]
    found = batch_annotated(batch, SIDES, Swapping((1, 3)), seeds)
    complete = (True,) * 5
    assert found.tolist() == [list(row) for row in (left, right, both, complete, right, left)]
    assert batch_annotated(batch, SIDES).tolist()[1] == list(left)
    assert batch_annotated(batch, SIDES, Swapping(), seeds).tolist()[1] == list(left)
    assert batch_annotated(batch_of(None, None), SIDES, Swapping((1, 3)), [1, 1]) is None


PARTIAL = {
    "labels": {"case_1": Annotation(channels=(True, True, False), structures=((1,),))},
    "regions": {"case_1": Annotation(channels=(True, False), structures=((1, 2),))},
}


def partial_run(tiny, kind):
    """Return a run whose second case has its lesion hidden: as background, or as organ."""
    options = {"labels": TINY_REGIONS} if kind == "regions" else {}
    run = tiny(partial=PARTIAL[kind], **options)
    hidden = run.entries["case_1"].segmentation
    hidden[hidden == 2] = 1 if kind == "regions" else 0
    del run.entries["case_1"].locations[2]
    return run


@pytest.mark.parametrize("kind", PARTIAL)
def test_a_step_tells_the_loss_what_was_annotated(tiny, kind):
    run, told = partial_run(tiny, kind), []
    loss = run.trainer.parts.loss

    def noting(*args, **options):
        told.append(options.get("annotated"))
        return loss(*args, **options)

    object.__setattr__(run.trainer.parts, "loss", noting)
    found = list(islice(batches(run.sampler, first=0), 12))
    losses = [float(run.trainer.step(run.preparer(batch, augment=True))) for batch in found]
    assert np.isfinite(losses).all()
    for batch, annotated in zip(found, told, strict=True):
        if "case_1" not in batch.case_ids:
            assert annotated is None
            continue
        mask = PARTIAL[kind]["case_1"].channels
        expected = [list(mask) if c == "case_1" else [True] * len(mask) for c in batch.case_ids]
        assert annotated.tolist() == expected
    assert any(mask is None for mask in told)


@pytest.mark.parametrize("kind", PARTIAL)
def test_validation_judges_a_structure_where_it_was_annotated(tiny, kind):
    run = partial_run(tiny, kind)
    run.steps(8)
    trainer, labels = run.trainer, run.trainer.parts.labels
    trainer.network.eval()
    counts = {name: [0, 0, 0, 0] for name in labels.foreground}
    losses = []
    for batch in run.validation_batches(6):
        image = torch.stack([torch.from_numpy(patch.image) for patch in batch.patches])
        with torch.no_grad():
            logits = list(trainer.network(image))
        for patch, found in zip(batch.patches, logits[0], strict=True):
            predicted = labels.segment(found)
            for name, indices in labels.foreground.items():
                channel = labels.channels[name]
                if patch.annotated is not None and not patch.annotated[channel]:
                    continue
                ours = np.asarray(found[channel] > 0)
                ours = ours if labels.has_regions else predicted == channel
                theirs = np.isin(patch.segmentation, indices)
                counts[name][0] += int((ours & theirs).sum())
                counts[name][1] += int((ours ^ theirs).sum())
                counts[name][2] += int(theirs.sum())
                counts[name][3] += int(ours.sum())
        segmentation = torch.stack([torch.from_numpy(p.segmentation) for p in batch.patches])
        target, valid = labels.target(segmentation)
        annotated = batch.annotated if batch.annotated is None else torch.tensor(batch.annotated)
        loss = build_loss("dice_ce", batch_dice=False, has_regions=labels.has_regions)
        losses.append(float(loss(logits, target, valid, annotated)))
    scores = trainer.validate(run.validation(6))
    dice, mean_loss = scores.dice, scores.loss
    for name, (hits, wrong, *voxels) in counts.items():
        assert list(scores.voxels[name]) == voxels
        assert dice[name] == pytest.approx(2 * hits / (2 * hits + wrong))
    assert mean_loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_dice_is_told_by_name_whatever_the_order_of_the_names(tiny):
    """Labels may be listed in another order than their values are in."""
    turned = LabelScheme(labels={"lesion": 2, "background": 0, "organ": 1})
    run, other = tiny(), tiny(labels=turned)
    for each in (run, other):
        found = list(islice(batches(run.sampler, first=0), 6))
        for batch in found:
            each.trainer.step(each.preparer(batch, augment=True))
    expected = run.trainer.validate(run.validation(3)).dice
    found = other.trainer.validate(run.validation(3)).dice
    assert list(found) == ["lesion", "organ"]
    assert found == pytest.approx(expected)
    assert expected["lesion"] != expected["organ"]
