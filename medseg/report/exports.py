"""What an export wrote, as a table that fits a terminal."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path

from medseg.interop.nnunet.write import MARK, ExportedFolder, ExportedStage
from medseg.interop.onnx import TOLERANCE
from medseg.schema.exported import ExportedModel

_POSTPROCESSING = (
    "Note: it does not do the postprocessing stored in the model, which stands in model.json."
)
_STAGE_FOLDER = "STAGE_1"
"""Where the label maps of the first stage go, in the commands."""


def format_export(written: ExportedModel | ExportedFolder, folder: Path) -> str:
    """Return a line for each file, what is to be known of them, and how to run them.

    Args:
        written: What was written.
        folder: Where it lies.
    """
    if isinstance(written, ExportedFolder):
        return _format_folder(written, folder)
    return _format_networks(written, folder)


def _format_networks(model: ExportedModel, folder: Path) -> str:
    differences = {one.file: one.max_probability_difference for one in model.networks}
    lines = [f"{'file':<32} {'size':>10} {'difference':>12}"]
    for path in sorted(folder.iterdir()):
        found = f"{differences[path.name]:>12.1e}" if path.name in differences else ""
        lines.append(f"{path.name:<32} {_size(path.stat().st_size):>10} {found}".rstrip())
    worst = max(differences.values())
    return "\n".join(
        [
            *lines,
            "difference: the largest between probabilities of torch and onnxruntime, on one",
            f"tile of random numbers; {worst:.1e} in all, allowed {TOLERANCE:.0e}.",
            "",
            f"To predict, one NIfTI file for each of {', '.join(model.channels)}:",
            f"  python {folder / 'predict.py'} IMAGE... OUTPUT.nii.gz",
            "It needs numpy, scipy, nibabel and onnxruntime, but not medseg.",
            *([] if model.postprocessing is None else [_POSTPROCESSING]),
        ]
    )


def _format_folder(exported: ExportedFolder, folder: Path) -> str:
    names = (*exported.files, MARK)
    width = max(len(name) for name in names)
    last = len(exported.channels) - 1
    files = "CASE_0000.nii.gz" + (f" ... CASE_{last:04d}.nii.gz" if last else "")
    previous = [stage.previous_stage for stage in exported.stages[:1] if stage.previous_stage]
    return "\n".join(
        [
            *(f"{name:<{width}} {_size((folder / name).stat().st_size):>10}" for name in names),
            "",
            *_wrapped(f"To predict, {files} in INPUT for {', '.join(exported.channels)}:"),
            *(f"  {_command(stage, exported, folder)}" for stage in exported.stages),
            *(f"{_STAGE_FOLDER} holds the label maps of {name}, CASE.nii.gz." for name in previous),
            *(line for note in exported.notes for line in _wrapped(f"Note: {note}")),
        ]
    )


def _command(stage: ExportedStage, exported: ExportedFolder, folder: Path) -> str:
    """Return the command with which nnU-Net predicts with a model folder."""
    is_last = stage == exported.stages[-1]
    words = ["nnUNetv2_predict_from_modelfolder", "-i", "INPUT"]
    words += ["-o", "OUTPUT" if is_last else _STAGE_FOLDER]
    words += ["-m", shlex.quote(str(folder / stage.folder)), "-f", *stage.folds]
    if stage.checkpoint != "checkpoint_final.pth":
        words += ["-chk", stage.checkpoint]
    if stage.previous_stage is not None:
        words += ["-prev_stage_predictions", _STAGE_FOLDER]
    return " ".join(words)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 80, break_long_words=False, break_on_hyphens=False)


def _size(num_bytes: int) -> str:
    if num_bytes < 1e6:
        return f"{num_bytes / 1e3:.1f} kB"
    return f"{num_bytes / 1e6:.1f} MB"
