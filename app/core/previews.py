"""Previews: pictures of a job in the making, made only while somebody says that he watches."""

import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError

from app.core import redis_keys as keys
from app.core.events import JobEvent

WATCH_SECONDS: Final = 30  # after this a watcher counts as gone unless it has said again that it is there


@dataclass(frozen=True, slots=True)
class PreviewsOf:
    """A job's latest previews as a feed; its events' channel says when there is one. Those that passed are gone."""

    job_id: str

    @property
    def key(self) -> str:
        return keys.EVENTS + self.job_id

    def ask(self, pipeline: Pipeline, after: int) -> None:
        pipeline.zrangebyscore(keys.PREVIEWS + self.job_id, f"({after}", "+inf", withscores=True)

    def parse(self, after: int, reply: Sequence[tuple[str, float]]) -> list[JobEvent]:
        return [JobEvent(int(number), "preview", json.loads(data)) for data, number in reply]


@asynccontextmanager
async def watching(redis: Redis, job_id: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Have previews of a job made for as long as this is entered, and what it gives is called every WATCH_SECONDS."""
    watcher = secrets.token_hex(8)

    async def say(lasting_ms: int) -> None:
        await keys.WATCH.call(redis, job_id, watcher, lasting_ms)

    async def stay() -> None:
        await say(WATCH_SECONDS * 1000)

    await stay()
    try:
        yield stay
    finally:
        with suppress(RedisError, OSError):  # best effort: it is forgotten when its time is over
            await say(0)
