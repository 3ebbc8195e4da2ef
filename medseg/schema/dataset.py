"""What a dataset is: channels, labels, and which files make up each case."""

from __future__ import annotations

from pydantic import Field

from medseg.schema.base import FORMAT_VERSION, Schema


class CaseFiles(Schema):
    """The files of one case."""

    channels: tuple[str, ...]
    """One image file per channel, in the order of the dataset's channels."""
    segmentation: str | None = None
    """Label map on the grid of the channels; absent for unlabelled cases."""


class DatasetSpec(Schema):
    """A dataset as medseg sees it; `dataset.json` of a workspace and of a bundle."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    name: str
    """Name of the source folder."""
    source: str = ""
    """Folder the cases were read from; empty in a bundle."""
    channels: tuple[str, ...] = Field(min_length=1)
    """Channel names, in order; "CT" selects CT normalisation."""
    labels: dict[str, int | tuple[int, ...]]
    """Label name -> integer value, or -> several values for a region; "background" is 0."""
    regions_class_order: tuple[int, ...] | None = None
    """With regions: the label value written for each region, in the order of `labels`."""
    ignore_label: int | None = None
    """Voxels with this value take part in neither loss nor metrics."""
    file_ending: str = ".nii.gz"
    """Ending of the image files, with the dot."""
    cases: dict[str, CaseFiles] = Field(default_factory=dict)
    """Case id -> files; empty in a bundle."""
