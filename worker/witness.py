"""Witness: says in Redis where jobs under suspicion are before they go on, so that their deaths can be compared."""

import time
from collections.abc import Iterable
from typing import Final

import structlog
from redis.exceptions import RedisError

from worker.held import HeldJob
from worker.leases import Leases

log = structlog.get_logger()
AWAY_SECONDS: Final = 1.0  # between tries while Redis is away


class Witness:
    """The step loop's own, and the one thing for which it waits for Redis: only while it holds such jobs."""

    def __init__(self, leases: Leases) -> None:
        """`leases`: on a connection that gives up soon."""
        self._leases = leases
        self._away_until = 0.0  # monotonic

    def look(self, held: Iterable[HeldJob]) -> None:
        """Note where those of the jobs are that were in a worker that died. Best effort: reap.lua asks for no more."""
        moved = [(job, walk) for job in held if job.is_suspect and (walk := job.walk) != job.marked]
        if not moved or time.monotonic() < self._away_until:
            return
        try:
            self._leases.mark([(job.claim, walk) for job, walk in moved])
        except (RedisError, OSError) as error:
            log.warning("redis.unavailable", error=type(error).__name__)
            self._away_until = time.monotonic() + AWAY_SECONDS
        else:
            for job, walk in moved:
                job.marked = walk
