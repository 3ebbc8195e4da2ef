"""The catalogue of public models, and what is kept of a download."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from medseg.schema.base import FORMAT_VERSION, Schema

ModelFormat = Literal["nnunet v1", "nnunet v2", "totalsegmentator"]
"""How the files of an archive are laid out; `totalsegmentator`: as nnunet v2, for images of a
voxel size that its name tells."""
Text = Annotated[str, Field(min_length=1)]
Checksum = Annotated[str, Field(pattern=r"^(md5:[0-9a-f]{32}|sha256:[0-9a-f]{64})?$")]
"""Algorithm and value, "md5:..." or "sha256:..."; empty where it is not known."""
Address = Annotated[str, Field(pattern=r"^https?://[^\s/]+/\S+$")]

MAY_BE_UNVERIFIED = ("modality", "labels", "configurations", "size_bytes", "licence", "checksum")
"""Fields of an entry that may be empty."""


class CatalogueEntry(Schema):
    """One public model: one archive at one address."""

    name: Text
    """What it is called here."""
    task: Text
    """What it segments, in words."""
    modality: tuple[Text, ...] = ()
    """The images it needs, in the order of its channels."""
    labels: tuple[Text, ...] = ()
    """The structures it finds, without the background."""
    format: ModelFormat
    """How the files of the archive are laid out."""
    configurations: tuple[Text, ...] = ()
    """Configurations in the archive."""
    size_bytes: PositiveInt | None = None
    """Size of the archive."""
    licence: str = ""
    """Terms its owners give for the weights."""
    address: Address
    """Where the archive is."""
    checksum: Checksum = ""
    """Of the archive, as its owners give it."""
    source: tuple[Text, ...] = Field(min_length=1)
    """Where these facts were read."""
    unverified: tuple[str, ...] = ()
    """Fields that could not be verified; they are empty."""

    @property
    def file_name(self) -> str:
        """Return the name of the archive: the last of its address.

        Examples:
            >>> CatalogueEntry(name="a", task="liver", format="nnunet v1", source=("x",),
            ...     address="https://zenodo.org/record/1/files/Task003_Liver.zip?download=1",
            ...     unverified=MAY_BE_UNVERIFIED).file_name
            'Task003_Liver.zip'
        """
        return self.address.partition("?")[0].rstrip("/").rpartition("/")[2]

    @model_validator(mode="after")
    def _says_what_is_not_verified(self) -> CatalogueEntry:
        """Raise ValueError unless exactly the empty fields are called unverified."""
        empty = [name for name in MAY_BE_UNVERIFIED if not getattr(self, name)]
        if sorted(empty) != sorted(self.unverified):
            raise ValueError(
                f"unverified is {list(self.unverified)}, empty are {empty}; expected the same"
            )
        return self


class Catalogue(Schema):
    """The public models that come by name."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    models: tuple[CatalogueEntry, ...]
    """One entry per archive."""

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Catalogue:
        """Raise ValueError if two entries share a name, or two archives would share a file."""
        for values in ([one.name for one in self.models], [one.file_name for one in self.models]):
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"{', '.join(twice)} stands there more than once")
        return self


class DownloadState(Schema):
    """`FILE.part.json`: what a download that was interrupted is a part of."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    address: str
    """Where it comes from."""
    validator: str = ""
    """What tells whether the file there is still the same: its strong ETag, or when it was last
    changed; empty where the server says neither."""
    size_bytes: int | None = None
    """Size of the whole file; None where the server did not say."""


class DownloadRecord(Schema):
    """`FILE.json`: what a finished download is."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    address: str
    """Where it came from."""
    size_bytes: PositiveInt
    """Its size."""
    sha256: str
    """Its checksum, as it was found."""
    compared_with: str = ""
    """The published checksum it was compared with; empty where none is known."""
