"""The `medseg` command: options, messages and exit codes; no logic."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg.cli import (
    bundles,
    dataset,
    demo,
    export,
    importing,
    judge,
    models,
    predict,
    prepare,
    recipes,
    serve,
    train,
)
from medseg.cli.habits import Commands
from medseg.cli.options import settings
from medseg.cli.processes import leave_at_once

app = typer.Typer(
    name="medseg",
    cls=Commands,
    help="Segmentation of medical images without hand-tuning: plan, train, predict, judge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_GROUPS = (
    demo, dataset, prepare, train, predict, export, judge, recipes, serve, bundles, importing,
    models,
)  # fmt: skip
for group in _GROUPS:
    group.register(app)


_BY_SIGNAL = 128
"""Exit statuses above it are 128 + signal."""
_OPTION_ERROR: type[Any] = typer.BadParameter.__mro__[2]
"""What typer raises for any wrong option or argument."""


def _version(asked: bool) -> None:
    if asked:
        from medseg import __version__

        typer.echo(f"medseg {__version__}")
        raise typer.Exit


@app.callback()
def top(
    workspace: Annotated[
        Path, typer.Option("--workspace", help="Folder that holds what medseg makes.")
    ] = settings.workspace,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Hand the options before the command's name down to it."""
    settings.workspace, settings.debug = workspace, debug


def main() -> None:
    """Run the command line and leave with its status.

    Threads that wait for each other spin for a moment, then sleep: on a processor shared with
    other work a training step is several times faster so, and no slower alone
    (docs/benchmarks.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("medseg").setLevel(logging.INFO)
    status = run(sys.argv[1:])
    # an interrupted thread may hold a lock that the interpreter would wait for at its end
    if status > _BY_SIGNAL or any(
        thread.daemon and thread.name.startswith("medseg-") for thread in threading.enumerate()
    ):
        leave_at_once(status)
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status.

    Status: 0 done, 1 done except for the cases listed, 2 refused, 3 another process of the run was
    lost, 130 interrupted.
    """
    from medseg.errors import MedsegError

    try:
        result = app(arguments, standalone_mode=False)
    except (MedsegError, OSError, MemoryError) as error:
        return _refused(error)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        return _refused(error)
    except _OPTION_ERROR as error:
        error.show()
        return 2
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("Interrupted.", err=True)
        return 130
    return result if isinstance(result, int) else 0


def _refused(error: Exception) -> int:
    if settings.debug:
        logging.getLogger(__name__).error("", exc_info=error)
    notes = [note for note in getattr(error, "__notes__", ()) if note not in str(error)]
    typer.echo("\n".join([f"Error: {error}", *notes]), err=True)
    return int(getattr(error, "exit_status", 2))
