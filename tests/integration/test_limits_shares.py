"""Fair shares between tenants in the claim: by cost and weight, with a bound on waiting; caps on what runs."""

import itertools
import json
import random
from collections import Counter, defaultdict

import pytest
import redis as redis_py
from rq import Queue
from rq.serializers import JSONSerializer

from app.core import redis_keys as keys
from app.core.job import JobStatus
from app.core.limits import set_limits
from app.core.queue import rq_time
from tests.integration.test_leases import QUEUE, RETENTION_MS, params
from worker.leases import Claim, Leases, Turn

SEED = 20261124


@pytest.fixture
def leases(redis):
    return Leases(redis, "worker-1", lease_ms=60_000, retention_ms=RETENTION_MS)


class Tenants:
    """Submits jobs of a given cost, and knows whose each is."""

    def __init__(self, redis):
        self.redis = redis
        self.of = {}
        self.number = 0

    def submit(self, tenant, ms, priority="normal", count=1):
        lane = keys.lane_name(QUEUE, priority, tenant)
        self.redis.script_load(keys.SUBMIT.text)
        pipeline = self.redis.pipeline(transaction=False)  # one sync of the file for all
        for _ in range(count):
            self.number += 1
            job_id = f"job_{self.number}"
            fields = json.dumps({"params": params().model_dump_json(), "work": f"{ms} 2"})
            rq = ["created_at", rq_time(), "data", json.dumps(["f", None, [], {}]), "origin", lane]
            pipeline.evalsha(keys.SUBMIT.sha, 0, job_id, tenant, lane, "", "-", RETENTION_MS, fields, "", *rq)
            self.of[job_id] = tenant
        assert {reply[0] for reply in pipeline.execute()} == {"created"}
        return job_id


@pytest.fixture
def tenants(redis):
    return Tenants(redis)


def claimed(leases, tenants, count):
    """Whose the next jobs are."""
    found = []
    for _ in range(count):
        claim = leases.claim(QUEUE, is_idle=False)
        assert isinstance(claim, Claim)
        found.append(tenants.of[claim.id])
    return found


def test_two_tenants_get_as_much_of_the_denoiser_however_large_their_jobs_are(leases, tenants):
    tenants.submit("large", 1000, count=20)
    tenants.submit("small", 100, count=200)
    assert Counter(claimed(leases, tenants, 110)) == {"large": 10, "small": 100}


def test_weights_divide_the_denoiser(redis, leases, tenants):
    set_limits(redis, "heavy", {"weight": 3})
    tenants.submit("heavy", 100, count=100)
    tenants.submit("light", 100, count=100)
    assert Counter(claimed(leases, tenants, 80)) == {"heavy": 60, "light": 20}


def test_who_comes_while_another_floods_waits_for_one_job_at_most(leases, tenants):
    tenants.submit("flood", 60_000, count=1000)
    claimed(leases, tenants, 20)
    tenants.submit("guest", 10)
    assert "guest" in claimed(leases, tenants, 2)


def test_nobody_saves_up_while_he_has_no_jobs(leases, tenants):
    tenants.submit("guest", 100)
    claimed(leases, tenants, 1)
    tenants.submit("steady", 100, count=60)
    claimed(leases, tenants, 40)
    tenants.submit("guest", 100, count=20)
    assert Counter(claimed(leases, tenants, 20))["guest"] in {10, 11}


def test_who_leaves_and_comes_back_pays_for_what_he_had(leases, tenants):
    """One large job after another, each submitted when the one before was taken, is no way around the shares."""
    tenants.submit("steady", 100, count=100)
    found = []
    for _ in range(50):
        if "comer" not in [tenants.of[i] for i in tenants.of if i not in found]:
            tenants.submit("comer", 1000)
        claim = leases.claim(QUEUE, is_idle=False)
        found.append(claim.id)
    had = Counter(tenants.of[job_id] for job_id in found)
    assert had["comer"] <= had["steady"] / 10 + 2


def test_a_tenants_priorities_are_its_own_affair(leases, tenants):
    tenants.submit("one", 100, "high", count=40)
    tenants.submit("other", 100, "low", count=40)
    assert Counter(claimed(leases, tenants, 40)) == {"one": 20, "other": 20}


def test_whatever_they_hand_in_no_tenant_falls_behind_by_more_than_two_jobs(leases, tenants, redis):
    """Start-time fair queueing's bound: between tenants who always have jobs, the work they had by their weight differs
    by at most the largest job of each by its weight.
    """
    dice = random.Random(SEED)
    names = {f"t{i}": dice.choice([0.5, 1, 2, 4]) for i in range(6)}
    largest, had, costs = defaultdict(int), defaultdict(float), {}
    for name, weight in names.items():
        set_limits(redis, name, {"weight": weight})
        for _ in range(100):
            ms = dice.choice([10, 100, 1000, 5000])
            largest[name] = max(largest[name], ms)
            costs[tenants.submit(name, ms, dice.choice(["high", "normal", "low"]))] = ms
    worst = 0.0
    for _ in range(120):
        claim = leases.claim(QUEUE, is_idle=False)
        had[tenants.of[claim.id]] += costs[claim.id] / names[tenants.of[claim.id]]
        for one, other in itertools.permutations(names, 2):
            bound = largest[one] / names[one] + largest[other] / names[other]
            assert abs(had[one] - had[other]) <= bound, f"seed {SEED}"
            worst = max(worst, abs(had[one] - had[other]) / bound)
    print(f"seed {SEED}: at worst {worst:.2f} of the bound, 120 claims of 6 tenants")


def test_a_tenant_runs_no_more_jobs_than_it_may_and_others_go_on(redis, leases, tenants):
    set_limits(redis, "one", {"max_running": 2})
    tenants.submit("one", 100, count=4)
    tenants.submit("other", 100, count=2)
    claims = [leases.claim(QUEUE, is_idle=False) for _ in range(4)]
    assert Counter(tenants.of[c.id] for c in claims) == {"one": 2, "other": 2}
    assert leases.claim(QUEUE, is_idle=False) is Turn.NOTHING
    ended = next(c for c in claims if tenants.of[c.id] == "one")
    assert leases.commit(ended, JobStatus.SUCCEEDED, {"outputs": []})
    assert claimed(leases, tenants, 1) == ["one"]
    assert leases.claim(QUEUE, is_idle=False) is Turn.NOTHING


@pytest.mark.parametrize("way", ["raise", "cancel", "release"])
def test_whatever_lets_a_capped_tenant_run_again_wakes_its_jobs(redis, leases, tenants, way):
    set_limits(redis, "one", {"max_running": 1})
    tenants.submit("one", 100, count=2)
    claim = leases.claim(QUEUE, is_idle=False)
    assert leases.claim(QUEUE, is_idle=False) is Turn.NOTHING
    if way == "raise":
        set_limits(redis, "one", {"max_running": None})
    elif way == "cancel":
        keys.CANCEL.run(redis, claim.id, "one", RETENTION_MS)
    else:
        leases.release(claim)
    assert claimed(leases, tenants, 1) == ["one"]


def test_the_cap_of_the_settings_holds_for_tenants_without_their_own(redis, tenants):
    capped = Leases(redis, "worker-2", lease_ms=60_000, retention_ms=RETENTION_MS, max_running=1)
    set_limits(redis, "free", {"max_running": 0})
    tenants.submit("free", 100, count=2)
    tenants.submit("one", 100, count=2)
    assert Counter(claimed(capped, tenants, 3)) == {"free": 2, "one": 1}
    assert capped.claim(QUEUE, is_idle=False) is Turn.NOTHING


def test_a_tenant_whose_turn_is_let_pass_keeps_it(leases, tenants):
    tenants.submit("flood", 100, count=2)
    tenants.submit("guest", 100)
    assert tenants.of[leases.claim(QUEUE, is_idle=False, passing=["flood"]).id] == "guest"
    assert leases.claim(QUEUE, is_idle=False, passing=["flood"]) is Turn.NOTHING
    assert claimed(leases, tenants, 2) == ["flood", "flood"]


def test_rqs_counts_are_ours_but_for_cancelled_jobs_not_yet_popped(redis, redis_url, leases, tenants):
    for tenant, count in (("default", 3), ("one", 4), ("other", 5)):
        tenants.submit(tenant, 100, "high", count=1)
        tenants.submit(tenant, 100, count=count)
    claimed(leases, tenants, 4)
    last = tenants.submit("one", 100)
    rq_redis = redis_py.Redis.from_url(redis_url)
    seen = [len(queue) for queue in Queue.all(connection=rq_redis, serializer=JSONSerializer)]
    rq_redis.close()
    assert sum(seen) == int(redis.hget(keys.WORK + QUEUE, "jobs")) == 12
    keys.CANCEL.run(redis, last, "one", RETENTION_MS)
    assert int(redis.hget(keys.WORK + QUEUE, "jobs")) == 11


def test_the_sums_of_a_queue_follow_its_jobs_and_end_at_nothing(redis, leases, tenants):
    tenants.submit("one", 300, "low")
    tenants.submit("one", 200)
    gone = tenants.submit("other", 100)
    assert redis.hgetall(keys.WORK + QUEUE) == {
        "jobs": "3",
        "waiting": "600",
        f"{QUEUE}@one:low": "300",
        f"{QUEUE}@one": "200",
        f"{QUEUE}@other": "100",
    }
    keys.CANCEL.run(redis, gone, "other", RETENTION_MS)
    claims = [leases.claim(QUEUE, is_idle=False) for _ in range(2)]
    assert redis.hgetall(keys.WORK + QUEUE) == {"running": "500", "rows": "4"}
    for claim in claims:
        leases.commit(claim, JobStatus.SUCCEEDED, {"outputs": []})
    assert redis.hgetall(keys.WORK + QUEUE) == {}
    assert leases.claim(QUEUE, is_idle=False) is Turn.NOTHING
    assert redis.zcard(keys.SHARES + QUEUE) == 0


def test_jobs_of_every_tenant_come_back_when_somebody_empties_rqs_lists_and_the_ring(redis, leases, tenants):
    for tenant in ("default", "one", "other"):
        tenants.submit(tenant, 100, count=2)
    redis.delete(keys.SHARES + QUEUE, *(f"rq:queue:{keys.share_name(QUEUE, t)}" for t in ("default", "one", "other")))
    while leases.audit(QUEUE):
        pass
    assert Counter(claimed(leases, tenants, 6)) == {"default": 2, "one": 2, "other": 2}
