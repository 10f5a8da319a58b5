"""The event stream: order, resumption at every cut, and its ends."""

import json
import threading
import time

import httpx2
import pytest

from app.api import events
from app.core import redis_keys as keys
from tests.integration.test_api_jobs import submit


def parse(lines):
    """The events of a stream: (id, event, data)."""
    found, current = [], {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            current[name] = value
        elif current:
            found.append((int(current["id"]), current["event"], json.loads(current["data"])))
            current = {}
    return found


def stream(client, job_id, after=None):
    headers = {"Last-Event-ID": str(after)} if after is not None else {}
    with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as reply:
        assert reply.status_code == 200
        return parse(reply.iter_lines())


def without_urls(found):
    for _, _, data in found:
        for output in data.get("outputs", []):
            output.pop("url")
    return found


@pytest.fixture
def finished(client, worker):
    """A job with a history: tried twice, then done."""
    job_id = submit(client)["id"]
    job = worker.claim()
    worker.step(job, 1)
    assert keys.RELEASE.run(worker.redis, *job) == "done"
    job = worker.claim()
    for step in (5, 10, 20):
        worker.step(job, step)
    worker.succeed(job)
    return job_id


def test_a_finished_jobs_stream_has_all_in_order_and_ends(client, finished):
    found = stream(client, finished)
    assert [number for number, _, _ in found] == list(range(1, len(found) + 1))
    kinds = [data["status"] if kind == "status" else kind for _, kind, data in found]
    assert kinds == ["queued", "processing", "progress", "queued", "processing", *["progress"] * 3, "succeeded"]
    assert found[-1][2]["id"] == finished
    assert found[-1][2] | {"outputs": []} == client.get(f"/v1/jobs/{finished}").json() | {"outputs": []}


def test_a_stream_resumed_at_any_cut_gives_the_same_list(client, finished):
    whole = without_urls(stream(client, finished))
    for cut in range(len(whole)):
        assert without_urls(stream(client, finished, after=cut)) == whole[cut:]


def test_after_the_last_event_there_is_nothing_to_reconnect_for(client, finished):
    last = stream(client, finished)[-1][0]
    for after in (last, last + 1, 10**8):
        reply = client.get(f"/v1/jobs/{finished}/events", headers={"Last-Event-ID": str(after)})
        assert (reply.status_code, reply.content) == (204, b"")


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "9" * 30, ""])
def test_a_last_event_id_that_is_none_of_ours_starts_from_the_beginning(client, finished, after):
    assert stream(client, finished, after=after)[0][0] == 1


def test_a_stream_is_marked_so_that_nothing_buffers_or_keeps_it(client, finished):
    reply = client.get(f"/v1/jobs/{finished}/events")
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["cache-control"] == "no-cache"


def test_events_arrive_as_they_happen(client, worker):
    job_id = submit(client)["id"]
    with client.stream("GET", f"/v1/jobs/{job_id}/events") as reply:
        lines = reply.iter_lines()
        assert _next(lines)[1:] == ("status", "queued")
        job = worker.claim()
        assert _next(lines)[1:] == ("status", "processing")
        for step in range(1, 6):
            started = time.perf_counter()
            worker.step(job, step)
            assert _next(lines)[1] == "progress"
            assert time.perf_counter() - started < 1
        worker.succeed(job)
        assert _next(lines)[1:] == ("succeeded", "succeeded")
        assert list(lines) == []


def _next(lines):
    block = []
    for line in lines:
        if not line:
            break
        block.append(line)
    ((number, kind, data),) = parse([*block, ""])
    return number, kind, data.get("status")


@pytest.mark.parametrize("end", ["cancel", "fail", "delete"])
def test_a_stream_ends_however_the_job_does(api, client, worker, end):
    job_id = submit(client)["id"]
    job = worker.claim()
    kinds = []

    def listen():
        with api.client() as own:
            kinds.extend(kind for _, kind, _ in stream(own, job_id))

    thread = threading.Thread(target=listen)
    thread.start()
    time.sleep(0.2)
    if end == "cancel":
        client.post(f"/v1/jobs/{job_id}/cancel")
    elif end == "fail":
        worker.fail(job)
    else:
        client.delete(f"/v1/jobs/{job_id}")
    thread.join(5)
    assert not thread.is_alive()
    assert kinds[:2] == ["status", "status"]
    if end != "delete":  # a job that is deleted may be gone before its last event is read
        assert kinds[2:] == [{"cancel": "canceled", "fail": "failed"}[end]]


def test_many_first_listeners_at_once_all_hear_the_end(api, client, worker):
    job_id = submit(client)["id"]
    heard = []

    def listen():
        with api.client() as own:
            heard.append(stream(own, job_id)[-1][1])

    threads = [threading.Thread(target=listen) for _ in range(24)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    worker.succeed(worker.claim())
    for thread in threads:
        thread.join(8)
    assert heard == ["succeeded"] * 24


def test_an_idle_stream_is_kept_alive(client, worker, monkeypatch):
    monkeypatch.setattr(events, "KEEP_ALIVE", 0.1)
    job_id = submit(client)["id"]
    with client.stream("GET", f"/v1/jobs/{job_id}/events") as reply:
        lines = (line for line in reply.iter_lines() if line.startswith(":"))
        assert [next(lines), next(lines)] == [": keep-alive"] * 2


def test_a_listener_that_hangs_up_leaves_no_subscription(client, redis, wait_until):
    job_id = submit(client)["id"]
    with client.stream("GET", f"/v1/jobs/{job_id}/events") as reply:
        lines = reply.iter_lines()
        next(lines)
        wait_until(lambda: redis.pubsub_numsub(keys.EVENTS + job_id)[0][1] == 1)
    wait_until(lambda: redis.pubsub_numsub(keys.EVENTS + job_id)[0][1] == 0)


def test_streams_and_waits_end_when_the_server_stops(start_api):
    api = start_api()
    with api.client() as client:
        job_id = submit(client)["id"]
    results = {}

    def listen():
        with api.client() as own:
            results["stream"] = [kind for _, kind, _ in stream(own, job_id)]

    def wait():
        with api.client() as own:
            results["wait"] = own.post("/v1/jobs", json={"prompt": "x"}, headers={"Prefer": "wait=60"}).status_code

    threads = [threading.Thread(target=listen), threading.Thread(target=wait)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert api.stop() < 2
    for thread in threads:
        thread.join(5)
    assert results == {"stream": ["status"], "wait": 202}
    with pytest.raises(httpx2.ConnectError), api.client() as client:
        client.get("/livez")
