"""predict."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.cli.options import Device, names, numbers, settings

if TYPE_CHECKING:
    from medseg.schema.prediction import PredictionRow


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("predict")(predict)


def predict(  # noqa: PLR0913 - one option of the command each
    inputs: Annotated[
        list[Path],
        typer.Option(
            "-i",
            "--input",
            help="Folder, image files, DICOM series, or a .txt list of them; repeat it.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the segmentations.")],
    model: Annotated[
        list[Path],
        typer.Option(
            "-m",
            "--model",
            help="Bundle, run, zip of a bundle, model of nnU-Net, or the name of a fetched model; "
            "of several the mean is taken.",
        ),
    ],
    weights: Annotated[
        str | None, typer.Option("--weights", help="Share of each model, such as 2,1.")
    ] = None,
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
    save: Annotated[
        str | None,
        typer.Option("--save", help="Maps to write too: probabilities,entropy,disagreement."),
    ] = None,
    previous_stage: Annotated[
        Path | None,
        typer.Option(
            "--previous-stage",
            help="Cascade: folder of label maps instead of the first stage's.",
        ),
    ] = None,
    parts: Annotated[
        str | None, typer.Option("--parts", help="i/n: the i-th of n shares of the cases.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Predict cases again that have an output.")
    ] = False,
    no_postprocess: Annotated[
        bool, typer.Option("--no-postprocess", help="Leave out the model's postprocessing.")
    ] = False,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="Memory to take at most, such as 4GB.")
    ] = None,
    max_vram: Annotated[
        str | None, typer.Option("--max-vram", help="GPU memory to take at most, such as 6GB.")
    ] = None,
    device: Device = "auto",
    exact: Annotated[
        bool, typer.Option("--exact", help="Compute as the program that trained it.")
    ] = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run a network that the model brings as code.")
    ] = False,
) -> int:
    """Segment images with a trained model."""
    from medseg.api.models import load
    from medseg.cli.processes import use_cpus
    from medseg.infer.folder import predict_folder
    from medseg.report.predictions import format_predictions

    with _interruptible(), _Progress() as shown:
        use_cpus()
        loaded = load(
            model,
            device=device,
            mode="exact" if exact else "default",
            folds=names(folds),
            checkpoint=checkpoint,
            weights=numbers(weights, "--weights"),
            max_memory=max_memory,
            max_vram=max_vram,
            trust_code=trust_code,
            workspace=settings.workspace,
        )
        rows = predict_folder(
            loaded,
            inputs,
            output,
            tta=tta,  # type: ignore[arg-type]
            step=step,
            save=names(save) or (),
            previous_stage=previous_stage,
            parts=parts,
            overwrite=overwrite,
            postprocess=not no_postprocess,
            progress=shown.case_done,
            on_tile=shown.tile_done,
        )
    typer.echo(format_predictions(rows, width=max(80, shutil.get_terminal_size((80, 24)).columns)))
    return 1 if any(row.status == "failed" for row in rows) else 0


class _Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the command alike: with words, and nothing half-written left."""

    def note(number: int, _: FrameType | None) -> None:
        raise _Terminated(number)

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, note) if is_main else None
    try:
        yield
    except KeyboardInterrupt as asked:
        number = signal.SIGTERM if isinstance(asked, _Terminated) else signal.SIGINT
        typer.echo(
            "Interrupted. Finished cases are whole; the same command does the rest.", err=True
        )
        raise typer.Exit(128 + number) from None
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


class _Progress:
    """A bar of cases and tiles that appears once there is something to tell."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._lock = threading.Lock()
        self._open = ExitStack()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def case_done(self, row: PredictionRow, total: int) -> None:
        """Count a case."""
        bar = self._shown()
        bar.total = total
        bar.set_postfix_str("", refresh=False)
        bar.update()

    def tile_done(self, case: str, done: int, total: int) -> None:
        """Show the tiles of a case that takes a while."""
        from medseg.report.text import shortened

        if total > 1:
            bar = self._shown()
            bar.set_postfix_str(f"{shortened(case, 24)}: tile {done} of {total}", refresh=False)
            bar.update(0)

    def _shown(self) -> Any:
        from tqdm.contrib.logging import logging_redirect_tqdm

        from medseg.execute.progress import progress_bar

        with self._lock:
            if self._bar is None:
                self._bar = self._open.enter_context(progress_bar(None, "predict", shown=True))
                self._bar.miniters, self._bar.dynamic_miniters = 0, False  # tiles are no steps
                self._open.enter_context(logging_redirect_tqdm())
        return self._bar
