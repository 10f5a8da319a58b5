"""Claim, beat, commit, hand back, reap: each script on a real server."""

import asyncio
import time

import pytest

from app.core import failpoints
from app.core import redis_keys as keys
from app.core.connections import connect, connect_async
from app.core.errors import Overloaded
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
        return self._do(lambda q: q.submit(keys.DEFAULT_TENANT, submission))[0].id

    def get(self, job_id):
        return self._do(lambda q: q.get(keys.DEFAULT_TENANT, job_id))

    def cancel(self, job_id):
        return self._do(lambda q: q.cancel(keys.DEFAULT_TENANT, job_id))


@pytest.fixture
def redis(redis_url):
    client = connect(redis_url)
    yield client
    client.close()


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    failpoints.disarm()


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


def die(redis, brief, walk="denoising:2"):
    """The worker `brief` claims the next job, says that it is at `walk`, and is never heard of again."""
    claim = brief.claim(QUEUE, is_idle=True)
    if walk:
        brief.mark([(claim, walk)])
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
    assert leases.beat(Beat(c.id, c.fence) for c in claims).lost == [gone]
    assert callers.get(kept).status is JobStatus.PROCESSING


def test_a_beat_after_our_own_commit_does_not_call_the_job_lost(callers, leases):
    callers.submit()
    claim = leases.claim(QUEUE, is_idle=False)
    leases.commit(claim, JobStatus.SUCCEEDED, {"outputs": []})
    assert leases.beat([Beat(claim.id, claim.fence)]).lost == []
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


def test_a_job_that_dies_alone_after_two_deaths_is_poison(callers, brief, redis):
    job_id = callers.submit()
    fates = [die(redis, brief)[1][job_id] for _ in range(3)]
    job = callers.get(job_id)
    assert fates == ["requeued", "alone", "poison"]
    assert (job.status, job.error.code, job.deaths) == (JobStatus.FAILED, "poison", 3)


def deaths_and_fates(callers, brief, redis, walks):
    job_id = callers.submit()
    fates = [die(redis, brief, walk)[1][job_id] for walk in walks]
    return callers.get(job_id).deaths, fates


def test_a_job_that_only_waited_for_the_store_is_not_to_blame_however_often_its_worker_dies(callers, brief, redis):
    assert deaths_and_fates(callers, brief, redis, ["made"] * 6) == (0, ["requeued"] * 6)


def test_a_job_under_suspicion_is_not_to_blame_where_its_work_had_not_begun(callers, brief, redis):
    walks = ["denoising:2", None, "denoising:2", None]
    assert deaths_and_fates(callers, brief, redis, walks) == (2, ["requeued", "requeued", "alone", "alone"])


def test_a_job_that_dies_alone_elsewhere_than_before_is_poison_only_where_it_dies_there_again(callers, brief, redis):
    walks = ["denoising:2", "denoising:7", "denoising:3", "denoising:3"]
    assert deaths_and_fates(callers, brief, redis, walks) == (3, ["requeued", "alone", "alone", "poison"])


def test_one_image_at_the_same_place_is_enough(callers, brief, redis):
    walks = ["begun", "denoising:7,denoising:6", "denoising:5,denoising:6"]
    assert deaths_and_fates(callers, brief, redis, walks) == (3, ["requeued", "alone", "poison"])


@pytest.mark.parametrize("walks", [[None] * 6, [f"denoising:{step}" for step in range(6)]])
def test_what_speaks_for_a_job_is_believed_three_times(callers, brief, redis, walks):
    deaths, fates = deaths_and_fates(callers, brief, redis, walks)
    assert (deaths, fates[-1]) == (3, "poison")


def test_where_a_job_was_counts_only_under_its_fence(callers, leases, brief, redis):
    job_id = callers.submit()
    stalled, _ = die(redis, brief)
    leases.claim(QUEUE, is_idle=False)
    brief.mark([(stalled, "made")])
    assert redis.hget(keys.JOB + job_id, "walk") == "1 denoising:2"


def test_a_worker_taken_for_dead_that_beats_again_takes_the_death_back(callers, leases, brief, redis):
    job_id = callers.submit()
    stalled, _ = die(redis, brief)
    assert callers.get(job_id).deaths == 1
    assert brief.beat([Beat(stalled.id, stalled.fence)]).lost == [job_id]
    assert brief.beat([Beat(stalled.id, stalled.fence)]).lost == [job_id]
    assert callers.get(job_id).deaths == 0


def test_a_claim_whose_reply_was_lost_gives_the_same_job_again(callers, leases):
    first, second = callers.submit(), callers.submit()
    failpoints.arm("after_claim=disconnect")
    with pytest.raises(ConnectionError):
        leases.claim(QUEUE, is_idle=False)
    assert [leases.claim(QUEUE, is_idle=False).id for _ in range(2)] == [first, second]
    assert (callers.get(first).fence, callers.get(first).tries) == (1, 1)


def test_a_job_that_was_cancelled_while_the_reply_of_its_claim_was_lost_is_not_given(callers, leases):
    cancelled, other = callers.submit(), callers.submit()
    failpoints.arm("after_claim=disconnect")
    with pytest.raises(ConnectionError):
        leases.claim(QUEUE, is_idle=False)
    callers.cancel(cancelled)
    assert leases.claim(QUEUE, is_idle=False).id == other


def test_of_thirteen_jobs_nine_are_high_three_normal_and_one_low(callers, leases):
    kinds = {callers.submit(priority=p): p for p in ("low", "normal", "high") for _ in range(13)}
    popped = [kinds[leases.claim(QUEUE, is_idle=False).id] for _ in range(39)]
    assert [popped[:13].count(p) for p in ("high", "normal", "low")] == [9, 3, 1]
    assert leases.claim(QUEUE, is_idle=False) is Turn.NOTHING


def test_a_job_of_another_lane_keeps_it_when_it_is_handed_back(callers, leases):
    job_id = callers.submit(priority="high")
    leases.release(leases.claim(QUEUE, is_idle=False))
    assert callers.get(job_id).priority == "high"
    assert leases.claim(QUEUE, is_idle=False).id == job_id


def test_a_job_behind_thousands_of_cancelled_ones_is_found_without_a_pause(callers, leases, redis):
    redis.rpush(f"rq:queue:{QUEUE}", *(f"job_gone{i}" for i in range(2500)))
    job_id = callers.submit()
    turns = [leases.claim(QUEUE, is_idle=False) for _ in range(3)]
    assert turns[:2] == [Turn.AGAIN, Turn.AGAIN]
    assert turns[2].id == job_id


def test_a_job_whose_id_somebody_took_out_of_rqs_list_is_put_back(callers, leases, redis):
    lost, _other = callers.submit(), callers.submit()
    redis.lrem(f"rq:queue:{QUEUE}", 0, lost)
    assert leases.audit(QUEUE) == [lost]
    assert leases.audit(QUEUE) == []
    assert leases.claim(QUEUE, is_idle=False).id == lost


def test_a_running_job_whose_lease_is_gone_is_found(callers, leases, redis):
    job_id = callers.submit()
    leases.claim(QUEUE, is_idle=False)
    redis.delete(keys.LEASES)
    assert leases.audit(QUEUE) == [job_id]
    time.sleep(0.005)
    assert leases.reap() == {job_id: "requeued"}


def test_a_full_redis_refuses_new_jobs_and_lets_those_it_has_end(callers, leases, redis):
    job_id = callers.submit(webhook=Webhook(url="https://example.org/hook"))
    claim = leases.claim(QUEUE, is_idle=False)
    redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(Overloaded):
            callers.submit()
        assert leases.beat([Beat(claim.id, claim.fence, '{"phase":"denoising","step":1,"steps":4}')]).lost == []
        assert leases.commit(claim, JobStatus.SUCCEEDED, {"outputs": []})
    finally:
        redis.config_set("maxmemory", 0)
    assert callers.get(job_id).status is JobStatus.SUCCEEDED
    assert redis.zcard(keys.OUTBOX) == 1


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


def test_a_job_that_one_version_cannot_read_is_left_to_others_behind_the_rest_and_keeps_its_tries(
    callers, leases, redis
):
    unread, other = callers.submit(), callers.submit()
    assert leases.pass_on(leases.claim(QUEUE, is_idle=False))
    assert [leases.claim(QUEUE, is_idle=False).id for _ in range(2)] == [other, unread]
    assert (callers.get(unread).tries, callers.get(unread).deaths) == (1, 0)


def test_a_job_that_nobody_could_read_for_minutes_stays_in_the_hands_of_who_tries_last(callers, leases, redis):
    job_id = callers.submit()
    redis.hset(keys.JOB + job_id, "unread_since", redis.time()[0] * 1000 - 301_000)
    claim = leases.claim(QUEUE, is_idle=False)
    assert not leases.pass_on(claim)
    assert leases.commit(claim, JobStatus.FAILED, {"error": {"code": "x", "message": "y"}})


def test_a_waiting_job_takes_at_most_one_and_a_half_kilobytes(callers, redis):
    count = 300
    before = redis.info("memory")["used_memory"]
    for _ in range(count):
        callers.submit()
    used = (redis.info("memory")["used_memory"] - before) / count
    print(f"{used:.0f} bytes a waiting job, {count} jobs")
    assert used <= 1500
