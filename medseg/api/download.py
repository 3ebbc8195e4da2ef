"""Download one large file: an interrupted download goes on, and what is damaged is not kept.

```text
FOLDER/
  FILE              whole, and verified as far as it could be
  FILE.json         DownloadRecord
  FILE.part         of a download that was interrupted
  FILE.part.json    DownloadState: what it is a part of
```
"""

from __future__ import annotations

import http.client
import logging
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from medseg.bundles.files import file_checksum
from medseg.errors import BundleError, ConfigError, DatasetError
from medseg.execute.progress import progress_bar
from medseg.execute.sizes import size_words
from medseg.io.space import full_disk_named, require_space
from medseg.schema.base import Schema, read, write
from medseg.schema.catalogue import DownloadRecord, DownloadState

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Schema)

_BLOCK = 2**20
_MEGABYTE = 10**6
_SECONDS = 60.0
"""How long a server may be silent."""
_OK, _PARTIAL, _NOT_SATISFIABLE = 200, 206, 416


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Where the file, its record, its part and the part's state lie."""

    file: Path

    @property
    def record(self) -> Path:
        """Return the path of the record."""
        return self.file.with_name(f"{self.file.name}.json")

    @property
    def part(self) -> Path:
        """Return the path of what has come so far."""
        return self.file.with_name(f"{self.file.name}.part")

    @property
    def state(self) -> Path:
        """Return the path of what the part is of."""
        return self.file.with_name(f"{self.file.name}.part.json")

    def forget_part(self) -> None:
        """Delete the part."""
        self.part.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)


def download(
    address: str,
    file: Path,
    *,
    checksum: str = "",
    size_bytes: int | None = None,
    progress: bool = False,
) -> DownloadRecord:
    """Download a file, go on with it, or find it there already.

    Args:
        address: http or https.
        file: Where it goes; its part and its record lie beside it.
        checksum: "md5:..." or "sha256:..." as published; empty if none is known.
        size_bytes: Its size as published; None if it is not known.
        progress: Show a progress bar on standard error.

    Returns:
        What it is; the same is kept beside it.

    Raises:
        ConfigError: If the address is not of http or https.
        BundleError: If the server refuses, the connection ends early (what has come is kept, and
            the same call goes on), or what came is not what was published (nothing is kept).
        DatasetError: If the disk is too small.
    """
    paths = Paths(file=Path(file))
    if not address.startswith(("https://", "http://")):
        raise ConfigError(f"{address}: expected an address that begins with https:// or http://.")
    if (found := _already_there(paths, address, checksum)) is not None:
        return found
    paths.file.parent.mkdir(parents=True, exist_ok=True)
    _receive(paths, address, checksum=checksum, size_bytes=size_bytes, progress=progress)
    sha256 = _verified(paths, address, checksum)
    _warn_of_change(paths, address, sha256)
    record = DownloadRecord(
        address=address,
        size_bytes=paths.part.stat().st_size,
        sha256=sha256,
        compared_with=checksum,
    )
    os.replace(paths.part, paths.file)
    write(paths.record, record)
    paths.forget_part()
    return record


def checksum_problem(path: Path, checksum: str) -> str | None:
    """Return how a file differs from a published checksum, in words; None if it does not."""
    if not checksum:
        return None
    algorithm, _, expected = checksum.partition(":")
    found = file_checksum(path, algorithm)
    if found == expected:
        return None
    return f"its {algorithm} is {found}, expected {expected}"


def _already_there(paths: Paths, address: str, checksum: str) -> DownloadRecord | None:
    """Return the record of an earlier download that is still whole, else None."""
    record = _read_or_none(DownloadRecord, paths.record)
    if record is None or record.address != address or not paths.file.is_file():
        return None
    if file_checksum(paths.file) != record.sha256:
        logger.warning("%s: damaged since it was downloaded; downloading it again.", paths.file)
        return None
    if record.compared_with != checksum:
        if checksum_problem(paths.file, checksum) is not None:
            logger.warning("%s: not what is published; downloading it again.", paths.file)
            return None
        record = record.model_copy(update={"compared_with": checksum})
        write(paths.record, record)
    return record


def _receive(
    paths: Paths, address: str, *, checksum: str, size_bytes: int | None, progress: bool
) -> None:
    """Bring the part to its full length."""
    state = _resumable(paths, address, checksum)
    have = paths.part.stat().st_size if state is not None else 0
    if state is not None and have == state.size_bytes:
        return
    if state is not None:
        with _opened(address, _range(have, state)) as response:
            if (answer := _answer(response, have, state)) is not None:
                _store(paths, address, response, answer, size_bytes, progress=progress)
                return
        paths.forget_part()
    with _opened(address, {}) as response:
        answer = _Answer(start=0, total=_length(response.headers))
        _store(paths, address, response, answer, size_bytes, progress=progress)


def _resumable(paths: Paths, address: str, checksum: str) -> DownloadState | None:
    """Return what a part is of, if it may be gone on with; otherwise delete it.

    Without a published checksum, and nothing from the server that tells whether its file is still
    the same, halves of two files could be joined unnoticed.
    """
    state = _read_or_none(DownloadState, paths.state)
    if (
        state is not None
        and state.address == address
        and (state.validator or checksum)
        and paths.part.is_file()
        and 0 < paths.part.stat().st_size <= (state.size_bytes or math.inf)
    ):
        return state
    paths.forget_part()
    return None


def _range(have: int, state: DownloadState) -> dict[str, str]:
    """Return what asks for the rest of a file, and for all of it if it has changed."""
    guard = {"If-Range": state.validator} if state.validator else {}
    return {"Range": f"bytes={have}-", **guard}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What a server sends: the file from `start` on, of `total` bytes in all."""

    start: int
    total: int | None


def _answer(response: Any, have: int, state: DownloadState) -> _Answer | None:
    """Return what the server sends when asked for the rest; None if it is of no use."""
    if response.status == _OK:
        logger.info("%s has changed, or its server cannot go on: from the start.", state.address)
        return _Answer(start=0, total=_length(response.headers))
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers["Content-Range"] or "")
    if response.status != _PARTIAL or match is None:
        return None
    start, total = int(match[1]), int(match[2])
    fits = start == have and state.size_bytes in (None, total)
    return _Answer(start=start, total=total) if fits else None


def _store(
    paths: Paths,
    address: str,
    response: Any,
    answer: _Answer,
    size_bytes: int | None,
    *,
    progress: bool,
) -> None:
    """Write what the server sends after what is there, and check that all of it came."""
    start, total = answer.start, answer.total
    if total is not None and size_bytes is not None and total != size_bytes:
        raise BundleError(
            f"{address}: the server offers {total} bytes, the catalogue says {size_bytes}: another "
            "file. Download it by hand if you trust it, and import it with 'import nnunet'."
        )
    if total is not None:
        require_space(paths.part, total - start)
    if start == 0:
        paths.forget_part()
        validator = _validator(response.headers)
        write(paths.state, DownloadState(address=address, validator=validator, size_bytes=total))
    try:
        with full_disk_named(paths.part), paths.part.open("ab" if start else "wb") as target:
            _copy(response, target, address, answer, progress=progress)
    except DatasetError:
        raise BundleError(
            f"{paths.part}: the disk is full. What came is kept; free some space, and run the same "
            "command again to go on."
        ) from None
    if total is not None and (found := paths.part.stat().st_size) > total:
        paths.forget_part()
        raise BundleError(
            f"{address}: {found} bytes came, expected {total}; nothing was kept. Is another "
            "process downloading it to the same folder? Run the command again."
        )


def _copy(
    response: Any, target: IO[bytes], address: str, answer: _Answer, *, progress: bool
) -> None:
    """Write what comes, as long as it comes.

    Raises:
        BundleError: If the connection ends before the file does.
    """
    have, total, problem = answer.start, answer.total, ""
    title = address.partition("?")[0].rpartition("/")[2]
    megabytes = None if total is None else total // _MEGABYTE
    with progress_bar(megabytes, title, shown=progress, unit="MB") as bar:
        bar.update(have // _MEGABYTE)
        while True:
            try:
                block = response.read(_BLOCK)
            except (OSError, http.client.HTTPException) as error:
                block, problem = b"", f" ({_reason(error)})"
            if not block:
                break
            target.write(block)
            bar.update((have + len(block)) // _MEGABYTE - have // _MEGABYTE)
            have += len(block)
    if problem or (total is not None and have < total):
        of = "" if total is None else f" of {size_words(total)}"
        raise BundleError(
            f"{address}: the connection ended{problem} after {size_words(have)}{of}. What came is "
            "kept; run the same command again to go on."
        )


def _verified(paths: Paths, address: str, checksum: str) -> str:
    """Return the part's sha256, once it is known to be what was published."""
    if paths.part.stat().st_size == 0:
        paths.forget_part()
        raise BundleError(f"{address}: the server sent an empty file. Try again later.")
    if (problem := checksum_problem(paths.part, checksum)) is not None:
        paths.forget_part()
        raise BundleError(
            f"{address}: what came is not the published file: {problem}. Nothing was kept. Run the "
            "command again; if it happens again, the file there has changed, or the connection "
            "alters it."
        )
    return file_checksum(paths.part)


def _warn_of_change(paths: Paths, address: str, sha256: str) -> None:
    """Say so where an earlier download from the same place was another file."""
    before = _read_or_none(DownloadRecord, paths.record)
    if before is not None and before.address == address and before.sha256 != sha256:
        logger.warning(
            "%s: sha256 was %s when it was last downloaded, now it is %s; its owners have "
            "probably replaced it.", address, before.sha256, sha256
        )  # fmt: skip


def _read_or_none(schema: type[S], path: Path) -> S | None:
    """Return a small file of ours; one that is missing or damaged says nothing."""
    try:
        return read(schema, path) if path.is_file() else None
    except ConfigError:
        return None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow a server that sends elsewhere, but only to https."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Return the request for the new address.

        Raises:
            BundleError: If it is not of https.
        """
        if not newurl.lower().startswith("https://"):
            raise BundleError(
                f"{req.full_url}: the server sends on to {newurl}; only addresses that begin with "
                "https:// are followed. Download it by hand if you trust it."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opened(address: str, headers: Mapping[str, str]) -> Any:
    """Return the server's answer, of status 200, 206 or 416."""
    plain = {"User-Agent": "medseg", "Accept-Encoding": "identity"}
    request = urllib.request.Request(address, headers={**plain, **headers})
    try:
        return urllib.request.build_opener(_Redirects).open(request, timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == _NOT_SATISFIABLE and "Range" in headers:
            return error
        with error:
            raise BundleError(
                f"{address}: the server answered {error.code} ({error.reason}). "
                f"{_ADVICE.get(error.code, 'Try again later.')}"
            ) from None
    except (OSError, http.client.HTTPException) as error:
        raise BundleError(
            f"{address}: cannot be reached ({_reason(error)}). Check the connection, or download "
            "the file elsewhere and give its folder with --from."
        ) from None


_ADVICE = {
    401: "It is not public; ask its owners.",
    403: "It is not public, or not from here; download it elsewhere and use --from.",
    404: "The file has moved or was withdrawn; look for it at its owners' page.",
    410: "The file was withdrawn; look for it at its owners' page.",
    429: "It was asked too often; wait before you try again.",
}
"""What a user can do about an answer."""


def _reason(error: BaseException) -> str:
    """Return what happened in words; the library hides it one level down."""
    return str(getattr(error, "reason", None) or error) or type(error).__name__


def _length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("Content-Length") or ""
    return int(text) if text.isdigit() else None


def _validator(headers: Mapping[str, str]) -> str:
    """Return what tells whether the file has changed; a weak ETag does not."""
    tag = headers.get("ETag") or ""
    return tag if tag.startswith('"') else headers.get("Last-Modified") or ""
