"""The description of a bundle: a folder sufficient for inference."""

from __future__ import annotations

from typing import Literal

from medseg.schema.base import FORMAT_VERSION, Schema


class Semantics(Schema):
    """How a prediction is put together."""

    average: Literal["logits", "probabilities"] = "logits"
    """What is averaged over tiles, mirrors and folds."""
    activation: Literal["softmax", "sigmoid"] = "softmax"
    """`sigmoid` for regions."""
    normalise_first: bool = True
    """Whether intensities are normalised before resampling."""
    accumulator: Literal["float32"] = "float32"
    """Type of the tile accumulator."""
    gaussian_peak: float = 1.0
    """Maximum of the tile weight."""
    label_resize: Literal["argmax"] = "argmax"
    """How label maps are resampled."""
    mirror_axes: tuple[int, ...] = ()
    """Axes of the patch that are mirrored in test-time augmentation."""
    swap_axes: tuple[int, ...] = ()
    """Axes of the patch along which the labels of each pair of the plans' `left_right` change
    places when mirrored."""


class BundleManifest(Schema):
    """`bundle.json`."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    kind: Literal["single", "cascade"] = "single"
    """`single`: one configuration, one or more folds; `cascade`: one that also sees what the
    configuration before it finds, whose whole bundle lies in `members/previous/`."""
    configuration: str
    """Name of the configuration in `plans.json`."""
    recipe: str = ""
    """Name of the recipe it was trained with."""
    orientation: Literal["canonical"] = "canonical"
    """Frame the images are brought to before anything else."""
    semantics: Semantics
    """How a prediction is put together."""
    folds: tuple[str, ...]
    """Folds with weights: "fold_0" ... or "all"."""
    checkpoints: tuple[str, ...] = ("final",)
    """Which weights each fold has: "final", "best"."""
    sha256: dict[str, str]
    """File (relative path) -> checksum, of every other file of the bundle; of a member its
    `bundle.json` alone, which holds the checksums of the member's own files."""
    medseg_version: str = ""
    """Version of medseg that wrote the bundle."""
