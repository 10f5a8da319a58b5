"""Reaper: the threads in every worker that find the jobs of the dead, keep deadlines and sweep the old."""

import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import structlog
from prometheus_client import Counter
from redis import Redis
from redis.exceptions import RedisError

from app.core.errors import StorageUnavailable
from app.core.job import JobStatus
from app.core.retention import sweep
from app.core.storage import Storage
from worker.leases import Leases

log = structlog.get_logger()
REAP_SECONDS: Final = 3.0  # at most; a fifth of a shorter lease
EXPIRE_SECONDS: Final = 0.5  # between two looks at what is past its deadline
AUDIT_EVERY: Final = 5  # rounds
SWEEP_SECONDS: Final = 15.0


class Reaper:
    """Reaps every three seconds, on Redis' own clock, audits its `queues` every fifth time, and sweeps.

    It ends the jobs that are past their deadline too, as every API does, so that it happens while anybody lives.

    While Redis was away no worker could say that it lives, so for one lease after that nobody is taken for dead.
    """

    def __init__(
        self,
        leases: Leases,
        redis: Redis,
        storage: Storage,
        recovered: Counter,
        *,
        ended: Counter,
        queues: Sequence[str],
        lease_seconds: float,
    ) -> None:
        self._leases, self._redis, self._storage = leases, redis, storage
        self._recovered, self._ended = recovered, ended
        self._queues = list(queues)
        self._lease_seconds = lease_seconds
        self._away_at = float("-inf")  # monotonic
        self._closed = threading.Event()
        self._bell = threading.Event()
        self._thread = threading.Thread(target=self._reap_forever, name="reap", daemon=True)
        # Apart, because a store that hangs holds it up, and the jobs of the dead must not wait for that.
        self._sweeper = threading.Thread(target=self._sweep_forever, name="sweep", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._sweeper.start()

    def look(self) -> None:
        """A job is past its deadline: end it now."""
        self._bell.set()

    def close(self) -> None:
        self._closed.set()
        self._bell.set()
        self._thread.join()
        self._sweeper.join()

    def _reap_forever(self) -> None:
        rounds, due, pause = 0, 0.0, min(REAP_SECONDS, self._lease_seconds / 5)
        while not self._is_closed_after(min(EXPIRE_SECONDS, pause)):
            try:
                for model in self._leases.expire():
                    self._ended.labels(model, JobStatus.EXPIRED).inc()
                if time.monotonic() < due:
                    continue
                due = time.monotonic() + pause
                rounds += 1
                self._reap()
                if rounds % AUDIT_EVERY == 0:
                    self._audit()
            except (RedisError, OSError) as error:
                self._away_at = time.monotonic()
                log.warning("reap.failed", error=type(error).__name__)

    def _is_closed_after(self, seconds: float) -> bool:
        """Wait for so long, or until there is something to look at."""
        self._bell.wait(seconds)
        self._bell.clear()
        return self._closed.is_set()

    def _sweep_forever(self) -> None:
        while not self._closed.wait(SWEEP_SECONDS):
            try:
                sweep(self._redis, self._storage)
            except StorageUnavailable as error:
                log.warning("sweep.failed", error=error.message)
            except (RedisError, OSError) as error:
                log.warning("sweep.failed", error=type(error).__name__)

    def _reap(self) -> None:
        if self._up_seconds() < self._lease_seconds:
            return
        for job_id, fate in self._leases.reap().items():
            log.warning("job.recovered", job_id=job_id, fate=fate)
            self._recovered.inc()

    def _up_seconds(self) -> float:
        """For how long Redis has been there, as it says and as we have seen."""
        began = time.monotonic()
        server: Any = self._redis.info("server")
        now = time.monotonic()
        if now - began > self._lease_seconds / 5:  # it stood still, and nobody's beat went through
            self._away_at = now
        return min(float(server["uptime_in_seconds"]), now - self._away_at)

    def _audit(self) -> None:
        for queue in self._queues:
            for job_id in self._leases.audit(queue):
                log.error("job.misplaced", job_id=job_id, queue=queue)
