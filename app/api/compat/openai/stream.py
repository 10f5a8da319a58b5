"""A request of the dialect as server-sent events: partial images while the job runs, then each picture."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any, Final, Literal

from fastapi import Request
from fastapi.sse import format_sse_event
from redis.exceptions import RedisError

from app.api.compat.openai.errors import Refused, refusal
from app.api.compat.openai.mapping import end_user, shown_quality
from app.api.compat.openai.schemas import Described
from app.api.compat.openai.waiting import HungUp, base64_of, ended, minding, pictures, while_there
from app.api.deps import Services
from app.core.errors import SafelightError
from app.core.events import OfJob
from app.core.job import Job
from app.core.previews import PreviewsOf, watching

Kind = Literal["image_generation", "image_edit"]
KEEP_ALIVE: Final = 10.0  # seconds
# Tokens are not what is counted here, and the clients' types have the field.
NO_TOKENS: Final = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


async def events(
    deps: Services, request: Request, job: Job, asked: Described, kind: Kind, *, is_kept: bool
) -> AsyncIterator[bytes]:
    """The stream; a failure is its last event, for the reply has begun."""
    about = _about(job, asked)
    try:
        async with minding(deps, job, is_kept=is_kept):
            if asked.partial_images:
                async with aclosing(_partial(deps, request, job, asked.partial_images)) as found:
                    async for part in found:
                        yield _event(f"{kind}.partial_image", about | part) if part else _ALIVE
            job = await ended(deps, request, job)
            for output in pictures(job):
                picture = about | {"b64_json": await base64_of(deps, output), "usage": NO_TOKENS}
                yield _event(f"{kind}.completed", picture)
    except HungUp:
        return
    except (Refused, SafelightError, RedisError) as error:
        yield _event("error", refusal(error).body.model_dump())


_ALIVE: Final = format_sse_event(comment="keep-alive")


def _about(job: Job, asked: Described) -> dict[str, Any]:
    about = {
        "created_at": int(time.time()),
        "background": "opaque",
        "output_format": job.params.output_format,
        "quality": shown_quality(asked),
        "size": f"{job.params.width}x{job.params.height}",
    }
    return about | ({"safety_identifier": end_user(asked)} if end_user(asked) else {})


async def _partial(deps: Services, request: Request, job: Job, wanted: int) -> AsyncGenerator[dict[str, Any] | None]:
    """`wanted` previews at the most, spread over the steps, and None when the stream should show that it is alive.

    Ends with the job, or when all were given. Raises HungUp.
    """
    feed, shown, given, clock = PreviewsOf(job.id), 0, 0, asyncio.get_running_loop().time
    look_at = clock() + KEEP_ALIVE
    with suppress(RedisError, OSError, SafelightError):  # the end of the job is waited for elsewhere
        async with watching(deps.redis, job.id) as stay, deps.hub.watch(OfJob(job.id)) as bell:
            while given < wanted and not deps.is_draining:
                bell.clear()
                for preview in await deps.hub.read(feed, shown):
                    shown = preview.id
                    if given < wanted and _is_due(preview.data, given, wanted):
                        yield _part(preview.data, given)
                        given += 1
                async with deps.places:
                    if (await deps.queue.get(job.tenant, job.id)).status.is_final:
                        return
                if clock() >= look_at:
                    look_at = clock() + KEEP_ALIVE
                    await stay()
                    yield None
                with suppress(TimeoutError):
                    await while_there(request, asyncio.wait_for(bell.wait(), look_at - clock()))


def _is_due(preview: dict[str, Any], given: int, wanted: int) -> bool:
    """Whether enough steps were done for the next one, so that they are spread evenly."""
    return bool(preview["step"] * (wanted + 1) >= preview["steps"] * (given + 1))


def _part(preview: dict[str, Any], index: int) -> dict[str, Any]:
    head, _, body = preview["image"].partition(",")  # data:image/webp;base64,...
    kind = head.removeprefix("data:image/").removesuffix(";base64")
    return {"b64_json": body, "partial_image_index": index, "output_format": kind}


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return format_sse_event(event=kind, data_str=json.dumps({"type": kind, **data}, separators=(",", ":")))
