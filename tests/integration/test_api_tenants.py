"""Tenants and keys over HTTP: what each scope opens, and that what is another tenant's is like nothing at all."""

import json
import re
import time

import pytest
from fastapi.routing import iter_route_contexts

from app.core import api_keys
from app.core import redis_keys as keys
from app.core.api_keys import Scope
from app.core.errors import InvalidRequest
from tests.conftest import PretendWorker
from tests.integration.test_api_auth import BOOTSTRAP, OPEN, bearer
from tests.unit.test_images import encoded, picture

# Every route that is not open to all, and the scope that it asks for: a new route is missing here until it is decided.
ASKS = {
    ("POST", "/v1/jobs"): "submit",
    ("GET", "/v1/jobs"): "read",
    ("GET", "/v1/jobs/{job_id}"): "read",
    ("DELETE", "/v1/jobs/{job_id}"): "submit",
    ("POST", "/v1/jobs/{job_id}/cancel"): "submit",
    ("GET", "/v1/jobs/{job_id}/events"): "read",
    ("GET", "/v1/events"): "read",
    ("POST", "/v1/batches"): "submit",
    ("GET", "/v1/batches"): "read",
    ("GET", "/v1/batches/{batch_id}"): "read",
    ("DELETE", "/v1/batches/{batch_id}"): "submit",
    ("POST", "/v1/batches/{batch_id}/cancel"): "submit",
    ("GET", "/v1/batches/{batch_id}/jobs"): "read",
    ("GET", "/v1/batches/{batch_id}/events"): "read",
    ("POST", "/v1/uploads"): "submit",
    ("GET", "/v1/uploads"): "read",
    ("GET", "/v1/uploads/{upload_id}"): "read",
    ("DELETE", "/v1/uploads/{upload_id}"): "submit",
    ("GET", "/v1/models"): "read",
    ("GET", "/v1/models/{model:path}"): "read",
    ("POST", "/v1/images/generations"): "submit",
    ("POST", "/v1/images/edits"): "submit",
    ("POST", "/v1/images/variations"): "submit",
    ("GET", "/v1/usage"): "read",
    ("GET", "/v1/workers"): "admin",
    ("GET", "/v1/limits"): "read",
    ("GET", "/v1/tenants/{tenant}/limits"): "admin",
    ("PATCH", "/v1/tenants/{tenant}/limits"): "admin",
    ("POST", "/v1/keys"): "admin",
    ("GET", "/v1/keys"): "admin",
    ("DELETE", "/v1/keys/{key_id}"): "admin",
    ("POST", "/v1/webhook-endpoints"): "submit",
    ("GET", "/v1/webhook-endpoints"): "read",
    ("GET", "/v1/webhook-endpoints/{endpoint_id}"): "read",
    ("PATCH", "/v1/webhook-endpoints/{endpoint_id}"): "submit",
    ("DELETE", "/v1/webhook-endpoints/{endpoint_id}"): "submit",
    ("POST", "/v1/webhook-endpoints/{endpoint_id}/test"): "submit",
    ("GET", "/v1/webhook-deliveries"): "read",
    ("GET", "/v1/webhook-deliveries/{delivery_id}"): "read",
    ("POST", "/v1/webhook-deliveries/{delivery_id}/redeliver"): "submit",
    ("GET", "/v1/webhook-secret"): "submit",
    ("POST", "/v1/webhook-secret/rotate"): "submit",
    ("GET", "/metrics"): "read",
    ("GET", "/metrics/targets"): "read",
}
BODIES = {
    "/v1/jobs": {"prompt": "a cat"},
    "/v1/keys": {"name": "app"},
    "/v1/webhook-endpoints": {"url": "https://example.com/hook"},
    "/v1/webhook-endpoints/{endpoint_id}": {"enabled": True},
    "/v1/webhook-secret/rotate": {},
    "/v1/tenants/{tenant}/limits": {"weight": 2},
}
FOR_ADMINS = ("/v1/keys", "/v1/tenants")  # who see those of all tenants
STREAMS = {"/v1/events"}  # it does not end by itself: only its head is asked for


def routes(app):
    found = {(m, r.path) for r in iter_route_contexts(app.routes) for m in r.methods or {"GET"}}
    return {(method, path) for method, path in found if path not in OPEN and method != "HEAD"}


@pytest.fixture
def guarded(start_api):
    """An API with a bootstrap key, and webhooks to this machine."""
    return start_api(api_key=BOOTSTRAP, webhook_allow="127.0.0.0/8")


@pytest.fixture
def caller(guarded, redis):
    """`caller(tenant, *scopes)`: a client with a key of its own."""
    clients = []

    def make(tenant="default", *scopes):
        _, secret = api_keys.create(redis, tenant, tenant, scopes or api_keys.EVERYDAY)
        clients.append(guarded.client(headers=bearer(secret)))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def admin(guarded):
    with guarded.client(headers=bearer(BOOTSTRAP)) as client:
        yield client


def call(client, method, path, ids=None, headers=None):
    """Status, body and what matters of the headers of a route; `ids` fill its path."""
    sent = re.sub(r"{(\w+)(:path)?}", lambda name: (ids or {}).get(name[1], "x"), path)
    headers = {"X-Request-ID": "same"} | (headers or {})
    with client.stream(method, sent, json=BODIES.get(path), headers=headers) as reply:
        is_endless = path in STREAMS and reply.status_code == 200
        body = b"" if is_endless else reply.read()
        shown = {name: value for name, value in reply.headers.items() if name != "date"}
    return reply.status_code, body, shown


def test_every_route_asks_for_the_scope_that_was_decided_on(guarded, caller):
    assert routes(guarded.app) == set(ASKS)
    allowed = {scope: {scope} for scope in ("read", "submit")} | {"admin": {"read", "submit", "admin"}}
    for scope, opens in allowed.items():
        client = caller("default", Scope(scope))
        for (method, path), asked in ASKS.items():
            status, body, _ = call(client, method, path)
            assert (status == 403) == (asked not in opens), (scope, method, path, body)


def test_a_route_that_nobody_decided_on_is_for_admins(guarded, caller, admin):
    from fastapi import APIRouter, Depends

    from app.api.auth import authenticate

    router = APIRouter(dependencies=[Depends(authenticate)])

    @router.get("/forgotten")
    def forgotten():
        return {}

    guarded.app.include_router(router)
    assert caller().get("/forgotten").status_code == 403
    assert admin.get("/forgotten").status_code == 200


def everything_of(client, worker):
    """One of each thing that a tenant can have: their ids by the name in the path."""
    endpoint = client.post("/v1/webhook-endpoints", json={"url": "http://127.0.0.1:9999/hook"}).json()["id"]
    job = client.post("/v1/jobs", json={"prompt": "a secret cat"}, headers={"Idempotency-Key": "k"}).json()["id"]
    worker.succeed(worker.claim())
    [delivery] = client.get(f"/v1/webhook-deliveries?job={job}").json()["data"]
    upload = client.post("/v1/uploads", files={"file": ("a.png", encoded(picture()), "image/png")}).json()["id"]
    batch = client.post("/v1/batches", json={"requests": [{"prompt": "a secret dog"}]}).json()["id"]
    client.post(f"/v1/batches/{batch}/cancel")
    with client.stream("GET", f"/v1/batches/{batch}/events") as events:  # until it has ended
        events.read()
    return {
        "job_id": job,
        "batch_id": batch,
        "upload_id": upload,
        "endpoint_id": endpoint,
        "delivery_id": delivery["id"],
        "key_id": "00000000",
    }


INVENTED = {
    "job_id": "job_" + "0" * 26,
    "batch_id": "batch_" + "0" * 26,
    "upload_id": "upload_" + "0" * 26,
    "endpoint_id": "whe_" + "0" * 20,
    "delivery_id": "msg_" + "0" * 26 + "_succeeded",
    "key_id": "11111111",
}


def test_another_tenants_anything_is_byte_for_byte_like_nothing(guarded, caller, redis):
    owner, compared = caller("owner"), 0
    ids = everything_of(owner, PretendWorker(redis, guarded.settings.data))
    ids["key_id"] = api_keys.list_keys(redis)[0].id
    before = {path: owner.get(path).content for path in ("/v1/webhook-endpoints", "/v1/usage")}
    for client in (caller("other"), caller("other", Scope.READ), caller("other", Scope.ADMIN)):
        for method, path in ASKS:
            if "{" not in path or path.startswith(FOR_ADMINS):
                continue
            theirs, nothing = call(client, method, path, ids), call(client, method, path, INVENTED)
            assert theirs == nothing, (method, path)
            assert theirs[0] in (403, 404)
            compared += 1
        for path in ("/v1/jobs", "/v1/batches", "/v1/webhook-endpoints", "/v1/webhook-deliveries"):
            assert client.get(path).json()["data"] == []
        for query in (f"job={ids['job_id']}", f"job={INVENTED['job_id']}"):
            assert client.get(f"/v1/webhook-deliveries?{query}").json()["data"] == []
        assert client.get("/v1/usage").json()["images"] == 0
    print(f"{compared} calls compared")
    assert compared >= 51
    assert {path: owner.get(path).content for path in before} == before
    assert owner.get(f"/v1/jobs/{ids['job_id']}").json()["status"] == "succeeded"


def test_only_an_admin_reaches_keys_whether_they_exist_or_not(caller, redis):
    client = caller("other")
    ids = {"key_id": api_keys.list_keys(redis)[0].id}
    replies = [call(client, "DELETE", "/v1/keys/{key_id}", which) for which in (ids, INVENTED)]
    assert replies[0] == replies[1]
    assert replies[0][0] == 403


def test_the_same_idempotency_key_of_two_tenants_makes_two_jobs(caller):
    made = [
        caller(tenant).post("/v1/jobs", json={"prompt": "a cat"}, headers={"Idempotency-Key": "k"}).json()["id"]
        for tenant in ("one", "two")
    ]
    assert made[0] != made[1]


# Keys


def test_a_key_is_made_shown_once_used_and_revoked_over_http(admin, guarded):
    made = admin.post("/v1/keys", json={"name": "shop", "tenant": "shop", "scopes": ["read"], "expires_days": 30})
    assert made.status_code == 201
    key = made.json()
    assert key["secret"].startswith(f"sl_{key['id']}_")
    assert (key["tenant"], key["scopes"], key["last_used_at"]) == ("shop", ["read"], None)
    with guarded.client(headers=bearer(key["secret"])) as client:
        assert client.get("/v1/jobs").status_code == 200
        listed = admin.get("/v1/keys")
        assert key["secret"] not in listed.text
        [shown] = listed.json()["data"]
        assert shown["last_used_at"]
        assert shown["expires_at"] == key["expires_at"]
        assert admin.delete(f"/v1/keys/{key['id']}").status_code == 204
        assert client.get("/v1/jobs").status_code == 401
    assert admin.get("/v1/keys").json()["data"][0]["revoked_at"]
    assert admin.delete("/v1/keys/nothing1").status_code == 404


def test_the_last_use_is_written_at_most_once_a_minute(caller, redis):
    client = caller()
    client.get("/v1/jobs")
    [key_id] = redis.hkeys(keys.API_KEY_USES)
    redis.hset(keys.API_KEY_USES, key_id, "7")
    for _ in range(5):
        client.get("/v1/jobs")
    assert redis.hget(keys.API_KEY_USES, key_id) == "7"


def test_an_expired_key_opens_nothing(guarded, redis):
    _, good = api_keys.create(redis, "a", expires_at=time.time() + 2)
    _, bad = api_keys.create(redis, "b", expires_at=time.time() - 1)
    with guarded.client() as client:
        assert client.get("/v1/jobs", headers=bearer(good)).status_code == 200
        assert client.get("/v1/jobs", headers=bearer(bad)).status_code == 401
        time.sleep(2)
        assert client.get("/v1/jobs", headers=bearer(good)).status_code == 401


def test_a_key_from_before_there_were_tenants_is_the_defaults_and_no_admin(guarded, redis):
    key, secret = api_keys.create(redis, "old")
    kept = {"id": key.id, "name": "old", "sha256": key.sha256, "created_at": 1.0, "revoked_at": None}
    redis.hset(keys.API_KEYS, key.id, json.dumps(kept))
    with guarded.client(headers=bearer(secret)) as client:
        assert client.post("/v1/jobs", json={"prompt": "x"}).status_code == 202
        assert client.get("/v1/usage").json()["tenant"] == "default"
        assert client.get("/v1/keys").status_code == 403


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": ""},
        {"name": "x" * 101},
        {"name": "\x1b[31m"},
        {"name": "x", "tenant": "A"},
        {"name": "x", "tenant": "a:b"},
        {"name": "x", "tenant": "../a"},
        {"name": "x", "scopes": []},
        {"name": "x", "scopes": ["root"]},
        {"name": "x", "expires_days": 0},
        {"name": "x", "secret": "mine"},
    ],
    ids=str,
)
def test_a_key_that_cannot_be_is_refused(admin, body):
    assert admin.post("/v1/keys", json=body).status_code == 422
    assert admin.get("/v1/keys").json()["data"] == []


def test_a_tenants_name_cannot_reach_into_anothers_keys(redis):
    with pytest.raises(InvalidRequest):
        api_keys.create(redis, "x", "default:succeeded")


# Usage


def test_usage_counts_images_and_denoiser_seconds_of_the_tenant_alone(caller, guarded, redis):
    one, two = caller("one"), caller("two")
    worker = PretendWorker(redis, guarded.settings.data)
    for client, seconds in ((one, 1.25), (one, 0.5), (two, 8)):
        client.post("/v1/jobs", json={"prompt": "x"})
        worker.succeed(worker.claim(), denoiser_seconds=seconds)
    found = one.get("/v1/usage").json()
    assert (found["tenant"], found["images"], found["denoiser_seconds"]) == ("one", 2, 1.75)
    assert [(day["images"], day["denoiser_seconds"]) for day in found["days"]] == [(2, 1.75)]
    today = found["days"][0]["date"]
    assert one.get("/v1/usage?days=1").json()["since"] == today
    redis.hset(f"{keys.USAGE}one", mapping={"20000:images": 5, "20000:denoiser_ms": 1000})  # in 2024
    assert one.get("/v1/usage").json()["images"] == 2


# Deadlines


def test_a_job_that_does_not_start_in_time_ends_as_expired(caller, guarded, redis, wait_until):
    client = caller()
    job = client.post("/v1/jobs", json={"prompt": "x", "deadline_seconds": 0.5}).json()
    assert job["deadline_at"] > job["created_at"]
    wait_until(lambda: client.get(f"/v1/jobs/{job['id']}").json()["status"] == "expired", 5)
    with pytest.raises(AssertionError, match="no job waits"):
        PretendWorker(redis, guarded.settings.data).claim()


def test_a_running_job_that_is_late_is_stopped_and_its_commit_is_lost(caller, guarded, redis, wait_until):
    client, worker = caller(), PretendWorker(redis, guarded.settings.data)
    control = redis.pubsub()
    control.subscribe(keys.CONTROL)
    job_id = client.post("/v1/jobs", json={"prompt": "x", "deadline_seconds": 0.5}).json()["id"]
    job = worker.claim()
    wait_until(lambda: client.get(f"/v1/jobs/{job_id}").json()["status"] == "expired", 5)
    assert worker._commit(job, "succeeded", {}) == "lost"
    assert [job_id] == [m["data"] for m in iter(lambda: control.get_message(timeout=0.2), None) if m["data"] != 1]
    control.close()


def test_a_job_that_ends_in_time_keeps_its_end(caller, guarded, redis):
    client, worker = caller(), PretendWorker(redis, guarded.settings.data)
    job_id = client.post("/v1/jobs", json={"prompt": "x", "deadline_seconds": 0.6}).json()["id"]
    worker.succeed(worker.claim())
    time.sleep(1.5)
    assert client.get(f"/v1/jobs/{job_id}").json()["status"] == "succeeded"
    assert redis.zcard(keys.DEADLINES) == 0
