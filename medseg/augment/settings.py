"""From a recipe to the settings of the augmentation: the one place that knows both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from medseg.augment.intensity import IntensitySettings
from medseg.augment.previous import PreviousSettings
from medseg.augment.spatial import SpatialSettings
from medseg.errors import ConfigError
from medseg.schema.plans import LeftRight
from medseg.schema.recipe import AugmentationRecipe

_ANISOTROPIC = 3.0
_ELONGATED = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirroring:
    """What is mirrored, in training and in test-time augmentation alike."""

    axes: tuple[int, ...]
    """Axes of the patch that may be mirrored."""
    swap_axes: tuple[int, ...] = ()
    """Those of them whose mirroring exchanges left and right labels."""

    def exchanges(self, mirrored: Sequence[int]) -> bool:
        """Return whether mirroring these axes, all of them, exchanges left and right labels.

        Examples:
            >>> mirroring = Mirroring(axes=(0, 1, 2), swap_axes=(1, 2))
            >>> [mirroring.exchanges(axes) for axes in ((0,), (0, 2), (1, 2))]
            [False, True, False]
        """
        return sum(axis in self.swap_axes for axis in mirrored) % 2 == 1


def is_anisotropic(patch_size: Sequence[int]) -> bool:
    """Return whether a patch is deformed in the plane of its last two axes only ("dummy 2D").

    Source:
        nnU-Net v2: a 3D patch whose longest edge is more than 3 times its first one.

    Examples:
        >>> is_anisotropic((16, 320, 320)), is_anisotropic((128, 128, 128))
        (True, False)
    """
    return len(patch_size) == 3 and max(patch_size) / patch_size[0] > _ANISOTROPIC


def spatial_settings(
    recipe: AugmentationRecipe, patch_size: Sequence[int], *, dummy_2d: bool
) -> SpatialSettings:
    """Map a recipe to the settings of the deformation, over the deformed axes only.

    Source:
        Default angles of nnU-Net v2: 30 degrees in 3D, 180 in a plane, 15 where a 2D patch is
        elongated.
    """
    deformed = tuple(patch_size[1:] if dummy_2d else patch_size)
    if recipe.rotation_max_deg is not None:
        degrees = abs(recipe.rotation_max_deg)
    elif len(deformed) == 3:
        degrees = 30.0
    else:
        elongated = not dummy_2d and max(deformed) / min(deformed) > _ELONGATED
        degrees = 15.0 if elongated else 180.0
    active = recipe.backend != "none"
    return SpatialSettings(
        patch_size=deformed,
        rotation_probability=recipe.rotation_probability * active,
        rotation_max=math.radians(degrees),
        scaling_probability=recipe.scaling_probability * active,
        scaling_range=recipe.scaling_range,
        elastic_probability=recipe.elastic_probability * active,
    )


def intensity_settings(recipe: AugmentationRecipe) -> IntensitySettings:
    """Map a recipe to the chances of the intensity transforms."""
    active = recipe.backend != "none"
    return IntensitySettings(
        noise=recipe.noise_probability * active,
        blur=recipe.blur_probability * active,
        brightness=recipe.brightness_probability * active,
        contrast=recipe.contrast_probability * active,
        low_resolution=recipe.low_resolution_probability * active,
        inverted_gamma=recipe.inverted_gamma_probability * active,
        gamma=recipe.gamma_probability * active,
    )


def previous_settings(recipe: AugmentationRecipe, num_previous: int) -> PreviousSettings:
    """Map a recipe to the chances of corrupting what a stage before found."""
    active = recipe.backend != "none"
    return PreviousSettings(
        num_previous=num_previous,
        operator=recipe.previous_operator_probability * active,
        removal=recipe.previous_removal_probability * active,
    )


def mirror_axes(recipe: AugmentationRecipe, num_axes: int) -> tuple[int, ...]:
    """Return the axes that a recipe allows to mirror."""
    if recipe.backend == "none":
        return ()
    return tuple(range(num_axes)) if recipe.mirror_axes is None else recipe.mirror_axes


def mirroring(
    recipe: AugmentationRecipe,
    patch_size: Sequence[int],
    *,
    dummy_2d: bool,
    left_right: LeftRight | None,
) -> Mirroring:
    """Return what a recipe mirrors where labels have sides.

    Args:
        recipe: The augmentation; the axes it allows are not extended.
        patch_size: Patch in voxels; a 2D one lies across network axis 0.
        dummy_2d: Whether the patch is deformed in the plane of its last two axes only.
        left_right: The plans' decision; None: labels have no sides.
    """
    allowed = mirror_axes(recipe, len(patch_size))
    if left_right is None:
        return Mirroring(axes=allowed)
    sided = _sided_axes(recipe, patch_size, dummy_2d=dummy_2d, axis=left_right.axis)
    if left_right.policy == "forbid":
        return Mirroring(axes=tuple(axis for axis in allowed if axis not in sided))
    return Mirroring(axes=allowed, swap_axes=tuple(axis for axis in allowed if axis in sided))


def _sided_axes(
    recipe: AugmentationRecipe, patch_size: Sequence[int], *, dummy_2d: bool, axis: int
) -> tuple[int, ...]:
    """Return the axes of the patch whose mirroring exchanges left and right.

    It is the axis between left and right, unless slices lie across it. But half a turn mirrors two
    axes, so that with larger rotations than a right angle every axis of the turned plane counts.
    """
    own = axis - (3 - len(patch_size))
    if own < 0:
        return ()
    settings = spatial_settings(recipe, patch_size, dummy_2d=dummy_2d)
    first = len(patch_size) - len(settings.patch_size)
    turns = settings.rotation_probability > 0 and settings.rotation_max > math.pi / 2
    return tuple(range(first, len(patch_size))) if turns and own >= first else (own,)


def check_recipe(recipe: AugmentationRecipe, num_axes: int) -> None:
    """Check what a recipe's own schema cannot.

    Raises:
        ConfigError: With all problems.
    """
    problems = []
    low, high = recipe.scaling_range
    if not 0 < low <= high:
        problems.append(
            f"augmentation.scaling_range is ({low:g}, {high:g}); "
            "expected two positive factors, the smaller first"
        )
    wrong = [axis for axis in recipe.mirror_axes or () if axis >= num_axes]
    if wrong:
        problems.append(
            f"augmentation.mirror_axes has {wrong}; a {num_axes}D patch has the axes "
            f"{list(range(num_axes))}. Remove them, or set mirror_axes to null for all axes"
        )
    if problems:
        raise ConfigError(".\n".join(problems) + ".")
