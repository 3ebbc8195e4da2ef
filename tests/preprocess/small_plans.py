"""Plans of a network that is never built: what preprocessing asks of them."""

from __future__ import annotations

from medseg.schema.plans import Architecture, Configuration, Plans


def make_configuration(spacing, *, normalization=("zscore", "ct"), use_mask=(True, False)):
    dimensions = len(spacing)
    architecture = Architecture(
        kind="plain_unet",
        features=(4,),
        kernel_sizes=((3,) * dimensions,),
        strides=((1,) * dimensions,),
        blocks_encoder=(1,),
        blocks_decoder=(),
    )
    return Configuration(
        patch_size=(8,) * dimensions,
        batch_size=2,
        spacing=spacing,
        median_shape=(16.0,) * dimensions,
        normalization=normalization,
        use_mask_for_norm=use_mask,
        batch_dice=False,
        architecture=architecture,
    )


def make_plans(configuration, network_axes, statistics):
    """Return plans with the same statistics for every channel."""
    return Plans(
        name="tiny",
        dataset="Dataset999_Tiny",
        network_axes=network_axes,
        original_median_spacing=(2.0, 1.0, 1.0),
        original_median_shape=(16.0, 16.0, 16.0),
        intensity=(statistics,) * len(configuration.normalization),
        configurations={"one": configuration},
    )
