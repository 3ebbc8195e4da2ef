"""What the server answers, as JSON."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from medseg.schema.base import Schema


class Problem(Schema):
    """Why a request was refused."""

    detail: str
    """What is wrong, what was expected, what to do."""


class Links(Schema):
    """Where things of a job are, relative to the server's address."""

    job: str
    """State of the job; DELETE cancels or forgets it."""
    segmentation: str
    """The label map, a `.nii.gz` file, once the job is done."""
    result: str
    """What was found, as JSON, once the job is done."""


class JobView(Schema):
    """A job and what became of it."""

    id: str
    """Whoever knows it can read and delete the job."""
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    """Where the job stands."""
    place: int | None = None
    """Place in the queue while it waits; 1 is the next."""
    created: datetime
    """When the upload was complete."""
    started: datetime | None = None
    """When the model began."""
    finished: datetime | None = None
    """When it ended, in whatever way."""
    expires: datetime | None = None
    """When a job that has ended is forgotten and its result deleted."""
    message: str = ""
    """Why it failed."""
    volumes_ml: dict[str, float] | None = None
    """Structure -> volume in ml, once done."""
    flags: tuple[str, ...] | None = None
    """What a person should look at, once done; empty if nothing."""
    links: Links
    """Where the rest is."""


class ResultView(Schema):
    """What was found in one case."""

    id: str
    """The job."""
    model: str
    """Name of the dataset the model was trained on."""
    labels: dict[str, int | tuple[int, ...]]
    """Label name -> value in the segmentation, or values of a region."""
    volumes_ml: dict[str, float]
    """Structure -> volume in ml."""
    flags: tuple[str, ...]
    """What a person should look at; empty if nothing."""
    shape: tuple[int, ...]
    """Voxels along I, J, K: those of the image."""
    affine: tuple[tuple[float, ...], ...]
    """(4, 4) voxel index to RAS+ mm: that of the image."""
    seconds: float
    """How long it took, waiting not counted."""


class LimitsView(Schema):
    """What the server takes on at most."""

    max_upload_bytes: int
    """Bytes of one request."""
    max_unpacked_bytes: int
    """Bytes of the files in a zip archive, and of one image's voxels as 32-bit floats."""
    max_entries: int
    """Files in one zip archive."""
    max_waiting: int
    """Jobs that wait."""
    keep_seconds: float
    """How long a job that ended can be asked for."""
    endings: tuple[str, ...]
    """File endings that are accepted."""


class ModelView(Schema):
    """The model that is served."""

    name: str
    """Name of the dataset it was trained on."""
    configuration: str
    """Configuration of its plans."""
    folds: tuple[str, ...]
    """Folds that are averaged."""
    channels: tuple[str, ...]
    """Images a case consists of, in order; also the names of the form's fields."""
    labels: dict[str, int | tuple[int, ...]]
    """Label name -> value in the segmentation, or values of a region."""
    tta: Literal["auto", "none", "flips"]
    """Test-time augmentation."""
    limits: LimitsView
    """What is accepted."""


class Health(Schema):
    """Whether jobs are being worked off."""

    status: Literal["ok"] = "ok"
    """Any other state answers with status 503."""
    version: str = Field(description="Version of medseg.")
