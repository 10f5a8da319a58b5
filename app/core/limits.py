"""Limits: how much a tenant may hand in and have made at once, and its share of the denoiser; kept in Redis by tenant.

Work is counted in denoiser-seconds (see estimates.py). The service's own limits come from the settings; a tenant's own
replace them, name by name. Zero: no limit. lua/limits.lua and lua/claim.lua keep them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Final

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from app.core import redis_keys as keys
from app.core.errors import LimitReached, Overloaded, SafelightError
from app.core.settings import Settings

REFUSALS: Final = frozenset({"rate", "waiting", "overloaded"})  # outcomes of submit.lua


@dataclass(frozen=True, slots=True)
class Limits:
    """What holds for a tenant; 0 is no limit."""

    rate: float = 0.0  # denoiser-seconds that may be handed in, a second
    burst: float = 0.0  # denoiser-seconds that may be handed in at once; 0: a minute of the rate
    max_running: int = 0  # jobs in the making, over all workers
    max_waiting: int = 0  # jobs that wait
    max_streams: int = 0  # event streams, at each process of the API
    weight: float = 1.0  # of its share of the denoiser where several tenants' jobs wait


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a tenant may hand in now, in denoiser-seconds (a debt is negative), and seconds until it is full."""

    size: float
    left: float
    full_after: float


def defaults(settings: Settings) -> Limits:
    """The limits of tenants without their own."""
    return Limits(
        rate=settings.tenant_rate,
        burst=settings.tenant_burst,
        max_running=settings.tenant_max_running,
        max_waiting=settings.tenant_max_waiting,
        max_streams=settings.tenant_max_streams,
    )


async def own_limits(redis: AsyncRedis, tenant: str) -> dict[str, float]:
    """What a tenant has of its own."""
    kept: Any = await redis.hgetall(keys.LIMITS + tenant)
    return _read(kept)


def set_limits(redis: Redis, tenant: str, changes: Mapping[str, float | None]) -> dict[str, float]:
    """Change some of a tenant's limits; None: the service's own again. Returns all it has of its own then."""
    return _read(_pairs(keys.SET_LIMITS.run(redis, tenant, *_flat(changes))))


async def change_limits(redis: AsyncRedis, tenant: str, changes: Mapping[str, float | None]) -> dict[str, float]:
    """As `set_limits`, on an asynchronous client."""
    return _read(_pairs(await keys.SET_LIMITS.call(redis, tenant, *_flat(changes))))


def merged(own: Mapping[str, float], base: Limits) -> Limits:
    """What holds: a tenant's own where it has some, else the service's."""
    known = asdict(base)
    return Limits(**(known | {n: type(known[n])(v) for n, v in own.items() if n in known}))


def rules(base: Limits, *, start_seconds: float = 0.0, max_wait: float = 0.0) -> str:
    """What submit.lua admits by.

    `start_seconds`: until a new job would start; one that would wait longer than `max_wait` is refused (0: none is).
    """
    over_seconds = max(start_seconds - max_wait, 0.0) if max_wait else 0.0
    fields = {name: value for name, value in asdict(base).items() if name in ("rate", "burst", "max_waiting")}
    return json.dumps(fields | {"start_ms": ceil(1000 * start_seconds), "over_ms": ceil(1000 * over_seconds)})


def refusal(reason: str, wait_ms: float, bucket: Bucket | None) -> SafelightError:
    """The error for a refusal of submit.lua."""
    error = _refusal(reason, wait_ms)
    error.headers |= headers_of(bucket)
    return error


def headers_of(bucket: Bucket | None) -> dict[str, str]:
    """The headers that tell a caller his rate; all in denoiser-seconds, but the reset, which is seconds from now."""
    if bucket is None:
        return {}
    return {
        "X-RateLimit-Limit": f"{bucket.size:g}",
        "X-RateLimit-Remaining": f"{max(bucket.left, 0.0):g}",
        "X-RateLimit-Reset": f"{ceil(bucket.full_after)}",
    }


def _refusal(reason: str, wait_ms: float) -> SafelightError:
    seconds = max(ceil(wait_ms / 1000), 1)
    if reason == "overloaded":
        return Overloaded(f"the queue is too long now: try again in {seconds} s", retry_after=seconds)
    if reason == "waiting":
        return LimitReached(
            "as many of your jobs wait as may; wait for some of them, or cancel some", retry_after=seconds
        )
    return LimitReached(f"you hand in work faster than your limit allows; go on in {seconds} s", retry_after=seconds)


def bucket_of(reply: list[Any]) -> Bucket | None:
    """The bucket as submit.lua returns it; None where the tenant has no rate."""
    if len(reply) < 3 or not int(reply[0]):
        return None
    size, left, full = (float(part) / 1000 for part in reply[:3])
    return Bucket(size, left, full)


def _flat(changes: Mapping[str, float | None]) -> list[str]:
    return [part for name, value in changes.items() for part in (name, "" if value is None else f"{value:.15g}")]


def _pairs(flat: list[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _read(kept: Mapping[str, str]) -> dict[str, float]:
    return {name: float(value) for name, value in kept.items()}
