"""A state machine of all that can happen to a job, against the real server, with a dict as its model."""

import itertools
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from app.core import redis_keys as keys
from app.core.connections import connect
from app.core.job import JobStatus
from app.core.queue import rq_time
from tests.integration.test_leases import QUEUE, RETENTION_MS, params
from tests.servers import redis_server
from worker.leases import Beat, Claim, Leases, Turn

LANES = [*keys.lanes(QUEUE), *keys.lanes(QUEUE, "other")]
DEAD_MS, ALIVE_MS = 1, 600_000
FINAL = {"succeeded", "failed", "canceled"}


class Jobs(RuleBasedStateMachine):
    """What is expected of each job: its status, deaths, tries, and the claim that holds it."""

    server = None  # set by the test

    def __init__(self):
        super().__init__()
        self.redis = connect(self.server.url)
        self.redis.flushall()
        self.names = itertools.count()
        self.model = {}
        self.by_key = {}
        self.worker = Leases(self.redis, "worker", lease_ms=ALIVE_MS, retention_ms=RETENTION_MS)
        self.doomed = Leases(self.redis, "doomed", lease_ms=DEAD_MS, retention_ms=RETENTION_MS)

    jobs = Bundle("jobs")
    claims = Bundle("claims")

    def _submit(self, key, lane):
        job_id = f"job_{next(self.names)}"
        fields = json.dumps(
            {"params": params().model_dump_json(), "webhook_url": "https://x", "webhook_events": EVENTS}
        )
        rq = ["created_at", rq_time(), "origin", lane]
        outcome = keys.SUBMIT.run(self.redis, job_id, "t", lane, key, "print", RETENTION_MS, fields, "", *rq)
        return job_id, outcome[:2]

    @rule(target=jobs, lane=st.sampled_from(LANES))
    def submit(self, lane):
        job_id, outcome = self._submit("", lane)
        assert outcome == ["created", job_id]
        self.model[job_id] = {"status": "queued", "deaths": 0, "tries": 0, "claim": None}
        return job_id

    @rule(target=jobs, key=st.sampled_from(["a", "b"]))
    def submit_under_a_key(self, key):
        job_id, (outcome, found) = self._submit(key, QUEUE)
        if key in self.by_key:
            assert (outcome, found) == ("existing", self.by_key[key])
            return multiple()
        assert (outcome, found) == ("created", job_id)
        self.by_key[key] = job_id
        self.model[job_id] = {"status": "queued", "deaths": 0, "tries": 0, "claim": None}
        return job_id

    def _claim(self, leases):
        claim = leases.claim(QUEUE, is_idle=True)
        waiting = {job_id for job_id, job in self.model.items() if job["status"] == "queued"}
        if claim is Turn.NOTHING:
            assert not waiting
            return multiple()
        assert isinstance(claim, Claim)
        assert claim.id in waiting
        job = self.model[claim.id]
        assert claim.is_alone == (job["deaths"] >= 2 and claim.is_alone)
        job.update(status="processing", tries=job["tries"] + 1, claim=claim, walk=None)
        return claim

    @rule(target=claims)
    def claim(self):
        return self._claim(self.worker)

    @rule(target=claims)
    def claim_and_be_silent(self):
        """The lease passes at once; whether anybody notices is for `reap`."""
        claim = self._claim(self.doomed)
        if isinstance(claim, Claim):
            self.model[claim.id]["is_silent"] = True
            time.sleep(0.003)
        return claim

    def _holds(self, claim):
        return self.model[claim.id]["claim"] is claim and self.model[claim.id]["status"] == "processing"

    @rule(claim=claims)
    def step(self, claim):
        holds, job = self._holds(claim), self.model[claim.id]
        committed = job.get("committed") == claim.fence
        lost = self.worker.beat([Beat(claim.id, claim.fence, '{"phase":"denoising","step":1,"steps":4}')]).lost
        assert lost == ([] if holds or committed else [claim.id])
        if holds:
            job["is_silent"] = False
        elif job.get("died") == claim.fence and job["status"] not in FINAL:
            job["deaths"] -= 1
            job["died"] = job["died_at"] = None

    @rule(claim=claims, walk=st.sampled_from(["begun", "denoising:1", "denoising:2", "made"]))
    def come_to(self, claim, walk):
        self.worker.mark([(claim, walk)])
        if self._holds(claim):
            self.model[claim.id]["walk"] = walk

    @rule(claim=claims, status=st.sampled_from([JobStatus.SUCCEEDED, JobStatus.FAILED]))
    def commit(self, claim, status):
        holds, job = self._holds(claim), self.model[claim.id]
        again = job.get("committed") == claim.fence
        assert self.worker.commit(claim, status, {"outputs": []}) == (holds or again)
        if holds:
            job.update(status=str(status), claim=None, committed=claim.fence)

    @rule(claim=claims)
    def hand_back(self, claim):
        holds, job = self._holds(claim), self.model[claim.id]
        assert self.worker.release(claim) == holds
        if holds:
            job.update(status="queued", claim=None, tries=job["tries"] - 1)

    @rule(job_id=jobs)
    def cancel(self, job_id):
        job = self.model[job_id]
        expected = job["status"] if job["status"] in FINAL else "canceled"
        assert keys.CANCEL.run(self.redis, job_id, "t", RETENTION_MS) == expected
        job.update(status=expected, claim=None)

    @rule()
    def reap(self):
        silent = {i for i, job in self.model.items() if job["status"] == "processing" and job.get("is_silent")}
        fates = self.worker.reap()
        assert set(fates) == silent
        for job_id, fate in fates.items():
            job = self.model[job_id]
            was_alone = job["claim"].is_alone
            deaths = job["deaths"] + 1
            walk, died_at, chances = job.get("walk"), job.get("died_at"), job.get("chances", 0)
            is_proof = was_alone and deaths >= 3
            job["died_at"] = walk or died_at
            if walk == "made":
                deaths, job["died_at"] = job["deaths"], died_at
            elif job["deaths"] and chances < 3 and (walk is None or (is_proof and walk != (died_at or walk))):
                deaths = job["deaths"]
                job["chances"] = chances + 1
            else:
                job["died"] = job["claim"].fence
            is_poison = is_proof and deaths > job["deaths"]
            assert fate == ("poison" if is_poison else "alone" if deaths >= 2 else "requeued")
            job.update(status="failed" if is_poison else "queued", deaths=deaths, claim=None)

    @rule()
    def audit(self):
        assert self.worker.audit(QUEUE) == []

    @rule()
    def empty_rqs_lists(self):
        self.redis.delete(*(f"rq:queue:{lane}" for lane in LANES))
        expected = {i for i, job in self.model.items() if job["status"] == "queued"}
        alone = set(self.redis.lrange(keys.ALONE + QUEUE, 0, -1))
        while self.worker.audit(QUEUE):
            pass
        in_lists = {i for lane in LANES for i in self.redis.lrange(f"rq:queue:{lane}", 0, -1)}
        assert expected - alone <= in_lists or len(expected) > 10

    @rule()
    def restart_redis(self):
        self.server.kill()
        self.server.start()

    @invariant()
    def the_server_agrees(self):
        pipeline = self.redis.pipeline(transaction=False)
        pipeline.zrange(keys.LEASES, 0, -1)
        for lane in LANES:
            pipeline.zrange(keys.WAITING + lane, 0, -1)
        pipeline.hmget(keys.WORK + QUEUE, "jobs", "rows")
        for job_id, job in self.model.items():
            pipeline.hmget(keys.JOB + job_id, "status", "deaths", "tries")
            pipeline.lrange(keys.EVENTS + job_id, 0, -1)
            pipeline.exists(f"{keys.DELIVERY}msg_{job_id[4:]}_{job['status']}")
        held, *found = pipeline.execute()
        waiting, sums, found = found[: len(LANES)], found[len(LANES)], found[len(LANES) + 1 :]
        assert set(held) == {i for i, job in self.model.items() if job["status"] == "processing"}
        assert set().union(*waiting) == {i for i, job in self.model.items() if job["status"] == "queued"}
        assert [int(text or 0) for text in sums] == [sum(map(len, waiting)), len(held)]
        for job, record, events, has_webhook in zip(
            self.model.values(), found[::3], found[1::3], found[2::3], strict=True
        ):
            assert record[0] == job["status"]
            assert [int(text or 0) for text in record[1:]] == [job["deaths"], job["tries"]]
            is_final = job["status"] in FINAL
            assert sum(any(f'"{status}"' in event for status in FINAL) for event in events) == is_final
            assert has_webhook == is_final

    def teardown(self):
        self.redis.close()


EVENTS = "job.succeeded,job.failed,job.canceled,job.expired"


@pytest.mark.timeout(170)
def test_whatever_happens_in_whatever_order_every_job_is_in_one_place_and_ends_once():
    # In memory where that is possible: thousands of steps, each of them synced, and a kill -9 takes no page cache away.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with TemporaryDirectory(dir=memory) as folder, redis_server(Path(folder)) as server:
        Jobs.server = server
        about = settings(
            max_examples=20,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        run_state_machine_as_test(Jobs, settings=about)
