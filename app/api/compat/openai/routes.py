"""OpenAI's Images API: pictures from words, from another picture, and like another picture."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from fastapi import APIRouter, Request, Response

from app.api.auth import Caller, Identity, needs
from app.api.compat.openai import forms
from app.api.compat.openai.errors import DialectRoute, ErrorReply
from app.api.compat.openai.mapping import to_reply, to_request
from app.api.compat.openai.schemas import Asked, Described, ImageEdit, ImageGeneration, ImagesResponse, ImageVariation
from app.api.compat.openai.stream import Kind, events
from app.api.compat.openai.waiting import HungUp, ended, images, minding
from app.api.deps import Deps, Services
from app.api.events import EventStream
from app.api.jobs import IdempotencyKey, cancel, fingerprint_of, hand_in
from app.api.schemas import JobRequest
from app.core.api_keys import Scope
from app.core.errors import LimitReached, SafelightError, Unavailable
from app.core.job import Job
from app.core.limits import headers_of

CLOSED: Final = 499  # nginx's word for a caller who hung up; nobody gets to see it but the log
JOB_HEADER: Final = "Safelight-Job"
UNBUFFERED: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorReply, "description": description}
    for status, description in {
        400: "The request cannot be honoured, or its picture was refused.",
        401: "No good key.",
        403: "The key may not do this.",
        404: "There is no such model.",
        408: "The body did not come in time.",
        409: "The job was cancelled by another request.",
        413: "The body is too large.",
        429: "A limit of the tenant's is reached.",
        500: "The picture could not be made.",
        503: "Nobody can make it now.",
        504: "It was not made within ten minutes.",
    }.items()
}
_STREAMED: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "headers": {JOB_HEADER: {"description": "The job's id, under /v1/jobs.", "schema": {"type": "string"}}},
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}

router = APIRouter(tags=["openai"], route_class=DialectRoute)


@router.post("/v1/images/generations", response_model=ImagesResponse, responses=_ERRORS | _STREAMED)
@needs(Scope.SUBMIT)
async def create_image(
    body: ImageGeneration, request: Request, caller: Caller, deps: Deps, idempotency_key: IdempotencyKey = None
) -> Response:
    """Make pictures from words, and reply when they are there. OpenAI's `images.generate`; `stream` for events."""
    return await _answer(deps, request, caller, body, kind="image_generation", idempotency_key=idempotency_key)


@router.post(
    "/v1/images/edits",
    response_model=ImagesResponse,
    responses=_ERRORS | _STREAMED,
    openapi_extra=forms.described(ImageEdit, ("image", "mask"), ("image", "prompt")),
)
@needs(Scope.SUBMIT)
async def edit_image(request: Request, caller: Caller, deps: Deps, idempotency_key: IdempotencyKey = None) -> Response:
    """Paint a picture anew, where its mask is transparent or all of it. OpenAI's `images.edit`; `stream` for events."""
    asked, uploads = await forms.read(request, caller, deps, ImageEdit, ("image", "mask"))
    return await _answer(
        deps, request, caller, asked, kind="image_edit", idempotency_key=idempotency_key, uploads=uploads
    )


@router.post(
    "/v1/images/variations",
    response_model=ImagesResponse,
    responses=_ERRORS | _STREAMED,
    openapi_extra=forms.described(ImageVariation, ("image",), ("image",)),
)
@needs(Scope.SUBMIT)
async def vary_image(request: Request, caller: Caller, deps: Deps, idempotency_key: IdempotencyKey = None) -> Response:
    """Make pictures like another. OpenAI's `images.create_variation`."""
    asked, uploads = await forms.read(request, caller, deps, ImageVariation, ("image",))
    return await _answer(
        deps, request, caller, asked, kind="image_edit", idempotency_key=idempotency_key, uploads=uploads
    )


async def _answer(
    deps: Services,
    request: Request,
    caller: Identity,
    asked: Asked,
    *,
    kind: Kind,
    idempotency_key: str | None,
    uploads: Mapping[str, str] | None = None,
) -> Response:
    """Queue the job, wait for it, and give its pictures."""
    spec = deps.catalog.get(asked.model)
    wanted, is_kept = to_request(asked, spec, uploads), idempotency_key is not None
    known = await _known(deps, caller, wanted, idempotency_key)
    # A stream of a job that has ended is over at once.
    streamed = asked if isinstance(asked, Described) and asked.stream else None
    counts = streamed is not None and not (known and known.status.is_final)
    if counts:
        await deps.streams.check(caller.tenant)
    if known is None and spec.name not in await deps.served():
        raise Unavailable(f"no live worker serves model {spec.name!r}; try again later", retry_after=5)
    job, _, bucket = await hand_in(wanted, caller, deps, request.state.request_id, idempotency_key)
    headers = headers_of(bucket) | {JOB_HEADER: job.id}
    if streamed:
        if counts:
            await _check_again(deps, job, is_kept=is_kept)
        made = events(deps, request, job, streamed, kind, is_kept=is_kept)
        stream = EventStream(made, headers=headers | UNBUFFERED)
        stream.open_for = (deps.streams, caller.tenant)
        return stream
    try:
        async with minding(deps, job, is_kept=is_kept):
            job = await ended(deps, request, job)
    except HungUp:
        return Response(status_code=CLOSED)
    reply = to_reply(job, await images(deps, job, asked), asked)
    return Response(reply.model_dump_json(exclude_none=True), headers=headers, media_type="application/json")


async def _known(deps: Services, caller: Identity, wanted: JobRequest, idempotency_key: str | None) -> Job | None:
    """The job that the same request has made before. Raises IdempotencyMismatch."""
    if idempotency_key is None:
        return None
    return await deps.queue.find(caller.tenant, idempotency_key, fingerprint_of(wanted))


async def _check_again(deps: Services, job: Job, *, is_kept: bool) -> None:
    """As `Streams.check`, for other streams may have begun since; `is_kept`: the job's caller comes back for it."""
    try:
        await deps.streams.check(job.tenant)
    except LimitReached:
        if not is_kept:
            # Best effort: its deadline ends it where Redis is away.
            with suppress(SafelightError):
                await cancel(deps, job.tenant, job.id)
        raise
