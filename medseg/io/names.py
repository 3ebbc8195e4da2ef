"""Names and colours inside a NIfTI file: header extensions that viewers read.

Source:
    NIfTI-1 standard: extensions, and code 30 of its registry. Elements: what Connectome Workbench
    writes and reads (`CaretVolumeExtension`, GIFTI's LabelTable). TotalSegmentator writes the same
    elements under code 0, and its readers take them from the first extension of the file through
    nibabel's `get_content`, which nibabel 5.3 and later refuse for code 30.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from medseg.io.palette import rgb

_ECODE_IGNORE = 0
_ECODE_CARET = 30
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelEntry:
    """What one value of a label map means."""

    value: int
    """Value in the file."""
    name: str
    """Name of the structure."""
    colour: str
    """Its colour, #RRGGBB."""
    opacity: float = 1.0
    """From 0, not shown, to 1."""


def label_extension(entries: Sequence[LabelEntry]) -> bytes:
    """Return the header extensions that name the values of a label map.

    There are two of the same text: the first one, of code 0, is what TotalSegmentator's readers
    find, the second one, of code 30, what Workbench looks for.

    Args:
        entries: One for each value, that of the background too.
    """
    root = ElementTree.Element("CaretExtension")
    information = ElementTree.SubElement(root, "VolumeInformation", Index="0")
    table = ElementTree.SubElement(information, "LabelTable")
    for entry in entries:
        red, green, blue = (f"{part / 255:.6g}" for part in rgb(entry.colour))
        shade = {"Red": red, "Green": green, "Blue": blue, "Alpha": f"{entry.opacity:g}"}
        label = ElementTree.SubElement(table, "Label", {"Key": str(entry.value), **shade})
        label.text = _printable(entry.name)
    ElementTree.SubElement(information, "VolumeType").text = "Label"
    return _extension(root, _ECODE_IGNORE) + _extension(root, _ECODE_CARET)


def map_extension(names: Sequence[str]) -> bytes:
    """Return the header extension that names the volumes of a file along its fourth axis.

    Args:
        names: One for each volume, in order.
    """
    root = ElementTree.Element("CaretExtension")
    for index, name in enumerate(names):
        information = ElementTree.SubElement(root, "VolumeInformation", Index=str(index))
        ElementTree.SubElement(information, "GuiLabel").text = _printable(name)
        ElementTree.SubElement(information, "VolumeType").text = "Functional"
    return _extension(root, _ECODE_CARET)


def _printable(text: str) -> str:
    """Replace what XML cannot hold; a name that is empty then could not be read back."""
    kept = "".join(letter if letter.isprintable() else " " for letter in text).strip()
    return kept or "unnamed"


def _extension(root: ElementTree.Element, code: int) -> bytes:
    """Return length, code and text; lengths of extensions are multiples of 16."""
    content: bytes = ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True)
    size = -(-(8 + len(content)) // _ALIGNMENT) * _ALIGNMENT
    return struct.pack("=ii", size, code) + content.ljust(size - 8, b"\0")
