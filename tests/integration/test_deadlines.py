"""Deadlines where no API lives: the worker keeps them, for the jobs it makes and for those that wait."""

import json
import time

import httpx2
import pytest

from app.core.redis_keys import JOB, LEASES
from tests.chaos.service import model_name, service
from tests.chaos.stub_worker import STEP_VARIABLE

STEP_SECONDS = 0.05
DEADLINE = 2.0


@pytest.fixture
def built(forks, tmp_path):
    with service(tmp_path, forks, models=1, on_disk=True, **{STEP_VARIABLE: str(STEP_SECONDS)}) as built:
        yield built


def in_flight(address):
    text = httpx2.get(f"http://{address}/metrics", trust_env=False).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("safelight_runs_in_flight{"))


def test_a_worker_ends_what_is_past_its_deadline_though_no_api_lives(built):
    api = built.start("api")
    built.start("worker", SAFELIGHT_SERVE=model_name(0), SAFELIGHT_MAX_RUNS="1")
    built.wait_until(built.is_ready, 60)
    built.wait_until(lambda: built.client.get("/v1/workers").json()["data"], 60)
    [worker] = built.client.get("/v1/workers").json()["data"]
    running = built.submit(num_inference_steps=250, deadline_seconds=DEADLINE)
    built.wait_until(lambda: built.job(running)["status"] == "processing", 20)
    waiting = built.submit(num_inference_steps=250, deadline_seconds=DEADLINE)
    last = built.submit(num_inference_steps=4)
    assert built.job(waiting)["status"] == "queued"
    built.retire(api)

    def ended(job_id):
        built.wait_until(lambda: built.redis.hget(JOB + job_id, "completed_at"), 20)
        record = built.redis.hgetall(JOB + job_id)
        assert record["status"] == "expired"
        return int(record["completed_at"]) / 1e3, int(record["deadline_at"]) / 1e3

    at, due = ended(running)
    built.wait_until(lambda: in_flight(worker["metrics"]) == 0 or built.redis.hget(JOB + last, "fence"), 5)
    stopped_after, lates = time.time() - at, [at - due]
    at, due = ended(waiting)
    lates.append(at - due)
    print(
        f"late by {', '.join(f'{late:.2f}' for late in lates)} s; the engine was free {stopped_after:.2f} s after that"
    )
    assert lates[0] < 0.25, "the worker that makes it knows when it is due"
    assert lates[1] < 1.5
    assert stopped_after < 1.5, "250 steps would have taken 12 s"
    built.wait_until(lambda: built.redis.hget(JOB + last, "status") == "succeeded", 20)
    assert built.redis.zcard(LEASES) == 0
    assert json.loads(built.redis.hget(JOB + last, "outputs"))
