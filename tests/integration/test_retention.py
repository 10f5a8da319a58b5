"""Retention on a real Valkey and the real disk store."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.core import redis_keys as keys
from app.core.errors import StorageUnavailable
from app.core.queue import rq_time
from app.core.retention import sweep
from app.core.storage import job_prefix, object_key, open_storage
from tests.servers import S3_ENVIRONMENT, free_port

PARAMS = {"model": "tiny", "prompt": "a red heart"}


@pytest.fixture
def storage(tmp_path):
    return open_storage((tmp_path / "objects").as_uri(), public_url="http://127.0.0.1:8000", secret=b"secret")


def finish(redis, storage, job_id, retention_ms=0):
    """A cancelled job with one object."""
    queue = keys.queue_name("tiny")
    fields = json.dumps({"params": json.dumps(PARAMS)})
    rq = ["created_at", rq_time(), "origin", queue]
    keys.SUBMIT.run(redis, job_id, "default", queue, f"digest-{job_id}", "print", 3_600_000, fields, "", *rq)
    keys.CANCEL.run(redis, job_id, "default", retention_ms)
    storage.put(object_key(job_id, 1, 0, "png"), b"pixels", "image/png")


def keys_left(redis):
    # The tenant's events are bounded by their number.
    kept = (keys.CLOCK, f"{keys.RQ}queues", f"{keys.TENANT_EVENTS}default")
    return {key for key in redis.scan_iter("*") if key not in kept}


def test_what_is_past_its_time_goes_with_its_objects_and_leaves_nothing(redis, storage):
    for number in range(150):
        finish(redis, storage, f"job_{number}")
    assert sweep(redis, storage) == 150
    assert list(storage.list()) == []
    # RQ's list of what it once held, and its tenant's turn, are worked off by whoever pops next; nothing else is left.
    queue = keys.queue_name("tiny")
    assert keys_left(redis) <= {f"{keys.RQ}queue:{queue}", keys.SHARES + queue}


def test_what_has_time_left_stays(redis, storage):
    finish(redis, storage, "job_kept", retention_ms=60_000)
    assert sweep(redis, storage) == 0
    assert redis.exists(f"{keys.JOB}job_kept")
    assert len(list(storage.list())) == 1


def test_while_the_store_is_away_the_record_stays_for_the_next_time(redis, storage, monkeypatch):
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    away = open_storage(f"s3://images?endpoint=http://127.0.0.1:{free_port()}", public_url="", secret=b"")
    finish(redis, storage, "job_1")
    with pytest.raises(StorageUnavailable):
        sweep(redis, away)
    assert redis.exists(f"{keys.JOB}job_1")
    assert sweep(redis, storage) == 1
    assert list(storage.list()) == []


def test_what_the_store_does_not_delete_holds_up_nothing_else(redis, storage, monkeypatch):
    for number in range(20):
        finish(redis, storage, f"job_{number}")
    stuck = {job_prefix("job_0"), job_prefix("job_7")}
    delete = storage.delete_prefix

    def fail(prefix):
        if prefix in stuck:
            raise StorageUnavailable("not this one")
        delete(prefix)

    monkeypatch.setattr(storage, "delete_prefix", fail)
    redis.zadd(keys.ABANDONED, {"job_99/1": 0})
    assert sweep(redis, storage) == 18
    assert redis.zcard(keys.ABANDONED) == 0
    assert redis.exists(f"{keys.JOB}job_0", f"{keys.JOB}job_7") == 2
    assert sweep(redis, storage) == 0
    stuck.clear()
    redis.zadd(keys.RETENTION, {"job_0": 0, "job_7": 0}, xx=True)  # some minutes pass
    assert sweep(redis, storage) == 2
    assert list(storage.list()) == []


def test_two_that_sweep_at_once_do_not_fail_each_other(redis, storage):
    for number in range(100):
        finish(redis, storage, f"job_{number}")
    with ThreadPoolExecutor(4) as pool:
        swept = list(pool.map(lambda _: sweep(redis, storage), range(4)))
    assert sum(swept) >= 100
    assert list(storage.list()) == []


def test_an_idempotency_key_may_be_used_again_once_its_job_is_gone(redis, storage):
    finish(redis, storage, "job_1")
    sweep(redis, storage)
    assert not list(redis.scan_iter(f"{keys.IDEMPOTENCY}*"))
