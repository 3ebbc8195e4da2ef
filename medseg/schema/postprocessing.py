"""What is done to a segmentation after the network: `postprocessing.json` of a bundle."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, StrictInt, StrictStr

from medseg.schema.base import FORMAT_VERSION, Schema


def _distinct(entries: tuple[str | int, ...]) -> tuple[str | int, ...]:
    twice = sorted({str(entry) for entry in entries if entries.count(entry) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} stands there more than once; name each once")
    return entries


Structures = Annotated[
    tuple[StrictStr | StrictInt, ...], Field(min_length=1), AfterValidator(_distinct)
]
"""Names of labels or regions, or values of the files where a value has no name of its own."""

Connectivity = Literal[1, 2, 3]
"""Which voxels are neighbours: 1 those that share a face, 2 also an edge, 3 also a corner."""


class KeepLargest(Schema):
    """Of a structure's pieces only the largest stays; of several equally large ones, all do.

    Source:
        Behaviour of the stored postprocessing of nnU-Net v1 (connectivity 1) and v2 (3).
    """

    kind: Literal["keep_largest"] = "keep_largest"
    """Names the step."""
    structures: Structures
    """What the pieces are of."""
    together: bool = True
    """Whether the structures are one mask (pieces of their union), or each is treated alone."""
    connectivity: Connectivity = 3
    """Which voxels are neighbours."""
    below_mm3: PositiveFloat | None = None
    """Only pieces smaller than this are removed; None: every piece but the largest."""


class RemoveSmall(Schema):
    """Pieces smaller than a volume become background, the largest too."""

    kind: Literal["remove_small"] = "remove_small"
    """Names the step."""
    structures: Structures
    """What the pieces are of."""
    together: bool = True
    """Whether the structures are one mask (pieces of their union), or each is treated alone."""
    connectivity: Connectivity = 3
    """Which voxels are neighbours."""
    min_ml: PositiveFloat
    """Smallest volume that stays."""


class FillHoles(Schema):
    """Background that a structure encloses becomes part of it; other structures stay.

    What is enclosed cannot reach the border of the image from face to face outside the structure.
    A structure of several values gives the hole the first of them.
    """

    kind: Literal["fill_holes"] = "fill_holes"
    """Names the step."""
    structures: Structures
    """What has the holes; each is treated alone, in this order."""
    max_ml: PositiveFloat | None = None
    """Largest hole that is filled; None: any."""


Step = Annotated[KeepLargest | RemoveSmall | FillHoles, Field(discriminator="kind")]
"""One step; its `kind` says which."""


class Postprocessing(Schema):
    """`postprocessing.json` of a bundle."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    reason: str = ""
    """Where the steps come from, in words."""
    steps: tuple[Step, ...] = ()
    """What is done, in this order; what a step removes becomes background."""
