"""What happens to a job, in order: read it from any point, and hear of more over one Redis connection."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.core import redis_keys as keys

log = structlog.get_logger()
RECONNECT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One entry of a job's history; `id` is its number from 1, and what Last-Event-ID gives back."""

    id: int
    type: str  # status, progress
    data: dict[str, Any]


async def read(redis: Redis, job_id: str, after: int) -> list[JobEvent]:
    """The events of a job after number `after` (0: from its beginning)."""
    entries: list[Any] = await redis.lrange(keys.EVENTS + job_id, after, -1)
    return [_event(after + i, entry) for i, entry in enumerate(entries, 1)]


def _event(number: int, entry: str) -> JobEvent:
    kind, _, data = entry.partition(" ")
    return JobEvent(number, kind, json.loads(data))


class Hub:
    """Wakes everyone who waits for a job when something happens to it; a wake-up is a hint, the list is the truth."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiters: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._pubsub = redis.pubsub()
        # Two callers at once would each take a connection for the one pubsub.
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        self._task = asyncio.create_task(self._listen())

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._pubsub.aclose()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped

    @asynccontextmanager
    async def watch(self, job_id: str) -> AsyncIterator[asyncio.Event]:
        """An event that is set whenever something happened to the job, and after any (re)connection."""
        channel, bell = keys.EVENTS + job_id, asyncio.Event()
        self._waiters[channel].add(bell)
        if len(self._waiters[channel]) == 1:
            await self._subscribe(channel)
        try:
            yield bell
        finally:
            self._waiters[channel].discard(bell)
            if not self._waiters[channel]:
                del self._waiters[channel]
                # Shielded: a caller that hangs up cancels this too, and the subscription would stay.
                await asyncio.shield(self._unsubscribe(channel))

    def ring(self) -> None:
        """Wake everyone, whatever happened."""
        for bells in self._waiters.values():
            for bell in bells:
                bell.set()

    async def _subscribe(self, channel: str) -> None:
        # Redis away: the listener subscribes to everything again when it is back.
        with suppress(RedisError, OSError):
            async with self._lock:
                await self._pubsub.subscribe(channel)
        self._changed.set()

    async def _unsubscribe(self, channel: str) -> None:
        with suppress(RedisError, OSError):
            async with self._lock:
                if channel not in self._waiters:
                    await self._pubsub.unsubscribe(channel)

    async def _listen(self) -> None:
        while True:
            try:
                await self._pump()
            except (RedisError, OSError) as error:
                log.warning("events.reconnecting", error=type(error).__name__)
                await asyncio.sleep(RECONNECT_SECONDS)
                async with self._lock:
                    await self._pubsub.aclose()  # type: ignore[no-untyped-call]
                    self._pubsub = self._redis.pubsub()

    async def _pump(self) -> None:
        async with self._lock:
            if self._waiters:
                await self._pubsub.subscribe(*self._waiters)
        while True:
            if not self._pubsub.subscribed:
                self._changed.clear()
                await self._changed.wait()
                continue
            message = await self._pubsub.get_message(timeout=1)
            if message:
                # Redis' word that a subscription stands rings too: what came before it was not heard.
                for bell in self._waiters.get(message["channel"], ()):
                    bell.set()
