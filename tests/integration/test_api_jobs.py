"""Jobs over HTTP: from a request to its record and back, with a worker that paints nothing."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.core import redis_keys as keys

NOBODY = "job_" + "0" * 26


def submit(client, headers=None, **fields):
    reply = client.post("/v1/jobs", json={"prompt": "a cat"} | fields, headers=headers)
    assert reply.is_success, reply.text
    return reply.json()


def test_a_submitted_job_is_queued_complete_and_has_absolute_links(client, api):
    reply = client.post("/v1/jobs", json={"prompt": "a cat", "seed": 7, "metadata": {"order": 17}})
    job = reply.json()
    assert reply.status_code == 202
    assert reply.headers["location"] == job["links"]["self"] == f"{api.url}/v1/jobs/{job['id']}"
    assert job["status"] == "queued"
    assert job["metadata"] == {"order": 17}
    assert job["queue_position"] == 0
    assert {name: value for name, value in job["params"].items() if value} == {
        "model": "tiny",
        "prompt": "a cat",
        "width": 64,
        "height": 64,
        "num_inference_steps": 20,
        "guidance_scale": 5.0,
        "seed": 7,
        "num_images": 1,
        "scheduler": "ddim",
        "output_format": "png",
        "mask_channel": "luminance",
    }
    assert client.get(job["links"]["self"]).json() == job


def test_a_jobs_params_sent_again_are_accepted_and_the_same(client):
    params = submit(client, seed=3)["params"]
    assert submit(client, **params)["params"] == params


def test_a_seed_is_drawn_where_none_is_given(client):
    assert submit(client)["params"]["seed"] != submit(client)["params"]["seed"]


def test_a_job_without_a_worker_is_accepted_and_says_so(client, worker):
    assert "tiny" in submit(client)["notice"]
    worker.live()
    assert submit(client)["notice"] is None


def test_a_finished_job_has_outputs_timings_and_an_end(client, worker):
    job_id = submit(client)["id"]
    worker.succeed(worker.claim())
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert job["status"] == "succeeded"
    assert job["timings"]["denoise_seconds"] == 0.5
    assert job["started_at"] <= job["completed_at"] < job["expires_at"]
    assert "key" not in job["outputs"][0]
    assert client.get(job["outputs"][0]["url"]).content.startswith(b"\x89PNG")


def test_a_failed_job_says_why_in_a_code_and_a_sentence(client, worker):
    job_id = submit(client)["id"]
    worker.fail(worker.claim())
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert job["error"] == {"code": "generation_failed", "message": "the denoiser gave NaN"}


def test_a_running_job_shows_its_progress(client, worker):
    job_id = submit(client)["id"]
    worker.step(worker.claim(), 12)
    assert client.get(f"/v1/jobs/{job_id}").json()["progress"] == {
        "phase": "denoising",
        "step": 12,
        "steps": 20,
        "eta_seconds": None,
    }


def test_the_request_id_travels_with_the_job(client, redis):
    job_id = submit(client, headers={"X-Request-ID": "mine-1"})["id"]
    assert redis.hget(keys.JOB + job_id, "request_id") == "mine-1"


# Lists


def test_jobs_are_listed_newest_first_page_by_page(client):
    ids = [submit(client)["id"] for _ in range(5)]
    found, cursor, pages = [], None, 0
    while pages == 0 or cursor:
        page = client.get("/v1/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        assert page["object"] == "list"
        found += [job["id"] for job in page["data"]]
        cursor, pages = page["next_cursor"], pages + 1
    assert (found, pages) == (ids[::-1], 3)


def test_jobs_are_listed_by_status(client, worker):
    done, waiting = submit(client)["id"], submit(client)["id"]
    worker.succeed(worker.claim())
    assert [job["id"] for job in client.get("/v1/jobs?status=succeeded").json()["data"]] == [done]
    assert [job["id"] for job in client.get("/v1/jobs?status=queued").json()["data"]] == [waiting]
    assert client.get("/v1/jobs?status=failed").json() == {"object": "list", "data": [], "next_cursor": None}


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=x", "status=done", "cursor=abc", "cursor=²", "colour=red"]
)
def test_a_list_that_cannot_be_is_refused(client, query):
    reply = client.get(f"/v1/jobs?{query}")
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid_request")


# Cancelling and deleting


def test_a_waiting_job_is_cancelled_and_never_claimed(client, worker):
    job_id = submit(client)["id"]
    assert client.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "canceled"
    with pytest.raises(AssertionError, match="no job waits"):
        worker.claim()


def test_a_running_job_is_cancelled_and_its_commit_is_lost(client, worker):
    submit(client)
    job = worker.claim()
    assert client.post(f"/v1/jobs/{job[0]}/cancel").json()["status"] == "canceled"
    assert worker._commit(job, "succeeded", {}) == "lost"


def test_cancelling_again_or_too_late_changes_nothing(client, worker):
    first, second = submit(client)["id"], submit(client)["id"]
    worker.succeed(worker.claim())
    assert client.post(f"/v1/jobs/{first}/cancel").json()["status"] == "succeeded"
    once = client.post(f"/v1/jobs/{second}/cancel").json()
    assert client.post(f"/v1/jobs/{second}/cancel").json() == once


def test_a_deleted_job_is_gone_with_its_objects(client, worker, api):
    job_id = submit(client)["id"]
    worker.succeed(worker.claim())
    url = client.get(f"/v1/jobs/{job_id}").json()["outputs"][0]["url"]
    reply = client.delete(f"/v1/jobs/{job_id}")
    assert (reply.status_code, reply.content) == (204, b"")
    assert client.get(f"/v1/jobs/{job_id}").status_code == 404
    assert client.delete(f"/v1/jobs/{job_id}").status_code == 404
    assert client.get(url).status_code == 404
    assert not (api.settings.data / "objects" / "jobs" / job_id).exists()
    assert client.get("/v1/jobs").json()["data"] == []


def test_deleting_a_running_job_cancels_it_first(client, worker):
    submit(client)
    job = worker.claim()
    assert client.delete(f"/v1/jobs/{job[0]}").status_code == 204
    assert worker._commit(job, "succeeded", {}) == "lost"


def test_deleting_leaves_nothing_of_the_job_in_redis(client, worker, redis):
    job_id = submit(client, headers={"Idempotency-Key": "k"})["id"]
    worker.succeed(worker.claim())
    client.delete(f"/v1/jobs/{job_id}")
    assert [key for key in redis.scan_iter() if job_id in key or "idempotency" in key] == []


@pytest.mark.parametrize("path", ["", "/events", "/cancel"])
def test_unknown_malformed_and_foreign_ids_get_the_same_bytes(client, redis, path):
    foreign = submit(client)["id"]
    redis.hset(keys.JOB + foreign, "tenant", "someone")
    method = "POST" if path == "/cancel" else "GET"
    names = [NOBODY, foreign, foreign.upper(), "x", "job_", "%00", "job_" + "é" * 26, "9" * 5000]
    replies = [client.request(method, f"/v1/jobs/{name}{path}", headers={"X-Request-ID": "same"}) for name in names]
    assert {reply.status_code for reply in replies} == {404}
    assert len({reply.content for reply in replies}) == 1
    assert client.delete(f"/v1/jobs/{foreign}").status_code == 404


# Idempotency


def test_a_repeated_key_gives_the_same_job_and_says_so(client):
    headers = {"Idempotency-Key": "order-17"}
    first = client.post("/v1/jobs", json={"prompt": "a cat", "guidance_scale": 5}, headers=headers)
    again = client.post("/v1/jobs", json={"guidance_scale": 5.0, "prompt": "a cat"}, headers=headers)
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json() == first.json()
    assert len(client.get("/v1/jobs").json()["data"]) == 1


def test_a_key_used_for_another_request_is_refused(client):
    headers = {"Idempotency-Key": "order-17"}
    submit(client, headers=headers)
    reply = client.post("/v1/jobs", json={"prompt": "a dog"}, headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (422, "idempotency_mismatch")


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "\x7f", "é".encode()])
def test_a_key_of_other_than_visible_characters_is_refused(client, key):
    reply = client.post("/v1/jobs", json={"prompt": "x"}, headers={"Idempotency-Key": key})
    assert reply.status_code == 422


def test_thirty_two_at_once_with_one_key_make_one_job(api, worker):
    start = threading.Barrier(32)

    def one(_):
        with api.client() as client:
            client.get("/livez")
            start.wait()
            reply = client.post("/v1/jobs", json={"prompt": "a cat"}, headers={"Idempotency-Key": "k"})
            return reply.json()["id"], reply.headers.get("idempotent-replayed")

    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(one, range(32)))
    assert len({job_id for job_id, _ in results}) == 1
    assert sum(replayed is None for _, replayed in results) == 1
    worker.claim()
    with pytest.raises(AssertionError, match="no job waits"):
        worker.claim()


# Prefer: wait


def test_a_wait_ends_with_the_job(client, worker, redis):
    def work():
        _wait_for_a_job(redis)
        time.sleep(0.2)
        worker.succeed(worker.claim())

    thread = threading.Thread(target=work)
    thread.start()
    started = time.perf_counter()
    reply = client.post("/v1/jobs", json={"prompt": "a cat"}, headers={"Prefer": "wait=20"})
    took = time.perf_counter() - started
    thread.join()
    assert reply.status_code == 200
    assert reply.headers["preference-applied"] == "wait=20"
    assert reply.json()["status"] == "succeeded"
    assert reply.json()["outputs"][0]["url"]
    assert took < 2


def test_a_wait_that_is_too_short_gives_the_job_as_it_stands(client, worker):
    started = time.perf_counter()
    reply = client.post("/v1/jobs", json={"prompt": "a cat"}, headers={"Prefer": "wait=1"})
    assert (reply.status_code, reply.json()["status"]) == (202, "queued")
    assert 0.9 < time.perf_counter() - started < 2


def test_a_repeat_of_a_finished_job_with_a_wait_is_answered_at_once(client, worker):
    headers = {"Idempotency-Key": "k", "Prefer": "wait=20"}
    submit(client, headers={"Idempotency-Key": "k"})
    worker.succeed(worker.claim())
    reply = client.post("/v1/jobs", json={"prompt": "a cat"}, headers=headers)
    assert (reply.status_code, reply.json()["status"]) == (200, "succeeded")


def test_many_waits_at_once_all_end(api, worker, redis):
    def one(_):
        with api.client() as client:
            return client.post("/v1/jobs", json={"prompt": "a cat"}, headers={"Prefer": "wait=20"}).status_code

    with ThreadPoolExecutor(24) as pool:
        replies = [pool.submit(one, i) for i in range(24)]
        for _ in replies:
            _wait_for_a_job(redis)
            worker.succeed(worker.claim())
        assert {reply.result() for reply in replies} == {200}


def _wait_for_a_job(redis):
    deadline = time.monotonic() + 10
    while not redis.zcard(keys.WAITING + keys.queue_name("tiny")):
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Webhooks


def test_a_webhook_is_kept_with_the_job(client, redis):
    job_id = submit(client, webhook={"url": "https://example.com/hook", "events": ["job.failed"]})["id"]
    assert redis.hmget(keys.JOB + job_id, "webhook_url", "webhook_events") == ["https://example.com/hook", "job.failed"]


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/", "http://169.254.169.254/latest", "ftp://example.com", "nonsense", "http://[::1]/"]
)
def test_a_webhook_to_an_address_that_is_not_public_is_refused(client, url):
    reply = client.post("/v1/jobs", json={"prompt": "x", "webhook": {"url": url}})
    assert (reply.status_code, reply.json()["code"]) == (422, "address_refused")


def test_the_operators_own_networks_are_let_through(start_api):
    with start_api(webhook_allow="127.0.0.0/8").client() as client:
        reply = client.post("/v1/jobs", json={"prompt": "x", "webhook": {"url": "http://127.0.0.1:9000/"}})
    assert reply.status_code == 202
