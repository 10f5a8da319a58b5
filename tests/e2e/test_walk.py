"""The walk of a prompt over HTTP, with every part a process of its own."""

import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import httpx2
import numpy as np
import pytest
import standardwebhooks

from tests.house import STARTING, house
from tests.receiver import receiver
from tests.servers import redis_binaries, redis_server, s3_server, s3rver

SECRET = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
SEED = 20261124


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """Valkey, the disk, an API, a worker, a sender."""
    folder = tmp_path_factory.mktemp("house")
    with (
        redis_server(tmp_path_factory.mktemp("redis")) as server,
        # The measured knee may lie below a crowd of 24; what is tested here is the crowd.
        house(folder, server.url, SAFELIGHT_WEBHOOK_SECRET=SECRET, SAFELIGHT_MAX_BATCH="64") as built,
    ):
        built.start_all()
        yield built


def check_walk(built):
    """Submit, watch, fetch: a PNG of the asked size, and the job as CONTRACT has it."""
    job = built.submit(prompt="a red heart", num_inference_steps=6, num_images=2, seed=2**32 - 1)
    done = built.wait(job["id"])
    assert [o["seed"] for o in done["outputs"]] == [2**32 - 1, 0]
    for index, output in enumerate(done["outputs"]):
        assert built.picture(done, index).shape == (output["height"], output["width"], 3)
        assert output["content_type"] == "image/png"
    assert done["progress"] == {"phase": "storing", "step": 12, "steps": 12, "eta_seconds": None}
    assert set(done["timings"]) == {f"{p}_seconds" for p in ("queue", "encode", "denoise", "decode", "store")}
    return done


def test_a_prompt_becomes_a_picture_by_url(running):
    check_walk(running)


def test_params_sent_again_paint_the_same_picture(running):
    first = running.wait(running.submit(prompt="a ship", num_inference_steps=5)["id"])
    again = running.wait(running.submit(**first["params"])["id"])
    assert np.abs(running.picture(first).astype(int) - running.picture(again)).max() <= 1


def test_mixed_jobs_share_forwards_and_equal_themselves_alone(running):
    rng = random.Random(SEED)
    model = next(m for m in running.client.get("/v1/models").json()["data"] if m["default"])
    schedulers = model["schedulers"][:3]
    requests = [
        {
            "prompt": prompt,
            "num_inference_steps": rng.randint(14, 30),
            "guidance_scale": rng.choice([3.0, 5.0, 7.5]),
            "scheduler": schedulers[i % 3],
            "seed": i,
        }
        for i, prompt in enumerate((model["examples"] * 24)[:24])
    ]
    before = running.worker_metrics()
    with ThreadPoolExecutor(24) as pool:
        jobs = list(pool.map(lambda r: running.submit(**r), requests))
    crowd = [running.picture(running.wait(job["id"])).astype(int) for job in jobs]
    after = running.worker_metrics()
    runs, forwards = (
        after[f"safelight_batch_runs_{part}"] - before.get(f"safelight_batch_runs_{part}", 0)
        for part in ("sum", "count")
    )
    alone = [running.picture(running.wait(running.submit(**r)["id"])).astype(int) for r in requests]
    worst = max(np.abs(a - c).max() for a, c in zip(alone, crowd, strict=True))
    apart = np.mean([np.abs(a - b).mean() for a, b in combinations(crowd, 2)])
    print(f"seed {SEED}: {runs / forwards:.1f} runs a forward, worst difference {worst}/255, apart {apart:.1f}/255")
    assert runs / forwards >= 8
    assert worst <= 1
    assert apart > 8


def test_a_short_job_ends_before_a_long_one_that_came_first(running):
    long = running.submit(num_inference_steps=200, num_images=4)
    running.wait_until(lambda: running.job(long["id"])["progress"], 30)
    short = running.wait(running.submit(num_inference_steps=4)["id"])
    assert running.job(long["id"])["status"] == "processing"
    assert short["completed_at"] < running.wait(long["id"])["completed_at"]


def test_a_running_job_can_be_cancelled(running):
    job = running.submit(num_inference_steps=250, num_images=8)
    running.wait_until(lambda: running.job(job["id"])["progress"], 30)
    assert running.client.post(f"/v1/jobs/{job['id']}/cancel").json()["status"] == "canceled"
    running.wait_until(lambda: running.worker_metrics()["safelight_runs_in_flight"] == 0, 5)
    assert running.job(job["id"])["outputs"] == []


def test_a_waiting_request_gets_the_finished_job(running):
    reply = running.client.post(
        "/v1/jobs", json={"prompt": "a lamp", "num_inference_steps": 4}, headers={"Prefer": "wait=30"}
    )
    assert (reply.status_code, reply.json()["status"]) == (200, "succeeded")


def test_the_event_stream_tells_the_story_and_ends(running):
    job = running.submit(num_inference_steps=150)
    with running.client.stream("GET", f"/v1/jobs/{job['id']}/events") as reply:
        names = [line.removeprefix("event: ") for line in reply.iter_lines() if line.startswith("event: ")]
    assert names[0] == "status"
    assert "progress" in names
    assert names[-1] == "succeeded"


def test_the_webhook_is_signed_and_a_changed_byte_is_not_verified(running):
    with receiver() as hook:
        job = running.submit(num_inference_steps=4, webhook={"url": hook.url()})
        running.wait(job["id"])
        running.wait_until(lambda: hook.received, 10)
        got = hook.received[0]
    verifier = standardwebhooks.Webhook(SECRET)
    event = verifier.verify(got.body, got.headers)
    assert (event["type"], event["data"]["id"]) == ("job.succeeded", job["id"])
    assert httpx2.get(event["data"]["outputs"][0]["url"], trust_env=False).status_code == 200
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        verifier.verify(got.body.replace(b"succeeded", b"succeedeD", 1), got.headers)


def test_deleting_a_job_removes_its_pictures(running):
    done = running.wait(running.submit(num_inference_steps=4)["id"])
    assert running.client.delete(f"/v1/jobs/{done['id']}").status_code == 204
    assert running.client.get(f"/v1/jobs/{done['id']}").status_code == 404
    assert httpx2.get(done["outputs"][0]["url"], trust_env=False).status_code == 404


def test_a_job_of_a_killed_worker_succeeds_in_a_new_one_with_one_result_and_one_webhook(tmp_path):
    with redis_server(tmp_path) as server, receiver() as hook, house(tmp_path, server.url) as built:
        built.start("api")
        built.start("sender")
        victim = built.start("worker")
        built.wait_until(built.is_ready, STARTING)
        job = built.submit(num_inference_steps=120, num_images=2, webhook={"url": hook.url()})
        built.wait_until(lambda: (built.job(job["id"])["progress"] or {}).get("step", 0) > 20, 30)
        victim.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        built.start("worker")
        done = built.wait(job["id"], 60)
        recovered = time.monotonic() - killed
        stored = list((tmp_path / "data" / "objects").rglob("*.png"))
        built.wait_until(lambda: hook.received, 10)
        time.sleep(0.5)
        print(f"succeeded {recovered:.1f} s after the kill")
        assert recovered < 30
        assert (len(done["outputs"]), len(stored), len(hook.received)) == (2, 2, 1)


@pytest.mark.skipif("redis" not in redis_binaries(), reason="redis-server is not installed; make test installs it")
@pytest.mark.parametrize("kind", [s3_server, s3rver], ids=["moto", "s3rver"])
def test_the_same_walk_on_debians_redis_and_an_s3_server(tmp_path, kind):
    with redis_server(tmp_path, redis_binaries()["redis"]) as server, kind(tmp_path) as store:
        store.make_bucket("pictures")
        url = store.storage_url("pictures", "safelight")
        with house(tmp_path, server.url, SAFELIGHT_STORAGE_URL=url, **store.environment) as built:
            built.start_all()
            done = check_walk(built)
            assert store.endpoint in done["outputs"][0]["url"]


def test_a_worker_told_to_stop_finishes_what_it_holds(tmp_path):
    with redis_server(tmp_path) as server, house(tmp_path, server.url) as built:
        built.start("api")
        worker = built.start("worker")
        built.wait_until(built.is_ready, STARTING)
        job = built.submit(num_inference_steps=100)
        built.wait_until(lambda: built.job(job["id"])["progress"], 30)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
        assert built.job(job["id"])["status"] == "succeeded"


def test_a_worker_hands_back_what_its_grace_period_does_not_suffice_for(tmp_path):
    with redis_server(tmp_path) as server, house(tmp_path, server.url, SAFELIGHT_GRACE_SECONDS="0") as built:
        built.start("api")
        worker = built.start("worker")
        built.wait_until(built.is_ready, STARTING)
        job = built.submit(num_inference_steps=250, num_images=8)
        built.wait_until(lambda: built.job(job["id"])["progress"], 30)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
        assert built.job(job["id"])["status"] == "queued"


def test_rq_info_against_a_running_service_harms_no_job(running):
    import subprocess

    job = running.submit(num_inference_steps=250, num_images=4)  # long enough for a slow start of rq
    running.wait_until(lambda: running.job(job["id"])["progress"], 30)
    from tests.house import COMMAND

    redis_url = running.environment["SAFELIGHT_REDIS_URL"]
    told = subprocess.run(
        [Path(COMMAND).with_name("rq"), "info", "-u", redis_url], capture_output=True, text=True, check=True
    )
    assert "1 executing" in told.stdout
    running.wait(job["id"])


def test_many_threads_with_one_key_make_one_job(running):
    ids = set()
    lock = threading.Lock()

    def submit(_):
        headers = {"Idempotency-Key": "one"}
        body = {"prompt": "a lamp", "num_inference_steps": 4}
        found = running.client.post("/v1/jobs", json=body, headers=headers).json()["id"]
        with lock:
            ids.add(found)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(submit, range(32)))
    assert len(ids) == 1
