"""The webhook process: takes what is due from the outbox, renders it, signs it and POSTs it until somebody has it.

At least once: what was POSTed but not settled, because this process or Redis died in between, is sent again under the
same id. A receiver that does not answer delays nobody else: each host has few places of its own, no tenant has all
places, and few are for hosts that did not answer last time.
"""

import asyncio
import os
import random
import secrets
import signal
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Final
from urllib.parse import urlsplit

import httpx2
import structlog
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError

from app.core import failpoints, processes, webhooks
from app.core import redis_keys as keys
from app.core.addresses import AddressGuard, guarded_client, read_limited
from app.core.batch import batch_view
from app.core.connections import connect, connect_async
from app.core.errors import AddressRefused, SafelightError
from app.core.exposition import serve_metrics
from app.core.job import Output, view
from app.core.metrics import SenderMetrics, sender_metrics
from app.core.settings import Settings, redis_url, url_secret, webhook_secret
from app.core.storage import Storage, open_storage
from app.core.tenants import Secrets, open_secrets
from app.core.webhooks import Attempt, Delivery, Outcome

log = structlog.get_logger()

CONCURRENCY: Final = 96  # attempts at a time
PER_HOST: Final = 4  # of them to one host; to a host that did not answer last time, one
PER_TENANT: Final = 64  # of them for one tenant
TO_SILENT: Final = 16  # of them for one tenant to hosts that did not answer last time
KNOWN: Final = 4096  # hosts that did not answer, remembered while nothing is on its way to them
WAITING: Final = 128  # deliveries kept in hand for a busy host; the others go back to the outbox
IN_HAND: Final = 1024  # of them in all
STALE_SECONDS: Final = 30  # in hand this long: go back before the hold of `webhooks.take` ends
FAR_SECONDS: Final = 300  # the longest that a delivery is put back for
POLL_SECONDS: Final = 1.0  # the outbox is looked at this often without a bell, for retries come due silently
BUSY_SECONDS: Final = 0.05  # and this often while something is there that was put back
TOTAL_SECONDS: Final = 15.0  # an attempt, from looking up the name to the end of the reply
DRAIN_SECONDS: Final = TOTAL_SECONDS + 3
SETTLE_SECONDS: Final = 30  # how long the outcome of an attempt is kept for a Redis that is away
BEAT_SECONDS: Final = 3.0
PATIENCE_SECONDS: Final = 5 * 86400  # an endpoint that has done nothing but fail for so long is disabled
MAX_REPLY: Final = 64 * 1024  # bytes of a reply that are read
MAX_RETRY_AFTER: Final = 3600  # seconds
URL_SECONDS: Final = 3600  # the life of the URLs in a webhook
BACKOFF: Final = (0.1, 5.0)  # seconds to the first and the longest wait for a Redis that is away


@dataclass(frozen=True, slots=True)
class Reply:
    """What a receiver said: its status, None for no answer, and the seconds it wants to be left alone."""

    status: int | None
    retry_after: float = 0.0
    about: str = ""  # why there is no answer


@dataclass(slots=True)
class Pace:
    """Attempts under way, of which there may be so many at a time, and how fast they end."""

    running: int = 0
    seconds: float = 0.02  # an attempt takes, as of late
    next_due: float = 0.0  # when the place of the next one that is put back comes up (monotonic)

    @property
    def places(self) -> int:
        raise NotImplementedError

    @property
    def has_room(self) -> bool:
        return self.running < self.places

    def leave(self, seconds: float) -> None:
        """An attempt has ended that took so long."""
        self.running -= 1
        self.seconds += (seconds - self.seconds) / 4

    def delay(self, now: float, ahead: int = 0) -> float:
        """Seconds to put the next delivery back for: each in turn, `ahead` at first, at the pace at which they end."""
        pace = self.seconds / self.places
        self.next_due = max(self.next_due, now + ahead * pace) + pace
        return min(self.next_due - now, FAR_SECONDS)


@dataclass(slots=True)
class Host(Pace):
    """A receiver's host and port, and what waits in hand for an attempt to it to end."""

    is_silent: bool = False  # it did not answer last time
    waiting: deque[tuple[Delivery, float]] = field(default_factory=deque)

    @property
    def places(self) -> int:
        return 1 if self.is_silent else PER_HOST

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting


class ToSilent(Pace):
    """A tenant's attempts to hosts that did not answer last time."""

    @property
    def places(self) -> int:
        return TO_SILENT


@dataclass(slots=True)
class Tenant(Pace):
    """A tenant's attempts, and those of them to hosts that did not answer last time."""

    to_silent: ToSilent = field(default_factory=ToSilent)

    @property
    def places(self) -> int:
        return PER_TENANT


Render = Callable[[Delivery], Awaitable[bytes]]


class Sender:
    """Delivers what is in the outbox. `render` makes the body of an attempt, `client` is bounded in time by itself."""

    def __init__(
        self,
        redis: AsyncRedis,
        client: httpx2.AsyncClient,
        render: Render,
        *,
        secrets: Secrets,
        metrics: SenderMetrics,
        keep_ms: int,
        schedule: Sequence[float] = webhooks.SCHEDULE,
        patience: float = PATIENCE_SECONDS,
        probe_ms: int = webhooks.PROBE_MS,
    ) -> None:
        self._redis = redis
        self._client = client
        self._render = render
        self._secrets = secrets
        self._metrics = metrics
        self._keep_ms = keep_ms  # of the record of a delivery that has ended
        self._schedule = schedule
        self._patience_ms = int(patience * 1000)
        self._probe_ms = probe_ms
        self._bell = asyncio.Event()
        self._stopping = asyncio.Event()
        # Past its schedule and a day more for busy receivers a delivery is not put back again.
        self._give_up_after = sum(schedule) * 1.15 + 86400
        self._hosts: dict[str, Host] = {}
        self._in_hand = 0  # deliveries that wait for a host
        self._tenants: dict[str, Tenant] = {}
        self._busy_until = 0.0  # the last of what was put back is due (monotonic)
        self._attempts: set[asyncio.Task[None]] = set()
        self._errands: set[asyncio.Task[None]] = set()  # deliveries on their way back to the outbox

    def stop(self) -> None:
        """Take nothing more; `run` returns when what is under way has ended."""
        self._stopping.set()
        self._bell.set()

    async def run(self) -> None:
        """Deliver until stopped."""
        listener = asyncio.create_task(self._listen())
        try:
            await self._take_all()
            await self._drain()
        finally:
            listener.cancel()
            with suppress(asyncio.CancelledError):
                await listener

    async def _take_all(self) -> None:
        pause = BACKOFF[0]
        while not self._stopping.is_set():
            self._bell.clear()
            try:
                has_more = await self._take()
            except (RedisError, OSError) as error:
                log.warning("sender.redis_away", error=type(error).__name__)
                await self._wait(pause)
                pause = min(pause * 2, BACKOFF[1])
                continue
            pause = BACKOFF[0]
            if not has_more:
                await self._wait(BUSY_SECONDS if time.monotonic() < self._busy_until else POLL_SECONDS)

    async def _take(self) -> bool:
        """Begin what is due, as far as there is room; whether there may be more."""
        room = CONCURRENCY - len(self._attempts)
        if room <= 0:
            return False
        taken = await webhooks.take(self._redis, room, probe_ms=self._probe_ms)
        for delivery_id in taken.unreadable:
            log.error("webhook.unreadable", delivery=delivery_id)
            self._count(Outcome.UNREADABLE)
            unmade = Attempt(time.time(), Outcome.UNREADABLE, None, 0.0)
            self._go(webhooks.settle(self._redis, delivery_id, unmade, keep_ms=self._keep_ms))
        for delivery in taken.deliveries:
            if delivery.obstacle:
                self._set_aside(delivery)
            else:
                self._admit(delivery)
        return len(taken) == room

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._bell.wait(), seconds)

    async def _listen(self) -> None:
        """Ring the bell for what enters the outbox. A hint: without it the outbox is looked at every second."""
        while True:
            with suppress(RedisError, OSError):
                async with self._redis.pubsub() as pubsub:
                    await pubsub.subscribe(keys.OUTBOX_BELL)
                    while True:
                        if await pubsub.get_message(ignore_subscribe_messages=True, timeout=POLL_SECONDS):
                            self._bell.set()
            await asyncio.sleep(POLL_SECONDS)

    def _admit(self, delivery: Delivery) -> None:
        host = self._hosts.setdefault(_origin(delivery.url), Host())
        if host.has_room:
            self._begin_if_it_may(host, delivery)
        elif len(host.waiting) < WAITING and self._in_hand < IN_HAND:
            host.waiting.append((delivery, time.monotonic()))
            self._in_hand += 1
        else:
            self._put_back(delivery, host.delay(time.monotonic(), len(host.waiting)))

    def _begin_if_it_may(self, host: Host, delivery: Delivery) -> None:
        """Begin an attempt, or put it back where its tenant has too many under way."""
        for places in self._also(host, delivery):
            if not places.has_room:
                self._put_back(delivery, places.delay(time.monotonic()))
                self._forget(_origin(delivery.url), delivery.tenant)
                return
        self._begin(host, delivery)

    def _also(self, host: Host, delivery: Delivery) -> list[Pace]:
        """Whose places an attempt takes, besides its host's."""
        tenant = self._tenants.setdefault(delivery.tenant, Tenant())
        return [tenant, tenant.to_silent] if host.is_silent else [tenant]

    def _set_aside(self, delivery: Delivery) -> None:
        """Give up what its endpoint is not to have; what it cannot have now keeps to its schedule, without a call."""
        outcome, delay = Outcome.DISABLED, 0.0
        if delivery.obstacle == "failing":
            outcome, delay = self._again(delivery)
            outcome = outcome if outcome.is_final else Outcome.SKIPPED
        unmade = Attempt(time.time(), outcome, None, 0.0)
        task = asyncio.create_task(self._record(delivery, unmade, delay))
        self._attempts.add(task)  # so that there are as few at a time as of those that are made
        task.add_done_callback(self._leave)

    def _begin(self, host: Host, delivery: Delivery) -> None:
        began, taken = time.monotonic(), [host, *self._also(host, delivery)]
        for places in taken:
            places.running += 1
        task = asyncio.create_task(self._deliver(host, delivery))
        self._attempts.add(task)
        task.add_done_callback(lambda done: self._ended(done, began, host, delivery, taken))

    def _leave(self, task: asyncio.Task[None]) -> None:
        if len(self._attempts) == CONCURRENCY:
            self._bell.set()
        self._attempts.discard(task)

    def _ended(
        self, task: asyncio.Task[None], began: float, host: Host, delivery: Delivery, taken: Sequence[Pace]
    ) -> None:
        self._leave(task)
        for places in taken:
            places.leave(time.monotonic() - began)
        while host.waiting and host.has_room:
            waiting, since = host.waiting.popleft()
            self._in_hand -= 1
            if self._stopping.is_set():
                self._put_back(waiting, 0)
            elif time.monotonic() - since > STALE_SECONDS:
                self._put_back(waiting, host.delay(time.monotonic(), len(host.waiting)))
            else:
                self._begin_if_it_may(host, waiting)
        self._forget(_origin(delivery.url), delivery.tenant)

    def _forget(self, origin: str, tenant: str) -> None:
        """Keep nothing of those that nothing is on its way to, but that some hosts did not answer."""
        if (host := self._hosts.get(origin)) and host.is_idle:
            del self._hosts[origin]
            if host.is_silent:
                self._hosts[origin] = host  # the last to be forgotten
        if len(self._hosts) > KNOWN:
            oldest = next((name for name, known in self._hosts.items() if known.is_idle), None)
            if oldest:
                del self._hosts[oldest]
        if tenant in self._tenants and not self._tenants[tenant].running:
            del self._tenants[tenant]

    def _put_back(self, delivery: Delivery, seconds: float) -> None:
        if seconds and time.time() - delivery.since > self._give_up_after:
            self._count(Outcome.GIVEN_UP)
            unmade = Attempt(time.time(), Outcome.GIVEN_UP, None, 0.0)
            self._go(webhooks.settle(self._redis, delivery.id, unmade, keep_ms=self._keep_ms, turn=delivery.turn))
            return
        self._busy_until = max(self._busy_until, time.monotonic() + seconds + BUSY_SECONDS)
        self._go(webhooks.put_back(self._redis, delivery.id, seconds, turn=delivery.turn))

    def _go(self, errand: Awaitable[None]) -> None:
        async def run() -> None:
            with suppress(RedisError, OSError):  # undone: the delivery is due again when its hold ends
                await errand

        task = asyncio.create_task(run())
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def _drain(self) -> None:
        for host in self._hosts.values():
            while host.waiting:
                self._put_back(host.waiting.popleft()[0], 0)
                self._in_hand -= 1
        if under_way := self._attempts | self._errands:
            _, left = await asyncio.wait(under_way, timeout=DRAIN_SECONDS)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _deliver(self, host: Host, delivery: Delivery) -> None:
        began, job_id, status = time.monotonic(), delivery.job.id if delivery.job else "", None
        bound = log.bind(delivery=delivery.id, job_id=job_id, attempt=delivery.attempts)
        try:
            failpoints.reach("before_webhook", job_id)
            outcome, delay, about = self._judge(delivery, reply := await self._attempt(delivery))
            failpoints.reach("after_webhook", job_id)
            status = reply.status
            host.is_silent = status is None
            await self._learn(delivery, outcome)
        except (AddressRefused, httpx2.InvalidURL) as error:
            outcome, delay, about = Outcome.REFUSED, 0.0, str(error)
        except Exception as error:  # noqa: BLE001  # one delivery, whatever is wrong with it, stops no other
            bound.warning("webhook.not_rendered", exc_info=not isinstance(error, SafelightError))
            outcome, delay, about = *self._again(delivery), type(error).__name__
        seconds = time.monotonic() - began
        level = bound.info if outcome in (Outcome.DELIVERED, Outcome.RETRIED) else bound.warning
        level("webhook.attempt", outcome=outcome.value, about=about, seconds=round(seconds, 3))
        await self._record(delivery, Attempt(time.time(), outcome, status, seconds), delay)

    async def _attempt(self, delivery: Delivery) -> Reply:
        """POST it once. Raises AddressRefused."""
        if delivery.attempts == 1:
            self._metrics.webhook_lag_seconds.observe(max(0.0, time.time() - delivery.created_at))
        async with asyncio.timeout(TOTAL_SECONDS):
            body = await self._render(delivery)
            secret = await self._secrets.of(delivery.tenant)
        headers = {"content-type": "application/json", "user-agent": f"Safelight/{version('safelight')}"}
        headers |= webhooks.sign(secret.valid, delivery.id, int(time.time()), body)
        try:
            async with self._client.stream("POST", delivery.url, content=body, headers=headers) as response:
                # The status alone decides; some of the body is read, so as not to slam the door.
                with suppress(SafelightError, httpx2.HTTPError):
                    await read_limited(response, MAX_REPLY)
                return Reply(response.status_code, _retry_after(response))
        except httpx2.HTTPError as error:
            return Reply(None, about=type(error).__name__)

    async def _learn(self, delivery: Delivery, outcome: Outcome) -> None:
        """Tell an endpoint's health how an attempt ended. Best effort: the next one tells it again."""
        said = {Outcome.DELIVERED: "ok", Outcome.GONE: "gone"}.get(outcome, "failed")
        if not delivery.endpoint or (delivery.type == webhooks.TEST and said != "ok"):
            return
        with suppress(RedisError, OSError):
            endpoint = delivery.endpoint
            disabled = await keys.HEALTH_OF.call(self._redis, delivery.tenant, endpoint, said, self._patience_ms)
            if disabled:
                log.warning("webhook.endpoint_disabled", endpoint=endpoint, reason=disabled)

    def _judge(self, delivery: Delivery, reply: Reply) -> tuple[Outcome, float, str]:
        about = str(reply.status or reply.about)
        if reply.status and 200 <= reply.status < 300:
            return Outcome.DELIVERED, 0.0, about
        if reply.status == httpx2.codes.GONE:
            return Outcome.GONE, 0.0, about
        outcome, delay = self._again(delivery)
        return outcome, max(delay, reply.retry_after), about

    def _again(self, delivery: Delivery) -> tuple[Outcome, float]:
        if delivery.attempts > len(self._schedule) or delivery.type == webhooks.TEST:
            return Outcome.GIVEN_UP, 0.0
        return Outcome.RETRIED, self._schedule[delivery.attempts - 1] * random.uniform(0.85, 1.15)

    async def _record(self, delivery: Delivery, attempt: Attempt, delay: float) -> None:
        """Settle or postpone, also if Redis is away for a while; else the hold ends, and it is sent once more."""
        deadline, pause = time.monotonic() + SETTLE_SECONDS, BACKOFF[0]
        while True:
            try:
                if attempt.outcome.is_final:
                    await webhooks.settle(self._redis, delivery.id, attempt, keep_ms=self._keep_ms, turn=delivery.turn)
                else:
                    await webhooks.postpone(self._redis, delivery.id, delay, attempt, turn=delivery.turn)
            except (RedisError, OSError) as error:
                if time.monotonic() > deadline or self._stopping.is_set():
                    log.warning("webhook.unsettled", delivery=delivery.id, error=type(error).__name__)
                    break
            else:
                break
            await asyncio.sleep(pause)
            pause = min(pause * 2, BACKOFF[1])
        self._count(attempt.outcome)

    def _count(self, outcome: Outcome) -> None:
        self._metrics.webhook_attempts_total.labels(outcome.value).inc()


def _origin(url: str) -> str:
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:  # the guard will refuse it
        return url


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that a busy receiver asks for, capped; both forms of RFC 9110, section 10.2.3."""
    text = response.headers.get("retry-after", "")
    if response.status_code not in (httpx2.codes.TOO_MANY_REQUESTS, httpx2.codes.SERVICE_UNAVAILABLE) or not text:
        return 0.0
    if text.isascii() and text.isdigit():
        return float(min(int(text[:9]), MAX_RETRY_AFTER))
    try:
        seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):  # TypeError: a date without a zone
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def renderer(storage: Storage, public_url: str) -> Render:
    """Renders a delivery as what it is about was then, with URLs signed now. Raises StorageUnavailable."""

    def sign(output: Output) -> str:
        return storage.sign(output.key, URL_SECONDS)

    def render(delivery: Delivery) -> bytes:
        if delivery.job:
            return webhooks.body(delivery, view(delivery.job, public_url, sign).model_dump(mode="json"))
        if delivery.batch:
            return webhooks.body(delivery, batch_view(delivery.batch, public_url).model_dump(mode="json"))
        return webhooks.body(delivery, None)

    async def in_thread(delivery: Delivery) -> bytes:
        # In a thread: short-lived credentials of a bucket may have to be fetched anew before they can sign.
        return await asyncio.to_thread(render, delivery)

    return in_thread


def run(settings: Settings) -> None:
    """Run the sender until SIGTERM or SIGINT. Raises ConfigError."""
    failpoints.arm(settings.failpoints)
    url = redis_url(settings)
    webhooks.secret_bytes(webhook_secret(settings))
    storage = open_storage(settings.storage, public_url=settings.base_url, secret=url_secret(settings).encode())
    asyncio.run(_run(settings, url, renderer(storage, settings.base_url)))


async def _run(settings: Settings, url: str, render: Render) -> None:
    metrics = sender_metrics()
    with connect(url) as beats:
        process = _process(serve_metrics(settings, metrics.registry))
        redis = connect_async(url)
        async with guarded_client(AddressGuard(settings.webhook_allow), total_seconds=TOTAL_SECONDS) as client:
            sender = Sender(
                redis,
                client,
                render,
                secrets=open_secrets(settings, redis),
                metrics=metrics,
                keep_ms=settings.retention_ms,
            )
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, sender.stop)
            beating = asyncio.create_task(_beat(beats, process))
            log.info("sender.started", metrics=process.metrics)
            await sender.run()
            beating.cancel()
        await redis.aclose(close_connection_pool=True)
        with suppress(RedisError, OSError):
            await asyncio.to_thread(processes.leave, beats, process.name)
    log.info("sender.stopped")


def _process(metrics: str) -> processes.Process:
    """What this process says of itself; `metrics` is the host:port of its metrics."""
    return processes.Process(
        name=f"sender-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}",
        kind="sender",
        metrics=metrics,
        version=version("safelight"),
        started_at=time.time(),
    )


async def _beat(redis: Redis, process: processes.Process) -> None:
    while True:
        with suppress(RedisError, OSError):
            await asyncio.to_thread(processes.beat, redis, process)
        await asyncio.sleep(BEAT_SECONDS)
