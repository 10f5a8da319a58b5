"""Batches through a real API on a real Valkey. MEMBERS=10000 runs the large forms."""

import base64
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from PIL import Image

from app.api.batch_members import Pictures
from app.core import batches
from app.core import redis_keys as keys
from app.core.limits import set_limits
from app.core.retention import sweep
from app.core.storage import open_storage
from tests.conftest import PretendWorker
from tests.servers import free_port
from tests.unit.test_images import encoded

MEMBERS = int(os.environ.get("MEMBERS", "600"))


@pytest.fixture
def client(api):
    with api.client() as client:
        yield client


def submit(client, *, headers=None, **body):
    reply = client.post("/v1/batches", json=body, headers=headers or {})
    assert reply.status_code == 202, reply.text
    return reply.json()


def small(count):
    return [{"prompt": f"cat {n}", "seed": n} for n in range(count)]


def look(client, batch):
    return client.get(f"/v1/batches/{batch['id']}").json()


def jobs_of(client, batch, **which):
    """All jobs of a batch, page by page."""
    found, cursor = [], None
    while True:
        query = {"limit": 100, **which} | ({"cursor": cursor} if cursor else {})
        page = client.get(f"/v1/batches/{batch['id']}/jobs", params=query).json()
        found += page["data"]
        cursor = page["next_cursor"]
        if cursor is None:
            return found


def wait_for(client, batch, status, seconds=60):
    deadline = time.monotonic() + seconds
    while (found := look(client, batch))["status"] != status:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def events(client, batch, last=None):
    """(id, kind, data) of a batch's stream until it ends."""
    headers = {"Last-Event-ID": str(last)} if last is not None else {}
    found = []
    with client.stream("GET", f"/v1/batches/{batch['id']}/events", headers=headers) as reply:
        if reply.status_code == 204:
            return None
        event = {}
        for line in reply.iter_lines():
            name, _, value = line.partition(": ")
            if line == "":
                if "data" in event:
                    found.append((int(event["id"]), event["event"], json.loads(event["data"])))
                event = {}
            elif name:
                event[name] = value
    return found


def finish(worker, count):
    for _ in range(count):
        worker.succeed(worker.claim(), denoiser_seconds=1, images=1)


def test_a_list_of_requests_becomes_jobs_in_its_order_and_counts_them(client, worker):
    batch = submit(client, requests=small(5), metadata={"order": 1})
    assert batch["object"] == "batch"
    assert batch["total"] == 5
    assert batch["metadata"] == {"order": 1}
    wait_for(client, batch, "processing")
    found = jobs_of(client, batch)
    assert [job["params"]["prompt"] for job in found] == [f"cat {n}" for n in range(5)]
    assert [job["batch_index"] for job in found] == list(range(5))
    assert {job["batch_id"] for job in found} == {batch["id"]}
    worker.succeed(worker.claim())
    worker.fail(worker.claim())
    client.post(f"/v1/jobs/{found[4]['id']}/cancel")
    counts = look(client, batch)["counts"]
    assert counts == {
        "planned": 0, "queued": 2, "processing": 0, "succeeded": 1, "failed": 1, "canceled": 1, "expired": 0,
    }  # fmt: skip
    assert [job["batch_index"] for job in jobs_of(client, batch, status="failed")] == [1]
    finish(worker, 2)
    ended = look(client, batch)
    assert ended["status"] == "completed"
    assert ended["completed_at"] is not None
    assert ended["counts"]["succeeded"] == 3


def test_a_matrix_is_multiplied_out_the_last_list_first(client):
    batch = submit(
        client,
        request={"num_inference_steps": 7, "model": "tiny"},
        matrix={"prompt": ["a", "b"], "seed": [1, 2, 3], "guidance_scale": [2.0, 4.0]},
    )
    wait_for(client, batch, "processing")
    params = [job["params"] for job in jobs_of(client, batch)]
    assert len(params) == batch["total"] == 12
    assert {p["num_inference_steps"] for p in params} == {7}
    assert [(p["prompt"], p["seed"], p["guidance_scale"]) for p in params[:3]] == [
        ("a", 1, 2.0),
        ("a", 1, 4.0),
        ("a", 2, 2.0),
    ]


def test_members_without_a_seed_draw_one_each_and_keep_their_own_fields(client):
    batch = submit(client, requests=[{"prompt": "a", "metadata": {"n": n}, "priority": "low"} for n in range(4)])
    wait_for(client, batch, "processing")
    found = jobs_of(client, batch)
    assert len({job["params"]["seed"] for job in found}) == 4
    assert [job["metadata"] for job in found] == [{"n": n} for n in range(4)]
    assert {job["priority"] for job in found} == {"low"}


@pytest.mark.parametrize(
    ("body", "place", "says"),
    [
        ({"requests": [*small(3), {"prompt": "x", "wide": 1}]}, ["body", "requests", 3, "wide"], None),
        ({"requests": [*small(2), {"prompt": "x", "width": 63}]}, None, "requests[2]: width must be a multiple of 8"),
        ({"requests": [{"prompt": "x", "model": "none"}]}, None, "requests[0]: "),
        ({"requests": [{"prompt": "x", "webhook": {"url": "http://10.0.0.1/"}}]}, None, "requests[0]: "),
        ({"request": {"prompt": "x"}, "matrix": {"seed": [1, "two"]}}, ["body", "matrix", 1, "seed"], None),
        ({"request": {"prompt": "x"}, "matrix": {"width": [64, 4096]}}, None, "matrix[1]: width must be 64 to 128"),
        ({"matrix": {"seed": [1]}}, ["body", "matrix", 0, "prompt"], None),
    ],
)
def test_a_refused_member_is_named_by_its_index_and_nothing_is_made(client, redis, body, place, says):
    before = set(redis.scan_iter("safelight:*"))
    reply = client.post("/v1/batches", json=body)
    assert reply.status_code in (404, 422)
    if place:
        assert reply.json()["errors"][0]["loc"] == place
    else:
        assert reply.json()["detail"].startswith(says)
    assert not [key for key in set(redis.scan_iter("safelight:*")) - before if "batch" in key or "job" in key]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"requests": []},
        {"requests": small(1), "matrix": {"seed": [1]}},
        {"requests": small(1), "request": {"prompt": "x"}},
        {"request": {"prompt": "x"}},
        {"request": {"prompt": "x"}, "matrix": {}},
        {"request": {"prompt": "x"}, "matrix": {"seed": []}},
        {"request": {"prompt": "x"}, "matrix": {"metadata": [{}]}},
        {"request": {"prompt": "x", "seed": 1}, "matrix": {"seed": [1, 2]}},
        {"request": {"prompt": "x"}, "matrix": {"seed": list(range(101)), "num_inference_steps": list(range(1, 101))}},
        {"requests": [{"prompt": "x"}] * 10_001},
        {"requests": [[]]},
        {"requests": small(1), "webhook": {"url": "http://127.0.0.1/"}},
        {"requests": small(1), "webhook": {"url": "https://example.com/", "events": ["job.failed"]}},
        {"requests": small(1), "surprise": 1},
    ],
)
def test_what_is_no_batch_is_refused(client, body):
    assert client.post("/v1/batches", json=body).status_code == 422


def test_one_idempotency_key_makes_one_batch_and_another_body_is_refused(client, redis):
    headers = {"Idempotency-Key": "order-1"}
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: submit(client, headers=headers, requests=small(30))["id"], range(16)))
    assert len(set(made)) == 1
    wait_for(client, {"id": made[0]}, "processing")
    assert redis.zcard(f"{keys.JOBS}default") == 30
    assert not list(redis.scan_iter(f"{keys.BATCH_PLAN}*"))
    again = client.post("/v1/batches", json={"requests": small(30)}, headers=headers)
    assert again.headers["idempotent-replayed"] == "true"
    other = client.post("/v1/batches", json={"requests": small(31)}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    as_a_job = client.post("/v1/jobs", json={"prompt": "x"}, headers=headers)
    assert (as_a_job.status_code, as_a_job.json()["code"]) == (422, "idempotency_mismatch")


def test_batches_are_listed_newest_first_by_pages(client):
    made = [submit(client, requests=small(1))["id"] for _ in range(5)]
    first = client.get("/v1/batches?limit=3").json()
    rest = client.get("/v1/batches", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [batch["id"] for batch in first["data"] + rest["data"]] == made[::-1]
    assert rest["next_cursor"] is None


def test_a_cancelled_batch_makes_nothing_more_and_ends_with_its_counts(client, worker):
    batch = submit(client, requests=small(50))
    wait_for(client, batch, "processing")
    done, running = worker.claim(), worker.claim()
    worker.succeed(done)
    client.post(f"/v1/batches/{batch['id']}/cancel")
    ended = wait_for(client, batch, "canceled")
    assert ended["counts"]["succeeded"] == 1
    assert ended["counts"]["canceled"] == 49
    assert worker._commit(running, "failed", {}) == "lost"
    assert client.post(f"/v1/batches/{batch['id']}/cancel").json()["status"] == "canceled"


def test_a_batch_cancelled_while_it_is_queued_counts_the_rest_as_canceled(client, redis):
    batch = submit(client, requests=small(MEMBERS))
    client.post(f"/v1/batches/{batch['id']}/cancel")
    ended = wait_for(client, batch, "canceled")
    assert ended["counts"]["canceled"] == MEMBERS
    assert len(jobs_of(client, batch)) < MEMBERS
    assert redis.exists(keys.BATCH_PLAN + batch["id"]) == 0


def test_a_deleted_batch_is_gone_at_once_and_its_jobs_and_objects_with_the_sweep(api, client, worker, redis):
    batch = submit(client, requests=small(40), headers={"Idempotency-Key": "once"})
    wait_for(client, batch, "processing")
    worker.succeed(worker.claim())
    [done] = jobs_of(client, batch, status="succeeded")
    objects = api.settings.data / "objects" / "jobs" / done["id"]
    assert [path for path in objects.rglob("*") if path.is_file()]
    assert client.delete(f"/v1/batches/{batch['id']}").status_code == 204
    assert client.get(f"/v1/batches/{batch['id']}").status_code == 404
    assert client.get("/v1/batches").json()["data"] == []
    deadline = time.monotonic() + 20
    while redis.exists(keys.BATCH + batch["id"]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    storage = open_storage(api.settings.storage, public_url="http://x", secret=b"secret")
    while sweep(redis, storage):
        pass
    assert client.get("/v1/jobs").json()["data"] == []
    assert not [path for path in objects.rglob("*") if path.is_file()]
    left = [key for key in redis.scan_iter("safelight:*") if "batch" in key or "idempotency" in key]
    assert left == []
    assert redis.zcard(keys.RETENTION) == 0


def test_what_is_kept_of_a_batch_goes_after_its_retention(api, client, worker, redis):
    batch = submit(client, requests=small(3))
    wait_for(client, batch, "processing")
    finish(worker, 3)
    storage = open_storage(api.settings.storage, public_url="http://x", secret=b"secret")
    assert sweep(redis, storage) == 0
    for index in (keys.RETENTION, keys.BATCH_RETENTION):
        for name in redis.zrange(index, 0, -1):
            redis.zadd(index, {name: 1})
    assert sweep(redis, storage) == 3
    assert client.get(f"/v1/batches/{batch['id']}").status_code == 404
    assert [key for key in redis.scan_iter("safelight:*") if "batch" in key] == []


def test_the_events_of_a_batch_end_by_themselves_and_resume_the_same_whatever_the_cut(client, worker):
    batch = submit(client, requests=small(4))
    wait_for(client, batch, "processing")
    heard = []
    listener = threading.Thread(target=lambda: heard.extend(events(client, batch)))
    listener.start()
    finish(worker, 3)
    worker.fail(worker.claim())
    listener.join(10)
    assert not listener.is_alive()
    assert [number for number, _, _ in heard] == list(range(1, len(heard) + 1))
    kinds = [data["status"] if kind == "status" else kind for _, kind, data in heard]
    assert kinds == ["creating", "processing", *["job"] * 8, "completed"]
    assert [data["status"] for _, kind, data in heard if kind == "job"] == ["processing", "succeeded"] * 3 + [
        "processing", "failed",
    ]  # fmt: skip
    assert heard[-1][2]["counts"]["failed"] == 1
    for cut in range(len(heard)):
        assert events(client, batch, cut) == heard[cut:]
    assert events(client, batch, len(heard)) is None


def test_one_redis_connection_hears_for_all_streams_of_batches_and_jobs(client, redis):
    batches = [submit(client, requests=small(1)) for _ in range(10)]
    for batch in batches:
        wait_for(client, batch, "processing")
    threads = [threading.Thread(target=events, args=(client, batch)) for batch in batches * 2]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while sum(int(entry["sub"]) for entry in redis.client_list()) < len(batches):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert sum(int(entry["sub"]) > 0 for entry in redis.client_list()) == 1
    for batch in batches:
        client.post(f"/v1/batches/{batch['id']}/cancel")
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_batchs_stream_counts_among_those_a_tenant_may_have_open(client, redis):
    batch = submit(client, requests=small(1))
    set_limits(redis, "default", {"max_streams": 1})
    with client.stream("GET", f"/v1/batches/{batch['id']}/events") as stream:
        lines = stream.iter_lines()  # kept: a generator that is dropped closes the stream
        next(lines)
        assert client.get(f"/v1/batches/{batch['id']}/events").status_code == 429


def test_another_tenants_batch_is_byte_for_byte_nothing(start_api, redis):
    api = start_api(api_key="the-bootstrap-key-of-the-tests")
    with api.client(headers={"Authorization": "Bearer the-bootstrap-key-of-the-tests"}) as admin:
        secrets = [
            admin.post("/v1/keys", json={"name": name, "tenant": name}).json()["secret"] for name in ("one", "two")
        ]
    one, two = (api.client(headers={"Authorization": f"Bearer {secret}", "X-Request-ID": "same"}) for secret in secrets)
    with one, two:
        batch = submit(one, requests=small(2))
        unknown = {"id": "batch_" + "0" * 26}
        for method, path in [
            ("GET", ""), ("GET", "/jobs"), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", ""),
        ]:  # fmt: skip
            replies = [two.request(method, f"/v1/batches/{which['id']}{path}") for which in (batch, unknown)]
            assert [reply.status_code for reply in replies] == [404, 404], path
            assert replies[0].content == replies[1].content
        assert two.get("/v1/batches").json()["data"] == []
        assert two.get("/v1/webhook-deliveries", params={"batch": batch["id"]}).json()["data"] == []
        assert one.get(f"/v1/batches/{batch['id']}").status_code == 200
        assert one.post("/v1/batches", json={"requests": small(1)}, headers={"Idempotency-Key": "k"}).status_code == 202
        assert two.post("/v1/batches", json={"requests": small(2)}, headers={"Idempotency-Key": "k"}).status_code == 202


def test_members_are_charged_to_the_tenant_as_any_job_is(client, worker):
    batch = submit(client, requests=small(3))
    wait_for(client, batch, "processing")
    finish(worker, 3)
    usage = client.get("/v1/usage").json()
    assert usage["images"] == 3


def test_a_full_redis_takes_no_batch_and_an_open_one_waits(client, redis):
    kept = submit(client, requests=small(1))
    wait_for(client, kept, "processing")
    redis.config_set("maxmemory", 1)
    try:
        time.sleep(1.1)  # it is looked at once a second
        reply = client.post("/v1/batches", json={"requests": small(1)})
        assert (reply.status_code, reply.json()["code"]) == (503, "overloaded")
        client.post(f"/v1/batches/{kept['id']}/cancel")
        wait_for(client, kept, "canceled")
    finally:
        redis.config_set("maxmemory", 0)
        time.sleep(1.1)  # so that others do not hear of it


def test_members_are_queued_as_fast_as_the_tenants_limits_let_them(api, redis):
    set_limits(redis, "default", {"max_waiting": 25})
    with api.client() as client:
        batch = submit(client, requests=small(60))
        deadline = time.monotonic() + 10
        while look(client, batch)["counts"]["queued"] < 25:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)
        held = look(client, batch)
        assert (held["status"], held["counts"]["queued"], held["counts"]["planned"]) == ("creating", 25, 35)
        assert "when fewer of your jobs wait" in held["notice"]
        assert client.post("/v1/jobs", json={"prompt": "x"}).status_code == 429
        worker = PretendWorker(redis, api.settings.data)
        for _ in range(60):
            deadline = time.monotonic() + 10
            while not redis.zcard(f"{keys.JOBS}default:queued"):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            worker.succeed(worker.claim())
        ended = wait_for(client, batch, "completed")
        assert ended["counts"]["succeeded"] == 60
        assert ended["notice"] is None


def test_an_upload_is_kept_for_members_that_are_still_to_be_queued(api, redis):
    storage = open_storage(api.settings.storage, public_url="http://x", secret=b"x")
    set_limits(redis, "default", {"max_waiting": 1})
    with api.client() as client:
        body = encoded(Image.new("RGB", (64, 64), "green"))
        upload = client.post("/v1/uploads", files={"file": ("a.png", body, "image/png")}).json()["id"]
        batch = submit(client, requests=[{"prompt": "a"}, {"prompt": "b", "image": upload, "strength": 0.5}])

        def status_once_expired():
            redis.hset(keys.UPLOAD + upload, "expires_at", 1)
            redis.zadd(keys.UPLOAD_EXPIRY, {upload: 1})
            sweep(redis, storage)
            return client.get(f"/v1/uploads/{upload}").status_code

        refused = client.delete(f"/v1/uploads/{upload}")
        assert (refused.status_code, status_once_expired()) == (409, 200)
        assert client.post(f"/v1/batches/{batch['id']}/cancel").status_code == 200
        assert [status_once_expired(), status_once_expired()][-1] == 404


def test_a_member_whose_upload_is_gone_before_it_is_queued_counts_as_failed(api, redis):
    set_limits(redis, "default", {"max_waiting": 1})
    with api.client() as client:
        body = encoded(Image.new("RGB", (64, 64), "red"))
        upload = client.post("/v1/uploads", files={"file": ("a.png", body, "image/png")}).json()["id"]
        batch = submit(client, requests=[{"prompt": "a"}, {"prompt": "b", "image": upload, "strength": 0.5}])
        deadline = time.monotonic() + 10
        while look(client, batch)["counts"]["queued"] < 1:
            assert time.monotonic() < deadline
        redis.delete(keys.UPLOAD + upload)
        worker = PretendWorker(redis, api.settings.data)
        worker.succeed(worker.claim())
        ended = wait_for(client, batch, "completed")
        assert (ended["counts"]["succeeded"], ended["counts"]["failed"]) == (1, 1)
        lost = [data for _, kind, data in events(client, batch) if kind == "job" and data["index"] == 1]
        assert [event["status"] for event in lost] == ["failed"]


def test_a_picture_that_many_members_name_is_taken_in_once(client):
    data = "data:image/png;base64," + base64.b64encode(encoded(Image.new("RGB", (64, 64), "blue"))).decode()
    batch = submit(client, request={"prompt": "x", "image": data, "strength": 0.5}, matrix={"seed": list(range(30))})
    wait_for(client, batch, "processing")
    images = {job["params"]["image"] for job in jobs_of(client, batch)}
    assert [image[:7] for image in images] == ["upload_"]
    assert len(client.get("/v1/uploads").json()["data"]) == 1


def test_a_controls_picture_is_known_by_its_id_from_the_second_member_on():
    pictures = Pictures(None, "default")
    pictures._known = {"data:image/png;base64,x": "upload_1"}
    control = {"type": "edges", "image": "data:image/png;base64,x"}
    member = {"image": "data:image/png;base64,x", "controls": [control, {"type": "depth"}, 7], "prompt": "a"}
    assert pictures.known(member) == {
        "image": "upload_1",
        "controls": [{"type": "edges", "image": "upload_1"}, {"type": "depth"}, 7],
        "prompt": "a",
    }


def test_a_batch_whose_jobs_would_fill_redis_is_refused_and_leaves_nothing(client, redis, monkeypatch):
    monkeypatch.setattr(batches, "PLAN_BYTES", 200_000)
    reply = client.post("/v1/batches", json={"request": {"prompt": "x"}, "matrix": {"seed": list(range(1000))}})
    assert (reply.status_code, reply.json()["code"]) == (413, "too_large")
    assert not redis.keys(f"{keys.BATCH_PLAN}*")
    submit(client, requests=small(100))


def test_a_deleted_batchs_key_makes_another(client):
    headers = {"Idempotency-Key": "one"}
    first = submit(client, headers=headers, requests=small(30))
    assert client.delete(f"/v1/batches/{first['id']}").status_code == 204
    assert submit(client, headers=headers, requests=small(30))["id"] != first["id"]


def test_a_stream_after_an_event_that_never_was_is_told_from_the_start(client):
    batch = submit(client, requests=small(1))
    wait_for(client, batch, "processing")
    [job] = jobs_of(client, batch)
    beyond = {"Last-Event-ID": "99999"}
    paths = (f"/v1/batches/{batch['id']}/events", f"/v1/jobs/{job['id']}/events")
    with client.stream("GET", paths[0], headers=beyond) as one, client.stream("GET", paths[1], headers=beyond) as two:
        assert client.post(f"/v1/batches/{batch['id']}/cancel").status_code == 200
        assert ["event: canceled" in "".join(stream.iter_text()) for stream in (one, two)] == [True, True]


def test_too_many_open_batches_are_a_conflict(client):
    made = [submit(client, requests=small(1)) for _ in range(20)]
    assert client.post("/v1/batches", json={"requests": small(1)}).status_code == 409
    client.post(f"/v1/batches/{made[0]['id']}/cancel")
    wait_for(client, made[0], "canceled")
    submit(client, requests=small(1))


def test_open_batches_that_would_fill_redis_together_are_a_conflict(client, redis, monkeypatch):
    monkeypatch.setattr(batches, "OPEN_BYTES", 100_000)
    first = submit(client, requests=small(100))
    size = int(redis.hget(keys.BATCH + first["id"], "plan_bytes"))
    assert 100_000 / 2 < size < 100_000
    refused = client.post("/v1/batches", json={"requests": small(100)})
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert "100000 bytes" in refused.json()["detail"]
    assert redis.keys(f"{keys.BATCH_PLAN}*") in ([], [keys.BATCH_PLAN + first["id"]])
    client.post(f"/v1/batches/{first['id']}/cancel")
    wait_for(client, first, "canceled")
    submit(client, requests=small(100))


def test_a_batch_of_an_earlier_version_counts_for_nothing(client, redis, monkeypatch):
    monkeypatch.setattr(batches, "OPEN_BYTES", 100_000)
    first = submit(client, requests=small(100))
    redis.hdel(keys.BATCH + first["id"], "plan_bytes")
    submit(client, requests=small(100))


def test_a_tenants_batches_take_a_tenth_of_redis_memory_at_the_most(client, redis):
    redis.config_set("maxmemory", redis.info("memory")["used_memory"] * 2 + 2_000_000)
    try:
        most = redis.info("memory")["maxmemory"] // 10
        wordy = {"prompt": "x", "metadata": {"note": "x" * 4000}}
        body = {"request": wordy, "matrix": {"seed": list(range(most // 4000))}}
        reply = client.post("/v1/batches", json=body)
    finally:
        redis.config_set("maxmemory", 0)
    assert reply.status_code == 413
    assert f"{most} bytes" in reply.json()["detail"]


class Mortal:
    """An API process on one port that is killed with -9 and started again; its callers ask again, too."""

    def __init__(self, forks, settings, folder):
        self._forks, self._log = forks, folder / "api.log"
        self._environment = {f"SAFELIGHT_{name.upper()}": str(value) for name, value in settings.items()}
        self.url = f"http://127.0.0.1:{settings['port']}"
        self.start()

    def start(self):
        self.process = self._forks.start("api", self._environment, self._log)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.start()

    def call(self, method, path, **about):
        deadline = time.monotonic() + 60
        while True:
            try:
                return httpx2.request(method, self.url + path, trust_env=False, timeout=60, **about)
            except httpx2.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.1)

    def wait_for(self, batch, status):
        deadline = time.monotonic() + 60
        while (found := self.call("GET", f"/v1/batches/{batch['id']}").json())["status"] != status:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        return found


@pytest.fixture
def mortal(forks, redis_url, catalog_file, tmp_path):
    settings = {"redis_url": redis_url, "models": catalog_file, "data": tmp_path, "port": free_port()}
    mortal = Mortal(forks, settings, tmp_path)
    yield mortal
    mortal.process.kill()
    mortal.process.wait()


@pytest.mark.parametrize("moment", ["while it is asked", "while it is queued", "while it is cancelled"])
def test_a_killed_api_leaves_a_batch_whole_or_none_at_all(mortal, redis, moment):
    """The caller asks again under its key; the API that is started next finishes what the dead one promised."""
    body, headers = {"requests": small(MEMBERS)}, {"Idempotency-Key": "one"}
    wanted = MEMBERS // 3

    def ask():
        reply = mortal.call("POST", "/v1/batches", json=body, headers=headers)
        assert reply.status_code == 202, reply.text
        return reply.json()

    def kill_when(is_so):
        deadline = time.monotonic() + 30
        while not is_so():
            assert time.monotonic() < deadline
        mortal.kill()

    def has_entered(status):
        return wanted < redis.zcard(f"{keys.JOBS}default:{status}") < MEMBERS

    if moment == "while it is asked":
        asking = threading.Thread(target=ask)
        asking.start()
        kill_when(lambda: any(redis.llen(key) > wanted for key in redis.scan_iter(f"{keys.BATCH_PLAN}*")))
        print(f"{redis.zcard(f'{keys.BATCHES}default')} batches were promised")
        asking.join()
    else:
        batch = ask()
        if moment == "while it is cancelled":
            mortal.wait_for(batch, "processing")
            mortal.call("POST", f"/v1/batches/{batch['id']}/cancel")
            kill_when(lambda: has_entered("canceled"))
        else:
            kill_when(lambda: has_entered("queued"))
    batch = ask()
    ended = mortal.wait_for(batch, "canceled" if moment == "while it is cancelled" else "processing")
    assert ended["total"] == sum(ended["counts"].values()) == MEMBERS
    assert ended["counts"]["planned"] == 0
    with httpx2.Client(base_url=mortal.url, trust_env=False, timeout=60, verify=False) as client:
        assert [job["batch_index"] for job in jobs_of(client, batch)] == list(range(MEMBERS))
        assert len(client.get("/v1/batches").json()["data"]) == 1
    assert redis.zcard(f"{keys.JOBS}default") == MEMBERS
    assert redis.llen(keys.RQ + "queue:" + keys.queue_name("tiny")) == MEMBERS
