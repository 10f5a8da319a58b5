"""Retention: what is past its time goes, first a job's objects, then its record, so that no object is left unnamed.

And what an attempt stored that never committed goes, an hour after it ended: its worker meant to, and may have died.
An upload goes the other way about, its record first, because its object's key is remembered until it is gone.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import structlog
from redis import Redis

from app.core import redis_keys as keys
from app.core.errors import StorageUnavailable
from app.core.storage import Storage, attempt_prefix, job_prefix

log = structlog.get_logger()

BATCH: Final = 64  # jobs, deleted THREADS at a time
THREADS: Final = 8  # a bucket answers in tens of milliseconds, mostly spent waiting
SECONDS: Final = 2.0  # no batch begins after this: the caller has jobs of the dead to find

LATER_SECONDS: Final = 300  # what the store did not delete is tried again after this


def sweep(redis: Redis, storage: Storage) -> int:
    """Forget the jobs whose retention has passed, by Redis' clock, and their objects; how many.

    What a sweep does not get to is the next one's. What the store does not delete is tried again later, and holds up
    nothing else. Raises StorageUnavailable where it is away, and what redis-py raises: the records of what may
    still be there stay.
    """

    def delete_objects(job_id: str) -> None:
        storage.delete_prefix(job_prefix(job_id))

    began, swept = time.monotonic(), 0
    while time.monotonic() - began < SECONDS and (due := _due(redis)):
        for job_id in _delete_all(redis, storage, keys.RETENTION, due, delete_objects):
            swept += keys.PURGE.run(redis, job_id)
    _sweep_abandoned(redis, storage)
    _sweep_uploads(redis, storage, began)
    for batch_id in _due(redis, keys.BATCH_RETENTION):
        keys.BATCH_PURGE.run(redis, batch_id)
    return swept


def _delete_all(
    redis: Redis, storage: Storage, index: str, due: Sequence[str], delete: Callable[[str], object]
) -> list[str]:
    """Those of the index that the store has deleted; the others are due again in LATER_SECONDS.

    Raises StorageUnavailable where the store is away: it is not asked for the rest.
    """
    done, failed, in_a_row = list[str](), list[str](), 0
    pool = ThreadPoolExecutor(THREADS)
    try:
        for name, task in [(name, pool.submit(delete, name)) for name in due]:
            try:
                task.result()
                done.append(name)
                in_a_row = 0
            except StorageUnavailable:
                failed.append(name)
                in_a_row += 1
                if in_a_row % THREADS == 0 or len(failed) == len(due):
                    storage.ping()
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        log.warning("sweep.not_deleted", index=index, names=failed[:8], number=len(failed))
        redis.zadd(index, dict.fromkeys(failed, _now_ms(redis) + 1000 * LATER_SECONDS), xx=True)
    return done


def _sweep_abandoned(redis: Redis, storage: Storage) -> None:
    def delete(entry: str) -> None:
        job_id, _, fence = entry.partition("/")
        if redis.hget(keys.JOB + job_id, "committed") != fence:
            storage.delete_prefix(attempt_prefix(job_id, int(fence)))

    if (due := _due(redis, keys.ABANDONED)) and (done := _delete_all(redis, storage, keys.ABANDONED, due, delete)):
        redis.zrem(keys.ABANDONED, *done)


def _sweep_uploads(redis: Redis, storage: Storage, began: float) -> None:
    while time.monotonic() - began < SECONDS and (due := _due(redis, keys.UPLOAD_EXPIRY)):
        for upload_id in due:
            keys.FORGET_UPLOAD.run(redis, upload_id, "expired")
    while time.monotonic() - began < SECONDS and (due := _due(redis, keys.STRAY_OBJECTS)):
        if done := _delete_all(redis, storage, keys.STRAY_OBJECTS, due, storage.delete):
            redis.zrem(keys.STRAY_OBJECTS, *done)


def _due(redis: Redis, index: str = keys.RETENTION) -> list[str]:
    found: Any = redis.zrange(index, "-inf", _now_ms(redis), byscore=True, offset=0, num=BATCH)
    return list(found)


def _now_ms(redis: Redis) -> int:
    seconds, micros = redis.time()
    return int(seconds) * 1000 + int(micros) // 1000
