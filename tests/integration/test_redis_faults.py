"""Redis emptied, frozen, full, killed, or set up so that it may lose jobs, under real processes with a stub model."""

import signal
import time

import pytest
import structlog
import uvloop
from redis.exceptions import ConnectionError as RedisConnectionError

from app.core import redis_keys as keys
from app.core.connections import check_server, connect, connect_async
from app.core.errors import ConfigError
from tests.chaos.checker import History, check
from tests.chaos.service import service
from tests.chaos.stub_worker import STEP_VARIABLE
from tests.servers import redis_binaries, redis_server


@pytest.fixture(scope="module")
def built(forks, tmp_path_factory):
    """A service with two workers, whose leases last two seconds, and a step a fiftieth of one."""
    about = {"SAFELIGHT_LEASE_SECONDS": "2", STEP_VARIABLE: "0.02"}
    with service(tmp_path_factory.mktemp("redis"), forks, on_disk=True, **about) as built:
        built.start_all()
        yield built


def start_long(built, count=4, steps=60):
    """Jobs that run for a while, once they do."""
    job_ids = [built.submit(seed=i, num_inference_steps=steps) for i in range(count)]
    built.wait_until(lambda: all((built.job(i) or {}).get("progress") for i in job_ids), 20)
    return job_ids


def finish(built, history_file, job_ids):
    for job_id in job_ids:
        built.wait(job_id)
    built.wait_until(built.outbox_is_empty, 20)
    return check(built, History(history_file), job_ids)


def test_a_redis_that_stood_still_for_longer_than_a_lease_has_nobody_taken_for_dead(built, tmp_path):
    job_ids = start_long(built, steps=200)
    built.redis_server.pause()
    time.sleep(3.5)
    built.redis_server.resume()
    verdict = finish(built, tmp_path / "history.jsonl", job_ids)
    assert verdict.is_clean, verdict
    assert (set(verdict.died), set(verdict.tries)) == ({0}, {1})


def test_a_redis_that_was_killed_for_longer_than_a_lease_has_nobody_taken_for_dead(built, tmp_path):
    job_ids = start_long(built, steps=200)
    built.redis_server.kill()
    time.sleep(3.5)
    built.redis_server.start()
    began = time.monotonic()
    built.wait_until(built.is_ready, 5)
    print(f"ready {time.monotonic() - began:.2f} s after Redis")
    verdict = finish(built, tmp_path / "history.jsonl", job_ids)
    assert verdict.is_clean, verdict
    assert (set(verdict.died), set(verdict.tries)) == ({0}, {1})


def test_a_full_redis_refuses_new_jobs_and_lets_those_it_has_succeed(built, tmp_path):
    job_ids = start_long(built)
    used = built.redis.info("memory")["used_memory"]
    built.redis.config_set("maxmemory", used // 2)
    try:
        time.sleep(1.1)  # memory is looked at every second
        reply = built.client.post("/v1/jobs", json={"prompt": "one too many"})
        assert (reply.status_code, reply.json()["code"]) == (503, "overloaded")
        assert reply.headers["retry-after"] == "10"
        verdict = finish(built, tmp_path / "history.jsonl", job_ids)
        assert verdict.is_clean, verdict
    finally:
        built.redis.config_set("maxmemory", 0)
    built.wait(built.submit(seed=1))


def test_a_redis_that_was_emptied_leaves_workers_that_drop_their_jobs_and_take_new_ones(built):
    job_ids = start_long(built, steps=200)
    built.redis.flushall()
    assert {built.client.get(f"/v1/jobs/{job_id}").status_code for job_id in job_ids} == {404}
    assert built.client.post(f"/v1/jobs/{job_ids[0]}/cancel").status_code == 404
    assert built.client.get("/v1/jobs").json()["data"] == []
    built.wait_until(lambda: len(built.logged("job.dropped")) >= len(job_ids), 10)
    assert built.wait(built.submit(seed=1))["status"] == "succeeded"
    assert {job_id for job_id in job_ids if built.redis.exists(keys.JOB + job_id)} == set()
    built.wait_until(lambda: built.redis.scard("rq:workers") == 2, 10)


def test_a_worker_told_to_stop_twice_still_hands_its_jobs_back(built):
    job_ids = start_long(built, steps=200)
    for slot in built.workers:
        slot.child.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    for slot in built.workers:
        slot.child.send_signal(signal.SIGTERM)
    for job_id in job_ids:
        assert built.wait(job_id)["status"] == "succeeded"
        assert built.redis.hmget(keys.JOB + job_id, "tries", "deaths") == ["1", None]


def test_a_connection_that_closes_under_a_write_is_an_error_of_redis_under_uvloop_too(redis_url):
    async def write_to_a_closed_one():
        async with connect_async(redis_url) as redis:
            connection = await redis.connection_pool.get_connection()
            connection._writer.transport.abort()
            await connection.send_command("PING")

    with pytest.raises(RedisConnectionError):
        uvloop.run(write_to_a_closed_one())


@pytest.mark.parametrize("name", redis_binaries())
def test_a_redis_that_may_throw_jobs_away_is_refused_and_one_without_a_file_is_warned_of(tmp_path, name):
    with redis_server(tmp_path, redis_binaries()[name]) as server, connect(server.url) as redis:
        redis.config_set("maxmemory", "1gb")
        with structlog.testing.capture_logs() as logs:
            check_server(redis)
        assert logs == []
        redis.config_set("appendonly", "no")
        redis.config_set("maxmemory", "0")
        with structlog.testing.capture_logs() as logs:
            check_server(redis)
        assert [entry["event"] for entry in logs] == ["redis.not_durable", "redis.unbounded"]
        redis.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(ConfigError, match="noeviction"):
            check_server(redis)
