"""The same recipe through the library batchgenerators: a second backend, on the host.

Differences of the library that remain: cubic interpolation of images and of simulated low
resolutions, brightness factors drawn evenly, a blur truncated at 4 sigma, its own elastic field.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from batchgenerators.transforms.abstract_transforms import Compose
from batchgenerators.transforms.color_transforms import (
    BrightnessMultiplicativeTransform,
    ContrastAugmentationTransform,
    GammaTransform,
)
from batchgenerators.transforms.noise_transforms import (
    GaussianBlurTransform,
    GaussianNoiseTransform,
)
from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform
from batchgenerators.transforms.spatial_transforms import MirrorTransform, SpatialTransform
from torch import Tensor

from medseg.augment import intensity
from medseg.augment.intensity import IntensitySettings
from medseg.augment.sample import Sample
from medseg.augment.settings import Mirroring
from medseg.augment.spatial import SpatialSettings
from medseg.augment.streams import stream
from medseg.augment.warp import decode, encode

_OUTSIDE_CODE = 1
_ELASTIC_ALPHA = (0.0, 900.0)
_ELASTIC_SIGMA = (9.0, 13.0)
_GLOBAL_STATE = threading.Lock()


class ReferenceTransform:
    """Augments one sample through batchgenerators.

    The library draws from the global generators of numpy and Python. They are seeded for each
    sample and restored after it; a lock keeps other samples out meanwhile.

    Args:
        spatial: What may happen to the patch.
        intensity: The chance of each intensity transform.
        mirroring: Axes that may be mirrored.
        num_sliced: 1 if the first axis is left alone by deformations and low resolutions, else 0.
    """

    def __init__(
        self,
        spatial: SpatialSettings,
        intensity: IntensitySettings,
        *,
        mirroring: Mirroring,
        num_sliced: int = 0,
    ) -> None:
        self._patch_size = spatial.patch_size
        self._num_sliced = num_sliced
        self._spatial = spatial_transform(spatial)
        self._intensity = intensity_transforms(intensity, kept_axes=tuple(range(num_sliced)))
        others = tuple(axis for axis in mirroring.axes if axis not in mirroring.swap_axes)
        self._mirror = MirrorTransform(axes=others) if others else None
        self._mirroring = mirroring

    def __call__(self, sample: Sample, *, seed: int) -> Sample:
        """Augment one sample.

        Args:
            sample: Arrays at source size.
            seed: Seed of the sample.

        Returns:
            The same at patch size, with the types and on the device of the argument.
        """
        image, segmentation, outside = sample.image, sample.segmentation, sample.outside
        others = tuple(segmentation.shape[: self._num_sliced])
        plane = tuple(segmentation.shape[self._num_sliced :])
        data = image.detach().cpu().float().numpy().reshape(1, -1, *plane)
        maps = _code_maps(sample)
        codes = maps.numpy().reshape(1, -1, *plane)
        with _seeded(seed):
            moved = self._spatial(data=data, seg=codes)
            arrays = {
                "data": moved["data"].reshape(1, len(image), *others, *self._patch_size),
                "seg": moved["seg"].reshape(1, len(maps), *others, *self._patch_size),
            }
            arrays = self._intensity(**arrays)
            if self._mirror is not None:
                arrays = self._mirror(**arrays)
        dims = tuple(axis + 2 for axis in self._swap_axes(seed))
        arrays = {key: np.flip(value, dims) for key, value in arrays.items()}
        result = torch.from_numpy(np.ascontiguousarray(arrays["data"][0], dtype=np.float32))
        found = torch.from_numpy(arrays["seg"][0].round().astype(np.int32))
        labels, mask = decode(found[0])
        before = sample.previous
        return Sample(
            result.to(image),
            labels.to(segmentation),
            None if outside is None else mask.to(outside),
            None if before is None else decode(found[1])[0].to(before),
        )

    def swaps_sides(self, seed: int) -> bool:
        """Return whether the sample with this seed is mirrored so that left becomes right."""
        return self._mirroring.exchanges(self._swap_axes(seed))

    def _swap_axes(self, seed: int) -> tuple[int, ...]:
        """Return the mirrored ones of the axes that exchange left and right.

        The library does not tell what it mirrored, so these are drawn here.
        """
        axes = self._mirroring.swap_axes
        flips = stream(seed).random(len(axes))
        return tuple(axis for axis, flip in zip(axes, flips, strict=True) if flip < 0.5)


def _code_maps(sample: Sample) -> Tensor:
    """Return the label maps as codes (1 or 2, *source) that have a mask, float32."""
    maps = [(sample.segmentation, sample.outside)]
    if sample.previous is not None:
        maps.append((sample.previous, None))
    nothing = torch.zeros((), dtype=torch.bool, device=sample.image.device)
    codes = [encode(labels, nothing if mask is None else mask) for labels, mask in maps]
    return torch.stack([code.cpu().float() for code in codes])


def spatial_transform(settings: SpatialSettings) -> Any:
    """Return batchgenerators' spatial transform with these settings."""
    angles = (-settings.rotation_max, settings.rotation_max)
    return SpatialTransform(
        settings.patch_size,
        patch_center_dist_from_border=None,
        do_elastic_deform=settings.elastic_probability > 0,
        alpha=_ELASTIC_ALPHA,
        sigma=_ELASTIC_SIGMA,
        p_el_per_sample=settings.elastic_probability,
        do_rotation=settings.rotation_probability > 0,
        angle_x=angles,
        angle_y=angles,
        angle_z=angles,
        p_rot_per_sample=settings.rotation_probability,
        do_scale=settings.scaling_probability > 0,
        scale=settings.scaling_range,
        p_scale_per_sample=settings.scaling_probability,
        border_mode_data="constant",
        border_cval_data=0,
        order_data=3,
        border_mode_seg="constant",
        border_cval_seg=_OUTSIDE_CODE,
        order_seg=1,
        random_crop=False,
    )


def intensity_transforms(settings: IntensitySettings, *, kept_axes: tuple[int, ...]) -> Any:
    """Return batchgenerators' intensity transforms with these settings."""
    return Compose(
        [
            GaussianNoiseTransform(intensity.NOISE_STD, p_per_sample=settings.noise),
            GaussianBlurTransform(
                intensity.BLUR_SIGMA,
                different_sigma_per_channel=True,
                different_sigma_per_axis=True,
                p_per_channel=intensity.CHANNEL_PROBABILITY,
                p_per_sample=settings.blur,
            ),
            BrightnessMultiplicativeTransform(
                intensity.BRIGHTNESS_FACTOR, p_per_sample=settings.brightness
            ),
            ContrastAugmentationTransform(
                intensity.CONTRAST_FACTOR, p_per_sample=settings.contrast
            ),
            SimulateLowResolutionTransform(
                zoom_range=intensity.LOW_RESOLUTION_FACTOR,
                per_channel=True,
                p_per_channel=intensity.CHANNEL_PROBABILITY,
                order_downsample=0,
                order_upsample=3,
                p_per_sample=settings.low_resolution,
                ignore_axes=kept_axes or None,
            ),
            *(
                GammaTransform(
                    intensity.GAMMA_EXPONENT,
                    invert_image=inverts,
                    per_channel=True,
                    retain_stats=True,
                    p_per_sample=probability,
                )
                for inverts, probability in (
                    (True, settings.inverted_gamma),
                    (False, settings.gamma),
                )
            ),
        ]
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators inside the block, alone among the samples."""
    rng = stream(seed)
    with _GLOBAL_STATE:
        states = np.random.get_state(), random.getstate()
        try:
            words = rng.integers(1 << 32, size=8, dtype=np.uint32)
            np.random.set_state(np.random.RandomState(words).get_state())
            random.seed(int(rng.integers(1 << 63)))
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])
