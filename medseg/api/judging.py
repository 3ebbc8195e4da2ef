"""Score predictions against references, and pool the folds of a run."""

from __future__ import annotations

from pathlib import Path

from medseg.data.workspace import DEFAULT_WORKSPACE, Workspace
from medseg.evaluate.cases import evaluate_folder
from medseg.evaluate.crossval import crossval as pool_folds
from medseg.schema.base import write
from medseg.schema.metrics import Metrics


def evaluate(pred: str | Path, ref: str | Path, *, output: str | Path | None = None) -> Metrics:
    """Compare predicted label maps with references.

    Args:
        pred: A label map, or a folder of them.
        ref: The reference, or a folder of references with the same names; a `dataset.json` in it
            or above it names the labels.
        output: JSON file to write the scores to.

    Raises:
        DatasetError: If files are missing on either side.
        GeometryError: If two single files do not share a grid.
    """
    metrics = evaluate_folder(Path(pred), Path(ref))
    if output is not None:
        write(Path(output), metrics)
    return metrics


def crossval(
    dataset: str | Path,
    config: str,
    *,
    plans: str = "nnunet",
    recipe: str | Path = "default",
    name: str | None = None,
    workspace: str | Path = DEFAULT_WORKSPACE,
) -> Metrics:
    """Pool the full-volume validation of all folds of a run into `crossval/metrics.json`.

    Args:
        dataset: Path of raw data, or a name or number in the workspace.
        config: Configuration of the plans.
        plans: Name of the plans.
        recipe: Name or path of the recipe.
        name: Name of the run, if it was given one.
        workspace: Folder that holds what medseg makes.

    Raises:
        DatasetError: If folds are missing.
    """
    folder, _ = Workspace(Path(workspace)).find(dataset)
    return pool_folds(folder.run_path(plans, config, name or Path(str(recipe)).stem))
