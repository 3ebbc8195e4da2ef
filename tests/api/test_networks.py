"""What a recipe makes of the planned network."""

from __future__ import annotations

import pytest

from medseg.api.networks import apply_network, scaled_patch
from medseg.errors import ConfigError
from medseg.models.build import architecture_problems
from medseg.schema.plans import Architecture, Configuration
from medseg.schema.recipe import NetworkRecipe

CONFIGURATION = Configuration(
    patch_size=(20, 56, 96),
    batch_size=2,
    spacing=(3.0, 1.0, 0.8),
    median_shape=(30.0, 100.0, 120.0),
    normalization=("zscore",),
    use_mask_for_norm=(False,),
    batch_dice=False,
    architecture=Architecture(
        kind="plain_unet",
        features=(32, 64, 128, 256, 320, 320),
        kernel_sizes=((1, 3, 3), *((3, 3, 3),) * 5),
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 2), (1, 1, 2)),
        blocks_encoder=(2,) * 6,
        blocks_decoder=(2,) * 5,
    ),
)


def changed(**changes: object) -> Architecture:
    architecture = apply_network(CONFIGURATION, NetworkRecipe(**changes)).architecture
    assert architecture_problems(architecture) == []
    return architecture


def test_recipe_without_changes_keeps_the_plans() -> None:
    assert apply_network(CONFIGURATION, NetworkRecipe()) == CONFIGURATION


def test_mednext_brings_its_blocks_kernels_and_width_to_the_planned_topology() -> None:
    found = changed(kind="mednext_l", kernel_size=5)
    assert found.features == (32, 64, 128, 256, 512, 512)
    assert found.strides == CONFIGURATION.architecture.strides
    assert found.kernel_sizes == ((1, 5, 5), *((5, 5, 5),) * 5)
    assert found.blocks_encoder == (3, 4, 8, 8, 8, 8)
    assert found.blocks_decoder == (3, 4, 8, 8, 8)
    again = apply_network(
        CONFIGURATION.model_copy(update={"architecture": found}), NetworkRecipe(kernel_size=3)
    ).architecture
    assert again == found.model_copy(update={"kernel_sizes": ((1, 3, 3), *((3, 3, 3),) * 5)})


def test_residual_encoder_brings_the_blocks_of_nnunets_presets() -> None:
    found = changed(kind="residual_unet")
    assert found.blocks_encoder == (1, 3, 4, 6, 6, 6)
    assert found.blocks_decoder == (1, 1, 1, 1, 1)
    assert found.features == CONFIGURATION.architecture.features


def test_features_double_up_to_the_limit() -> None:
    assert changed(base_features=24).features == (24, 48, 96, 192, 320, 320)
    assert changed(max_features=100).features == (32, 64, 100, 100, 100, 100)
    assert changed(kind="mednext_s", base_features=8).features == (8, 16, 32, 64, 128, 128)
    assert changed(kind="mednext_s", max_features=90).features == (32, 64, 90, 90, 90, 90)


def test_network_from_outside_keeps_its_options() -> None:
    found = changed(kind="my.networks:Net", options={"width": 3})
    assert found.kind == "my.networks:Net"
    assert found.options == {"width": 3}
    assert changed(kind="mednext_s", options={"checkpointing": True}).options == {
        "checkpointing": True
    }


def test_every_change_that_does_not_fit_is_named_at_once() -> None:
    changes = NetworkRecipe(kind="plain_unit", kernel_size=5, options={"width": 3})
    with pytest.raises(ConfigError, match="3 problems in the recipe") as caught:
        apply_network(CONFIGURATION, changes)
    message = str(caught.value)
    assert "network.kind: got 'plain_unit'; expected one of: plain_unet" in message
    assert "network.kernel_size: got 5, but only MedNeXt has such kernels" in message
    assert "network.options: got width; 'plain_unit' takes none" in message


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(1.0, (20, 56, 96)), (0.5, (8, 32, 64)), (0.01, (4, 8, 32)), (0.9, (16, 48, 96))],
)
def test_patch_is_scaled_to_multiples_of_the_strides(
    fraction: float, expected: tuple[int, ...]
) -> None:
    assert scaled_patch(CONFIGURATION, fraction) == expected
