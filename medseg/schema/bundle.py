"""The description of a bundle: a folder sufficient for inference."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from medseg.schema.base import FORMAT_VERSION, Schema

Orientation = Literal["canonical", "stored_sitk"]
"""Frame an image is brought to before anything else: its axes permuted and reversed so that they
point to right, anterior, superior; or as they are stored in the file (SimpleITK's x, y, z)."""


Axis = Annotated[int, Field(ge=0, le=2)]
"""An axis of the patch."""


class Resampling(Schema):
    """How arrays are brought to another grid."""

    method: Literal["spline", "interpolate", "none"] = "spline"
    """`spline`: as scipy does; `interpolate`: linear, as torch does in float32; `none`: not."""
    order: Literal[0, 1, 3] = 1
    """Spline order; `interpolate` is linear whatever it says."""
    separate: Literal["auto", "always", "never"] = "auto"
    """Whether the coarsest axis is treated alone, its nearest slices taken: `auto` where the grid
    is anisotropic; `always`; `never`."""


class Semantics(Schema):
    """How a prediction is put together; what is as in medseg's own models is not written."""

    average: Literal["logits", "probabilities"] = "logits"
    """What is averaged over tiles, mirrors and folds, and resampled."""
    activation: Literal["softmax", "sigmoid"] = "softmax"
    """`sigmoid` for regions."""
    normalise_first: bool = True
    """Whether intensities are normalised before resampling."""
    accumulator: Literal["float32", "float16"] = "float32"
    """Type of the sums over tiles and folds and of their resampled mean, in exact mode; otherwise
    float32."""
    gaussian_peak: float = Field(default=1.0, gt=0, le=1e4)
    """Maximum of the tile weight, in exact mode; it has no influence but by rounding."""
    label_resize: Literal["argmax", "threshold"] = "argmax"
    """How label maps are resampled: the label of the largest share; or the last of those with at
    least half."""
    mirror_axes: tuple[Axis, ...] = ()
    """Axes of the patch that are mirrored in test-time augmentation."""
    swap_axes: tuple[Axis, ...] = ()
    """Axes of the patch along which the labels of each pair of the plans' `left_right` change
    places when mirrored."""
    least_std: Literal["floor", "added"] = "floor"
    """What keeps a z-score from dividing by 0: the standard deviation is at least 1e-8; or 1e-8 is
    added to a case's own, and nothing to a dataset's."""
    keeps_slices: bool = False
    """Whether a 3D configuration leaves the spacing across its slices (network axis 0) as it is."""
    resample_image: Resampling = Field(default_factory=lambda: Resampling(order=3))
    """For the image."""
    resample_labels: Resampling = Field(default_factory=Resampling)
    """For label maps: the mask of the imaged region, and what the stage before found."""
    resample_result: Resampling = Field(default_factory=Resampling)
    """For what is averaged, on the way back to the image's grid; linear but in exact mode."""
    separate_by: Literal["network", "image"] = "network"
    """Which grid tells first, on the way back, whether an axis is treated alone. `image`: where
    only the network's grid tells, the number of its axis is taken for one of the stored image, in
    the order K, J, I."""
    previous: Literal["logits", "labels", "labels_uncropped"] = "logits"
    """How a cascade hands over what the stage before found: its logits are brought to this stage's
    grid; its label map on the image's grid is cropped and resized; or resized as it is."""

    low_precision: Literal["trusted", "checked"] = "trusted"
    """Whether networks compute with 16 bits where that is faster on a CPU: `trusted`, as they were
    trained so; `checked`: only where a tile of the first image shows that labels do not change."""

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what came after the first version of the format and says nothing new."""
        values: dict[str, Any] = handler(self)
        usual = Semantics.model_construct()
        return {
            name: value
            for name, value in values.items()
            if name not in _LATER or getattr(self, name) != getattr(usual, name)
        }


_LATER = (
    "least_std", "keeps_slices", "resample_image", "resample_labels", "resample_result",
    "separate_by", "previous", "low_precision",
)  # fmt: skip


MEDSEG = Semantics()
"""How the predictions of medseg's own models are put together."""


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
    orientation: Orientation = "canonical"
    """Frame images are brought to before anything else."""
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


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MemberName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""Name of a member, whose whole bundle lies in `members/NAME/`."""


class EnsembleManifest(Schema):
    """`bundle.json` of several bundles whose probabilities are averaged."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    kind: Literal["ensemble"] = "ensemble"
    """Names the kind."""
    weights: dict[MemberName, Positive] = Field(min_length=1)
    """Member -> its share in the mean, of any sum; the first leads."""
    sha256: dict[str, str]
    """As in `BundleManifest`."""
    medseg_version: str = ""
    """Version of medseg that wrote the bundle."""

    @property
    def members(self) -> tuple[str, ...]:
        """Return the names of the bundles it is made of."""
        return tuple(self.weights)


def _three(value: Any) -> Any:
    return (value,) * 3 if isinstance(value, (int, float)) else value


class ChainPart(Schema):
    """One of the models of a chain."""

    member: MemberName
    """Which."""
    values: dict[int, int] = Field(min_length=1)
    """Value in the member's label map -> value in that of the chain; others are dropped."""


class Chain(Schema):
    """Several models, one after the other, on one resampled image; their label maps are merged.

    The image's axes are permuted and reversed so that they point to right, anterior, superior. It
    is resampled between the centres of its first and its last voxels, to round(length times spacing
    by target) voxels, halves to even. On the way back each voxel of the image takes the label
    nearest to it, in the same sense.
    """

    spacing: Annotated[tuple[Positive, Positive, Positive], BeforeValidator(_three)] | None = None
    """Voxel size in mm the image is brought to, along its axes to right, anterior, superior; one
    number for all three; None: it stays as it is, like an image that has this size already."""
    order: Literal[1, 3] = 3
    """Order of the spline the image is resampled with."""
    truncate: bool = False
    """Whether resampled intensities lose what is behind the point."""
    step: float = Field(default=0.5, gt=0, le=1)
    """Largest shift between tiles where nobody asks for another, as a fraction of the tile."""
    mirror: bool = True
    """Whether parts may mirror where nobody asks for it."""
    parts: tuple[ChainPart, ...] = Field(min_length=1)
    """In the order they speak: where a later one finds something, it has the last word."""


class ChainManifest(Schema):
    """`bundle.json` of a chain; a stored postprocessing works on the resampled image's grid."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    kind: Literal["chain"] = "chain"
    """Names the kind."""
    chain: Chain
    """What is done."""
    sha256: dict[str, str]
    """As in `BundleManifest`."""
    medseg_version: str = ""
    """Version of medseg that wrote the bundle."""

    @property
    def members(self) -> tuple[str, ...]:
        """Return the names of the bundles it is made of."""
        return tuple(dict.fromkeys(part.member for part in self.chain.parts))
