"""An object store that is away, slow or lying: the picture waits, and what was committed is there."""

import time

import pytest

from app.core import redis_keys as keys
from app.core.errors import StorageUnavailable
from app.core.retention import sweep
from app.core.storage import object_key, open_storage
from tests.chaos.bucket import MODES, bucket
from tests.chaos.checker import History, check
from tests.chaos.service import service
from tests.servers import S3_ENVIRONMENT

KEY = object_key("job_1", 1, 0, "png")
MAX_RUNS = 6


@pytest.fixture(scope="module")
def built(forks, tmp_path_factory):
    """A service with a worker that holds six pictures at most; its lease lasts two seconds."""
    folder = tmp_path_factory.mktemp("store")
    about = {"SAFELIGHT_LEASE_SECONDS": "2", "SAFELIGHT_MAX_RUNS": str(MAX_RUNS)}
    with service(folder, forks, **about) as built:
        built.start_all(workers=1)
        yield built


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """A bucket and our client of it."""
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with bucket(tmp_path) as served:
        yield served, open_storage(served.url, public_url="", secret=b"")


@pytest.mark.parametrize("mode", MODES)
def test_while_the_store_fails_pictures_wait_in_bounded_number_and_no_job_succeeds_without_its_own(
    built, tmp_path, mode
):
    built.store.fail(mode)
    job_ids = [built.submit(seed=i) for i in range(MAX_RUNS * 2)]
    time.sleep(2.5)  # longer than a lease
    assert built.redis.zcard(keys.LEASES) == MAX_RUNS
    assert {built.job(job_id)["status"] for job_id in job_ids} == {"queued", "processing"}
    built.store.fail("ok")
    for job_id in job_ids:
        built.wait(job_id)
    built.wait_until(built.outbox_is_empty, 20)
    verdict = check(built, History(tmp_path / "history.jsonl"), job_ids)
    assert verdict.is_clean, verdict
    assert (set(verdict.died), set(verdict.tries)) == ({0}, {1})


@pytest.mark.parametrize("mode", ["truncate", "forget", "corrupt"])
def test_a_store_that_keeps_something_else_is_not_believed(storage, mode):
    served, ours = storage
    served.fail(mode)
    with pytest.raises(StorageUnavailable):
        ours.put(KEY, b"pixels" * 100, "image/png")
    served.fail("ok")
    ours.put(KEY, b"pixels" * 100, "image/png")
    assert ours.get(KEY) == b"pixels" * 100


def test_what_an_attempt_left_that_never_committed_goes_after_an_hour_and_not_before(storage, redis):
    _, ours = storage
    abandoned, kept = object_key("job_1", 1, 0, "png"), object_key("job_1", 2, 0, "png")
    for key in (abandoned, kept):
        ours.put(key, b"pixels", "image/png")
    redis.hset(keys.JOB + "job_1", "committed", 2)
    now = redis.time()[0] * 1000
    redis.zadd(keys.ABANDONED, {"job_1/1": now + 60_000})
    sweep(redis, ours)
    assert {found.key for found in ours.list()} == {abandoned, kept}
    redis.zadd(keys.ABANDONED, {"job_1/1": now - 1, "job_1/2": now - 1})
    sweep(redis, ours)
    assert {found.key for found in ours.list()} == {kept}
    assert redis.zcard(keys.ABANDONED) == 0
