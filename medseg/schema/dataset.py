"""What a dataset is: channels, labels, and which files make up each case."""

from __future__ import annotations

from pydantic import Field

from medseg.schema.base import FORMAT_VERSION, Schema


class CaseFiles(Schema):
    """The files of one case."""

    channels: tuple[str, ...]
    """Image files in the order of the dataset's channels: one per channel, or files that hold
    several (RGB, or a fourth axis)."""
    segmentation: str | None = None
    """Label map on the grid of the channels; absent for unlabelled cases."""
    group: str | None = None
    """What must not be torn apart by a split, usually the patient; None: the case alone."""
    fold: int | None = None
    """Fold that validates on this case, where the dataset says so."""
    stratum: str | None = None
    """What every fold should hold its share of, such as the site; None: not asked for."""
    annotated_labels: tuple[str, ...] | None = None
    """Names of the labels drawn in this case; None: all. Where others lie is not known."""

    @property
    def files(self) -> tuple[str, ...]:
        """Return every file of the case: channels, then the segmentation if there is one."""
        return (*self.channels, *([self.segmentation] if self.segmentation else []))


class DatasetSpec(Schema):
    """A dataset as medseg sees it; `dataset.json` of a workspace and of a bundle."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    name: str
    """Name of the source folder."""
    source: str = ""
    """Folder the files of the cases are relative to; empty in a bundle."""
    description: str = ""
    """File that described the dataset (dataset.json or a manifest); empty in a bundle."""
    channels: tuple[str, ...] = Field(min_length=1)
    """Channel names, in order; "CT" selects CT normalisation."""
    labels: dict[str, int | tuple[int, ...]]
    """Label name -> value in the files, or -> several values for a region; any integers.
    `LabelScheme` turns them into consecutive indices, "background" first, and back."""
    regions_class_order: tuple[int, ...] | None = None
    """With regions: the label value written for each region, in the order of `labels`."""
    ignore_label: int | None = None
    """Voxels with this value take part in neither loss nor metrics."""
    cases: dict[str, CaseFiles] = Field(default_factory=dict)
    """Case id -> files; empty in a bundle."""
