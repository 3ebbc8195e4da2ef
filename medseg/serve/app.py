"""The web application: routes to a queue, described by OpenAPI."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.middleware.trustedhost import TrustedHostMiddleware

from medseg.serve.jobs import Job, JobQueue
from medseg.serve.limits import Refusal
from medseg.serve.receive import receive_job
from medseg.serve.schemas import (
    Health,
    JobView,
    LimitsView,
    Links,
    ModelView,
    Problem,
    ResultView,
)
from medseg.serve.uploads import ENDINGS, IN_ORDER

_BINARY = {"type": "string", "format": "binary"}
_TOKEN = HTTPBearer(auto_error=False, description="The token of --token-file, if one was given.")
_LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Served:
    """What the application tells about the model, and who may use it."""

    name: str
    configuration: str
    folds: tuple[str, ...]
    channels: tuple[str, ...]
    labels: Mapping[str, int | tuple[int, ...]]
    tta: Literal["auto", "none", "flips"] = "auto"
    token: str | None = None
    """What every request but /health has to bring; None: nothing."""
    is_local: bool = True
    """Whether requests must be addressed to this machine by its own name, which keeps web pages
    out that had another name resolved to it."""


def create_app(queue: JobQueue, served: Served, *, version: str) -> FastAPI:
    """Return the application.

    Args:
        queue: Works the jobs off.
        served: The model, and who may use it.
        version: Version of medseg.
    """
    app = FastAPI(
        title="medseg",
        version=version,
        summary="Segmentation of medical images.",
        description=(
            "Upload a case, ask for its job until it is done, download the segmentation. "
            "GET /v1/model tells which images a case consists of."
        ),
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failed)
    if served.is_local:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK, www_redirect=False)

    @app.get("/health", tags=["server"], responses=_problems(503))
    async def health() -> Health:
        """Tell whether jobs are being worked off; needs no token."""
        if not queue.is_alive:
            raise Refusal(503, "the server works no jobs off. Start it again.")
        return Health(version=version)

    app.include_router(_jobs(queue, served), prefix="/v1")
    return app


def _jobs(queue: JobQueue, served: Served) -> APIRouter:
    """Return the routes that need the token, if there is one."""
    router = APIRouter(dependencies=[_token_check(served.token)], responses=_problems(401, 422))
    _add_reading(router, queue, served)

    @router.post(
        "/jobs",
        status_code=202,
        tags=["jobs"],
        responses=_problems(400, 408, 413, 415, 429, 507),
        openapi_extra={"requestBody": _form()},
    )
    async def create_job(request: Request, response: Response) -> JobView:
        """Upload one case; it is queued.

        One file per channel: in fields called as the channels, or in fields called `image` in the
        order of the channels. A zip archive holds the DICOM files of one series; a single archive
        may hold all channels, each in a folder called as the channel. File names only tell the
        format.
        """
        job = await receive_job(request, queue, served.channels)
        view = _view(job, queue)
        response.headers["Location"] = view.links.job
        return view

    @router.delete(
        "/jobs/{job_id}",
        tags=["jobs"],
        responses={**_problems(404), 204: {"description": "It had ended and is forgotten."}},
        response_model=JobView,
    )
    def delete_job(job_id: str) -> Any:
        """Cancel a job that has not ended; forget one that has. Its files are deleted."""
        job = queue.cancel(job_id)
        return Response(status_code=204) if job is None else _view(job, queue)

    return router


def _add_reading(router: APIRouter, queue: JobQueue, served: Served) -> None:
    """Add the routes that change nothing."""

    @router.get("/model", tags=["server"])
    async def get_model() -> ModelView:
        """Tell what a case consists of, what is found in it and what is accepted."""
        return _model(queue, served)

    @router.get("/jobs/{job_id}", tags=["jobs"], responses=_problems(404))
    async def get_job(job_id: str) -> JobView:
        """Tell where a job stands."""
        return _view(queue.get(job_id), queue)

    @router.get("/jobs/{job_id}/result", tags=["jobs"], responses=_problems(404, 409))
    async def get_result(job_id: str) -> ResultView:
        """Tell what was found."""
        return _result(_done(queue.get(job_id)), served)

    @router.get(
        "/jobs/{job_id}/segmentation",
        tags=["jobs"],
        response_class=FileResponse,
        responses={
            **_problems(404, 409),
            200: {
                "description": "Label map.",
                "content": {"application/gzip": {"schema": _BINARY}},
            },
        },
    )
    async def get_segmentation(job_id: str) -> FileResponse:
        """Download the label map, on the grid of the image, as `.nii.gz`."""
        job = _done(queue.get(job_id))
        return FileResponse(
            job.segmentation, media_type="application/gzip", filename=job.segmentation.name
        )


def _token_check(token: str | None) -> Any:
    """Return a dependency that refuses requests without the token."""

    async def check(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(_TOKEN)],
    ) -> None:
        found = "" if given is None else given.credentials
        if token is not None and not hmac.compare_digest(found.encode(), token.encode()):
            raise Refusal(
                401,
                "the token is missing or wrong; expected a header 'Authorization: Bearer TOKEN'.",
            )

    return Depends(check)


def _view(job: Job, queue: JobQueue) -> JobView:
    address = f"/v1/jobs/{job.id}"
    return JobView(
        id=job.id,
        state=job.state,
        place=queue.place(job),
        created=job.created,
        started=job.started,
        finished=job.finished,
        expires=queue.expires(job),
        message=job.message,
        volumes_ml=None if job.outcome is None else job.outcome.volumes_ml,
        flags=None if job.outcome is None else job.outcome.flags,
        links=Links(
            job=address, segmentation=f"{address}/segmentation", result=f"{address}/result"
        ),
    )


def _done(job: Job) -> Job:
    """Return a job that is done.

    Raises:
        Refusal: If it is not.
    """
    if job.state != "done":
        more = f": {job.message}" if job.message else "; expected it to be done."
        raise Refusal(409, f"the job is {job.state}{more}")
    return job


def _result(job: Job, served: Served) -> ResultView:
    outcome, started, finished = job.outcome, job.started, job.finished
    if outcome is None or started is None or finished is None:
        raise Refusal(409, f"the job is {job.state}; expected it to be done.")
    return ResultView(
        id=job.id,
        model=served.name,
        labels=outcome.labels,
        volumes_ml=outcome.volumes_ml,
        flags=outcome.flags,
        shape=outcome.shape,
        affine=outcome.affine,
        seconds=(finished - started).total_seconds(),
    )


def _model(queue: JobQueue, served: Served) -> ModelView:
    limits = queue.limits
    return ModelView(
        name=served.name,
        configuration=served.configuration,
        folds=served.folds,
        channels=served.channels,
        labels=dict(served.labels),
        tta=served.tta,
        limits=LimitsView(
            max_upload_bytes=limits.max_upload_bytes,
            max_unpacked_bytes=limits.max_unpacked_bytes,
            max_entries=limits.max_entries,
            max_waiting=limits.max_waiting,
            keep_seconds=limits.keep_seconds,
            endings=ENDINGS,
        ),
    )


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    words = {
        400: "The body is no complete form.",
        401: "The token is missing or wrong.",
        404: "There is no such job, or none any more.",
        408: "The upload stood still or took too long.",
        409: "The job is not done.",
        413: "The upload, or what is packed in it, is too large.",
        415: "The body is no form, or a file is of a kind that is not accepted.",
        422: "The request makes no sense: its files are not one case of this model, say.",
        429: "Too many jobs wait; Retry-After tells when to try again.",
        503: "No jobs are worked off.",
        507: "The space for uploads and results is used up.",
    }
    return {status: {"model": Problem, "description": words[status]} for status in statuses}


def _form() -> dict[str, Any]:
    """Return the description of the upload's form."""
    schema = {
        "type": "object",
        "properties": {
            IN_ORDER: {
                "type": "array",
                "items": _BINARY,
                "description": "The files of all channels, in order; else one field per channel, "
                "called as it.",
            }
        },
        "additionalProperties": _BINARY,
    }
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(Problem(detail=detail).model_dump(), status_code=status, headers=headers)


async def _refused(_: Request, error: Exception) -> Response:
    if not isinstance(error, Refusal):
        raise error
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _problem(error.status, error.message, headers)


async def _invalid(_: Request, error: Exception) -> Response:
    problems: Sequence[Any] = error.errors() if isinstance(error, RequestValidationError) else ()
    return _problem(422, "; ".join(str(problem.get("msg", "")) for problem in problems))


async def _failed(_: Request, __: Exception) -> Response:
    return _problem(500, "the server made a mistake; its log says more.")
