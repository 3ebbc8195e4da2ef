"""serve."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg.cli.options import Device, names, settings


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("serve")(serve)


def serve(  # noqa: PLR0913 - one option of the command each
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Bundle, run, zip, model of nnU-Net, or name.")
    ],
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; the default is this machine only.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0: a free one.")
    ] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="File with a token that every request has to bring."),
    ] = None,
    max_upload: Annotated[
        str, typer.Option("--max-upload", help="Largest upload, such as 500MB or 2GB.")
    ] = "2GB",
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=1, help="Most jobs that wait.")
    ] = 16,
    max_disk: Annotated[
        str, typer.Option("--max-disk", help="Most space for uploads and results together.")
    ] = "20GB",
    keep: Annotated[
        str, typer.Option("--keep", help="How long results are kept, such as 30m or 1h.")
    ] = "1h",
    folds: Annotated[
        str | None, typer.Option("--folds", help="Folds to average, such as 0,1. Default: all.")
    ] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="final or best.")] = "final",
    tta: Annotated[
        str, typer.Option("--tta", help="Mirrored test-time augmentation: auto, none or flips.")
    ] = "auto",
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="Memory to take at most, such as 8GB.")
    ] = None,
    device: Device = "auto",
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run a network that the model brings as code.")
    ] = False,
) -> int:
    """Serve a model over HTTP: upload an image, ask for its job, download the segmentation."""
    from medseg.api.models import load
    from medseg.cli.processes import leave_at_once, use_cpus
    from medseg.infer.result import Options
    from medseg.serve import server

    server.check_installed()
    Options(tta=tta)  # type: ignore[arg-type]
    limits = _limits(max_upload, max_waiting, max_disk, keep)
    token = None if token_file is None else server.read_token(token_file)
    with server.listen(host, port) as listener:
        use_cpus()
        loaded = load(
            model,
            device=device,
            folds=names(folds),
            checkpoint=checkpoint,
            max_memory=max_memory,
            trust_code=trust_code,
            workspace=settings.workspace,
        )
        address = server.address_of(listener)

        def greet() -> None:
            if not server.is_loopback(host):
                typer.echo(_warning(host, has_token=token is not None), err=True)
            typer.echo(_greeting(address, loaded, limits, token_file))
            sys.stdout.flush()

        status = server.serve(
            loaded,
            listener,
            limits=limits,
            tta=tta,  # type: ignore[arg-type]
            token=token,
            on_start=greet,
        )
    typer.echo("Stopped; all uploads and results are deleted.", err=True)
    leave_at_once(status)
    return status


def _limits(max_upload: str, max_waiting: int, max_disk: str, keep: str) -> Any:
    from medseg.api.lengths import parse_duration
    from medseg.errors import ConfigError
    from medseg.execute.sizes import read_size
    from medseg.serve.limits import Limits

    try:
        seconds = parse_duration(keep)
    except ConfigError:
        raise ConfigError(f"keep is {keep!r}; expected a time such as 90s, 30m or 1h.") from None
    return Limits(
        max_upload_bytes=read_size(max_upload, "max-upload"),
        max_waiting=max_waiting,
        max_disk_bytes=read_size(max_disk, "max-disk"),
        keep_seconds=seconds,
    )


def _warning(host: str, *, has_token: bool) -> str:
    if has_token:
        return (
            f"Warning: {host} can be reached from other machines, and nothing is encrypted: the "
            "token and all images can be read on the way. Put a proxy with TLS in front of it."
        )
    return (
        f"Warning: {host} can be reached from other machines, and there is no authentication: "
        "anybody there can use the model and fill its queue, and nothing is encrypted. Give "
        "--token-file, and put a proxy with TLS in front of it."
    )


def _greeting(address: str, model: Any, limits: Any, token_file: Path | None) -> str:
    """Return what is served, where, and a first request to copy."""
    import shlex

    from medseg.execute.sizes import size_words

    spec = model.bundle.spec
    token = ""
    if token_file is not None:
        token = f'-H "Authorization: Bearer $(cat {shlex.quote(str(token_file))})" '
    fields = list(spec.channels) if len(spec.channels) > 1 else ["image"]
    files = " ".join(f"-F {shlex.quote(f'{name}=@{name}.nii.gz')}" for name in fields)
    return "\n".join(
        [
            f"Model: {spec.name}, {model.bundle.configuration_name}, "
            f"{len(model.folds)} fold{'s' if len(model.folds) > 1 else ''}, on {model.device}",
            f"Channels: {', '.join(spec.channels)}",
            f"Limits: {size_words(limits.max_upload_bytes)} an upload, {limits.max_waiting} jobs "
            f"waiting, {size_words(limits.max_disk_bytes)} of disk; results are kept for "
            f"{limits.keep_seconds / 60:g} minutes",
            f"Address: {address} (description: {address}/openapi.json)",
            "",
            "  # upload, ask, download: ID is in the answer to the first",
            f"  curl {token}{files} {address}/v1/jobs",
            f"  curl {token}{address}/v1/jobs/ID",
            f"  curl {token}-o segmentation.nii.gz {address}/v1/jobs/ID/segmentation",
            "",
            "Ctrl-C stops it.",
        ]
    )
