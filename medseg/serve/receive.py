"""From the stream of a request to files on disk, without a byte too many in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from medseg.execute.sizes import size_words
from medseg.serve.jobs import Job, JobQueue, Slot
from medseg.serve.limits import Limits, Refusal
from medseg.serve.uploads import Receiver, case_of, check_space

_BLOCK = 2**20
"""Bytes handed to a thread at once."""


async def receive_job(request: Request, queue: JobQueue, channels: tuple[str, ...]) -> Job:
    """Write the files of a request to disk and queue them as a job.

    Args:
        request: Its body has not been read.
        queue: Where the job goes.
        channels: Names of the model's channels.

    Raises:
        Refusal: If the queue is full or the request is not accepted; nothing of it is kept.
    """
    boundary = _boundary(request)
    announced = _announced_bytes(request, queue.limits)
    slot = queue.reserve()
    try:
        images = await _images(request, queue, slot, (boundary, announced, channels))
        return queue.submit(slot, images)
    except ClientDisconnect:
        await run_in_threadpool(queue.release, slot)
        raise Refusal(400, "the connection ended before the upload was complete.") from None
    except OSError as error:
        await run_in_threadpool(queue.release, slot)
        raise Refusal(507, f"the server cannot store the upload ({error.strerror}).") from error
    except BaseException:
        await asyncio.shield(run_in_threadpool(queue.release, slot))
        raise


async def _images(
    request: Request, queue: JobQueue, slot: Slot, how: tuple[bytes, int, tuple[str, ...]]
) -> tuple[Path, ...]:
    boundary, announced, channels = how
    take = partial(queue.disk.take, slot.id)
    await run_in_threadpool(check_space, slot.folder, announced)
    receiver = Receiver(slot.folder, boundary, max_parts=len(channels), take=take)
    try:
        async for block in _blocks(request, queue.limits):
            await run_in_threadpool(receiver.feed, block)
        parts = await run_in_threadpool(receiver.finish)
    finally:
        receiver.close()
    return await run_in_threadpool(case_of, parts, channels, limits=queue.limits, take=take)


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise Refusal(
            415, "the request is no form; expected multipart/form-data with one file per channel."
        )
    return boundary


def _announced_bytes(request: Request, limits: Limits) -> int:
    """Return the length the request says it has, 0 if it does not."""
    text = request.headers.get("content-length", "")
    announced = int(text) if text.isascii() and text.isdigit() else 0
    if announced > limits.max_upload_bytes:
        raise _too_large(limits)
    return announced


async def _blocks(request: Request, limits: Limits) -> AsyncIterator[bytes]:
    """Yield the body in pieces of some size, counted and timed."""
    total, pieces, held = 0, [], 0
    end = time.monotonic() + limits.upload_seconds
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(min(limits.idle_seconds, end - time.monotonic())):
                piece = await anext(stream, None)
        except TimeoutError:
            raise Refusal(
                408, "the upload takes too long, or stood still. Send it again."
            ) from None
        if piece is None:
            break
        total += len(piece)
        if total > limits.max_upload_bytes:
            raise _too_large(limits)
        pieces.append(piece)
        held += len(piece)
        if held >= _BLOCK:
            yield b"".join(pieces)
            pieces, held = [], 0
    yield b"".join(pieces)


def _too_large(limits: Limits) -> Refusal:
    return Refusal(
        413,
        f"the upload is larger than {size_words(limits.max_upload_bytes)}, which is the most that "
        "is accepted. Pack it, or cut it to the region of interest.",
    )
