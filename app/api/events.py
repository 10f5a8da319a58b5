"""A job's events as a stream (server-sent events), from its beginning or from where a caller left off."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from redis.exceptions import RedisError

from app.api.auth import Caller
from app.api.deps import Deps, Services
from app.api.jobs import JobId
from app.api.problems import responses
from app.core import events
from app.core.errors import NotFound, QueueUnavailable
from app.core.events import JobEvent
from app.core.job import Job, JobStatus

KEEP_ALIVE: Final = 10.0  # seconds; a caller that is gone is noticed when something is written
_NUMBER: Final = re.compile(r"[0-9]{1,9}", re.ASCII)
_STREAM: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": (
            "Events `status` and `progress`, then the last one, named by the job's final status, with the whole job as "
            "its data. A job that was tried again shows `queued` and `processing` a second time."
        ),
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'event: progress\ndata: {"phase":"denoising","step":12,"steps":20}\nid: 4\n\n',
            }
        },
    },
    204: {"description": "The last event was received before: there is nothing more, and no reason to connect again."},
}

router = APIRouter(tags=["jobs"])


class EventStream(StreamingResponse):
    """Not FastAPI's EventSourceResponse: under that a route can only be a generator, which cannot answer 204."""

    media_type = "text/event-stream"


@router.get("/v1/jobs/{job_id}/events", response_class=EventStream, responses=_STREAM | responses(404))
async def stream_events(
    job_id: JobId, caller: Caller, deps: Deps, last_event_id: Annotated[str | None, Header()] = None
) -> Response:
    """What happens to a job, as it happens; ends by itself. `Last-Event-ID` resumes after that event."""
    job = await deps.queue.get(caller.tenant, job_id)
    after = int(last_event_id) if last_event_id and _NUMBER.fullmatch(last_event_id) else 0
    if job.status.is_final and after and not await events.read(deps.redis, job_id, after):
        return Response(status_code=204)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return EventStream(_stream(deps, job, after), headers=headers)


async def _stream(deps: Services, job: Job, after: int) -> AsyncIterator[bytes]:
    try:
        async with deps.hub.watch(job.id) as bell:
            while not deps.is_draining:
                bell.clear()
                for event in await events.read(deps.redis, job.id, after):
                    is_last = _is_last(event)
                    yield await _last(deps, job, event) if is_last else _format(event.type, event.data, event.id)
                    if is_last:
                        return
                    after = event.id
                try:
                    await asyncio.wait_for(bell.wait(), KEEP_ALIVE)
                except TimeoutError:
                    await deps.queue.get(job.tenant, job.id)
                    yield format_sse_event(comment="keep-alive")
    except (RedisError, NotFound, QueueUnavailable):
        # The reply has begun, so it can only end: a caller connects again, and hears then what is wrong.
        return


def _is_last(event: JobEvent) -> bool:
    return event.type == "status" and JobStatus(event.data["status"]).is_final


async def _last(deps: Services, job: Job, event: JobEvent) -> bytes:
    shown = await deps.view(await deps.queue.get(job.tenant, job.id))
    return format_sse_event(event=event.data["status"], data_str=shown.model_dump_json(), id=str(event.id))


def _format(kind: str, data: dict[str, Any], number: int) -> bytes:
    return format_sse_event(event=kind, data_str=json.dumps(data, separators=(",", ":")), id=str(number))
