"""Retention: what is past its time goes, first a job's objects, then its record, so that no object is left unnamed.

And what an attempt stored that never committed goes, an hour after it ended: its worker meant to, and may have died.
An upload goes the other way about, its record first, because its object's key is remembered until it is gone.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from redis import Redis

from app.core import redis_keys as keys
from app.core.storage import Storage, attempt_prefix, job_prefix

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
        pool = ThreadPoolExecutor(THREADS)
        try:
            for job_id, _ in zip(due, pool.map(storage.delete_prefix, map(job_prefix, due)), strict=True):
                swept += keys.PURGE.run(redis, job_id)
        finally:
            pool.shutdown(cancel_futures=True)  # a store that fails or hangs is not asked for the rest of a batch
    _sweep_abandoned(redis, storage)
    _sweep_uploads(redis, storage, began)
    for batch_id in _due(redis, keys.BATCH_RETENTION):
        keys.BATCH_PURGE.run(redis, batch_id)
    return swept


def _sweep_abandoned(redis: Redis, storage: Storage) -> None:
    for entry in _due(redis, keys.ABANDONED):
        job_id, _, fence = entry.partition("/")
        if redis.hget(keys.JOB + job_id, "committed") != fence:
            storage.delete_prefix(attempt_prefix(job_id, int(fence)))
        redis.zrem(keys.ABANDONED, entry)


def _sweep_uploads(redis: Redis, storage: Storage, began: float) -> None:
    while time.monotonic() - began < SECONDS and (due := _due(redis, keys.UPLOAD_EXPIRY)):
        for upload_id in due:
            keys.FORGET_UPLOAD.run(redis, upload_id, "expired")
    while time.monotonic() - began < SECONDS and (due := _due(redis, keys.STRAY_OBJECTS)):
        for key in due:
            storage.delete(key)
            redis.zrem(keys.STRAY_OBJECTS, key)


def _due(redis: Redis, index: str = keys.RETENTION) -> list[str]:
    seconds, micros = redis.time()
    found: Any = redis.zrange(index, "-inf", seconds * 1000 + micros // 1000, byscore=True, offset=0, num=BATCH)
    return list(found)
