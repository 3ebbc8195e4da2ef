"""Which files make up which case of a prediction; everything that is wrong with them at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medseg.data.dataset import group_channels
from medseg.errors import ConfigError, DatasetError
from medseg.io.dicom import is_dicom_folder
from medseg.io.image import PICTURE_ENDINGS, TIFF_ENDINGS, split_channel
from medseg.io.read import read_channels, split_ending

_MAX_LISTED = 20
_SIDECARS = (".json", ".txt", ".csv", ".tsv", ".md", ".bval", ".bvec", ".yaml", ".yml", ".log")
_DATA_OF = {".raw": (".mhd", ".nhdr"), ".zraw": (".mhd",), ".raw.gz": (".nhdr",)}
_LIST = ".txt"
"""Ending of a file that lists inputs, one a line, relative to the folder it lies in."""

Cases = dict[str, tuple[Path, ...]]


def collect_cases(inputs: Sequence[str | Path], channels: Sequence[str]) -> Cases:
    """Return the cases that folders, files and lists hold.

    Images are opened only where one file has to hold several channels (as colours, or along a
    fourth axis).

    Args:
        inputs: Folders (their own files, and their sub-folders that hold a DICOM series), DICOM
            series folders, image files, and `.txt` files with one such path a line. A case is
            CASE_NNNN.ending (exactly four digits) per channel; no suffix means one channel, or all
            of them in one file. A folder of DICOM files is named in the same way. Endings may
            differ, also within a case.
        channels: Names of the channels every case must have.

    Returns:
        Case -> one file (or DICOM folder) per channel, sorted by case.

    Raises:
        DatasetError: With every problem of every case.
    """
    problems: list[str] = []
    files = [path for entry in inputs for path in _paths(Path(entry), problems)]
    cases: Cases = {}
    for case, found in _grouped(list(dict.fromkeys(files))).items():
        problem = _case_problem(case, found, channels)
        if problem is None:
            cases[case] = tuple(path for _, path in found)
        else:
            problems.append(problem)
    if problems or not cases:
        raise refusal(problems or ["no input was given; expected a folder or image files"])
    return cases


def part_of(cases: Cases, part: str | None) -> Cases:
    """Return every n-th case, from the i-th on, of "i/n", so that n jobs share the work.

    Raises:
        ConfigError: If it is no such text, or i is not from 1 to n.

    Examples:
        >>> list(part_of({"a": (), "b": (), "c": ()}, "1/2"))
        ['a', 'c']
    """
    if part is None:
        return cases
    first, _, last = part.partition("/")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"parts is {part!r}; expected i/n with i from 1 to n, such as 2/8.")
    names = list(cases)[int(first) - 1 :: int(last)]
    return {name: cases[name] for name in names}


def _grouped(paths: list[Path]) -> dict[str, list[tuple[int, Path]]]:
    """Return case -> [(channel number, path)], both sorted."""
    cases = group_channels([path for path in paths if not path.is_dir()])
    for path in sorted(path for path in paths if path.is_dir()):
        case, channel = split_channel(path.resolve().name)
        cases[case] = sorted([*cases.get(case, []), (channel or 0, path)])
    return dict(sorted(cases.items()))


def _paths(entry: Path, problems: list[str]) -> list[Path]:
    """Return the images of one input; what is no image is added to the problems."""
    if not entry.exists():
        problems.append(f"{entry}: no such file or folder")
        return []
    if entry.is_file():
        if entry.suffix.lower() == _LIST:
            return _listed(entry, problems)
        return _images([entry], problems)
    return [entry] if is_dicom_folder(entry) else _in_folder(entry, problems)


def _listed(entry: Path, problems: list[str]) -> list[Path]:
    """Return the images that a list names."""
    try:
        text = entry.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        problems.append(f"{entry}: is no text in UTF-8; expected one path a line. Save it as UTF-8")
        return []
    lines = [line.strip() for line in text.splitlines()]
    paths = [entry.parent / line for line in lines if line and not line.startswith("#")]
    if not paths:
        problems.append(f"{entry}: names no image; expected one path a line")
    nested = [path for path in paths if path.suffix.lower() == _LIST]
    problems += [f"{entry}: names the list {path}; expected images and folders" for path in nested]
    return [found for path in paths if path not in nested for found in _paths(path, problems)]


def _in_folder(entry: Path, problems: list[str]) -> list[Path]:
    """Return the images of a folder, and its sub-folders that hold a DICOM series."""
    held = [path for path in sorted(entry.iterdir()) if path.name[0] != "."]
    files = [path for path in held if path.is_file()]
    folders = [path for path in held if path.is_dir()]
    before = len(problems)
    images = _images(_without_companions(files), problems)
    images += [folder for folder in folders if is_dicom_folder(folder)]
    if not images and len(problems) == before:
        problems.append(
            f"{entry}: holds no image ({len(files)} other files, {len(folders)} folders); expected "
            "CASE_0000.nii.gz, CASE_0001.nii.gz ... or CASE.nii.gz, or folders of DICOM files"
        )
    return images


def _without_companions(files: list[Path]) -> list[Path]:
    """Drop notes beside images, and data files that belong to a header file."""
    names = {path.name.lower() for path in files}
    kept = []
    for path in files:
        name = path.name.lower()
        headers = {
            name.removesuffix(data) + header
            for data, endings in {**_DATA_OF, ".img": (".hdr",), ".img.gz": (".hdr",)}.items()
            for header in endings
            if name.endswith(data)
        }
        if not name.endswith(_SIDECARS) and not headers & names:
            kept.append(path)
    return kept


def _images(files: list[Path], problems: list[str]) -> list[Path]:
    images = []
    for path in files:
        try:
            split_ending(path.name)
        except DatasetError as error:
            problems.append(f"{path}: {error}")
        else:
            images.append(path)
    return images


def _case_problem(case: str, found: list[tuple[int, Path]], channels: Sequence[str]) -> str | None:
    numbers = [number for number, _ in found]
    if numbers == list(range(len(channels))) or _holds_all(case, found, channels):
        return None
    expected = ", ".join(f"{number:04d} ({name})" for number, name in enumerate(channels))
    got = ", ".join(f"{number:04d} ({path.name})" for number, path in found)
    if len(set(numbers)) < len(numbers):
        files = ", ".join(str(path) for _, path in found)
        return f"case {case!r}: several files claim one channel: {files}; keep one per channel"
    return f"case {case!r}: got channels {got}; expected {expected}"


def _holds_all(case: str, found: list[tuple[int, Path]], channels: Sequence[str]) -> bool:
    """Return whether fewer files than channels hold them all, as colours or along a fourth axis.

    That may be a single file without channel number, or pictures with or without.
    """
    paths = [path for _, path in found]
    is_folder = paths[0].is_dir()
    stem, ending = (paths[0].resolve().name, "") if is_folder else split_ending(paths[0].name)
    is_picture = ending in PICTURE_ENDINGS or ending in TIFF_ENDINGS
    in_order = [number for number, _ in found] == list(range(len(found)))
    if not in_order or len(found) >= len(channels) or not (is_picture or stem == case):
        return False
    try:
        return len(read_channels(paths).array) == len(channels)
    except DatasetError:
        return True  # damaged: its own error is reported when its turn comes


def refusal(problems: Sequence[str]) -> DatasetError:
    """Return the error that lists what is wrong with the input."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} with the input"
    shown = [f"  {problem}" for problem in problems[:_MAX_LISTED]]
    if len(problems) > _MAX_LISTED:
        shown.append(f"  ... and {len(problems) - _MAX_LISTED} more")
    return DatasetError("\n".join([f"{count}; nothing was predicted:", *shown]))
