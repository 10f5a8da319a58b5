"""Events as streams (server-sent events): of one job from its beginning, of all a tenant's jobs from now on."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext, suppress
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from redis.exceptions import RedisError
from starlette.types import Receive, Send
from starlette.types import Scope as Scope_

from app.api.auth import Caller, Identity, is_still_good, needs
from app.api.deps import Deps, Services
from app.api.jobs import JobId
from app.api.problems import responses
from app.api.streams import Streams
from app.core import events
from app.core.api_keys import Scope
from app.core.errors import NotFound, QueueUnavailable
from app.core.events import Feed, JobEvent, OfJob, OfTenant
from app.core.job import Job, JobStatus
from app.core.previews import PreviewsOf, watching

KEEP_ALIVE: Final = 10.0  # seconds; a caller that is gone is noticed when something is written
_NUMBER: Final = re.compile(r"[0-9]{1,9}", re.ASCII)
_EVENT_STREAM: Final = "text/event-stream"
HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_OF_JOB: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": (
            "Events `status` and `progress`, then the last one, named by the job's final status, with the whole job as "
            "its data. A job that was tried again shows `queued` and `processing` a second time. With `previews` there "
            "are events `preview` between them, of no id, for which nothing is sent again: `index` says which image "
            "it is of, `step` of `steps` how far that is, and `image` is a small picture as a data URL. A model whose "
            "latents nobody can read, as a video's, has none."
        ),
        "content": {
            _EVENT_STREAM: {
                "schema": {"type": "string"},
                "example": 'event: progress\ndata: {"phase":"denoising","step":12,"steps":20}\nid: 4\n\n',
            }
        },
    },
    204: {"description": "The last event was received before: there is nothing more, and no reason to connect again."},
}
_OF_TENANT: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": (
            "An event `status` whenever a job of yours changes its status. `missed` says that events between were "
            "dropped before you asked for them: ten thousand are kept. The stream does not end by itself."
        ),
        "content": {
            _EVENT_STREAM: {
                "schema": {"type": "string"},
                "example": 'event: status\ndata: {"job":"job_...","status":"succeeded","at":1700000000000}\nid: 17\n\n',
            }
        },
    },
}
LastEventId = Annotated[str | None, Header(description="Go on after this event.")]
WithPreviews = Annotated[bool, Query(description="Small pictures of what is being made, too.")]

router = APIRouter(tags=["jobs"])


class EventStream(StreamingResponse):
    """Not FastAPI's EventSourceResponse: under that a route can only be a generator, which cannot answer 204."""

    media_type = _EVENT_STREAM
    open_for: tuple[Streams, str] | None = None  # whose stream it is

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        with self.open_for[0].one_more(self.open_for[1]) if self.open_for else nullcontext():
            await super().__call__(scope, receive, send)


async def open_stream(deps: Services, caller: Identity, made: AsyncIterator[bytes]) -> EventStream:
    """A stream of events. Raises LimitReached where the caller has as many open as he may."""
    await deps.streams.check(caller.tenant)
    stream = EventStream(made, headers=HEADERS)
    stream.open_for = (deps.streams, caller.tenant)
    return stream


@router.get("/v1/jobs/{job_id}/events", response_class=EventStream, responses=_OF_JOB | responses(404, 429))
@needs(Scope.READ)
async def stream_events(
    job_id: JobId, caller: Caller, deps: Deps, last_event_id: LastEventId = None, *, previews: WithPreviews = False
) -> Response:
    """What happens to a job, as it happens; ends by itself. `Last-Event-ID` resumes after that event."""
    job = await deps.queue.get(caller.tenant, job_id)
    after = position(last_event_id) or 0
    if job.status.is_final and after and not await deps.hub.read(OfJob(job_id), after):
        return Response(status_code=204)
    after = await events.position_in(deps.redis, OfJob(job_id), after)
    made = _watched(deps, caller, job, after) if previews else _of_job(deps, caller, job, after)
    return await open_stream(deps, caller, made)


@router.get("/v1/events", response_class=EventStream, responses=_OF_TENANT | responses(429))
@needs(Scope.READ)
async def stream_all_events(caller: Caller, deps: Deps, last_event_id: LastEventId = None) -> Response:
    """The statuses of all your jobs, as they change. `Last-Event-ID` resumes after that event; 0: the oldest kept."""
    feed = OfTenant(caller.tenant)
    last, after = await events.last_of(deps.redis, feed), position(last_event_id)
    found = _of_tenant(deps, caller, feed, last if after is None else after, last)
    return await open_stream(deps, caller, found)


def position(last_event_id: str | None) -> int | None:
    return int(last_event_id) if last_event_id and _NUMBER.fullmatch(last_event_id) else None


async def _watched(deps: Services, caller: Identity, job: Job, after: int) -> AsyncIterator[bytes]:
    """As `_of_job`, with previews, which are made because of this."""
    try:
        async with watching(deps.redis, job.id) as stay:
            async for part in _of_job(deps, caller, job, after, stay):
                yield part
    except (RedisError, OSError):
        return


async def _of_job(
    deps: Services, caller: Identity, job: Job, after: int, stay: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[bytes]:
    """`stay` is called at every keep-alive of a stream with previews."""
    try:
        async for event in follow(deps, caller, OfJob(job.id), after, PreviewsOf(job.id) if stay else None):
            if event is None:
                async with deps.places:
                    await deps.queue.get(job.tenant, job.id)
                if stay:
                    await stay()
                yield format_sse_event(comment="keep-alive")
            elif _is_last(event):
                yield await _last(deps, job, event)
                return
            else:
                yield format_event(event)
    except (RedisError, OSError, NotFound, QueueUnavailable):
        # The reply has begun, so it can only end: a caller connects again, and hears then what is wrong.
        return


async def _of_tenant(deps: Services, caller: Identity, feed: OfTenant, after: int, last: int) -> AsyncIterator[bytes]:
    try:
        # Written at once, so that a caller knows that it is heard from here on.
        yield format_sse_event(comment="open")
        if after > last:  # a number of another Redis: what it had seen there, nobody can tell
            yield _missed(last, last)
            after = last
        async for event in follow(deps, caller, feed, after):
            if event is None:
                yield format_sse_event(comment="keep-alive")
                continue
            if event.id > after + 1:
                yield _missed(after, event.id - 1)
            yield format_event(event)
            after = event.id
    except (RedisError, OSError):
        return


async def follow(
    deps: Services, caller: Identity, feed: Feed, after: int, previews: PreviewsOf | None = None
) -> AsyncIterator[JobEvent | None]:
    """The events after `after`, and None in between whenever somebody should say that the stream is alive.

    `previews` come in between; they have the channel of `feed`.

    Ends when the service stops, or when the caller's key does.
    """
    clock = asyncio.get_running_loop().time
    look_at, shown = clock() + KEEP_ALIVE, 0
    async with deps.hub.watch(feed) as bell:
        while not deps.is_draining:
            bell.clear()
            for preview in await deps.hub.read(previews, shown) if previews else ():
                yield preview
                shown = preview.id
            found = await deps.hub.read(feed, after)
            for event in found:
                yield event
                after = event.id
            if clock() >= look_at:
                if not await is_still_good(deps, caller):
                    return
                look_at = clock() + KEEP_ALIVE
                yield None
            if not found:
                with suppress(TimeoutError):
                    await asyncio.wait_for(bell.wait(), look_at - clock())


def _is_last(event: JobEvent) -> bool:
    return event.type == "status" and JobStatus(event.data["status"]).is_final


async def _last(deps: Services, job: Job, event: JobEvent) -> bytes:
    async with deps.places:
        shown = await deps.view(await deps.queue.get(job.tenant, job.id))
    return format_sse_event(event=event.data["status"], data_str=shown.model_dump_json(), id=str(event.id))


def _missed(after: int, last: int) -> bytes:
    return format_sse_event(event="missed", data_str=json.dumps({"after": after, "until": last}), id=str(last))


def format_event(event: JobEvent) -> bytes:
    data = json.dumps(event.data, separators=(",", ":"))
    number = None if event.type == "preview" else str(event.id)
    return format_sse_event(event=event.type, data_str=data, id=number)
