"""Workers that die of a job, hang, are restarted, or have a wrong clock, in real processes with a stub model."""

import json
import os
import shutil
import signal
import time
from datetime import datetime

import pytest

from app.core.redis_keys import JOB
from tests.chaos.checker import History, check
from tests.chaos.nursery import nursery
from tests.chaos.service import model_name, service
from tests.chaos.stub_worker import CANCEL_VARIABLE, CANCELS, HANG, HUGE, KILLER, STEP_VARIABLE
from worker.main import BROKEN_EXIT

MODELS = 6
CANCELLED = int(os.environ.get("CHAOS_CANCELS", "300"))  # visits to a failpoint that end in a cancellation
RESTARTS = int(os.environ.get("CHAOS_RESTARTS", "20"))


@pytest.fixture(scope="module")
def built(forks, tmp_path_factory):
    """A service without workers, whose leases last a second."""
    folder = tmp_path_factory.mktemp("faults")
    with service(folder, forks, models=MODELS, on_disk=True, SAFELIGHT_LEASE_SECONDS="1") as built:
        built.start("api")
        built.start("sender")
        warden = built.start("worker", SAFELIGHT_SERVE=model_name(0))
        built.wait_until(built.is_ready, 60)
        built.retire(warden)
        yield built


@pytest.fixture
def history(built, tmp_path):
    return History(tmp_path / "history.jsonl")


def settle(built, history, job_ids):
    for job_id in job_ids:
        built.wait(job_id, 60)
    built.wait_until(built.outbox_is_empty, 20)
    return check(built, history, job_ids)


@pytest.mark.parametrize(("prompt", "number"), [(KILLER, 0), (HANG, 1)])
def test_a_job_that_ends_its_worker_is_poison_and_its_company_succeeds(built, history, prompt, number):
    model = model_name(number)
    company = [built.submit(model=model, seed=i, num_inference_steps=60) for i in range(16)]
    killer = built.submit(model=model, prompt=prompt, num_inference_steps=40)
    slots = [built.start("worker", SAFELIGHT_SERVE=model) for _ in range(2)]
    began = time.monotonic()
    job = built.wait(killer, 90)
    verdict = settle(built, history, company)
    deaths = int(built.redis.hget(JOB + killer, "deaths"))
    print(f"{prompt}: poison after {deaths} deaths, {time.monotonic() - began:.0f} s\n{verdict}")
    assert (job["status"], job["error"]["code"]) == ("failed", "poison")
    assert deaths <= 3
    assert max(verdict.died) <= 2
    assert verdict.is_clean, verdict
    for slot in slots:
        built.retire(slot)


@pytest.mark.parametrize("place", ["before_beat", "before_claim", "before_step"])
def test_a_worker_that_loses_a_thread_ends_at_once_and_its_jobs_go_on(built, history, place):
    model = model_name(2)
    victim = built.start("worker", f"{place}=crash@2", SAFELIGHT_SERVE=model)
    job_ids = [built.submit(model=model, seed=i, num_inference_steps=100) for i in range(3)]
    first = victim.child
    assert first.wait(10) in (1, BROKEN_EXIT)
    assert settle(built, history, job_ids).is_clean
    built.retire(victim)


def test_a_picture_that_cannot_be_encoded_fails_its_job_and_nothing_else(built, history):
    model = model_name(2)
    slot = built.start("worker", SAFELIGHT_SERVE=model)
    bad = built.submit(model=model, prompt=HUGE, output_format="webp", num_images=2, num_inference_steps=20)
    company = [built.submit(model=model, seed=i, num_inference_steps=60) for i in range(3)]
    job = built.wait(bad)
    assert (job["status"], job["error"]["code"]) == ("failed", "generation_failed")
    verdict = settle(built, history, company)
    assert verdict.is_clean, verdict
    assert (set(verdict.died), set(verdict.tries), slot.starts) == ({0}, {1}, 1)
    built.retire(slot)


def test_a_job_of_a_newer_version_waits_for_a_worker_that_can_read_it(built, history):
    model = model_name(2)
    job_id = built.submit(model=model, seed=1)
    params = json.loads(built.redis.hget(JOB + job_id, "params"))
    built.redis.hset(JOB + job_id, "params", json.dumps(params | {"in_the_next_version": 1}))
    slot = built.start("worker", SAFELIGHT_SERVE=model)
    company = built.submit(model=model, seed=2)
    built.wait(company)
    built.wait_until(lambda: len(built.statuses(job_id)) >= 3, 10)
    built.redis.hset(JOB + job_id, "params", json.dumps(params))  # as if the others had been replaced
    verdict = settle(built, history, [job_id, company])
    assert verdict.is_clean, verdict
    assert (set(verdict.died), set(verdict.tries)) == ({0}, {1})
    built.retire(slot)


@pytest.mark.timeout(180 + CANCELLED // 5)
def test_cancelled_at_any_point_of_its_walk_a_job_never_succeeds(built, history):
    model = model_name(3)
    about = {"SAFELIGHT_SERVE": model, CANCEL_VARIABLE: "0.05", STEP_VARIABLE: "0.001"}
    slots = [built.start("worker", **about) for _ in range(2)]
    job_ids = []
    while built.redis.llen(CANCELS) < CANCELLED:
        job_ids += [built.submit(model=model, seed=len(job_ids) + i) for i in range(20)]
        built.wait_until(lambda: built.redis.zcard(f"safelight:waiting:safelight.{model}") < 20, 30)
    for job_id in job_ids:
        built.wait(job_id)
    places = {}
    for entry in built.redis.lrange(CANCELS, 0, -1):
        place, job_id, outcome = entry.split()
        history.note("cancel", job=job_id, outcome=outcome)
        places[place] = places.get(place, 0) + 1
    verdict = settle(built, history, job_ids)
    print(f"{sum(places.values())} cancels of {len(job_ids)} jobs, by place {places}\n{verdict}")
    assert verdict.is_clean, verdict
    assert len(places) >= 10
    for slot in slots:
        built.retire(slot)


@pytest.mark.timeout(120 + 3 * RESTARTS)
def test_rolling_restarts_lose_nothing_and_use_no_try_up(built, history):
    model = model_name(4)
    about = {"SAFELIGHT_SERVE": model, "SAFELIGHT_GRACE_SECONDS": "0.1", "SAFELIGHT_LEASE_SECONDS": "5"}
    slots = [built.start("worker", **about) for _ in range(2)]
    job_ids = []
    for number in range(RESTARTS):
        slot = slots[number % 2]
        built.wait_until(lambda slot=slot: built.times(slot, "worker.ready") == slot.starts, 20)
        job_ids += [built.submit(model=model, seed=len(job_ids) + i, num_inference_steps=30) for i in range(6)]
        child = slot.child
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0
        built.wait_until(lambda slot=slot, child=child: slot.child is not child, 10)
    verdict = settle(built, history, job_ids)
    handed_back = sum(len(built.statuses(job_id)) > 3 for job_id in job_ids)
    print(f"{RESTARTS} restarts, {handed_back} jobs handed back\n{verdict}")
    assert verdict.is_clean, verdict
    assert (set(verdict.died), set(verdict.tries)) == ({0}, {1})
    assert handed_back
    for slot in slots:
        built.retire(slot)


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed; make test installs it")
def test_workers_whose_clocks_are_two_minutes_off_take_nobody_for_dead(built, history, monkeypatch):
    model = model_name(5)
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")  # timed waits hang where it is faked
    with nursery("faketime", "-f", "+120s") as ahead, nursery("faketime", "-f", "-120s") as behind:
        # A lease that a busy machine does not use up, and the clocks are off by many of.
        about = {"SAFELIGHT_SERVE": model, "SAFELIGHT_LEASE_SECONDS": "5"}
        slots = [built.start("worker", forks=forks, **about) for forks in (ahead, behind)]
        job_ids = [built.submit(model=model, seed=i, num_inference_steps=200) for i in range(30)]
        verdict = settle(built, history, job_ids)
        ended = [entry for entry in built.logged("job.ended") if entry["job_id"] in job_ids]
        told = [datetime.fromisoformat(entry["timestamp"]) for entry in ended]
        for slot in slots:
            built.retire(slot)
            slot.child.wait()
    print(verdict)
    assert verdict.is_clean, verdict
    assert (set(verdict.died), set(verdict.tries)) == ({0}, {1})
    assert 230 < (max(told) - min(told)).total_seconds() < 300  # both took part, each by its own clock
