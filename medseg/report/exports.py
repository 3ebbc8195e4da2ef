"""What an export wrote, as a table that fits a terminal."""

from __future__ import annotations

from pathlib import Path

from medseg.schema.exported import ExportedModel

_POSTPROCESSING = (
    "Note: it does not do the postprocessing stored in the model, which stands in model.json."
)


def format_export(model: ExportedModel, folder: Path, tolerance: float) -> str:
    """Return a line for each file, how exact the networks are, and how to run them.

    Args:
        model: What was written.
        folder: Where it lies.
        tolerance: Largest difference of probabilities that is allowed.
    """
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
            f"tile of random numbers; {worst:.1e} in all, allowed {tolerance:.0e}.",
            "",
            f"To predict, one NIfTI file for each of {', '.join(model.channels)}:",
            f"  python {folder / 'predict.py'} IMAGE... OUTPUT.nii.gz",
            "It needs numpy, scipy, nibabel and onnxruntime, but not medseg.",
            *([] if model.postprocessing is None else [_POSTPROCESSING]),
        ]
    )


def _size(num_bytes: int) -> str:
    if num_bytes < 1e6:
        return f"{num_bytes / 1e3:.1f} kB"
    return f"{num_bytes / 1e6:.1f} MB"
