"""The augmentation of a batch of patches, on the device on which the patches are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medseg.augment import spatial
from medseg.augment.intensity import ChannelDraw, draw_channels, transform_channel
from medseg.augment.previous import PreviousDraw, corrupted, draw_previous
from medseg.augment.sample import Sample, mirror
from medseg.augment.settings import (
    Mirroring,
    check_recipe,
    intensity_settings,
    mirror_axes,
    previous_settings,
    spatial_settings,
)
from medseg.augment.streams import draw_field_seed, field_generator, stream
from medseg.augment.warp import deform
from medseg.schema.recipe import AugmentationRecipe

if TYPE_CHECKING:
    from medseg.augment.reference import ReferenceTransform

Tensors = Tensor | Sequence[Tensor]

_LABEL_BITS = 20
"""Labels are below 2 to this power, as the resampling of labels demands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleDraw:
    """Everything that happens to one sample."""

    deformation: spatial.Deformation | None
    """Rotation, zoom, elastic deformation; None: the centre is cut out."""
    channels: tuple[ChannelDraw, ...]
    """Intensity transforms of each channel."""
    mirrored: tuple[int, ...]
    """Axes that are reversed."""
    swaps_sides: bool
    """Whether that exchanges left and right labels."""
    noise_seed: int
    """Seed of the noise."""
    previous: PreviousDraw
    """What happens to the structures of the stage before."""


class Augmenter:
    """Augments patches; a sample's result depends on its own content and seed only.

    Nothing waits for the device: parameters are drawn on the host and reach the device as
    arguments of kernels, statistics stay on the device. (The backend `batchgenerators` works on
    the host and does wait.)

    Args:
        recipe: What to do how often.
        patch_size: Size of the result in voxels, 2 or 3 axes, network order.
        mask_channels: For each channel, whether voxels outside are set to 0 in the end (not with
            the backend `none`).
        dummy_2d: Deform in the plane of the last two axes only, all slices alike.
        mirroring: Which axes may be mirrored; None: those of the recipe.
        swaps: Pairs of labels that change places where mirroring exchanges left and right.
        num_previous: Structures that a stage before this one found, each one more channel of the
            result; 0: there is no such stage.

    Attributes:
        source_size: Size of the patch to cut, so that no deformation reads beyond it. Along each
            axis it exceeds `patch_size` by an even number: both share their centre.

    Raises:
        ConfigError: If the recipe does not fit the patch.

    Source:
        Transforms, order, probabilities and ranges of nnU-Net v2 (2.8.1).
    """

    def __init__(
        self,
        recipe: AugmentationRecipe,
        patch_size: Sequence[int],
        *,
        mask_channels: Sequence[bool],
        dummy_2d: bool,
        mirroring: Mirroring | None = None,
        swaps: Sequence[tuple[int, int]] = (),
        num_previous: int = 0,
    ) -> None:
        self.patch_size = tuple(patch_size)
        num_axes = len(self.patch_size)
        if num_axes not in (2, 3) or (dummy_2d and num_axes != 3):
            raise ValueError(f"patch_size must have 2 or 3 axes (dummy_2d: 3), got {patch_size}")
        check_recipe(recipe, num_axes)
        self.backend = recipe.backend
        self.mask_channels = tuple(mask_channels)
        self.mirroring = mirroring or Mirroring(axes=mirror_axes(recipe, num_axes))
        self.swaps = tuple(swaps)
        self._tables: dict[tuple[torch.device, bool], Tensor] = {}
        self.spatial = spatial_settings(recipe, self.patch_size, dummy_2d=dummy_2d)
        self.intensity = intensity_settings(recipe)
        self.num_previous = num_previous
        self.corruption = previous_settings(recipe, num_previous)
        self.kept_axes = (0,) if dummy_2d else ()
        self.source_size = self._grown(spatial.largest_margin(self.spatial))

    def read_size(self, seed: int) -> tuple[int, ...]:
        """Return the size of the centred box that the sample with this seed reads, in voxels.

        It is the patch itself for most samples and at most `source_size`. A loader may cut this
        much and no more: the result is the same.
        """
        if self.backend == "batchgenerators":
            return self.source_size
        return self._read_size(self.draw(seed).deformation)

    def swaps_sides(self, seed: int) -> bool:
        """Return whether left and right labels change places in the sample with this seed."""
        if not (self.swaps and self.mirroring.swap_axes):
            return False
        if self.backend == "batchgenerators":
            return self._reference.swaps_sides(seed)
        return self.draw(seed).swaps_sides

    def draw(self, seed: int) -> SampleDraw:
        """Draw everything that happens to the sample with this seed.

        With the backend `batchgenerators` only `previous` does.
        """
        rng = stream(seed)
        num_axes = len(self.patch_size)
        deformation = spatial.draw_deformation(self.spatial, rng)
        flips = rng.random(num_axes).tolist()
        mirrored = tuple(axis for axis in self.mirroring.axes if flips[axis] < 0.5)
        noise_seed = draw_field_seed(rng)
        return SampleDraw(
            deformation=deformation,
            channels=draw_channels(self.intensity, len(self.mask_channels), num_axes, rng),
            mirrored=mirrored,
            swaps_sides=self.mirroring.exchanges(mirrored),
            noise_seed=noise_seed,
            previous=draw_previous(self.corruption, rng),
        )

    @torch.no_grad()
    def __call__(
        self,
        images: Tensors,
        segmentations: Tensors,
        outside: Tensors | None,
        *,
        seeds: Sequence[int],
        previous: Tensors | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Augment a batch.

        Args:
            images: Normalised intensities (B, C, *source), or one (C, *source) for each sample.
                The centre of a source is the centre of its patch. A source may have any size;
                voxels that are read but missing have intensity 0 and label 0 and count as outside.
            segmentations: Labels (B, *source) of any integer type, in [0, 2**20).
            outside: Voxels outside the body (B, *source), boolean, or None.
            seeds: One for each sample, for example from `sample_seed`.
            previous: What the stage before found, as `segmentations`; None where there is none.

        Returns:
            Image, segmentation and outside mask at patch size, with the types and on the device of
            the arguments. The structures of the stage before, one-hot and corrupted, are the last
            channels of the image.
        """
        samples = self._samples(images, segmentations, outside, previous, len(seeds))
        num_images, size = len(self.mask_channels), (len(seeds), *self.patch_size)
        num_channels = num_images + self.num_previous
        batch = images[0].new_empty((size[0], num_channels, *size[1:]))
        labels = segmentations[0].new_empty(size)
        masks = None if outside is None else outside[0].new_empty(size)
        for b, (sample, seed) in enumerate(zip(samples, seeds, strict=True)):
            channels, result = self._augment(sample, seed)
            for c, channel in enumerate(channels):
                batch[b, c].copy_(self._masked(channel, result.outside, c))
            if result.previous is not None:
                draw = self.draw(seed).previous
                found = corrupted(result.previous, self.num_previous, draw)
                batch[b, num_images:].copy_(found)
            labels[b].copy_(result.segmentation)
            if masks is not None and result.outside is not None:
                masks[b].copy_(result.outside)
        return batch, labels, masks

    def _augment(self, sample: Sample, seed: int) -> tuple[Sequence[Tensor], Sample]:
        """Return the channels of one sample's image, and its label maps."""
        if self.backend == "batchgenerators":
            sample = self._reference(sample.cut(self.source_size), seed=seed)
            return sample.image.unbind(), self._swapped(sample, self.swaps_sides(seed))
        draw = self.draw(seed)
        sample = sample.cut(self._read_size(draw.deformation))
        if draw.deformation is not None:
            sample = deform(
                sample, deformation=draw.deformation, patch_size=self.spatial.patch_size
            )
        channels = self._transform_channels(sample.image, draw)
        if draw.mirrored:
            channels = [mirror(channel, draw.mirrored) for channel in channels]
            sample = sample.mirrored_labels(draw.mirrored)
        return channels, self._swapped(sample, draw.swaps_sides)

    def _swapped(self, sample: Sample, swaps_sides: bool) -> Sample:
        """Return the sample, its labels with those of each pair exchanged if sides are swapped."""
        if not (swaps_sides and self.swaps):
            return sample
        before = sample.previous
        return replace(
            sample,
            segmentation=self._exchanged(sample.segmentation),
            previous=None if before is None else self._exchanged(before),
        )

    def _exchanged(self, labels: Tensor) -> Tensor:
        """Return other labels in their place, through a table on the device."""
        key = labels.device, labels.dtype == torch.uint8
        if key not in self._tables:
            self._tables[key] = _swap_table(self.swaps, labels)
        places = labels.reshape(-1).int()
        swapped = self._tables[key].index_select(0, places).reshape(labels.shape)
        return swapped.to(labels.dtype)

    def _transform_channels(self, image: Tensor, draw: SampleDraw) -> list[Tensor]:
        is_noisy = any(change.noise_std is not None for change in draw.channels)
        generator = field_generator(draw.noise_seed, image.device) if is_noisy else None
        return [
            transform_channel(channel, change, generator=generator, kept_axes=self.kept_axes)
            for channel, change in zip(image, draw.channels, strict=True)
        ]

    @cached_property
    def _reference(self) -> ReferenceTransform:
        from medseg.augment.reference import ReferenceTransform

        return ReferenceTransform(
            self.spatial,
            self.intensity,
            mirroring=self.mirroring,
            num_sliced=len(self.kept_axes),
        )

    def _masked(self, channel: Tensor, outside: Tensor | None, index: int) -> Tensor:
        """Return the channel with 0 outside, if it is one of those normalised inside only."""
        if outside is None or not self.mask_channels[index] or self.backend == "none":
            return channel
        return torch.where(outside, 0, channel)

    def _read_size(self, deformation: spatial.Deformation | None) -> tuple[int, ...]:
        if deformation is None:
            return self.patch_size
        return self._grown(spatial.margin(deformation, self.spatial.patch_size))

    def _grown(self, margin: Sequence[int]) -> tuple[int, ...]:
        margins = (0,) * len(self.kept_axes) + tuple(margin)
        return tuple(n + 2 * m for n, m in zip(self.patch_size, margins, strict=True))

    def _samples(
        self,
        images: Tensors,
        segmentations: Tensors,
        outside: Tensors | None,
        previous: Tensors | None,
        count: int,
    ) -> list[Sample]:
        """Return the samples of a batch; their number, channels and sizes are checked."""
        if (previous is not None) != (self.num_previous > 0):
            raise ValueError(
                f"the augmenter has num_previous={self.num_previous}, so `previous` must "
                f"{'not ' if previous is not None else ''}be given"
            )
        parts = [images, segmentations, *(x for x in (outside, previous) if x is not None)]
        if {len(part) for part in parts} != {count} or count == 0:
            raise ValueError(
                f"a batch needs as many images ({len(images)}), segmentations "
                f"({len(segmentations)}), outside masks, previous ones and seeds ({count}), at "
                "least one"
            )
        for found in parts[1:]:
            self._check(tuple(images[0].shape), tuple(found[0].shape))
        nothing = [None] * count
        return list(
            map(
                Sample,
                images,
                segmentations,
                nothing if outside is None else outside,
                nothing if previous is None else previous,
            )
        )

    def _check(self, shape: tuple[int, ...], of_labels: tuple[int, ...]) -> None:
        if len(shape) != len(self.patch_size) + 1 or shape[0] != len(self.mask_channels):
            raise ValueError(
                f"a sample has shape {shape}, expected (C, *source) with "
                f"{len(self.mask_channels)} channels and {len(self.patch_size)} axes"
            )
        if of_labels != shape[1:]:
            raise ValueError(f"a segmentation has shape {of_labels}, its image {shape[1:]}")


def _swap_table(swaps: Sequence[tuple[int, int]], labels: Tensor) -> Tensor:
    """Return what becomes of each label; made on the device, so that nothing waits for it.

    Its type is uint8 for such labels, otherwise int32: torch does not look up all others.
    """
    dtype = torch.uint8 if labels.dtype == torch.uint8 else torch.int32
    count = 1 << (8 if dtype == torch.uint8 else _LABEL_BITS)
    table = torch.arange(count, dtype=dtype, device=labels.device)
    for first, second in swaps:
        table[first] = second
        table[second] = first
    return table
