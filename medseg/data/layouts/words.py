"""What the parts of a file's name and folders mean: image or segmentation, which case, what else.

A file's key is what is left of its folders and its name without the words that only say what it
is: `masks/liver-seg001.png` and `images/liver-orig001.png` have the key (liver, 001) in common.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from medseg.data.layouts.names import image_name

_LABEL_WORDS = {
    "label", "labels", "lbl", "lbls", "mask", "masks", "seg", "segs", "segm", "segmentation",
    "segmentations", "dseg", "gt", "groundtruth", "annotation", "annotations", "annot", "roi",
    "rois", "manualseg", "labelmap", "contour", "contours", "truth",
}  # fmt: skip
_IMAGE_WORDS = {
    "image", "images", "img", "imgs", "scan", "scans", "volume", "volumes", "vol", "orig",
    "original", "raw", "input", "inputs", "picture", "pictures", "photo", "photos",
}  # fmt: skip
_TEST_WORDS = {"ts", "test", "testing", "tst"}
_OTHER_WORDS = {"probseg", "prob", "probs", "probabilities", "overlay", "overlays"}
_ENTITIES = {"desc", "space", "res", "den", "label", "seg", "atlas", "from", "to", "mode"}
_SEQUENCES = {
    "t1", "t1w", "t1n", "t1c", "t1ce", "t1gd", "t1post", "t1pre", "t2", "t2w", "t2f", "t2s",
    "t2star", "t2starw", "flair", "pd", "pdw", "dwi", "adc", "hbv", "swi", "bold", "asl", "mra",
    "tof", "ct", "cta", "cbct", "ncct", "pet", "suv", "fa", "md", "dir", "mprage", "mp2rage",
    "uni", "unit1", "dce", "cbf", "cbv", "mtt", "tmax", "water", "fat", "inphase", "outphase",
}  # fmt: skip
_PARTS = re.compile(r"[A-Za-z]+?(?=[A-Z][a-z])|[A-Za-z]+|\d+")
_WORD = re.compile(r"(?P<before>[_\-. ]*)(?P<text>[^_\-. ]+)")
_NUMBERED = re.compile(r"(?P<word>[A-Za-z]+)(?P<number>\d+)$")
_PREFERENCE = ("dseg", "seg", "segmentation", "label", "labels", "gt", "mask", "masks")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileWords:
    """One image file, taken to pieces."""

    name: str
    """Path relative to the dataset's folder, with "/"."""
    key: tuple[str, ...]
    """What tells this file from others of its kind, in lower case."""
    text: str
    """The part of the key that stands in the file's name, as it is spelled there."""
    folders: tuple[str, ...]
    """The part of the key that stands in the folders, as it is spelled there."""
    kind: str
    """The words that were left out of the key."""
    folder_role: str
    """What the folders say it is: "image", "segmentation", "test" or nothing."""
    name_role: str
    """What the name says it is: "image", "segmentation", "other" or nothing."""

    @property
    def sequence(self) -> str | None:
        """Return the last word that names a sequence or modality, as it is spelled."""
        stem = (image_name(self.name.rpartition("/")[2]) or (self.name, ""))[0]
        found = [m["text"] for m in _WORD.finditer(stem) if m["text"].lower() in _SEQUENCES]
        return found[-1] if found else None

    @property
    def preference(self) -> int:
        """Return a rank among several segmentations of one case; the lowest is taken."""
        words = self.kind.split()
        ranks = [n for n, word in enumerate(_PREFERENCE) if word in words]
        return min(ranks, default=len(_PREFERENCE))


def take_apart(name: str) -> FileWords:
    """Return the pieces of a file's name, a path relative to the dataset's folder.

    Examples:
        >>> words = take_apart("masks/p1/liver-seg001.png")
        >>> words.key, words.text, words.folder_role, words.name_role
        (('p1', 'liver', '001'), 'liver-001', 'segmentation', 'segmentation')
        >>> take_apart("derivatives/x/sub-1/anat/sub-1_T1w_desc-les_dseg.nii.gz").key
        ('sub-1', 't1w')
    """
    *folders, last = name.split("/")
    stem = (image_name(last) or (last, ""))[0]
    roles = [_folder_role(folder) for folder in folders]
    if stem.startswith("sub-"):
        kept, dropped, name_role = _entities(stem)
        own: list[str] = []
    else:
        kept, dropped, name_role = _words(stem)
        own = [folder for folder, role in zip(folders, roles, strict=True) if not role]
    text = "".join(before + word for before, word in kept).strip("_-. ")
    told = [role for role in reversed(roles) if role]
    return FileWords(
        name=name,
        key=(*(folder.lower() for folder in own), *(word.lower() for _, word in kept)),
        text=text,
        folders=tuple(own),
        kind=" ".join(dropped),
        folder_role="test" if "test" in told else (told[0] if told else ""),
        name_role=name_role,
    )


def _folder_role(folder: str) -> str:
    parts = {part.lower() for part in _PARTS.findall(folder)} | {folder.lower()}
    if parts & _TEST_WORDS:
        return "test"
    if parts & _LABEL_WORDS:
        return "segmentation"
    return "image" if parts & _IMAGE_WORDS else ""


def _role(words: set[str]) -> str:
    if words & _OTHER_WORDS:
        return "other"
    if words & _LABEL_WORDS:
        return "segmentation"
    return "image" if words & _IMAGE_WORDS else ""


def _words(stem: str) -> tuple[list[tuple[str, str]], list[str], str]:
    """Return the words of a name (with the separators before them), those left out, the role."""
    kept: list[tuple[str, str]] = []
    dropped: list[str] = []
    for match in _WORD.finditer(stem):
        before, text = match["before"], match["text"]
        numbered = _NUMBERED.match(text)
        word = (numbered["word"] if numbered else text).lower()
        if not _role({word}):
            kept.append((before, text))
            continue
        dropped.append(word)
        if numbered:
            kept.append((before, numbered["number"]))
    return kept, dropped, _role(set(dropped))


def _entities(stem: str) -> tuple[list[tuple[str, str]], list[str], str]:
    """Take apart a name of the Brain Imaging Data Structure: sub-01_ses-2_desc-manual_dseg."""
    kept: list[tuple[str, str]] = []
    dropped: list[str] = []
    for part in stem.split("_"):
        entity, _, value = part.partition("-")
        is_role = not value and bool(_role({part.lower()}))
        if is_role or (value and entity in _ENTITIES):
            dropped.append(part.lower())
        else:
            kept.append(("_" if kept else "", part))
    roles = {part.partition("-")[0] for part in dropped if part.partition("-")[0] != "desc"}
    return kept, dropped, _role(roles)
