"""Claim, beat, commit, hand back, reap: each script on a real server."""

import asyncio
import time

import pytest

from app.core import redis_keys as keys
from app.core.connections import connect, connect_async
from app.core.job import JobStatus, Webhook
from app.core.params import GenerationParams
from app.core.queue import JobQueue, Submission
from worker.leases import Beat, Claim, Leases, Turn

QUEUE = keys.queue_name("tiny")
RETENTION_MS = 60_000


def params(**given):
    base = {
        "model": "tiny",
        "prompt": "a lamp",
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "seed": 1,
        "num_images": 1,
        "scheduler": "ddim",
        "output_format": "png",
    }
    return GenerationParams.model_validate(base | given)


class Callers:
    """The asynchronous side of the queue, for tests that are not."""

    def __init__(self, url):
        self.url = url

    def _do(self, work):
        async def body():
            redis = connect_async(self.url)
            try:
                return await work(JobQueue(redis, retention_ms=RETENTION_MS))
            finally:
                await redis.aclose()

        return asyncio.run(body())

    def submit(self, **given):
        submission = Submission(params(), **given)
        return self._do(lambda q: q.submit("t", submission))[0].id

    def get(self, job_id):
        return self._do(lambda q: q.get("t", job_id))

    def cancel(self, job_id):
        return self._do(lambda q: q.cancel("t", job_id))


@pytest.fixture
def redis(redis_url):
    client = connect(redis_url)
    yield client
    client.close()


@pytest.fixture
def callers(redis_url):
    return Callers(redis_url)


@pytest.fixture
def leases(redis):
    return Leases(redis, "worker-1", lease_ms=60_000, retention_ms=RETENTION_MS)


@pytest.fixture
def brief(redis):
    """A worker whose leases pass at once: every beat and every reaper finds it dead."""
    return Leases(redis, "worker-2", lease_ms=1, retention_ms=RETENTION_MS)


def die(redis, brief):
    """The worker `brief` claims the next job and is never heard of again."""
    claim = brief.claim(QUEUE, is_idle=True)
    time.sleep(0.01)
    return claim, brief.reap()


def test_a_claimed_job_is_processing_under_a_new_fence(callers, leases):
    job_id = callers.submit()
    claim = leases.claim(QUEUE, is_idle=False)
    job = callers.get(job_id)
    assert (claim.id, claim.fence, job.status, job.tries) == (job_id, 1, JobStatus.PROCESSING, 1)


def test_nothing_waits_in_an_empty_queue(leases):
    assert leases.claim(QUEUE, is_idle=True) is Turn.NOTHING


def test_jobs_come_in_the_order_they_were_submitted(callers, leases):
    submitted = [callers.submit() for _ in range(5)]
    assert [leases.claim(QUEUE, is_idle=False).id for _ in submitted] == submitted


def test_a_cancelled_job_is_never_claimed(callers, leases):
    cancelled, other = callers.submit(), callers.submit()
    callers.cancel(cancelled)
    assert leases.claim(QUEUE, is_idle=False).id == other


def test_a_job_cancelled_while_it_runs_cannot_succeed(callers, leases):
    job_id = callers.submit()
    claim = leases.claim(QUEUE, is_idle=False)
    callers.cancel(job_id)
    assert not leases.commit(claim, JobStatus.SUCCEEDED, {"outputs": []})
    assert callers.get(job_id).status is JobStatus.CANCELED


def test_a_beat_says_which_jobs_are_no_longer_ours(callers, leases):
    kept, gone = callers.submit(), callers.submit()
    claims = [leases.claim(QUEUE, is_idle=False) for _ in range(2)]
    callers.cancel(gone)
    assert leases.beat(Beat(c.id, c.fence) for c in claims) == [gone]
    assert callers.get(kept).status is JobStatus.PROCESSING


def test_a_beat_after_our_own_commit_does_not_call_the_job_lost(callers, leases):
    callers.submit()
    claim = leases.claim(QUEUE, is_idle=False)
    leases.commit(claim, JobStatus.SUCCEEDED, {"outputs": []})
    assert leases.beat([Beat(claim.id, claim.fence)]) == []
    assert leases.is_committed(claim)


def test_a_commit_may_be_repeated_after_a_lost_reply(callers, leases):
    job_id = callers.submit(webhook=Webhook(url="https://example.org/hook"))
    claim = leases.claim(QUEUE, is_idle=False)
    assert leases.commit(claim, JobStatus.SUCCEEDED, {"outputs": []})
    assert leases.commit(claim, JobStatus.SUCCEEDED, {"outputs": []})
    assert callers.get(job_id).status is JobStatus.SUCCEEDED


def test_a_commit_writes_one_webhook_beside_the_result(callers, leases, redis):
    callers.submit(webhook=Webhook(url="https://example.org/hook"))
    claim = leases.claim(QUEUE, is_idle=False)
    leases.commit(claim, JobStatus.SUCCEEDED, {"outputs": []})
    leases.commit(claim, JobStatus.SUCCEEDED, {"outputs": []})
    assert redis.zcard(keys.OUTBOX) == 1


def test_a_stalled_worker_cannot_commit_over_its_replacement(callers, leases, brief, redis):
    job_id = callers.submit()
    stalled, _ = die(redis, brief)
    replacement = leases.claim(QUEUE, is_idle=False)
    assert not brief.commit(stalled, JobStatus.SUCCEEDED, {"outputs": []})
    assert leases.commit(replacement, JobStatus.SUCCEEDED, {"outputs": []})
    assert callers.get(job_id).fence == replacement.fence


def test_a_job_handed_back_keeps_its_tries_and_its_place(callers, leases):
    first, _ = callers.submit(), callers.submit()
    claim = leases.claim(QUEUE, is_idle=False)
    assert leases.release(claim)
    job = callers.get(first)
    assert (job.status, job.tries, job.queue_position) == (JobStatus.QUEUED, 0, 0)
    assert leases.claim(QUEUE, is_idle=False).id == first


def test_a_job_handed_back_twice_is_handed_back_once(callers, leases):
    callers.submit()
    claim = leases.claim(QUEUE, is_idle=False)
    assert leases.release(claim)
    assert not leases.release(claim)
    assert isinstance(leases.claim(QUEUE, is_idle=False), Claim)
    assert leases.claim(QUEUE, is_idle=False) is Turn.NOTHING


def test_a_dead_workers_job_goes_back_to_the_front(callers, leases, brief, redis):
    first, second = callers.submit(), callers.submit()
    assert die(redis, brief)[1] == {first: "requeued"}
    assert [leases.claim(QUEUE, is_idle=False).id for _ in range(2)] == [first, second]


def test_a_job_with_a_live_lease_is_not_reaped(callers, leases):
    callers.submit()
    leases.claim(QUEUE, is_idle=False)
    assert leases.reap() == {}


def test_after_its_second_death_a_job_waits_for_an_empty_worker(callers, leases, brief, redis):
    twice_dead = callers.submit()
    die(redis, brief)
    assert die(redis, brief)[1] == {twice_dead: "alone"}
    other = callers.submit()
    assert leases.claim(QUEUE, is_idle=False) is Turn.DRAIN
    claim = leases.claim(QUEUE, is_idle=True)
    assert (claim.id, claim.is_alone) == (twice_dead, True)
    assert leases.claim(QUEUE, is_idle=False).id == other


def test_while_one_worker_empties_itself_the_others_go_on(callers, leases, brief, redis):
    callers.submit()
    die(redis, brief)
    die(redis, brief)
    other = callers.submit()
    assert leases.claim(QUEUE, is_idle=False) is Turn.DRAIN
    neighbour = Leases(redis, "worker-3", lease_ms=60_000, retention_ms=RETENTION_MS)
    assert neighbour.claim(QUEUE, is_idle=False).id == other


def test_a_job_that_dies_alone_is_poison(callers, brief, redis):
    job_id = callers.submit()
    fates = [die(redis, brief)[1][job_id] for _ in range(3)]
    job = callers.get(job_id)
    assert fates == ["requeued", "alone", "poison"]
    assert (job.status, job.error.code, job.deaths) == (JobStatus.FAILED, "poison", 3)


def test_jobs_come_back_when_somebody_empties_rqs_list(callers, leases, redis):
    submitted = {callers.submit() for _ in range(3)}
    redis.delete(f"rq:queue:{QUEUE}")
    assert {leases.claim(QUEUE, is_idle=False).id for _ in range(3)} == submitted


def test_a_record_that_cannot_be_read_is_claimed_without_a_job(callers, leases, redis):
    job_id = callers.submit()
    redis.hset(keys.JOB + job_id, "params", '{"from": "another version"}')
    claim = leases.claim(QUEUE, is_idle=False)
    assert claim.job is None
    assert leases.commit(claim, JobStatus.FAILED, {"error": {"code": "x", "message": "y"}})


def test_a_waiting_job_takes_at_most_one_and_a_half_kilobytes(callers, redis):
    count = 300
    before = redis.info("memory")["used_memory"]
    for _ in range(count):
        callers.submit()
    used = (redis.info("memory")["used_memory"] - before) / count
    print(f"{used:.0f} bytes a waiting job, {count} jobs")
    assert used <= 1500
