"""Put into plain numbers what medseg does around a network, for programs that run it alone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

import numpy as np

from medseg.geometry import TIE_TOLERANCE
from medseg.labels import LabelScheme
from medseg.schema.bundle import Semantics
from medseg.schema.dataset import DatasetSpec
from medseg.schema.exported import (
    ExportedLabels,
    ExportedMirrors,
    ExportedModel,
    ExportedNetwork,
    ExportedNormalization,
    ExportedOrientation,
    ExportedResampling,
    ExportedTensors,
    ExportedTiles,
)
from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import Configuration, Normalization, Plans
from medseg.schema.postprocessing import Postprocessing

_STEP = 0.5
_SEPARATE_ABOVE = 3.0
_LEAST_DIVISOR = 1e-8
_SMALLEST = float(np.finfo(np.float32).tiny)


def describe(  # noqa: PLR0913 - the parts of a bundle, and what was made of them
    spec: DatasetSpec,
    plans: Plans,
    configuration: str,
    semantics: Semantics,
    *,
    postprocessing: Postprocessing | None,
    opset: int,
    networks: Sequence[ExportedNetwork],
    packages: Sequence[str],
) -> ExportedModel:
    """Return the whole description of a model whose networks were exported.

    Args:
        spec: Channels and labels.
        plans: Hold the configuration.
        configuration: Its name.
        semantics: How the bundle's predictions are put together.
        opset: Version of the ONNX operators.
        postprocessing: What is done to a label map at the end.
        networks: What was exported.
        packages: Packages whose versions are noted.
    """
    chosen, labels = plans.configuration(configuration), LabelScheme.from_spec(spec)
    return ExportedModel(
        dataset=spec.name,
        configuration=configuration,
        channels=spec.channels,
        orientation=ExportedOrientation(
            tie_tolerance=TIE_TOLERANCE, network_axes=plans.network_axes
        ),
        normalization=_normalizations(chosen, plans.intensity),
        spacing=chosen.spacing,
        resampling=ExportedResampling(separate_above=_SEPARATE_ABOVE),
        tiles=ExportedTiles(size=chosen.patch_size, step=_STEP),
        mirrors=mirrors_of(plans, semantics, labels),
        tensors=ExportedTensors(num_logits=labels.num_logits, opset=opset),
        networks=tuple(networks),
        labels=labels_of(labels),
        postprocessing=postprocessing,
        medseg_version=metadata.version("medseg"),
        exported_with={name: metadata.version(name) for name in packages},
    )


def _normalizations(
    configuration: Configuration, intensity: Sequence[IntensityStatistics]
) -> tuple[ExportedNormalization, ...]:
    channels = zip(
        configuration.normalization, configuration.use_mask_for_norm, intensity, strict=True
    )
    return tuple(normalization_of(*channel) for channel in channels)


def normalization_of(
    scheme: Normalization, use_mask: bool, statistics: IntensityStatistics
) -> ExportedNormalization:
    """Return a scheme with the numbers it takes from the dataset; see `preprocess.normalize`."""
    low, high = statistics.percentile_00_5, statistics.percentile_99_5
    clip: tuple[float, float] | None = None
    subtract: float | None = 0.0
    divide: float | None = 1.0
    if scheme == "ct":
        clip, subtract, divide = (low, high), statistics.mean, max(statistics.std, _LEAST_DIVISOR)
    elif scheme == "quantitative":
        clip = (low - (high - low), high + (high - low))
        subtract, divide = statistics.mean, max(statistics.std, _SMALLEST)
    elif scheme == "rgb_0_1":
        divide = 255.0
    elif scheme != "none":
        subtract = divide = None
    return ExportedNormalization(
        scheme=scheme,
        use_mask=use_mask and scheme == "zscore",
        clip=clip,
        subtract=subtract,
        divide=divide,
        least_divisor=_LEAST_DIVISOR,
    )


def mirrors_of(plans: Plans, semantics: Semantics, labels: LabelScheme) -> ExportedMirrors:
    """Return the mirrored axes, and the channels that change places with left and right."""
    sides = plans.left_right
    pairs = () if sides is None or not semantics.swap_axes else labels.channel_pairs(sides.pairs)
    return ExportedMirrors(
        axes=semantics.mirror_axes, swap_axes=semantics.swap_axes, swap_channels=pairs
    )


def labels_of(labels: LabelScheme) -> ExportedLabels:
    """Return what each logit channel stands for."""
    names = {channel: name for name, channel in labels.channels.items()}
    painted = tuple(labels.values[index] for index in labels.regions_order_indices)
    return ExportedLabels(
        activation="sigmoid" if labels.has_regions else "softmax",
        rule="regions" if labels.has_regions else "argmax",
        names=tuple(names.get(channel, "background") for channel in range(labels.num_logits)),
        values=painted if labels.has_regions else labels.values[: labels.num_logits],
        background=labels.background,
        dtype=labels.value_dtype.name,
    )
