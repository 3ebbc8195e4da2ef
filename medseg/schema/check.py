"""What was found in the files of a dataset: facts of every case, and problems in words."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from medseg.schema.base import FORMAT_VERSION, Schema
from medseg.schema.fingerprint import CaseFingerprint


class Problem(Schema):
    """One thing that is wrong, or that a person should look at."""

    code: str
    """Short name of the kind of problem, such as `missing-file` or `nan`."""
    level: Literal["error", "warning"]
    """`error`: the case cannot be used as it is; `warning`: it can, but look at it."""
    message: str
    """What, where, found, expected, what to do."""
    case: str | None = None
    """Case id; None for a problem of the dataset as a whole."""
    file: str | None = None
    """File, relative to the dataset's folder."""
    fix: str | None = None
    """What `dataset check --fix` would do about it; None where no correction is safe."""


class FileFacts(Schema):
    """One file, as it lay on the disk."""

    path: str
    """Relative to the dataset's folder, or absolute."""
    stamps: tuple[tuple[int, int, int], ...]
    """Bytes, time of last change and time of the entry's last change (ns): of the file, then of
    those that belong to it (voxels of a `.mhd`, spacing of a TIFF). The last of them tells a file
    that was exchanged for one of the same size and an older time."""
    sha256: str
    """Hash of the bytes of all of them."""
    dtype: str = ""
    """Type of the stored values, with byte order; empty if it could not be read."""
    picture: str = ""
    """Hash of the decoded values: equal for the same image in another file."""
    slope: float = 1.0
    """Factor the file asks for between stored values and intensities."""
    inter: float = 0.0
    """Summand the file asks for."""


class ChannelFacts(Schema):
    """Intensities of one channel of one case."""

    min: float
    """Smallest value."""
    max: float
    """Largest value."""
    mean: float
    """Arithmetic mean."""
    std: float
    """Population standard deviation."""
    median: float
    """Median of at most some ten thousand voxels on a regular lattice."""


class CaseFacts(Schema):
    """What one case is, and what is wrong with it."""

    files: tuple[FileFacts, ...] = ()
    """Channels, then the segmentation; files that are missing are left out."""
    shape: tuple[int, int, int] | None = None
    """Shape as stored (I, J, K), in voxels."""
    spacing: tuple[float, float, float] | None = None
    """Voxel size as stored (I, J, K), in mm."""
    orientation: str = ""
    """Closest anatomical directions of the stored axes, such as "RAS"."""
    channels: tuple[ChannelFacts, ...] = ()
    """Intensities of each channel."""
    labels: dict[int, int] = Field(default_factory=dict)
    """Value in the file -> number of voxels."""
    fingerprint: CaseFingerprint | None = None
    """Shape, cropped shape and spacing on canonical axes; None where the case is unusable."""
    relative_size: float = 1.0
    """Voxels of the non-zero box per voxel of the image."""
    annotated_labels: tuple[str, ...] | None = None
    """Labels drawn in this case when it was looked at; None: all."""
    problems: tuple[Problem, ...] = ()
    """What is wrong with this case alone."""

    @property
    def content(self) -> tuple[str, ...]:
        """Return the hashes of the files, which stand for the case's content."""
        return tuple(file.sha256 for file in self.files)

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Return the problems that keep the case from being used."""
        return tuple(problem for problem in self.problems if problem.level == "error")


class CheckReport(Schema):
    """`check.json`: every case that was looked at, and all problems."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    dataset: str
    """Name of the dataset."""
    made_with: str
    """Digest of the dataset's channels and labels and of the checks' version."""
    cases: dict[str, CaseFacts]
    """Case id -> facts."""
    problems: tuple[Problem, ...] = ()
    """Problems that show only between cases, such as duplicates."""
    skipped: tuple[str, ...] = ()
    """Cases left out on request (`--skip-bad`)."""
