"""Serve a loaded model until somebody asks to stop; leave nothing behind."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from medseg.errors import ConfigError
from medseg.infer.model import Model
from medseg.infer.result import Tta
from medseg.serve.limits import Limits

if TYPE_CHECKING:
    from medseg.serve.app import Served

logger = logging.getLogger(__name__)

_PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
_PREFIX = "medseg-serve-"
_LOCK = "lock"
_SHORTEST_TOKEN = 16
_GRACE_SECONDS = 5.0
"""What a running job gets when the server is stopped."""
_CLOSE_SECONDS = 2
"""What open connections get."""
_MOST_CONNECTIONS = 256


def check_installed() -> None:
    """Check that the packages of the extra are there.

    Raises:
        ConfigError: If one is missing.
    """
    missing = [name for module, name in _PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        raise ConfigError(
            f"'medseg serve' needs {', '.join(missing)}, not installed here: "
            "pip install 'medseg[serve]'."
        )


def read_token(path: Path) -> str:
    """Read the token of --token-file.

    Raises:
        ConfigError: If there is none, or one that could be guessed.
    """
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the token cannot be read ({error}).") from None
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"{path}: the token has {len(token)} characters; expected one line of at least "
            f"{_SHORTEST_TOKEN}, ASCII. Make one with: openssl rand -hex 32"
        )
    return token


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from its own machine alone.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    return host in ("localhost", "::1") or host.startswith("127.")


def listen(host: str, port: int) -> socket.socket:
    """Open the server's port, which no other program may have.

    Args:
        host: Address of one of this machine's interfaces.
        port: 0 takes a free one.

    Raises:
        ConfigError: If it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(
            f"port {port} of {host} cannot be opened ({error.strerror or error}). Choose another "
            "by --port."
        ) from None


def address_of(listener: socket.socket) -> str:
    """Return the address of an open port as a client gives it."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def work_folder() -> Iterator[Path]:
    """Make a folder for uploads and results, and remove it at the end.

    Folders of servers that were killed are removed first.
    """
    root = Path(tempfile.gettempdir())
    _sweep(root)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    lock = (folder / f".{_LOCK}").open("wb")
    try:
        _try_lock(lock)
        Path(lock.name).rename(folder / _LOCK)
        yield folder
    finally:
        lock.close()
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Remove the folders of servers that live no more: nobody holds their lock."""
    for folder in root.glob(f"{_PREFIX}*"):
        try:
            if folder.is_symlink():
                continue
            with (folder / _LOCK).open("r+b") as file:
                is_left_over = _try_lock(file)
        except OSError:  # not ours, or one that is just being made
            continue
        if is_left_over:
            shutil.rmtree(folder, ignore_errors=True)
            logger.info("removed %s, which a server left behind", folder)


def _try_lock(file: IO[bytes]) -> bool:
    """Lock a file until it is closed; False where another process has it."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class _Terminated(BaseException):
    """The process was asked to end by SIGTERM; no error."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that everything is cleaned up."""

    def note(number: int, _: FrameType | None) -> None:
        raise _Terminated(number)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def served_by(model: Model, *, tta: Tta, token: str | None, is_local: bool) -> Served:
    """Return what the application tells about a model."""
    from medseg.serve.app import Served

    spec = model.bundle.spec
    return Served(
        name=spec.name,
        configuration=model.bundle.configuration_name,
        folds=model.folds,
        channels=tuple(spec.channels),
        labels=dict(spec.labels),
        tta=tta,
        token=token,
        is_local=is_local,
    )


def serve(
    model: Model,
    listener: socket.socket,
    *,
    limits: Limits,
    tta: Tta = "auto",
    token: str | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> int:
    """Serve a model until SIGINT or SIGTERM.

    Open connections, then the running job, get some seconds; the rest is dropped, and every upload
    and result deleted.

    Args:
        model: Loaded.
        listener: Open port.
        limits: What is accepted.
        tta: Test-time augmentation of every job.
        token: What requests have to bring; None: nothing.
        on_start: Called once everything is ready but the first request.

    Returns:
        Exit status: 128 and the signal. A job may still be computed in a thread, which would hold
        up the end of the process; nothing of it is kept.
    """
    from medseg import __version__
    from medseg.serve.app import create_app
    from medseg.serve.jobs import JobQueue

    channels, status = model.bundle.spec.channels, 0
    is_local = is_loopback(listener.getsockname()[0])
    with work_folder() as folder, _terminable():
        queue = JobQueue(
            lambda case: model.predict(case, tta=tta), folder, channels=channels, limits=limits
        )
        try:
            served = served_by(model, tta=tta, token=token, is_local=is_local)
            server = _server(create_app(queue, served, version=__version__))
            on_start()
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
        except _Terminated:
            status = 128 + signal.SIGTERM
        finally:
            queue.close(_GRACE_SECONDS)
    return status


def _server(app: Any) -> Any:
    import uvicorn

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    return uvicorn.Server(config)
