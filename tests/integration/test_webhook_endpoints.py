"""Webhooks as a product: endpoints, secrets, the schedule of three days, the log; a real API, sender and receivers."""

import json
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from app.core import api_keys, webhooks
from app.core import redis_keys as keys
from app.core.endpoints import MAX_ENDPOINTS
from app.core.storage import open_storage
from app.core.webhooks import MAX_BODY, SCHEDULE, TRIP
from tests.conftest import PretendWorker
from tests.integration.test_api_auth import BOOTSTRAP, bearer
from tests.integration.test_sender import PUBLIC, SECRET, lag, percentile, sending
from tests.receiver import receiver

DAY_MS = 86_400_000
ALL = ["job.processing", "job.succeeded", "job.failed", "job.canceled", "job.expired"]


class Shop:
    """A tenant with a client, a worker and the means to let time pass."""

    def __init__(self, api, redis, tenant="shop"):
        self.redis = redis
        self.client = api.client(headers=bearer(api_keys.create(redis, tenant, tenant)[1]))
        self.worker = PretendWorker(redis, api.settings.data)

    def endpoint(self, url, **fields):
        made = self.client.post("/v1/webhook-endpoints", json={"url": url} | fields)
        assert made.status_code == 201, made.text
        return made.json()

    def submit(self, **fields):
        made = self.client.post("/v1/jobs", json={"prompt": "a cat"} | fields)
        assert made.status_code == 202, made.text
        return made.json()["id"]

    def cancel(self, **fields):
        """A job that has ended."""
        job_id = self.submit(**fields)
        self.client.post(f"/v1/jobs/{job_id}/cancel")
        return job_id

    def deliveries(self, job_id):
        return self.client.get(f"/v1/webhook-deliveries?job={job_id}").json()["data"]

    def look(self, endpoint):
        return self.client.get(f"/v1/webhook-endpoints/{endpoint['id']}").json()

    def due(self):
        """When the one delivery under way is due, in seconds from now."""
        [(_, score)] = self.redis.zrange(keys.OUTBOX, 0, -1, withscores=True)
        return score / 1e3 - time.time()

    def let_time_pass(self):
        """Make everything due now."""
        for name in self.redis.zrange(keys.OUTBOX, 0, -1):
            self.redis.zadd(keys.OUTBOX, {name: 0}, xx=True)
        self.redis.publish(keys.OUTBOX_BELL, "time")


@pytest.fixture
def guarded(start_api):
    return start_api(api_key=BOOTSTRAP, webhook_allow="127.0.0.0/8")


@pytest.fixture
def shop(guarded, redis):
    shop = Shop(guarded, redis)
    yield shop
    shop.client.close()


@pytest.fixture
def hook():
    with receiver() as state:
        yield state


@pytest.fixture
def storage(guarded):
    folder = (guarded.settings.data / "objects").as_uri()
    return open_storage(folder, public_url=PUBLIC, secret=b"secret")


@pytest.fixture
def sender(redis_url, storage):
    with sending(redis_url, storage) as counted:
        yield counted


def bodies(received):
    return [json.loads(request.body) for request in received]


# Endpoints


def test_an_event_goes_to_the_url_of_the_request_and_to_each_endpoint_that_wants_it(shop, hook, sender, wait_until):
    everything = shop.endpoint(hook.url("/all"), events=ALL)
    shop.endpoint(hook.url("/failed"), events=["job.failed"])
    job_id = shop.submit(webhook={"url": hook.url("/own")})
    shop.worker.succeed(shop.worker.claim())
    hook.wait_for(3)
    wait_until(lambda: sender("delivered") == 3)
    got = sorted((r.path, body["type"]) for r, body in zip(hook.received, bodies(hook.received), strict=True))
    assert got == [("/all", "job.processing"), ("/all", "job.succeeded"), ("/own", "job.succeeded")]
    ids = [r.headers["webhook-id"] for r in hook.received]
    assert len(set(ids)) == 3
    assert f"msg_{job_id[4:]}_succeeded_{everything['id']}" in ids
    assert {(d["endpoint"], d["status"]) for d in shop.deliveries(job_id)} == {
        (everything["id"], "delivered"),
        (None, "delivered"),
    }


def test_another_tenants_endpoint_hears_nothing(shop, guarded, redis, hook, sender):
    other = Shop(guarded, redis, "other")
    other.endpoint(hook.url("/other"), events=ALL)
    shop.endpoint(hook.url("/mine"))
    shop.cancel()
    hook.wait_for(1)
    time.sleep(0.3)
    assert [r.path for r in hook.received] == ["/mine"]
    other.client.close()


def test_an_endpoint_is_changed_paused_and_removed(shop, hook, sender):
    endpoint = shop.endpoint(hook.url("/first"), description="the shop")
    changed = shop.client.patch(f"/v1/webhook-endpoints/{endpoint['id']}", json={"url": hook.url("/second")}).json()
    assert changed == endpoint | {"url": hook.url("/second")}
    shop.client.patch(f"/v1/webhook-endpoints/{endpoint['id']}", json={"enabled": False})
    assert (shop.look(endpoint)["enabled"], shop.look(endpoint)["disabled_reason"]) == (False, "paused")
    unheard = shop.cancel()
    shop.client.patch(f"/v1/webhook-endpoints/{endpoint['id']}", json={"enabled": True})
    heard = shop.cancel()
    [request] = hook.wait_for(1)
    assert (request.path, json.loads(request.body)["data"]["id"]) == ("/second", heard)
    assert shop.deliveries(unheard) == []
    assert shop.client.delete(f"/v1/webhook-endpoints/{endpoint['id']}").status_code == 204
    shop.cancel()
    time.sleep(0.3)
    assert len(hook.received) == 1
    assert shop.client.get("/v1/webhook-endpoints").json()["data"] == []


def test_a_waiting_delivery_follows_its_endpoint_to_a_new_url_and_ends_with_it(
    shop, hook, redis_url, storage, wait_until
):
    endpoint = shop.endpoint(hook.url("/first"))
    hook.script = [(500, {}, b"")]
    with sending(redis_url, storage, schedule=(60, 60)) as counted:
        job_id = shop.cancel()
        wait_until(lambda: counted("retried") == 1)
        shop.client.patch(f"/v1/webhook-endpoints/{endpoint['id']}", json={"url": hook.url("/second")})
        shop.let_time_pass()
        first, second = hook.wait_for(2)
        assert (first.path, second.path) == ("/first", "/second")
        assert first.headers["webhook-id"] == second.headers["webhook-id"]
        hook.script = [(500, {}, b"")]
        wait_until(lambda: counted("delivered") == 1)
        job_id = shop.cancel()
        wait_until(lambda: counted("retried") == 2)
        shop.client.delete(f"/v1/webhook-endpoints/{endpoint['id']}")
        shop.let_time_pass()
        wait_until(lambda: shop.deliveries(job_id)[0]["status"] == "disabled")
    assert len(hook.received) == 3


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"url": "http://10.0.0.1/hook"},
        {"url": "http://169.254.169.254/latest"},
        {"url": "ftp://example.com/"},
        {"url": "https://user:pass@example.com/"},
        {"url": "https://example.com/", "events": []},
        {"url": "https://example.com/", "events": ["job.queued"]},
        {"url": "https://example.com/", "description": "\x1b"},
        {"url": "https://example.com/", "secret": "whsec_mine"},
    ],
    ids=str,
)
def test_an_endpoint_that_cannot_be_is_refused_when_made_and_when_changed(shop, hook, body):
    assert shop.client.post("/v1/webhook-endpoints", json=body).status_code == 422
    endpoint = shop.endpoint(hook.url())
    if body:
        assert shop.client.patch(f"/v1/webhook-endpoints/{endpoint['id']}", json=body).status_code == 422
    assert shop.look(endpoint) == endpoint


def test_there_are_only_so_many_endpoints(shop, hook):
    for _ in range(MAX_ENDPOINTS):
        shop.endpoint(hook.url())
    assert shop.client.post("/v1/webhook-endpoints", json={"url": hook.url()}).status_code == 409


def test_a_test_goes_out_once_even_to_a_paused_endpoint_and_says_what_came_of_it(shop, hook, sender, wait_until):
    endpoint = shop.endpoint(hook.url())
    shop.client.patch(f"/v1/webhook-endpoints/{endpoint['id']}", json={"enabled": False})
    hook.script = [(503, {}, b"")]
    sent = shop.client.post(f"/v1/webhook-endpoints/{endpoint['id']}/test")
    assert (sent.status_code, sent.json()["status"]) == (202, "pending")
    wait_until(lambda: sender("given_up") == 1)
    shown = shop.client.get(f"/v1/webhook-deliveries/{sent.json()['id']}").json()
    assert (shown["status"], shown["attempts"][0]["response_status"]) == ("given_up", 503)
    [request] = hook.received
    assert json.loads(request.body)["type"] == "endpoint.test"
    assert json.loads(request.body)["data"] == {"object": "webhook_endpoint", "id": endpoint["id"]}


# The schedule, under a clock that moves when it is told to


def test_the_schedule_lasts_three_days_and_then_it_is_given_up(shop, hook, redis_url, storage, wait_until):
    hook.script = [(500, {}, b"")] * 10
    waits = []
    with sending(redis_url, storage, schedule=SCHEDULE) as counted:
        job_id = shop.cancel(webhook={"url": hook.url()})
        for attempt in range(1, 10):
            wait_until(lambda attempt=attempt: counted("retried") == attempt)
            waits.append(shop.due())
            shop.let_time_pass()
        wait_until(lambda: counted("given_up") == 1)
    for seconds, planned in zip(waits, SCHEDULE, strict=True):
        assert planned * 0.84 - 3 < seconds < planned * 1.16
    print(f"waits: {', '.join(f'{w:.0f}' for w in waits)} s, {sum(waits) / 86400:.2f} days in all")
    assert len({r.headers["webhook-id"] for r in hook.received}) == 1
    [shown] = shop.deliveries(job_id)
    assert (shown["status"], len(shown["attempts"])) == ("given_up", 10)


def test_jitter_spreads_those_that_failed_together(shop, hook, redis_url, storage, wait_until):
    hook.script = [(500, {}, b"")] * 20
    with sending(redis_url, storage, schedule=(1000,)) as counted:
        for _ in range(20):
            shop.cancel(webhook={"url": hook.url()})
        wait_until(lambda: counted("retried") == 20)
    due = [score / 1e3 - time.time() for _, score in shop.redis.zrange(keys.OUTBOX, 0, -1, withscores=True)]
    assert all(840 < seconds < 1160 for seconds in due)
    assert statistics.stdev(due) > 30


def test_a_busy_receiver_is_left_alone_longer_than_the_schedule_says(shop, hook, redis_url, storage, wait_until):
    hook.script = [(429, {"retry-after": "1800"}, b"")]
    with sending(redis_url, storage, schedule=SCHEDULE) as counted:
        shop.cancel(webhook={"url": hook.url()})
        wait_until(lambda: counted("retried") == 1)
        assert 1700 < shop.due() <= 1800


def test_an_endpoint_that_says_gone_gets_nothing_more_until_it_is_enabled(shop, hook, sender, wait_until):
    endpoint = shop.endpoint(hook.url())
    hook.script = [(410, {}, b"")]
    shop.cancel()
    wait_until(lambda: shop.look(endpoint)["disabled_reason"] == "gone")
    unheard = shop.cancel()
    assert shop.deliveries(unheard) == []
    shop.client.patch(f"/v1/webhook-endpoints/{endpoint['id']}", json={"enabled": True})
    shop.cancel()
    wait_until(lambda: sender("delivered") == 1)
    assert shop.look(endpoint)["failures"] == 0


def test_an_endpoint_that_only_fails_is_probed_slowly_and_after_five_days_disabled(
    shop, hook, redis_url, storage, wait_until
):
    endpoint, redis = shop.endpoint(hook.url()), shop.redis
    hook.script = [(500, {}, b"")] * 100
    with sending(redis_url, storage, schedule=(600, 600, 600)) as counted:
        for _ in range(TRIP):
            shop.cancel()
        wait_until(lambda: shop.look(endpoint)["failures"] == TRIP)
        for _ in range(20):
            shop.cancel()
        wait_until(lambda: (counted("skipped") or 0) == 19)
        assert len(hook.received) == TRIP + 1  # one of the twenty was the probe
        assert shop.look(endpoint)["enabled"]
        # Five days go by.
        redis.hincrby(keys.HEALTH + endpoint["id"], "failing_since", -5 * DAY_MS)
        redis.hset(keys.HEALTH + endpoint["id"], "probe_at", 0)
        shop.let_time_pass()
        wait_until(lambda: shop.look(endpoint)["disabled_reason"] == "failing")
        shop.let_time_pass()
        wait_until(lambda: redis.zcard(keys.OUTBOX) == 0)
        assert len(hook.received) == TRIP + 2


def test_what_an_endpoint_that_fails_does_not_get_holds_up_nobody(shop, hook, redis_url, storage, wait_until):
    endpoint, redis = shop.endpoint(hook.url("/failing")), shop.redis
    redis.hset(keys.HEALTH + endpoint["id"], mapping={"failures": TRIP, "probe_at": 10**14})
    shop.cancel()
    [name] = redis.zrange(keys.OUTBOX, 0, -1)
    delivery = redis.hgetall(keys.DELIVERY + name)
    for number in range(800):
        redis.hset(f"{keys.DELIVERY}msg_{number}", mapping=delivery)
        redis.zadd(keys.OUTBOX, {f"msg_{number}": 0})
    shop.cancel(webhook={"url": hook.url(), "events": ["job.canceled"]})
    began = time.monotonic()
    with sending(redis_url, storage, schedule=(600, 600, 600)) as counted:
        hook.wait_for(1)
        wait_until(lambda: counted("skipped") == 802)
    print(f"802 set aside in {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 5


def test_a_tenant_has_no_more_endpoints_than_it_may_however_many_ask_at_once(shop, hook):
    def make(number):
        return shop.client.post("/v1/webhook-endpoints", json={"url": hook.url(f"/{number}")}).status_code

    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(make, range(2 * MAX_ENDPOINTS)))
    assert sorted(codes) == [201] * MAX_ENDPOINTS + [409] * MAX_ENDPOINTS
    assert len(shop.client.get("/v1/webhook-endpoints").json()["data"]) == MAX_ENDPOINTS


def test_two_who_change_an_endpoint_at_once_are_both_heard(shop, hook):
    endpoint = shop.endpoint(hook.url("/first"))

    def change(number):
        field = {"description": f"number {number}"} if number % 2 else {"events": ["job.failed"]}
        return shop.client.patch(f"/v1/webhook-endpoints/{endpoint['id']}", json=field).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(change, range(16))) == {200}
    changed = shop.look(endpoint)
    assert changed["events"] == ["job.failed"]
    assert changed["description"].startswith("number")


def test_a_probe_that_succeeds_opens_the_way_for_all(shop, hook, redis_url, storage, wait_until):
    endpoint = shop.endpoint(hook.url())
    hook.script = [(500, {}, b"")] * TRIP
    with sending(redis_url, storage, schedule=(600, 600, 600)) as counted:
        for _ in range(TRIP):
            shop.cancel()
        wait_until(lambda: shop.look(endpoint)["failures"] == TRIP)
        shop.let_time_pass()
        wait_until(lambda: (counted("delivered"), counted("skipped")) == (1, TRIP - 1))
        assert shop.look(endpoint)["failures"] == 0
        shop.let_time_pass()
        wait_until(lambda: counted("delivered") == TRIP)


# The secret


def test_each_tenant_has_a_secret_of_its_own(shop, guarded, redis, hook, sender):
    other = Shop(guarded, redis, "other")
    mine, theirs = (one.client.get("/v1/webhook-secret").json()["secret"] for one in (shop, other))
    assert len({mine, theirs, SECRET}) == 3
    shop.cancel(webhook={"url": hook.url()})
    [request] = hook.wait_for(1)
    Verifier(mine).verify(request.body, request.headers)
    for wrong in (theirs, SECRET):
        with pytest.raises(WebhookVerificationError):
            Verifier(wrong).verify(request.body, request.headers)
    other.client.close()


def test_while_a_rotation_overlaps_both_secrets_verify_and_then_only_the_new_one(shop, hook, sender, wait_until):
    old = shop.client.get("/v1/webhook-secret").json()["secret"]
    rotated = shop.client.post("/v1/webhook-secret/rotate", json={"overlap_seconds": 3}).json()
    assert rotated["previous_secret"] == old != rotated["secret"]
    shop.cancel(webhook={"url": hook.url()})
    [request] = hook.wait_for(1)
    assert request.headers["webhook-signature"].count("v1,") == 2
    for secret in (old, rotated["secret"]):
        Verifier(secret).verify(request.body, request.headers)
    wait_until(lambda: shop.client.get("/v1/webhook-secret").json()["previous_secret"] is None)
    shop.cancel(webhook={"url": hook.url()})
    request = hook.wait_for(2)[1]
    Verifier(rotated["secret"]).verify(request.body, request.headers)
    with pytest.raises(WebhookVerificationError):
        Verifier(old).verify(request.body, request.headers)


def test_an_admin_reads_and_rotates_any_tenants_secret_and_a_tenant_only_its_own(guarded, shop):
    mine = shop.client.get("/v1/webhook-secret").json()
    assert shop.client.get("/v1/webhook-secret?tenant=shop").json() == mine
    assert shop.client.get("/v1/webhook-secret?tenant=other").status_code == 403
    assert shop.client.post("/v1/webhook-secret/rotate?tenant=other", json={}).status_code == 403
    with guarded.client(headers=bearer(BOOTSTRAP)) as admin:
        assert admin.get("/v1/webhook-secret?tenant=shop").json() == mine
        rotated = admin.post("/v1/webhook-secret/rotate?tenant=shop", json={}).json()
    assert shop.client.get("/v1/webhook-secret").json()["secret"] == rotated["secret"] != mine["secret"]


def test_the_default_tenants_secret_is_the_services_and_a_fixed_one_is_not_rotated(start_api):
    secret = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    with start_api(webhook_secret=secret).client() as client:
        assert client.get("/v1/webhook-secret").json()["secret"] == secret
        refused = client.post("/v1/webhook-secret/rotate", json={})
        assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    api = start_api()
    with api.client() as client:
        kept = (api.settings.data / "webhook_secret").read_text().strip()
        assert client.get("/v1/webhook-secret").json()["secret"] == kept
        rotated = client.post("/v1/webhook-secret/rotate", json={}).json()
        assert rotated["previous_secret"] == kept
        assert client.get("/v1/webhook-secret").json()["secret"] == rotated["secret"] != kept


# The log


def test_a_delivery_is_sent_again_by_hand_under_the_same_id(shop, hook, sender, wait_until):
    job_id = shop.cancel(webhook={"url": hook.url()})
    hook.wait_for(1)
    wait_until(lambda: shop.deliveries(job_id)[0]["status"] == "delivered")
    [delivery] = shop.deliveries(job_id)
    again = shop.client.post(f"/v1/webhook-deliveries/{delivery['id']}/redeliver")
    assert again.status_code == 202
    first, second = hook.wait_for(2)
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == delivery["id"]
    assert json.loads(first.body)["data"]["id"] == json.loads(second.body)["data"]["id"]
    wait_until(lambda: len(shop.deliveries(job_id)[0]["attempts"]) == 2)


def test_what_is_no_longer_known_is_not_made_up(shop, hook, sender, wait_until):
    shop.endpoint(hook.url(), events=["job.processing"])
    job_id = shop.submit()
    job = shop.worker.claim()
    wait_until(lambda: shop.deliveries(job_id)[0]["status"] == "delivered")
    shop.worker.succeed(job)
    [delivery] = shop.deliveries(job_id)
    refused = shop.client.post(f"/v1/webhook-deliveries/{delivery['id']}/redeliver")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")


def test_a_delivery_that_was_given_up_may_be_sent_again_though_its_job_is_gone(
    shop, hook, redis_url, storage, wait_until
):
    hook.script = [(500, {}, b"")]
    with sending(redis_url, storage, schedule=()) as counted:
        job_id = shop.cancel(webhook={"url": hook.url()})
        wait_until(lambda: counted("given_up") == 1)
        shop.client.delete(f"/v1/jobs/{job_id}")
        [delivery] = shop.deliveries(job_id)
        assert shop.client.post(f"/v1/webhook-deliveries/{delivery['id']}/redeliver").status_code == 202
        assert json.loads(hook.wait_for(2)[1].body)["data"]["id"] == job_id


def test_the_log_says_no_more_of_a_receiver_than_its_status(shop, hook, sender, wait_until):
    hook.script = [(500, {}, b"internal details"), (302, {"location": "http://10.0.0.1/"}, b"")]
    job_id = shop.cancel(webhook={"url": hook.url()})
    wait_until(lambda: shop.deliveries(job_id)[0]["status"] == "delivered")
    [shown] = shop.deliveries(job_id)
    assert [a["response_status"] for a in shown["attempts"]] == [500, 302, 200]
    assert "details" not in json.dumps(shown)
    assert "10.0.0.1" not in json.dumps(shown)


def test_what_was_delivered_is_kept_small_and_goes_by_itself(shop, hook, redis, sender, wait_until):
    job_id = shop.cancel(webhook={"url": hook.url()}, metadata={"a": "x" * 5000})
    wait_until(lambda: shop.deliveries(job_id)[0]["status"] == "delivered")
    [name] = redis.scan_iter(f"{keys.DELIVERY}*")
    assert redis.memory_usage(name) < 1000
    assert 0 < redis.pttl(name) <= 60_000
    assert redis.pttl(keys.JOB_DELIVERIES + job_id) > 0


# The payload


def test_a_payload_stays_under_twenty_kilobytes_and_says_what_it_left_out(shop, hook, sender):
    prompt, metadata = "\U0001f408" * 200, {"order": 17, "note": "é" * 1000}
    shop.cancel(webhook={"url": hook.url()}, prompt=prompt, metadata=metadata)
    [request] = hook.wait_for(1)
    assert len(request.body) < MAX_BODY
    body = json.loads(request.body)
    assert "truncated" not in body
    assert (body["data"]["params"]["prompt"], body["data"]["metadata"]) == (prompt, metadata)


def test_the_largest_parameters_are_left_out_first_then_metadata_then_outputs():
    delivery = webhooks.Delivery("msg_1", "job.succeeded", "t", "https://example.com", 1.0, 1, None)
    job = {
        "id": "job_1",
        "params": {"prompt": "p" * 9000, "negative_prompt": "n" * 8000, "seed": 7},
        "metadata": {"a": "m" * 8000},
        "outputs": [{"url": "u" * 900}] * 4,
    }
    body = webhooks.body(delivery, job)
    shown = json.loads(body)
    assert len(body) < MAX_BODY
    assert shown["truncated"] == ["params.prompt"]
    assert shown["data"]["params"] == {"prompt": None, "negative_prompt": "n" * 8000, "seed": 7}
    assert job["params"]["prompt"]
    many = webhooks.body(delivery, job | {"outputs": [{"url": "u" * 900}] * 64})
    assert json.loads(many)["truncated"] == ["params.prompt", "params.negative_prompt", "metadata", "outputs"]
    assert len(many) < MAX_BODY


# One dead among many


def test_one_dead_endpoint_among_many_slows_no_other(shop, redis_url, storage, wait_until):
    """The p99 of fifteen healthy endpoints, alone and beside one that hangs, in one run."""

    def measure(stack, *, is_one_dead):
        hooks = [stack.enter_context(receiver()) for _ in range(MAX_ENDPOINTS)]
        made = [shop.endpoint(hook.url()) for hook in hooks]
        if is_one_dead:
            hooks[0].hang = threading.Event()
        for _ in range(12):
            shop.cancel()
        lags = [lag(request) for hook in hooks[1:] for request in hook.wait_for(12, 60)]
        for endpoint in made:
            shop.client.delete(f"/v1/webhook-endpoints/{endpoint['id']}")
        if is_one_dead:
            hooks[0].hang.set()
        return percentile(lags, 0.99)

    with ExitStack() as stack, sending(redis_url, storage, total_seconds=4):
        alone = measure(stack, is_one_dead=False)
        beside = measure(stack, is_one_dead=True)
    print(f"p99 of the others: {alone:.3f} s alone, {beside:.3f} s beside a dead one")
    assert beside < max(2 * alone, 0.5)
