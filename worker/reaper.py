"""Reaper: the thread in every worker that finds the jobs of the dead, and sweeps what is past its retention."""

import threading
from typing import Final

import structlog
from prometheus_client import Counter
from redis import Redis
from redis.exceptions import RedisError

from app.core.errors import StorageUnavailable
from app.core.retention import sweep
from app.core.storage import Storage
from worker.leases import Leases

log = structlog.get_logger()
REAP_SECONDS: Final = 3.0
SWEEP_EVERY: Final = 5  # rounds


class Reaper:
    """Reaps every three seconds, on Redis' own clock; sweeps every fifth time."""

    def __init__(self, leases: Leases, redis: Redis, storage: Storage, recovered: Counter) -> None:
        self._leases, self._redis, self._storage, self._recovered = leases, redis, storage, recovered
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reap", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        rounds = 0
        while not self._closed.wait(REAP_SECONDS):
            rounds += 1
            try:
                self._reap()
                if rounds % SWEEP_EVERY == 0:
                    sweep(self._redis, self._storage)
            except (RedisError, OSError, StorageUnavailable) as error:
                log.warning("reap.failed", error=type(error).__name__)

    def _reap(self) -> None:
        for job_id, fate in self._leases.reap().items():
            log.warning("job.recovered", job_id=job_id, fate=fate)
            self._recovered.inc()
