"""Tell images from segmentations: by their folders, by their names, or by patterns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from medseg.data.layouts.patterns import compile_pattern
from medseg.data.layouts.words import FileWords, take_apart
from medseg.errors import ConfigError

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """An image or a segmentation, with what says to which case it belongs."""

    words: FileWords
    key: Key
    """Its case; for an image, its channel behind or before it."""
    case: str = ""
    """Case id, where a pattern names it."""
    group: str | None = None
    """Patient, where a pattern names it."""

    @property
    def name(self) -> str:
        """Return the path relative to the dataset's folder."""
        return self.words.name

    @property
    def kind(self) -> str:
        """Return the words that tell it from other segmentations of the same case."""
        return self.words.kind


@dataclass(slots=True)
class Sorted:
    """Files by what they are."""

    images: list[File] = field(default_factory=list)
    labels: list[File] = field(default_factory=list)
    left_over: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, reason: str, names: Iterable[str]) -> None:
        """Put files aside."""
        self.left_over.setdefault(reason, []).extend(names)


def by_folders(files: Sequence[FileWords]) -> Sorted:
    """Tell images from segmentations by the folders they lie in."""
    has_image_folders = any(words.folder_role == "image" for words in files)

    def role(words: FileWords) -> str:
        return words.folder_role or ("" if has_image_folders else "image")

    return _sorted(files, role)


def by_names(files: Sequence[FileWords]) -> Sorted:
    """Tell images from segmentations by their own names."""

    def role(words: FileWords) -> str:
        return "test" if words.folder_role == "test" else words.name_role or "image"

    return _sorted(files, role)


def by_patterns(names: Sequence[str], images: str | None, segmentations: str | None) -> Sorted:
    """Tell images from segmentations by patterns; by their names what has no pattern.

    Raises:
        ConfigError: If a pattern is not usable, or only one of two names the case.
    """
    patterns = [compile_pattern(text) if text else None for text in (segmentations, images)]
    if (
        None not in patterns
        and len({"{case}" in (text or "") for text in (images, segmentations)}) > 1
    ):
        raise ConfigError(
            f"only one of the patterns {images!r} and {segmentations!r} holds {{case}}; put it "
            "into both, or into neither."
        )
    result = Sorted()
    for name in names:
        words = take_apart(name)
        for pattern, files, role in zip(
            patterns, (result.labels, result.images), ("segmentation", "image"), strict=True
        ):
            match = pattern.fullmatch(name) if pattern else None
            if match or (pattern is None and _role(words) == role):
                files.append(_matched(words, match, role))
                break
        else:
            result.leave("named by no pattern", [name])
    return result


def _role(words: FileWords) -> str:
    if words.folder_role == "test" or words.name_role == "other":
        return ""
    return words.name_role or words.folder_role or "image"


def _matched(words: FileWords, match: re.Match[str] | None, role: str) -> File:
    """Return a file whose key is what its pattern names, if it names a case."""
    fields = match.groupdict() if match else {}
    case = fields.get("case", "")
    if not case:
        return File(words=words, key=words.key, group=fields.get("group"))
    channel = fields.get("channel") or (words.sequence if role == "image" else None)
    parts = (fields.get("group"), case, channel)
    key = tuple(part.lower() for part in parts if part)
    return File(words=words, key=key, case=case, group=fields.get("group"))


def _sorted(files: Sequence[FileWords], role: Callable[[FileWords], str]) -> Sorted:
    result = Sorted()
    for words in files:
        found = role(words)
        file = File(words=words, key=words.key)
        if found == "test":
            result.leave("test images", [words.name])
        elif not found or words.name_role == "other":
            result.leave("neither image nor segmentation by name", [words.name])
        else:
            (result.images if found == "image" else result.labels).append(file)
    return result
