"""A tiny run: a synthetic case with two channels, a network of three stages."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from medseg.augment.pipeline import Augmenter
from medseg.augment.streams import sample_seed
from medseg.data.loader import batches
from medseg.data.locations import sample_locations
from medseg.data.patches import PatchSampler
from medseg.data.store import Entry
from medseg.geometry import SpatialRecord
from medseg.labels import LabelScheme
from medseg.losses.deep_supervision import build_loss
from medseg.models.build import build_network
from medseg.schema.plans import Architecture
from medseg.schema.recipe import Recipe
from medseg.train.feed import Preparer, feed
from medseg.train.schedule import Length
from medseg.train.timing import Clock
from medseg.train.trainer import Parts, Trainer

PATCH = (8, 16, 12)
LABELS = LabelScheme(labels={"background": 0, "organ": 1, "lesion": 2})
ARCHITECTURE = Architecture(
    kind="plain_unet",
    features=(4, 6, 8),
    kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    blocks_encoder=(1, 1, 1),
    blocks_decoder=(1, 1),
)


def make_entry(seed, shape=(12, 22, 17)):
    """Return smooth structures on noise: an organ bright in channel 0, a lesion in channel 1."""
    rng = np.random.default_rng(seed)
    i, j, k = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    a, b = rng.uniform(-0.2, 0.2, 2)
    labels = ((i - a) ** 2 + (j - b) ** 2 + 0.8 * k**2 < 0.5).astype(np.uint8)
    labels[(i > a) & (labels > 0) & (k < 0.1)] = 2
    image = rng.normal(0, 0.3, size=(2, *shape))
    image[0] += labels > 0
    image[1] += labels == 2
    record = SpatialRecord(
        shape_image=shape,
        affine_image=tuple(tuple(float(v) for v in row) for row in np.eye(4)),
        axes=(0, 1, 2),
        flips=(False, False, False),
        box=tuple((0, n) for n in shape),
        spacing_cropped=(1.0, 1.0, 1.0),
        shape_network=shape,
        spacing_network=(1.0, 1.0, 1.0),
    )
    return Entry(
        image=image.astype(np.float32),
        segmentation=labels,
        outside=None,
        locations=sample_locations(labels),
        record=record,
    )


class TinyRun:
    """A trainer and the batches it sees."""

    def __init__(
        self, recipe=None, *, length=None, seed=3, cases=2, spoil=None, labels=LABELS, partial=None
    ):
        self.recipe = recipe or Recipe(
            epochs=4,
            iterations_per_epoch=3,
            optimizer={"name": "adamw", "lr": 0.01, "weight_decay": 0.01},
            schedule={"name": "cosine", "warmup": 0.1, "per": "iteration"},
            precision="fp32",
        )
        self.entries = {f"case_{number}": make_entry(number) for number in range(cases)}
        for case in spoil or ():
            self.entries[case].image[:] = np.nan
        augmenter = Augmenter(
            self.recipe.augmentation, PATCH, mask_channels=(False, False), dummy_2d=False
        )
        network = build_network(
            ARCHITECTURE,
            num_inputs=2,
            num_logits=labels.num_logits,
            deep_supervision=True,
            generator=torch.Generator().manual_seed(seed),
        )
        loss = build_loss(self.recipe.loss.name, batch_dice=False, has_regions=labels.has_regions)
        parts = Parts(
            network=network,
            num_inputs=2,
            loss=loss,
            labels=labels,
            device=torch.device("cpu"),
            dtype=None,
        )
        self.preparer = Preparer(augmenter, labels, parts.device, seed)
        steps = self.recipe.epochs * self.recipe.iterations_per_epoch
        self.trainer = Trainer(self.recipe, parts, length or Length(num_iterations=steps))
        self.sampler = PatchSampler(
            entries=self.entries,
            case_ids=tuple(self.entries),
            patch_size=PATCH,
            read_size=lambda k: augmenter.read_size(sample_seed(seed, k)),
            batch_size=2,
            foreground_fraction=0.5,
            structures=tuple(labels.foreground.values()),
            seed=seed,
            partial=partial or {},
        )

    def validation_batches(self, count=2):
        """Yield batches of unaugmented patches."""
        chosen = replace(self.sampler, read_size=None, seed=self.sampler.seed + 500)
        with closing(batches(chosen, first=0)) as source:
            yield from islice(source, count)

    def validation(self, count=2):
        """Yield samples of unaugmented patches."""
        return feed(self.validation_batches(count), self.preparer, Clock(), augment=False)

    def samples(self):
        """Return the augmented samples of the steps from where the trainer stands."""
        source = batches(self.sampler, first=self.trainer.length.iteration)
        return feed(source, self.preparer, self.trainer.clock)

    def steps(self, count):
        """Do some steps from where the trainer stands and return their losses."""
        with closing(self.samples()) as source:
            return [float(self.trainer.step(samples)) for samples in islice(source, count)]


@pytest.fixture
def tiny(one_thread):
    return TinyRun
