"""What a tenant may hand in: rate, waiting jobs, streams, and the wait that is too long; by route and by command."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
from click.testing import CliRunner

from app.cli import commands
from app.core import redis_keys as keys
from app.core.estimates import Measured, Pace

ROW = 0.01  # seconds of a row of the pretended worker, in the best batch
COST = 20 * 2 * ROW  # of a job of 20 steps with guidance


def pace(**changes):
    fields = {"measured": [Measured(64 * 64, {1: ROW, 2: 2 * ROW, 4: 4 * ROW})], "max_images": 4}
    return asdict(Pace(**fields | changes))


def submit(client, **more):
    headers = more.pop("headers", {})
    return client.post("/v1/jobs", json={"prompt": "a cat"} | more, headers=headers)


@pytest.fixture
def limit(client):
    """Change limits of the default tenant by the admin route."""

    def change(**limits):
        reply = client.patch("/v1/tenants/default/limits", json=limits)
        assert reply.status_code == 200, reply.text
        return reply.json()

    return change


@pytest.fixture
def known(worker):
    """A live worker that has said how fast it is."""
    worker.live(paces={"tiny": pace()})


@pytest.fixture(autouse=True)
def _fresh_forecast(request):
    # The session's API believes for a second what the workers of the test before had said.
    if "api" in request.fixturenames:
        request.getfixturevalue("api").app.state.services.forecast.forget()


def test_nothing_is_limited_unless_somebody_says_so(client):
    found = client.get("/v1/limits").json()
    assert found["own"] == []
    assert {found[name] for name in ("rate", "burst", "max_running", "max_waiting", "max_streams")} == {0}
    assert found["weight"] == 1


def test_limits_are_a_tenants_own_until_they_are_taken_back(client, limit):
    assert limit(rate=2.5, max_waiting=7)["own"] == ["max_waiting", "rate"]
    assert (client.get("/v1/limits").json()["rate"], client.get("/v1/limits").json()["max_waiting"]) == (2.5, 7)
    assert client.get("/v1/tenants/other/limits").json()["rate"] == 0
    assert limit(rate=None)["own"] == ["max_waiting"]


def test_the_settings_hold_for_tenants_without_their_own(start_api):
    api = start_api(tenant_rate=3, tenant_max_waiting=5)
    with api.client() as client:
        found = client.get("/v1/limits").json()
        assert (found["rate"], found["max_waiting"], found["own"]) == (3, 5, [])


@pytest.mark.parametrize("body", [{"rate": -1}, {"weight": 0}, {"max_running": 1.5}, {"speed": 1}])
def test_what_is_no_limit_is_refused(client, body):
    assert client.patch("/v1/tenants/default/limits", json=body).status_code == 422


def test_a_burst_passes_and_then_the_rate_holds(client, known, limit):
    limit(rate=COST, burst=3 * COST)
    replies = [submit(client) for _ in range(4)]
    assert [reply.status_code for reply in replies] == [202, 202, 202, 429]
    assert replies[0].headers["X-RateLimit-Limit"] == f"{3 * COST:g}"
    assert [float(r.headers["X-RateLimit-Remaining"]) for r in replies[:2]] == pytest.approx([2 * COST, COST], abs=0.05)
    refused = replies[3]
    assert refused.json()["code"] == "limit_reached"
    assert refused.headers["Retry-After"] == "1"  # a job's cost a second
    assert float(refused.headers["X-RateLimit-Remaining"]) < COST


def test_after_the_time_that_retry_after_names_the_job_is_accepted(client, known, limit, redis):
    limit(rate=COST / 30, burst=COST)
    assert submit(client).status_code == 202
    refused = submit(client)
    seconds = int(refused.headers["Retry-After"])
    assert 29 <= seconds <= 30
    redis.hincrby(keys.BUCKET + "default", "at", -1000 * (seconds - 2))
    assert submit(client).status_code == 429
    redis.hincrby(keys.BUCKET + "default", "at", -2000)
    assert submit(client).status_code == 202


def test_a_job_larger_than_the_bucket_passes_when_it_is_full_and_leaves_a_debt(client, known, limit):
    limit(rate=COST, burst=COST)
    assert submit(client, num_images=4).status_code == 202
    refused = submit(client)
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "4"
    assert refused.headers["X-RateLimit-Remaining"] == "0"


def test_the_rate_counts_work_and_not_jobs(client, known, limit):
    limit(rate=0.001, burst=1.001 * COST)
    assert [submit(client, num_inference_steps=5).status_code for _ in range(5)] == [202] * 4 + [429]


def test_a_repeat_under_the_same_key_is_neither_refused_nor_charged(client, known, limit):
    limit(rate=0.001, burst=COST)
    headers = {"Idempotency-Key": "one"}
    replies = [submit(client, headers=headers) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [202] * 3
    assert len({reply.json()["id"] for reply in replies}) == 1


def test_no_more_jobs_wait_than_may(client, limit, worker):
    limit(max_waiting=2)
    first = submit(client).json()["id"]
    assert submit(client).status_code == 202
    refused = submit(client)
    assert (refused.status_code, refused.json()["code"]) == (429, "limit_reached")
    assert int(refused.headers["Retry-After"]) >= 1
    client.post(f"/v1/jobs/{first}/cancel")
    assert submit(client).status_code == 202
    worker.claim()
    assert submit(client).status_code == 202


def test_a_queue_that_is_too_long_refuses_whom_it_would_keep_waiting_and_no_one_else(start_api, worker):
    api = start_api(max_wait=10 * COST)
    worker.live(paces={"tiny": pace()})
    with api.client() as client:
        codes = [submit(client).status_code for _ in range(40)]
        accepted = codes.index(503)
        # Four pictures of work are in the worker's room before anybody waits.
        assert 10 <= accepted <= 10 + 4 + 1
        refused = submit(client)
        assert refused.json()["code"] == "overloaded"
        assert 1 <= int(refused.headers["Retry-After"]) <= COST + 1
        key = client.post("/v1/keys", json={"name": "other", "tenant": "other", "scopes": ["submit", "read", "admin"]})
        client.headers["Authorization"] = f"Bearer {key.json()['secret']}"
        assert submit(client).status_code == 202


def test_where_no_worker_lives_jobs_are_accepted_and_nothing_is_promised(start_api):
    with start_api(max_wait=1).client() as client:
        jobs = [submit(client).json() for _ in range(20)]
        assert jobs[-1]["estimate"] is None
        assert "no live worker" in jobs[-1]["notice"]


def test_a_tenant_opens_no_more_streams_than_it_may(client, limit, wait_until):
    limit(max_streams=1)
    job = submit(client).json()["links"]
    with client.stream("GET", job["events"]) as stream:
        assert stream.status_code == 200
        lines = stream.iter_lines()  # kept: a generator that is dropped closes the stream
        next(lines)
        for path in (job["events"], "/v1/events"):
            refused = client.get(path)
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "10")
        refused = client.post("/v1/images/generations", json={"prompt": "a cat", "stream": True})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "limit_reached")

    def is_free():
        with client.stream("GET", "/v1/events") as stream:
            return stream.status_code == 200

    wait_until(is_free)


def test_a_repeat_of_a_job_that_has_ended_streams_whatever_is_open_and_whoever_lives(client, worker, redis, limit):
    asked, headers = {"prompt": "a cat", "stream": True}, {"Idempotency-Key": "one"}
    worker.live()
    with client.stream("POST", "/v1/images/generations", json=asked, headers=headers) as first:
        worker.succeed(worker.claim())
        made = first.read()
    assert b"image_generation.completed" in made
    redis.delete(*redis.keys(f"{keys.PROCESS}*"))
    limit(max_streams=1)
    with client.stream("GET", "/v1/events") as other:
        assert other.status_code == 200
        again = client.post("/v1/images/generations", json=asked, headers=headers)
    assert (again.status_code, b"image_generation.completed" in again.content) == (200, True)


def test_streams_of_openais_that_begin_at_once_are_no_more_than_may_be(client, worker, redis, limit, api):
    worker.live()
    limit(max_streams=1)
    redis.client_pause(500)  # so that all of them are looked at before one begins
    together = threading.Barrier(7)

    def ask(_):
        with api.client() as other, other.stream("POST", "/v1/images/generations", json=asked) as reply:
            together.wait(20)
            together.wait(20)
            return reply.status_code

    asked = {"prompt": "a cat", "stream": True}
    with ThreadPoolExecutor(6) as pool:
        replies = [pool.submit(ask, n) for n in range(6)]
        together.wait(20)
        waiting = client.get("/v1/jobs", params={"status": "queued"}).json()["data"]
        together.wait(20)
    assert sorted(reply.result() for reply in replies) == [200, *[429] * 5]
    assert len(waiting) == 1


def test_the_command_sets_and_shows_limits(redis, redis_url, tmp_path):
    environment = {"SAFELIGHT_REDIS_URL": redis_url, "SAFELIGHT_DATA": str(tmp_path)}

    def run(*words):
        done = CliRunner().invoke(commands, ["limits", *words], env=environment, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    assert run("set", "acme", "--rate", "2", "--max-running", "3", "--weight", "2")["max_running"] == 3
    assert redis.hgetall(keys.LIMITS + "acme") == {"rate": "2", "max_running": "3", "weight": "2"}
    assert "max_running" not in run("set", "acme", "--max-running", "default")
    assert run("show", "acme") == {"rate": 2.0, "weight": 2.0}
    assert run("set", "acme", "--weight", "default") == {"rate": 2.0}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-waiting", "0.5"),
        ("--max-running", "-1"),
        ("--max-streams", "many"),
        ("--rate", "nan"),
        ("--rate", "inf"),
        ("--weight", "0"),
    ],
)
def test_the_command_refuses_what_is_no_limit(redis, redis_url, tmp_path, option, value):
    environment = {"SAFELIGHT_REDIS_URL": redis_url, "SAFELIGHT_DATA": str(tmp_path)}
    done = CliRunner().invoke(commands, ["limits", "set", "acme", option, value], env=environment)
    assert done.exit_code == 2
    assert f"Invalid value for '{option}'" in done.output
    assert not redis.exists(keys.LIMITS + "acme")
