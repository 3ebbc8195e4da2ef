"""predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medseg.cli.options import Device


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("predict")(predict)


def predict(  # noqa: PLR0913 - one option of the command each
    inputs: Annotated[
        list[Path], typer.Option("-i", "--input", help="Folder or image files; repeat it.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the segmentations.")],
    model: Annotated[Path, typer.Option("-m", "--model", help="Bundle or run.")],
    folds: Annotated[
        str | None, typer.Option("--folds", help="Folds to average, such as 0,1. Default: all.")
    ] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="final or best.")] = "final",
    tta: Annotated[
        str, typer.Option("--tta", help="Mirrored test-time augmentation: auto, none or flips.")
    ] = "auto",
    step: Annotated[
        float, typer.Option("--step", help="Shift between tiles, as a fraction of the tile.")
    ] = 0.5,
    device: Device = "auto",
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run a network that the model brings as code.")
    ] = False,
) -> int:
    """Segment images with a trained model."""
    from medseg.execute.progress import progress_bar
    from medseg.infer.folder import predict_folder
    from medseg.infer.model import load
    from medseg.report.predictions import format_predictions

    chosen = None if folds is None else [part.strip() for part in folds.split(",")]
    loaded = load(model, device=device, folds=chosen, checkpoint=checkpoint, trust_code=trust_code)
    with progress_bar(None, "predict", shown=True) as bar:
        rows = predict_folder(
            loaded,
            inputs,
            output,
            tta=tta,  # type: ignore[arg-type]
            step=step,
            progress=lambda row, total: _tick(bar, total),
        )
    typer.echo(format_predictions(rows))
    return 1 if any(row.status == "failed" for row in rows) else 0


def _tick(bar: Any, total: int) -> None:
    bar.total = total
    bar.update()
