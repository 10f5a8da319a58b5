"""What happens to jobs, in order: read it from any point, and hear of more.

A process hears over one Redis connection and reads over one, however many streams it serves.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Protocol

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError

from app.core import redis_keys as keys
from app.core.chores import stop

log = structlog.get_logger()
RECONNECT_SECONDS = 0.5
CHUNK: Final = 100  # events of one read
READS: Final = 64  # in one round trip


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One entry of a history; `id` is its number from 1, and what Last-Event-ID gives back."""

    id: int
    type: str  # status, progress, preview; of a batch: status, job
    data: dict[str, Any]


class Feed(Protocol):
    """A history that grows; `key` is where it lies, and the channel that says so when it grows."""

    @property
    def key(self) -> str: ...

    def ask(self, pipeline: Pipeline, after: int) -> None:
        """Put the question for what came after event `after` into a pipeline."""

    def parse(self, after: int, reply: Any) -> list[JobEvent]:
        """The events in the reply to that question."""


@dataclass(frozen=True, slots=True)
class _Listed:
    """A history that is kept whole."""

    about: str  # an id

    @property
    def key(self) -> str:
        return keys.EVENTS + self.about

    def ask(self, pipeline: Pipeline, after: int) -> None:
        pipeline.lrange(self.key, after, after + CHUNK - 1)

    def parse(self, after: int, reply: Sequence[str]) -> list[JobEvent]:
        parts = [entry.partition(" ") for entry in reply]
        return [JobEvent(number, kind, json.loads(data)) for number, (kind, _, data) in enumerate(parts, after + 1)]


class OfJob(_Listed):
    """Everything that happens to one job, from its beginning."""

    __slots__ = ()


class OfBatch(_Listed):
    """The statuses of a batch, and those of its jobs but for their first, as long as the batch is kept."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class OfTenant:
    """The statuses of all jobs of a tenant, the latest ten thousand, numbered without gaps."""

    tenant: str

    @property
    def key(self) -> str:
        return keys.TENANT_EVENTS + self.tenant

    def ask(self, pipeline: Pipeline, after: int) -> None:
        pipeline.xrange(self.key, f"(0-{after}", "+", count=CHUNK)

    def parse(self, after: int, reply: Sequence[tuple[str, dict[str, str]]]) -> list[JobEvent]:
        return [JobEvent(int(entry.partition("-")[2]), "status", _typed(fields)) for entry, fields in reply]


def _typed(fields: dict[str, str]) -> dict[str, Any]:
    return {**fields, "at": int(fields["at"])}


async def position_in(redis: Redis, feed: _Listed, after: int) -> int:
    """`after`, or 0 where no event has that number: it was another history's, and this one is told from its start."""
    return after if after and after <= await redis.llen(feed.key) else 0


async def last_of(redis: Redis, feed: OfTenant) -> int:
    """The number of a tenant's latest event, 0 where there is none."""
    found: Any = await redis.xrevrange(feed.key, count=1)
    return int(found[0][0].partition("-")[2]) if found else 0


class Hub:
    """Wakes everyone who waits for a feed when it grows, and reads for all; a wake-up is only a hint."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiters: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._asked = asyncio.Event()
        self._wanted: dict[tuple[Feed, int], asyncio.Future[list[JobEvent]]] = {}
        self._pubsub = redis.pubsub()
        # Two callers at once would each take a connection for the one pubsub.
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._read_all())]

    async def stop(self) -> None:
        await stop(*self._tasks)
        await self._pubsub.aclose()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped

    @asynccontextmanager
    async def watch(self, feed: Feed) -> AsyncIterator[asyncio.Event]:
        """An event that is set whenever the feed has grown, and after any (re)connection."""
        channel, bell = feed.key, asyncio.Event()
        self._waiters[channel].add(bell)
        try:
            if len(self._waiters[channel]) == 1:
                await self._subscribe(channel)
            yield bell
        finally:
            self._waiters[channel].discard(bell)
            if not self._waiters[channel]:
                del self._waiters[channel]
                # Shielded: a caller that hangs up cancels this too, and the subscription would stay.
                await asyncio.shield(self._unsubscribe(channel))

    async def read(self, feed: Feed, after: int) -> list[JobEvent]:
        """The events after number `after` (0: from the beginning), a hundred at most. Raises what redis-py raises.

        Whoever asks the same while nobody has sent the question yet shares its answer.
        """
        wanted = self._wanted.get((feed, after))
        if wanted is None:
            wanted = self._wanted[feed, after] = asyncio.get_running_loop().create_future()
            wanted.add_done_callback(_seen)
            self._asked.set()
        return await asyncio.shield(wanted)

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

    async def _read_all(self) -> None:
        while True:
            await self._asked.wait()
            batch = {asked: self._wanted.pop(asked) for asked in list(islice(self._wanted, READS))}
            if not self._wanted:
                self._asked.clear()
            try:
                await self._answer(batch)
            except Exception as error:  # noqa: BLE001  # it is theirs who asked; the reader goes on
                for wanted in batch.values():
                    if not wanted.done():
                        wanted.set_exception(error)

    async def _answer(self, batch: dict[tuple[Feed, int], asyncio.Future[list[JobEvent]]]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for feed, after in batch:
            feed.ask(pipeline, after)
        for ((feed, after), wanted), reply in zip(batch.items(), await pipeline.execute(), strict=True):
            wanted.set_result(feed.parse(after, reply))

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


def _seen(wanted: "asyncio.Future[list[JobEvent]]") -> None:
    # All who asked may be gone: an error that nobody looks at would be logged as one that was forgotten.
    if not wanted.cancelled():
        wanted.exception()
