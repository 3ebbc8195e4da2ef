"""The demo: simulated brains, from raw images to scored, ensembled predictions and pictures."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from medseg.api.judging import evaluate
from medseg.api.prepare import plan_and_preprocess
from medseg.api.training import train
from medseg.demo import DATASET_NAME, write_demo_dataset
from medseg.errors import ConfigError
from medseg.execute.progress import progress_bar
from medseg.infer.folder import predict_folder
from medseg.infer.loading import load
from medseg.report.pictures import draw_case
from medseg.schema.base import write_text
from medseg.schema.metrics import Metrics

_FOLDS = (0, 1)
_DRAWN_CHANNEL = 2
_MARKER = "DEMO.txt"
_MADE = (DATASET_NAME, "work", "predictions", "pictures", "metrics.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What the demo made."""

    dataset: Path
    """Raw data, nnU-Net layout."""
    bundle: Path
    """Model of two folds."""
    predictions: Path
    """Segmentations of the held-out cases."""
    pictures: tuple[Path, ...]
    """One PNG for each held-out case."""
    metrics: Metrics
    """Scores on the held-out cases."""
    seconds: float
    """Wall-clock time of everything."""


def run_demo(
    output: str | Path,
    *,
    device: str = "auto",
    budget: str | float | None = None,
    progress: bool = False,
) -> Demo:
    """Simulate a data set, plan, train two folds, predict held-out cases and score them.

    Args:
        output: Folder for everything; what an earlier demo left there is replaced.
        device: "auto", "cpu", "cuda:N" or "mps".
        budget: Training time of each fold; None takes 230 s.
        progress: Show progress bars on standard error.

    Raises:
        ConfigError: If `output` holds something that is not a demo.
    """
    started = time.monotonic()
    output = Path(output)
    _claim(output)
    with progress_bar(1, "simulate", shown=progress, unit="data set") as bar:
        dataset = write_demo_dataset(output)
        bar.update()
    workspace = output / "work"
    plan_and_preprocess(
        dataset, configurations=["3d_fullres"], workspace=workspace, progress=progress
    )
    for fold in _FOLDS:
        run = train(
            dataset,
            "3d_fullres",
            fold,
            recipe="demo",
            budget=budget or 230,
            device=device,
            workspace=workspace,
            progress=progress,
        )
    images, predictions = dataset / "imagesTs", output / "predictions"
    model = load(run.bundle, device=device)
    predict_folder(model, [images], predictions)
    metrics = evaluate(predictions, dataset / "labelsTs", output=output / "metrics.json")
    values = model.bundle.spec.labels.items()
    names = {value: name for name, value in values if isinstance(value, int)}
    pictures = _draw(dataset, predictions, output / "pictures", metrics, names)
    return Demo(
        dataset=dataset,
        bundle=run.bundle,
        predictions=predictions,
        pictures=pictures,
        metrics=metrics,
        seconds=time.monotonic() - started,
    )


def _claim(output: Path) -> None:
    """Clear what an earlier demo left; refuse a folder that holds anything else."""
    found = sorted(entry.name for entry in output.iterdir()) if output.is_dir() else []
    if output.exists() and (not output.is_dir() or (found and _MARKER not in found)):
        held = f"holds {', '.join(found[:5])}, which" if found else "is a file, which"
        raise ConfigError(
            f"{output}: {held} no demo has made. Give an empty or a new folder with -o."
        )
    for name in _MADE:
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_text(output / _MARKER, "Made by `medseg demo`, which replaces the files beside it.\n")


def _draw(
    dataset: Path, predictions: Path, folder: Path, metrics: Metrics, names: dict[int, str]
) -> tuple[Path, ...]:
    pictures = []
    for case in metrics.cases:
        pictures.append(folder / f"{case}.png")
        draw_case(
            dataset / "imagesTs" / f"{case}_{_DRAWN_CHANNEL:04d}.nii.gz",
            {
                "reference": dataset / "labelsTs" / f"{case}.nii.gz",
                "prediction": predictions / f"{case}.nii.gz",
            },
            pictures[-1],
            label_names=names,
        )
    return tuple(pictures)
