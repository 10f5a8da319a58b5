"""Retention: what is past its time goes, first a job's objects, then its record, so that no object is left unnamed."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from redis import Redis

from app.core import redis_keys as keys
from app.core.storage import Storage, job_prefix

BATCH: Final = 64  # jobs, deleted THREADS at a time
THREADS: Final = 8  # a bucket answers in tens of milliseconds, mostly spent waiting
SECONDS: Final = 2.0  # no batch begins after this: the caller has jobs of the dead to find


def sweep(redis: Redis, storage: Storage) -> int:
    """Forget the jobs whose retention has passed, by Redis' clock, and their objects; how many.

    What a sweep does not get to is the next one's. Raises StorageUnavailable, and what redis-py raises: the records of
    jobs whose objects may still be there stay.
    """
    began, swept = time.monotonic(), 0
    while time.monotonic() - began < SECONDS and (due := _due(redis)):
        with ThreadPoolExecutor(THREADS) as pool:
            for job_id, _ in zip(due, pool.map(storage.delete_prefix, map(job_prefix, due)), strict=True):
                swept += keys.PURGE.run(redis, job_id)
    return swept


def _due(redis: Redis) -> list[str]:
    seconds, micros = redis.time()
    found: Any = redis.zrange(
        keys.RETENTION, "-inf", seconds * 1000 + micros // 1000, byscore=True, offset=0, num=BATCH
    )
    return list(found)
