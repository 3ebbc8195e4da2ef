"""The description of an exported model: all that is needed to run it without medseg."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from medseg.schema.base import FORMAT_VERSION, Schema
from medseg.schema.plans import Count, Normalization, Positive
from medseg.schema.postprocessing import Postprocessing

Channel = Annotated[int, Field(ge=0)]


class ExportedNetwork(Schema):
    """One network, of one fold."""

    file: str
    """ONNX file beside the description."""
    fold: str
    """Fold it was trained on: "fold_0" ... or "all"."""
    sha256: str
    """Checksum of the file."""
    max_probability_difference: float
    """Largest difference between the probabilities of torch and of onnxruntime, on one tile of
    random numbers."""


class ExportedTensors(Schema):
    """What goes into every network and comes out of it, both float32."""

    input: str = "images"
    """Name of the input (B, C, *tile): any number of tiles."""
    output: str = "logits"
    """Name of the output (B, L, *tile)."""
    num_logits: Count
    """Channels of the output (L)."""
    opset: Count
    """Version of the ONNX operators."""


class ExportedOrientation(Schema):
    """How the axes of an image are ordered and directed before anything else."""

    rule: Literal["closest_to_ras"] = "closest_to_ras"
    """Of the 48 orders and directions of the axes, that with the largest sum of direction cosines
    towards right, anterior and superior; ties are decided by the cosines one by one, by rows."""
    tie_tolerance: float
    """Scores closer than this are equal."""
    network_axes: tuple[int, int, int]
    """Network axis d is canonical axis `network_axes[d]`."""


class ExportedNormalization(Schema):
    """What happens to the intensities of one channel, in float32."""

    scheme: Normalization
    """`zscore`: minus the mean, divided by the standard deviation, both of this image;
    `rescale_0_1`: minus the minimum, divided by the range; every other: the numbers below."""
    use_mask: bool
    """`zscore`: whether its numbers come from, and it applies to, the imaged region alone: voxels
    that are not zero in some channel, enclosed holes filled."""
    clip: tuple[float, float] | None
    """Range the intensities are clipped to; None: not clipped."""
    subtract: float | None
    """Subtracted after that; None: the scheme takes it from the image."""
    divide: float | None
    """Divisor after that; None: the scheme takes it from the image."""
    least_divisor: float
    """Smallest divisor that is taken from an image."""


class ExportedResampling(Schema):
    """How images are brought to the network's voxel size, and logits back."""

    grid: Literal["half_pixel_edges_repeated"] = "half_pixel_edges_repeated"
    """The outer faces of the two grids coincide; beyond them the edge voxels repeat."""
    image_order: Literal[3] = 3
    """Spline order of images; the result is clipped to the range it had."""
    logits_order: Literal[1] = 1
    """Spline order of logits."""
    separate_above: float
    """Where the largest voxel size is more than this times the smallest one (on the grid at hand,
    else on the grid asked for), the axis that has it alone is resampled on its own: every slice
    across it first, clipped to the range of the slice, then the nearest slices are taken."""


class ExportedTiles(Schema):
    """How an image is covered by what the network takes at once."""

    size: tuple[Count, ...] = Field(min_length=2, max_length=3)
    """Voxels of a tile; with two entries tiles lie in the slices across network axis 0."""
    step: float
    """Largest shift between tiles, as a fraction of the tile; they are evenly spaced, starts are
    rounded half to even."""
    padding: Literal["zeros_split_evenly"] = "zeros_split_evenly"
    """What a smaller image is padded with; an odd voxel goes after. It is cut off again."""
    weight_sigma: float = 1 / 8
    """Standard deviation of the Gaussian weight of a tile's voxels, as a fraction of the tile; its
    centre is voxel `size // 2`, zeros count as the smallest weight that is not zero."""
    weight_truncate: float = 4.0
    """The Gaussian ends at this many standard deviations along each axis."""


class ExportedMirrors(Schema):
    """Test-time augmentation."""

    axes: tuple[int, ...]
    """Axes of the tile that are mirrored, in all combinations; the results are averaged."""
    swap_axes: tuple[int, ...]
    """Where an odd number of these is mirrored, left and right have changed places."""
    swap_channels: tuple[tuple[Channel, Channel], ...]
    """Logit channels that change places with left and right."""


class ExportedLabels(Schema):
    """What the logits mean."""

    activation: Literal["softmax", "sigmoid"]
    """From logits to probabilities; `sigmoid` for regions, which may overlap."""
    rule: Literal["argmax", "regions"]
    """`argmax`: the channel of the largest logit (the first among equals) gives the value;
    `regions`: every channel whose logit is positive paints its value, in order."""
    names: tuple[str, ...]
    """Name of each logit channel."""
    values: tuple[int, ...]
    """Value that each logit channel stands for in the written file."""
    background: int
    """Value of all other voxels, also outside the crop."""
    dtype: str
    """Type of the written values, as numpy names it."""


class ExportedModel(Schema):
    """`model.json` of an exported model; the steps follow each other as its fields do."""

    kind: Literal["medseg onnx"] = "medseg onnx"
    """What the folder is."""
    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    dataset: str
    """Name of the dataset it was trained on."""
    configuration: str
    """Name of its configuration."""
    channels: tuple[str, ...] = Field(min_length=1)
    """Images that make up a case, in order, on one grid."""
    orientation: ExportedOrientation
    """First step."""
    crop: Literal["nonzero_box"] = "nonzero_box"
    """The smallest box that holds every voxel that is not zero in some channel; the whole image
    where there is none."""
    normalization: tuple[ExportedNormalization, ...]
    """Of each channel, within the box."""
    spacing: tuple[Positive, ...]
    """Voxel size the network takes, in mm, network order; with two entries the slices along network
    axis 0 keep their distance."""
    resampling: ExportedResampling
    """To that voxel size: round(spacing of the image / spacing asked for * voxels), half to even,
    at least one."""
    tiles: ExportedTiles
    """Which parts of the image the network sees."""
    mirrors: ExportedMirrors
    """How often it sees them."""
    average: Literal["logits"] = "logits"
    """What is averaged: plainly over mirrors and networks, by weight over tiles."""
    tensors: ExportedTensors
    """Input and output of the networks."""
    networks: tuple[ExportedNetwork, ...]
    """The networks."""
    labels: ExportedLabels
    """From the averaged logits, brought back to the voxels of the box, to the label map."""
    postprocessing: Postprocessing | None = None
    """What medseg does to the label map after that; the reference runtime says that it does not."""
    medseg_version: str
    """Version of medseg that wrote it."""
    exported_with: dict[str, str]
    """Package -> version."""
