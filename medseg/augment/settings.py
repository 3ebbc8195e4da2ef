"""From a recipe to the settings of the augmentation: the one place that knows both."""

from __future__ import annotations

import math
from collections.abc import Sequence

from medseg.augment.intensity import IntensitySettings
from medseg.augment.spatial import SpatialSettings
from medseg.errors import ConfigError
from medseg.schema.recipe import AugmentationRecipe

_ANISOTROPIC = 3.0
_ELONGATED = 1.5


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


def mirror_axes(recipe: AugmentationRecipe, num_axes: int) -> tuple[int, ...]:
    """Return the axes that a recipe allows to mirror."""
    if recipe.backend == "none":
        return ()
    return tuple(range(num_axes)) if recipe.mirror_axes is None else recipe.mirror_axes


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
