"""Waiting for a job on behalf of a caller of the dialect, who gets pictures or nothing, and may hang up."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Final, TypeVar

from fastapi import Request

from app.api.compat.openai.errors import not_made
from app.api.compat.openai.mapping import encoded
from app.api.compat.openai.schemas import Asked, Image
from app.api.deps import URL_SECONDS, Services
from app.api.jobs import cancel, wait
from app.core.errors import SafelightError, Unavailable
from app.core.job import Job, JobStatus, Output

LATE_SECONDS: Final = 630  # a job ends by its deadline before that

T = TypeVar("T")


class HungUp(Exception):  # noqa: N818  # nobody reads it as an error: there is nobody to answer
    """The caller closed the connection."""


@asynccontextmanager
async def minding(deps: Services, job: Job, *, is_kept: bool) -> AsyncIterator[None]:
    """Cancel a job that nobody waits for any more, whatever the reason; `is_kept`: its caller may come back for it."""
    try:
        yield
    except (HungUp, Unavailable, asyncio.CancelledError, GeneratorExit):
        if not is_kept:
            # Shielded: what cancels us shall not cancel this too.
            await asyncio.shield(_cancel(deps, job))
        raise


async def _cancel(deps: Services, job: Job) -> None:
    # Best effort: its deadline ends it where Redis is away.
    with suppress(SafelightError):
        await cancel(deps, job.tenant, job.id)


async def ended(deps: Services, request: Request, job: Job) -> Job:
    """The job once it has succeeded. Raises HungUp, Unavailable where the service stops, Refused where it failed."""
    job = await while_there(request, wait(deps, job, LATE_SECONDS))
    if not job.status.is_final:
        raise Unavailable("the service is stopping; try again", retry_after=2)
    if job.status is not JobStatus.SUCCEEDED:
        raise not_made(job)
    return job


async def while_there(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, unless the caller hangs up first. Raises HungUp."""
    doing, leaving = asyncio.ensure_future(work), asyncio.create_task(gone(request))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise HungUp
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()


async def gone(request: Request) -> None:
    """Return when the caller has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def images(deps: Services, job: Job, asked: Asked) -> list[Image]:
    """The pictures of a job, in the form that was asked for; one after the other, so that few are in memory."""
    if asked.response_format == "url":
        return [Image(url=deps.storage.sign(output.key, URL_SECONDS)) for output in pictures(job)]
    return [Image(b64_json=await base64_of(deps, output)) for output in pictures(job)]


def pictures(job: Job) -> list[Output]:
    """The job's images, without what else was made of them."""
    return [output for output in job.outputs if output.type == "image" and output.role == "image"]


async def base64_of(deps: Services, output: Output) -> str:
    return encoded(await deps.storage.get_async(output.key))
