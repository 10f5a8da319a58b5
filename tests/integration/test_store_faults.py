"""An object store that is away, slow or lying: the picture waits, and what was committed is there."""

import time
from pathlib import Path

import pytest

from app.core import redis_keys as keys
from app.core.errors import StorageUnavailable
from app.core.retention import sweep
from app.core.storage import object_key, open_storage
from tests.chaos.bucket import bucket
from tests.chaos.checker import History, check
from tests.chaos.service import service
from tests.chaos.stub_worker import body_of
from tests.integration.test_leases import params
from tests.servers import S3_ENVIRONMENT
from worker.spool import LOCK

KEY = object_key("job_1", 1, 0, "png")
MAX_RUNS = 6
IN_MEMORY, ON_DISK = 4, 8  # pictures that may wait, by their bytes


@pytest.fixture(scope="module")
def built(forks, tmp_path_factory):
    """A service with a worker that makes six pictures at once and keeps twelve; its lease lasts two seconds."""
    folder = tmp_path_factory.mktemp("store")
    size = len(body_of(params(num_inference_steps=4)))
    about = {
        "SAFELIGHT_LEASE_SECONDS": "2",
        "SAFELIGHT_MAX_RUNS": str(MAX_RUNS),
        "SAFELIGHT_SPOOL_MEMORY": str(IN_MEMORY * size),
        "SAFELIGHT_SPOOL_DISK": str((ON_DISK - 1) * size),
    }
    with service(folder, forks, **about) as built:
        built.start_all(workers=1)
        yield built


def spooled(built):
    """The files of pictures that wait."""
    folder = Path(built.environment["SAFELIGHT_DATA"]) / "spool"
    return [file for file in folder.glob("*/*") if file.name != LOCK]


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """A bucket and our client of it."""
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with bucket(tmp_path) as served:
        yield served, open_storage(served.url, public_url="", secret=b"")


@pytest.mark.parametrize("mode", ["error", "hang", "truncate"])
def test_while_the_store_fails_pictures_wait_on_disk_in_bounded_number_and_no_job_succeeds_without_its_own(
    built, tmp_path, mode
):
    built.store.fail(mode)
    job_ids = [built.submit(seed=i) for i in range(30)]
    built.wait_until(lambda: len(spooled(built)) >= ON_DISK - 1, 20)
    time.sleep(2.5)  # longer than a lease
    held, files = built.redis.zrange(keys.LEASES, 0, -1), spooled(built)
    print(f"{mode}: {len(held)} jobs held, {len(files)} pictures in files")
    assert IN_MEMORY + ON_DISK - 1 <= len(held) <= IN_MEMORY + ON_DISK + MAX_RUNS
    assert len(files) <= ON_DISK + MAX_RUNS
    assert {built.job(job_id)["status"] for job_id in job_ids} == {"queued", "processing"}
    marks = [built.redis.hget(keys.JOB + job_id, "walk") for job_id in held]
    assert set(marks) == {"1 made"}
    built.store.fail("ok")
    for job_id in job_ids:
        built.wait(job_id)
    built.wait_until(built.outbox_is_empty, 20)
    verdict = check(built, History(tmp_path / "history.jsonl"), job_ids)
    assert verdict.is_clean, verdict
    assert (set(verdict.died), set(verdict.tries)) == ({0}, {1})
    assert spooled(built) == []


def test_what_a_killed_worker_left_on_disk_goes_when_the_next_one_starts_and_its_jobs_succeed(built, tmp_path):
    built.store.fail("error")
    job_ids = [built.submit(seed=i) for i in range(10)]
    built.wait_until(lambda: len(spooled(built)) >= 3, 20)
    left = spooled(built)
    (slot,) = built.workers
    slot.child.kill()
    built.wait_until(lambda: slot.starts == 2 and not any(file.exists() for file in left), 20)
    built.store.fail("ok")
    for job_id in job_ids:
        built.wait(job_id)
    verdict = check(built, History(tmp_path / "history.jsonl"), job_ids)
    assert verdict.is_clean, verdict
    assert spooled(built) == []


@pytest.mark.parametrize("mode", ["truncate", "forget", "corrupt", "cut"])
def test_a_store_that_keeps_something_else_or_nothing_is_not_believed(storage, mode):
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
