"""Batches: submit many jobs at once, look, list, cancel, delete, and hear how they get on."""

import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.sse import format_sse_event
from redis.exceptions import RedisError

from app.api.auth import Caller, Identity, needs
from app.api.batch_members import BatchRequest, submissions
from app.api.deps import Deps, Services
from app.api.events import EventStream, LastEventId, follow, format_event, open_stream, position
from app.api.jobs import IdempotencyKey
from app.api.problems import responses
from app.api.schemas import BatchFilter, JobFilter, ListResponse
from app.core.api_keys import Scope
from app.core.batch import Batch, BatchStatus, BatchView, batch_view
from app.core.batches import DELETING, BatchSubmission
from app.core.errors import NotFound, QueueUnavailable
from app.core.events import JobEvent, OfBatch, position_in
from app.core.job import JobView

_BATCH_ID: Final = re.compile(r"batch_[0-9a-hjkmnp-tv-z]{26}", re.ASCII)
_STRING: Final = {"schema": {"type": "string"}}
_SUBMIT_HEADERS: Final[dict[str, Any]] = {
    "Location": {"description": "The batch's URL.", **_STRING},
    "Idempotent-Replayed": {"description": "true: this Idempotency-Key had made the batch before.", **_STRING},
}
_EVENTS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": (
            "Events `status` of the batch and `job` of its members (its `index` among the requests, and the status "
            "that it entered; that it was queued first is not said), then the last one, named by the batch's final "
            "status, with the whole batch as its data."
        ),
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'event: job\ndata: {"job":"job_...","index":4,"status":"succeeded","at":17}\nid: 9\n\n',
            }
        },
    },
    204: {"description": "The last event was received before: there is nothing more, and no reason to connect again."},
}

router = APIRouter(tags=["batches"])


def _batch_id(
    batch_id: Annotated[
        str, Path(json_schema_extra={"pattern": f"^{_BATCH_ID.pattern}$"}, examples=["batch_" + "0" * 26])
    ],
) -> str:
    # A malformed id is answered exactly as one that nobody has.
    if not _BATCH_ID.fullmatch(batch_id):
        raise NotFound("there is no such batch")
    return batch_id


BatchId = Annotated[str, Depends(_batch_id)]


@router.post(
    "/v1/batches",
    status_code=202,
    responses={
        202: {"description": "Promised; its jobs are being queued.", "headers": _SUBMIT_HEADERS},
        **responses(404, 408, 409, 413, 422),
    },
)
@needs(Scope.SUBMIT)
async def submit_batch(
    *,
    body: BatchRequest,
    request: Request,
    response: Response,
    caller: Caller,
    deps: Deps,
    idempotency_key: IdempotencyKey = None,
) -> BatchView:
    """Queue up to 10,000 jobs as one: all of them, or none. Each job is as one of `POST /v1/jobs`."""
    if body.webhook:
        deps.guard.check_url(body.webhook.url)
    about = BatchSubmission(
        total=body.total,
        webhook_url=body.webhook.url if body.webhook else None,
        metadata=body.metadata,
        idempotency_key=idempotency_key,
        fingerprint=body.fingerprint(),
        request_id=request.state.request_id,
    )
    batch, is_new = await deps.batches.find(caller.tenant, about), False
    if batch is None:
        async with aclosing(submissions(body, caller, deps, request.state.request_id)) as members:
            batch, is_new = await deps.batches.create(caller.tenant, about, members)
    if not is_new:
        response.headers["Idempotent-Replayed"] = "true"
    shown = _view(deps, batch)
    response.headers["Location"] = shown.links.self
    return shown


@router.get("/v1/batches", responses=responses(422))
@needs(Scope.READ)
async def list_batches(caller: Caller, deps: Deps, which: Annotated[BatchFilter, Query()]) -> ListResponse[BatchView]:
    """Your batches, newest first."""
    page = await deps.batches.list(caller.tenant, limit=which.limit, cursor=which.cursor)
    return ListResponse(data=[_view(deps, batch) for batch in page.batches], next_cursor=page.next_cursor)


@router.get("/v1/batches/{batch_id}", responses=responses(404))
@needs(Scope.READ)
async def get_batch(batch_id: BatchId, caller: Caller, deps: Deps) -> BatchView:
    """A batch, and how many of its jobs stand where."""
    return _view(deps, await deps.batches.get(caller.tenant, batch_id))


@router.get("/v1/batches/{batch_id}/jobs", responses=responses(404, 422))
@needs(Scope.READ)
async def list_batch_jobs(
    batch_id: BatchId, caller: Caller, deps: Deps, which: Annotated[JobFilter, Query()]
) -> ListResponse[JobView]:
    """The jobs of a batch that have been queued, in the order of its requests."""
    page = await deps.batches.jobs(caller.tenant, batch_id, status=which.status, limit=which.limit, cursor=which.cursor)
    return ListResponse(data=await deps.views(page.jobs), next_cursor=page.next_cursor)


@router.get("/v1/batches/{batch_id}/events", response_class=EventStream, responses=_EVENTS | responses(404, 429))
@needs(Scope.READ)
async def stream_batch_events(
    batch_id: BatchId, caller: Caller, deps: Deps, last_event_id: LastEventId = None
) -> Response:
    """What happens to a batch's jobs, from the beginning; ends by itself. `Last-Event-ID` resumes after that event."""
    batch = await deps.batches.get(caller.tenant, batch_id)
    after = position(last_event_id) or 0
    if batch.status.is_final and after and not await deps.hub.read(OfBatch(batch_id), after):
        return Response(status_code=204)
    after = await position_in(deps.redis, OfBatch(batch_id), after)
    return await open_stream(deps, caller, _events(deps, caller, batch, after))


@router.post("/v1/batches/{batch_id}/cancel", responses=responses(404))
@needs(Scope.SUBMIT)
async def cancel_batch(batch_id: BatchId, caller: Caller, deps: Deps) -> BatchView:
    """Stop a batch: what is not queued never is, and what is, stops. One that has ended stays as it is."""
    return _view(deps, await deps.batches.cancel(caller.tenant, batch_id))


@router.delete("/v1/batches/{batch_id}", status_code=204, responses=responses(404))
@needs(Scope.SUBMIT)
async def delete_batch(batch_id: BatchId, caller: Caller, deps: Deps) -> None:
    """Forget a batch. Its jobs are cancelled if they run, and removed with their objects within a few minutes."""
    await deps.batches.delete(caller.tenant, batch_id)


def _view(deps: Services, batch: Batch) -> BatchView:
    return batch_view(batch, deps.settings.base_url)


async def _events(deps: Services, caller: Identity, batch: Batch, after: int) -> AsyncIterator[bytes]:
    try:
        async for event in follow(deps, caller, OfBatch(batch.id), after):
            if event is None:
                async with deps.places:
                    await deps.batches.get(batch.tenant, batch.id)
                yield format_sse_event(comment="keep-alive")
            elif _is_last(event):
                async with deps.places:
                    shown = _view(deps, await deps.batches.get(batch.tenant, batch.id))
                yield format_sse_event(event=event.data["status"], data_str=shown.model_dump_json(), id=str(event.id))
                return
            elif event.type != "status" or event.data["status"] != DELETING:
                yield format_event(event)
    except (RedisError, OSError, NotFound, QueueUnavailable):
        # The reply has begun, so it can only end: a caller connects again, and hears then what is wrong.
        return


def _is_last(event: JobEvent) -> bool:
    # DELETING is none of the statuses that anybody sees: the stream then ends by the next look at the batch.
    return event.type == "status" and event.data["status"] in (BatchStatus.COMPLETED, BatchStatus.CANCELED)
