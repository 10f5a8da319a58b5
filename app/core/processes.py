"""Which processes live: each says so every few seconds, and what it says is gone soon after it is."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from app.core import redis_keys as keys

TTL_MS: Final = 15_000


@dataclass(frozen=True, slots=True)
class Process:
    """What a live worker or sender says of itself; `metrics` is the host:port Prometheus scrapes."""

    name: str
    kind: Literal["worker", "sender"]
    metrics: str
    version: str
    models: Sequence[str] = ()  # that it serves
    warm: Sequence[str] = ()  # of these in memory, or on the way there
    device: str = ""
    runs: int = 0  # images in the making
    max_runs: int = 0
    started_at: float = 0.0  # seconds since the epoch
    paces: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by model: see estimates.Pace


def beat(redis: Redis, process: Process) -> None:
    """Say that `process` lives."""
    pipeline = redis.pipeline(transaction=False)
    pipeline.set(keys.PROCESS + process.name, json.dumps(asdict(process)), px=TTL_MS)
    pipeline.zadd(keys.PROCESSES, {process.name: int(time.time() * 1000)})
    pipeline.execute()


def leave(redis: Redis, name: str) -> None:
    """Say that a process has ended."""
    pipeline = redis.pipeline(transaction=False)
    pipeline.delete(keys.PROCESS + name)
    pipeline.zrem(keys.PROCESSES, name)
    pipeline.execute()


def live_now(redis: Redis) -> list[Process]:
    """All live processes, for a caller that may wait."""
    names: list[Any] = redis.zrange(keys.PROCESSES, 0, -1)
    found: list[Any] = redis.mget([keys.PROCESS + name for name in names]) if names else []
    return [_read(text) for text in found if text]


def _read(text: str) -> Process:
    """What another version says of itself that we do not know is passed over."""
    said = json.loads(text)
    return Process(**{field.name: said[field.name] for field in fields(Process) if field.name in said})


async def live(redis: AsyncRedis) -> list[Process]:
    """All live processes; the names of those that went silently are forgotten."""
    names: list[Any] = await redis.zrange(keys.PROCESSES, 0, -1)
    if not names:
        return []
    found: list[Any] = await redis.mget([keys.PROCESS + name for name in names])
    if gone := [name for name, text in zip(names, found, strict=True) if text is None]:
        await redis.zrem(keys.PROCESSES, *gone)
    return [_read(text) for text in found if text]
