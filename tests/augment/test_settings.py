from __future__ import annotations

import math

import pytest

from medseg.augment.settings import (
    check_recipe,
    intensity_settings,
    is_anisotropic,
    mirror_axes,
    previous_settings,
    spatial_settings,
)
from medseg.errors import ConfigError
from medseg.schema.recipe import AugmentationRecipe


@pytest.mark.parametrize(
    ("patch_size", "dummy_2d", "expected_deg"),
    [
        ((128, 128, 128), False, 30),
        ((16, 320, 256), True, 180),
        ((512, 512), False, 180),
        ((512, 320), False, 15),
        ((320, 214), False, 180),
    ],
)
def test_default_angles_are_nnunets(patch_size, dummy_2d, expected_deg):
    settings = spatial_settings(AugmentationRecipe(), patch_size, dummy_2d=dummy_2d)
    assert math.degrees(settings.rotation_max) == pytest.approx(expected_deg)
    assert settings.patch_size == (patch_size[1:] if dummy_2d else patch_size)


def test_a_recipes_own_angle_wins():
    recipe = AugmentationRecipe(rotation_max_deg=-12)
    settings = spatial_settings(recipe, (20, 30), dummy_2d=False)
    assert math.degrees(settings.rotation_max) == pytest.approx(12)


def test_every_probability_of_the_recipe_arrives():
    values = {
        name: round(0.05 * i, 2)
        for i, name in enumerate(AugmentationRecipe.model_fields, start=1)
        if name.endswith("_probability")
    }
    recipe = AugmentationRecipe(**values)
    spatial = spatial_settings(recipe, (8, 9, 10), dummy_2d=False)
    intensity, previous = intensity_settings(recipe), previous_settings(recipe, 2)
    for name, value in values.items():
        short = name.removesuffix("_probability")
        found = (
            getattr(spatial, name, None),
            getattr(intensity, short, None),
            getattr(previous, short.removeprefix("previous_"), None),
        )
        assert value in found, name


def test_backend_none_does_nothing():
    recipe = AugmentationRecipe(backend="none")
    assert spatial_settings(recipe, (8, 9, 10), dummy_2d=False).rotation_probability == 0
    assert intensity_settings(recipe).gamma == 0
    assert previous_settings(recipe, 3).operator == previous_settings(recipe, 3).removal == 0
    assert mirror_axes(recipe, 3) == ()


def test_mirror_axes_are_all_unless_named():
    assert mirror_axes(AugmentationRecipe(), 3) == (0, 1, 2)
    assert mirror_axes(AugmentationRecipe(mirror_axes=(1,)), 3) == (1,)


def test_problems_are_reported_all_at_once():
    recipe = AugmentationRecipe(scaling_range=(1.4, 0.7), mirror_axes=(0, 2))
    with pytest.raises(
        ConfigError, match=r"(?s)scaling_range is \(1.4, 0.7\).*mirror_axes has \[2"
    ):
        check_recipe(recipe, 2)
    check_recipe(AugmentationRecipe(), 2)


def test_patches_much_longer_than_thick_are_deformed_in_the_plane():
    assert is_anisotropic((20, 61, 40))
    assert not is_anisotropic((20, 60, 40))
    assert not is_anisotropic((61, 20, 20))
    assert not is_anisotropic((10, 60))
