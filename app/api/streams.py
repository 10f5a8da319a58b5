"""Streams: how many event streams each tenant has open at this process, and whether there may be one more."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from redis.asyncio import Redis

from app.core.errors import LimitReached
from app.core.limits import Limits, merged, own_limits

RETRY_SECONDS: Final = 10


class Streams:
    """The open streams of one process; `base` holds for tenants without limits of their own."""

    def __init__(self, redis: Redis, base: Limits) -> None:
        self._redis, self._base = redis, base
        self._open: Counter[str] = Counter()

    async def check(self, tenant: str) -> None:
        """Raises LimitReached where a tenant has as many as it may."""
        most = merged(await own_limits(self._redis, tenant), self._base).max_streams
        if most and self._open[tenant] >= most:
            raise LimitReached(f"you have {most} event streams open; close one first", retry_after=RETRY_SECONDS)

    @contextmanager
    def one_more(self, tenant: str) -> Iterator[None]:
        """While a stream is open."""
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]
