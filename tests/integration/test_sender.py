"""The sender on a real Valkey, to real receivers on loopback, checked by the standardwebhooks library."""

import asyncio
import hashlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import pytest
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from app.core import processes
from app.core import redis_keys as keys
from app.core.addresses import AddressGuard, guarded_client
from app.core.connections import connect, connect_async
from app.core.job import Webhook
from app.core.metrics import sender_metrics
from app.core.params import GenerationParams
from app.core.queue import JobQueue, Submission, rq_time
from app.core.storage import object_key, open_storage
from app.core.tenants import Secrets
from app.sender import PER_HOST, Sender, renderer
from tests.receiver import receiver
from tests.servers import redis_server as start_redis

SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
LOOPBACK = ipaddress.ip_network("127.0.0.0/8")
FAST = (0.2, 0.2, 0.2)  # seconds between attempts; the real schedule is three days
SENDER = [sys.executable, "-m", "app.cli", "sender"]
PUBLIC = "http://127.0.0.1:8000"
PARAMS = GenerationParams(
    model="tiny",
    prompt="a red heart",
    negative_prompt="",
    width=64,
    height=64,
    num_inference_steps=4,
    guidance_scale=5.0,
    seed=7,
    num_images=1,
    scheduler="ddim",
    output_format="png",
)


class Outbox:
    """Puts webhooks into the outbox the way they get there: a job is submitted, and cancelled."""

    def __init__(self, url):
        self.url = url

    def add(self, *receivers, count=1, tenant="default"):
        """The ids of the jobs whose webhooks go to the receivers, in turn."""
        return asyncio.run(self._submit(receivers * count, is_canceled=True, tenant=tenant))

    def submit(self, webhook_url):
        """The id of a job that waits."""
        return asyncio.run(self._submit([webhook_url], is_canceled=False))[0]

    async def _submit(self, webhook_urls, *, is_canceled, tenant="default"):
        redis = connect_async(self.url)
        queue = JobQueue(redis, retention_ms=3_600_000)
        places = asyncio.Semaphore(16)

        async def submit(webhook_url):
            async with places:
                job, *_ = await queue.submit(tenant, Submission(PARAMS, webhook=Webhook(url=webhook_url)))
                if is_canceled:
                    await queue.cancel(tenant, job.id)
                return job.id

        ids = await asyncio.gather(*map(submit, webhook_urls))
        await redis.aclose(close_connection_pool=True)
        return ids


@pytest.fixture
def outbox(redis_url):
    return Outbox(redis_url)


@pytest.fixture
def hook():
    with receiver() as state:
        yield state


@pytest.fixture
def storage(tmp_path):
    return open_storage((tmp_path / "objects").as_uri(), public_url=PUBLIC, secret=b"secret")


@contextmanager
def sending(url, storage, schedule=FAST, allow=(LOOPBACK,), total_seconds=15.0, **options):
    """A sender at work in a thread; yields a function that gives the count of an outcome."""
    metrics = sender_metrics()
    started = threading.Event()
    running = {}

    async def main():
        redis = connect_async(url)
        async with guarded_client(AddressGuard(allow), total_seconds=total_seconds) as client:
            sender = Sender(
                redis,
                client,
                renderer(storage, PUBLIC),
                secrets=Secrets(redis, SECRET),
                metrics=metrics,
                keep_ms=60_000,
                schedule=schedule,
                **options,
            )
            running.update(loop=asyncio.get_running_loop(), sender=sender)
            started.set()
            await sender.run()
        await redis.aclose(close_connection_pool=True)

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert started.wait(5)
    time.sleep(0.1)  # it subscribes
    try:
        yield lambda outcome: metrics.registry.get_sample_value(
            "safelight_webhook_attempts_total", {"outcome": outcome}
        )
    finally:
        running["loop"].call_soon_threadsafe(running["sender"].stop)
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def sender(redis_url, storage):
    with sending(redis_url, storage) as counted:
        yield counted


@contextmanager
def sender_process(url, data, **environment):
    """`safelight sender` as its users start it."""
    settings = {
        "SAFELIGHT_REDIS_URL": url,
        "SAFELIGHT_DATA": str(data),
        "SAFELIGHT_WEBHOOK_SECRET": SECRET,
        "SAFELIGHT_WEBHOOK_ALLOW": "127.0.0.0/8",
        **environment,
    }
    process = subprocess.Popen(SENDER, env={**os.environ, **settings}, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def is_empty(redis):
    """Nothing is under way, and what is kept of what was will go by itself."""
    return redis.zcard(keys.OUTBOX) == 0 and all(redis.pttl(key) > 0 for key in redis.scan_iter(f"{keys.DELIVERY}*"))


def lag(request):
    body = json.loads(request.body)
    return request.at - datetime.fromisoformat(body["timestamp"]).timestamp()


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def test_a_webhook_is_signed_so_that_the_standard_library_of_the_spec_accepts_it(
    sender, outbox, hook, redis, wait_until
):
    [job_id] = outbox.add(hook.url())
    [request] = hook.wait_for(1)
    payload = Verifier(SECRET).verify(request.body, request.headers)
    assert payload["type"] == "job.canceled"
    assert payload["data"]["id"] == job_id
    assert payload["data"]["params"]["prompt"] == "a red heart"
    assert request.headers["user-agent"].startswith("Safelight/")
    assert request.headers["content-type"] == "application/json"
    wait_until(lambda: sender("delivered") == 1)
    assert is_empty(redis)


def test_a_changed_byte_is_refused(sender, outbox, hook):
    outbox.add(hook.url())
    [request] = hook.wait_for(1)
    with pytest.raises(WebhookVerificationError):
        Verifier(SECRET).verify(request.body.replace(b"canceled", b"cancele!", 1), request.headers)


def test_a_finished_jobs_webhook_holds_urls_signed_at_the_attempt(sender, outbox, redis, hook, storage):
    body = b"pixels"
    job_id = outbox.submit(hook.url())
    claimed = keys.CLAIM.run(redis, "w1", keys.queue_name("tiny"), 15_000, "1", rq_time(), "t1")
    key = object_key(job_id, claimed[2], 0, "png")
    storage.put(key, body, "image/png")
    output = {"key": key, "seed": 7, "width": 64, "height": 64, "content_type": "image/png", "bytes": len(body)}
    outputs = json.dumps([{**output, "sha256": hashlib.sha256(body).hexdigest()}])
    assert (
        keys.COMMIT.run(redis, job_id, claimed[2], "succeeded", 3_600_000, json.dumps({"outputs": outputs}), rq_time())
        == "done"
    )

    [request] = hook.wait_for(1)
    [shown] = json.loads(request.body)["data"]["outputs"]
    assert "key" not in shown
    url = httpx2.URL(shown["url"])
    assert url.path == f"/v1/files/{key}"
    storage.verify(key, url.params["token"])


def test_a_failed_attempt_is_made_again_with_the_same_id_and_a_new_timestamp(storage, outbox, hook):
    hook.script = [(500, {}, b"")]
    with sending(outbox.url, storage, schedule=(1.2,)) as counted:
        outbox.add(hook.url())
        first, second = hook.wait_for(2)
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert int(second.headers["webhook-timestamp"]) > int(first.headers["webhook-timestamp"])
    assert 0.9 < second.at - first.at < 3
    Verifier(SECRET).verify(second.body, second.headers)
    assert (counted("retried"), counted("delivered")) == (1, 1)


def test_a_redirect_is_a_failure_and_is_not_followed(sender, outbox, hook):
    with receiver() as elsewhere:
        hook.script = [(302, {"location": elsewhere.url()}, b"")]
        outbox.add(hook.url())
        hook.wait_for(2)
        assert elsewhere.received == []
    assert sender("retried") == 1


def test_a_receiver_that_is_gone_is_not_asked_again(sender, outbox, hook, redis, wait_until):
    hook.script = [(410, {}, b"")]
    outbox.add(hook.url())
    wait_until(lambda: sender("gone") == 1)
    assert is_empty(redis)
    assert len(hook.received) == 1


def test_a_busy_receiver_is_left_alone_for_as_long_as_it_asks(sender, outbox, hook):
    hook.script = [(429, {"retry-after": "2"}, b"")]
    outbox.add(hook.url())
    first, second = hook.wait_for(2)
    assert 1.9 < second.at - first.at < 4


def test_a_busy_receiver_may_name_a_date(sender, outbox, hook):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    hook.script = [(503, {"retry-after": date}, b"")]
    outbox.add(hook.url())
    first, second = hook.wait_for(2)
    assert 1 < second.at - first.at < 5


def test_ten_megabytes_of_reply_are_not_read(sender, outbox, hook, redis, wait_until):
    hook.script = [(200, {}, bytes(10 * 2**20))]
    outbox.add(hook.url())
    wait_until(lambda: sender("delivered") == 1)
    wait_until(lambda: is_empty(redis))
    assert len(hook.received) == 1


def test_a_receiver_that_hangs_counts_as_one_that_failed(storage, outbox, hook, wait_until):
    hook.hang = threading.Event()
    with sending(outbox.url, storage, total_seconds=0.5) as counted:
        outbox.add(hook.url())
        wait_until(lambda: counted("retried") == 1)
        hook.hang.set()
        hook.wait_for(2)
    assert (counted("retried"), counted("delivered")) == (1, 1)


def test_a_status_counts_even_if_the_body_never_ends(storage, outbox, hook, wait_until):
    hook.script = [(200, {"content-length": "1000"}, b"the rest never comes")]
    with sending(outbox.url, storage, total_seconds=0.5) as counted:
        outbox.add(hook.url())
        wait_until(lambda: counted("delivered") == 1)
    assert len(hook.received) == 1


def test_after_the_last_attempt_it_is_given_up(storage, outbox, hook, redis, wait_until):
    hook.script = [(500, {}, b"")] * 2
    with sending(outbox.url, storage, schedule=(0.1,)) as counted:
        outbox.add(hook.url())
        wait_until(lambda: counted("given_up") == 1)
        assert counted("retried") == 1
    assert len(hook.received) == 2
    assert is_empty(redis)


def test_an_address_that_the_guard_refuses_is_never_called(storage, outbox, hook, redis, wait_until):
    with sending(outbox.url, storage, allow=()) as counted:
        outbox.add(hook.url(), "http://[::1", "gopher://127.0.0.1/")
        wait_until(lambda: counted("refused") == 3)
        wait_until(lambda: is_empty(redis))
    assert hook.received == []


def test_a_record_that_makes_no_sense_is_dropped_and_the_others_are_delivered(sender, outbox, hook, redis, wait_until):
    for number, broken in enumerate([{"job": "{"}, {"job": "[]", "type": "x"}, {"url": "x"}]):
        redis.hset(f"{keys.DELIVERY}broken{number}", mapping={"attempts": 0, "created_at": 1, "url": "x", **broken})
        redis.zadd(keys.OUTBOX, {f"broken{number}": 0})
    outbox.add(hook.url())
    hook.wait_for(1)
    wait_until(lambda: sender("unreadable") == 3)
    wait_until(lambda: is_empty(redis))


def test_the_first_attempt_follows_the_event_at_once(sender, outbox, hook):
    for _ in range(20):
        outbox.add(hook.url())
    lags = [lag(request) for request in hook.wait_for(20)]
    print(f"first try, one at a time: p50 {percentile(lags, 0.5) * 1e3:.0f} ms, max {max(lags) * 1e3:.0f} ms")
    assert percentile(lags, 0.5) < 0.3  # a sender that polls would need half a second


def test_a_burst_to_one_receiver_arrives_complete_and_once_each(sender, outbox, hook, redis, wait_until):
    ids = outbox.add(hook.url(), count=300)
    received = hook.wait_for(300, 30)
    lags = [lag(request) for request in received]
    print(f"a burst of 300: p50 {percentile(lags, 0.5):.3f} s, max {max(lags):.3f} s")
    assert sorted(json.loads(r.body)["data"]["id"] for r in received) == sorted(ids)
    wait_until(lambda: is_empty(redis))
    assert len(hook.received) == 300


def test_dead_hosts_among_many_delay_nobody_else(storage, outbox, wait_until):
    with ExitStack() as stack:
        dead = [stack.enter_context(receiver()) for _ in range(8)]
        for one in dead:
            one.hang = threading.Event()
        alive = [stack.enter_context(receiver()) for _ in range(10)]
        counted = stack.enter_context(sending(outbox.url, storage, total_seconds=4))
        outbox.add(*(one.url() for one in dead), count=150)  # more than the sender keeps in hand
        outbox.add(*(one.url() for one in alive), count=15)
        lags = [lag(request) for one in alive for request in one.wait_for(15, 30)]
        print(f"beside 8 dead hosts: p50 {percentile(lags, 0.5):.3f} s, p99 {percentile(lags, 0.99):.3f} s")
        assert percentile(lags, 0.99) < 2
        wait_until(lambda: counted("delivered") == 150)
        for one in dead:
            one.hang.set()


def test_a_tenant_whose_many_hosts_hang_delays_no_other(storage, outbox, hook, wait_until):
    with ExitStack() as stack:
        ports = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64)).getsockname()[1] for _ in range(200)
        ]
        stack.enter_context(sending(outbox.url, storage, total_seconds=2))
        outbox.add(*(f"http://127.0.0.1:{port}/" for port in ports), count=2, tenant="evil")
        time.sleep(0.5)
        outbox.add(hook.url(), count=40)
        lags = [lag(request) for request in hook.wait_for(40)]
        print(f"beside a tenant with 200 hosts that hang: p50 {percentile(lags, 0.5):.3f} s, max {max(lags):.3f} s")
        assert max(lags) < 1.5


def test_hosts_that_hang_are_remembered_and_leave_their_tenants_others_alone(storage, outbox, hook, redis, wait_until):
    with ExitStack() as stack:
        ports = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64)).getsockname()[1] for _ in range(90)
        ]
        counted = stack.enter_context(sending(outbox.url, storage, total_seconds=1, schedule=(2, 600)))
        outbox.add(*(f"http://127.0.0.1:{port}/" for port in ports))
        wait_until(lambda: (counted("retried") or 0) >= 90, 30)
        time.sleep(0.5)  # the second attempts, to hosts that are known by now
        outbox.add(hook.url(), count=40)
        lags = [lag(request) for request in hook.wait_for(40)]
        print(f"beside 90 hosts that hang: p50 {percentile(lags, 0.5):.3f} s, max {max(lags):.3f} s")
        assert max(lags) < 0.9


@pytest.mark.parametrize("is_asked_again", [False, True])
def test_a_delivery_for_a_busy_host_is_given_up_when_its_schedule_is_long_over(
    storage, outbox, hook, redis, wait_until, *, monkeypatch, is_asked_again
):
    monkeypatch.setattr("app.sender.WAITING", 0)  # nothing waits in hand
    hook.hang = threading.Event()
    outbox.add(hook.url(), count=PER_HOST + 1)
    *_, last = redis.zrange(keys.OUTBOX, 0, -1)
    redis.hset(keys.DELIVERY + last, "created_at", int((time.time() - 2 * 86400) * 1000))
    if is_asked_again:
        redis.hset(keys.DELIVERY + last, "since", int(time.time() * 1000))
    with sending(outbox.url, storage) as counted:
        hook.wait_for(PER_HOST)
        if is_asked_again:
            time.sleep(0.5)
            assert not counted("given_up")
        else:
            wait_until(lambda: counted("given_up") == 1)
            assert redis.hget(keys.DELIVERY + last, "outcome") == "given_up"
        hook.hang.set()
        wait_until(lambda: is_empty(redis))
        assert counted("delivered") == PER_HOST + is_asked_again


def test_what_was_asked_for_again_in_mid_attempt_is_sent_again(storage, outbox, hook, redis, wait_until):
    hook.hang = threading.Event()
    outbox.add(hook.url())
    [name] = redis.zrange(keys.OUTBOX, 0, -1)
    with sending(outbox.url, storage) as counted:
        hook.wait_for(1)
        assert keys.REDELIVER.run(redis, name, "default") == "due"
        hook.hang.set()
        hook.wait_for(2)
        wait_until(lambda: counted("delivered") == 2)
    assert is_empty(redis)
    assert [request.headers["webhook-id"] for request in hook.received] == [name] * 2
    assert redis.hget(keys.DELIVERY + name, "attempts") == "1"
    assert len(redis.hget(keys.DELIVERY + name, "log").splitlines()) == 2


def test_a_delivery_that_was_not_tried_keeps_its_attempts(storage, outbox, redis, hook):
    hook.hang = threading.Event()
    with sending(outbox.url, storage):
        outbox.add(hook.url(), count=10)  # four places, six wait in hand
        hook.wait_for(4)
        threading.Timer(0.5, hook.hang.set).start()
    left = [int(redis.hget(keys.DELIVERY + name, "attempts")) for name in redis.zrange(keys.OUTBOX, 0, -1)]
    assert left == [0] * 6
    assert redis.zcount(keys.OUTBOX, "-inf", (time.time() + 1) * 1000) == 6  # due at once, for the next sender


def test_a_sender_killed_after_the_post_sends_it_again_under_the_same_id(outbox, hook, redis, tmp_path, wait_until):
    hook.hang = threading.Event()
    with sender_process(outbox.url, tmp_path) as process:
        outbox.add(hook.url())
        hook.wait_for(1)
        process.kill()
        process.wait()
    hook.hang.set()
    hook.hang = None
    [held] = redis.zrange(keys.OUTBOX, 0, -1, withscores=True)
    assert held[1] > time.time() * 1000 + 30_000  # nobody else takes what a living sender has in hand
    redis.zadd(keys.OUTBOX, {held[0]: 0})  # a minute passes
    with sender_process(outbox.url, tmp_path) as process:
        first, second = hook.wait_for(2)
        assert first.headers["webhook-id"] == second.headers["webhook-id"]
        wait_until(lambda: is_empty(redis))


def test_sigterm_finishes_what_is_under_way_and_exits_with_0(outbox, hook, redis, tmp_path):
    hook.hang = threading.Event()
    with sender_process(outbox.url, tmp_path) as process:
        outbox.add(hook.url())
        hook.wait_for(1)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        hook.hang.set()
        assert process.wait(10) == 0
    assert is_empty(redis)
    assert asyncio.run(live(outbox.url)) == []


def test_a_sender_says_that_it_lives_and_where_its_metrics_are(outbox, hook, tmp_path, wait_until):
    with sender_process(outbox.url, tmp_path):
        wait_until(lambda: asyncio.run(live(outbox.url)))
        [process] = asyncio.run(live(outbox.url))
        assert process.kind == "sender"
        outbox.add(hook.url())
        hook.wait_for(1)
        wait_until(lambda: 'safelight_webhook_attempts_total{outcome="delivered"} 1.0' in metrics_of(process))
        assert "safelight_webhook_lag_seconds_count 1.0" in metrics_of(process)


def metrics_of(process):
    return httpx2.get(f"http://{process.metrics}/metrics", trust_env=False).text


async def live(url):
    redis = connect_async(url)
    found = await processes.live(redis)
    await redis.aclose(close_connection_pool=True)
    return found


def test_a_redis_that_restarts_is_found_again_and_nothing_is_lost(storage, hook, tmp_path, wait_until):
    folder = tmp_path / "redis"
    folder.mkdir()
    with start_redis(folder) as server, sending(server.url, storage) as counted:
        outbox = Outbox(server.url)
        outbox.add(hook.url(), count=5)
        hook.wait_for(5)
        server.kill()
        time.sleep(0.7)
        server.start()
        restarted = time.monotonic()
        outbox.add(hook.url(), count=5)
        hook.wait_until(lambda received: len({r.headers["webhook-id"] for r in received}) == 10)
        assert time.monotonic() - restarted < 5
        with connect(server.url) as redis:
            wait_until(lambda: is_empty(redis))
        wait_until(lambda: counted("delivered") == 10)


def test_a_redis_that_goes_between_post_and_settle_gets_the_outcome_when_it_is_back(
    storage, hook, tmp_path, wait_until
):
    folder = tmp_path / "redis"
    folder.mkdir()
    hook.hang = threading.Event()
    with start_redis(folder) as server, sending(server.url, storage) as counted:
        Outbox(server.url).add(hook.url())
        hook.wait_for(1)
        server.kill()
        hook.hang.set()
        time.sleep(0.5)
        server.start()
        wait_until(lambda: counted("delivered") == 1)
        with connect(server.url) as redis:
            assert is_empty(redis)
    assert len(hook.received) == 1


def test_a_wrong_setting_stops_the_sender_with_2_and_its_name(tmp_path):
    environment = {**os.environ, "SAFELIGHT_DATA": str(tmp_path), "SAFELIGHT_WEBHOOK_SECRET": "whsec_c2hvcnQ="}
    environment["SAFELIGHT_REDIS_URL"] = "redis://127.0.0.1:1/0"
    ended = subprocess.run(SENDER, env=environment, capture_output=True, check=False, text=True)
    assert ended.returncode == 2
    assert "SAFELIGHT_WEBHOOK_SECRET" in ended.stderr
    assert "Traceback" not in ended.stderr
