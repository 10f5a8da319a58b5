"""Webhooks by Standard Webhooks 1.0: how they are signed, and the outbox they wait in."""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from redis.asyncio import Redis

from app.core import redis_keys as keys
from app.core.batch import Batch, batch_from_hash
from app.core.errors import ConfigError, Conflict, NotFound
from app.core.job import Job, job_from_hash

# Seconds before attempt 2, 3, ...: the schedule Standard Webhooks recommends, three days in all.
SCHEDULE: Final = (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
HOLD_MS: Final = 60_000  # a delivery in a dead sender's hands is due again after this
LIFE_MS: Final = 7 * 86_400_000  # longer than any delivery is under way, jitter and busy receivers included
TRIP: Final = 10  # failures in a row after which an endpoint is only probed
PROBE_MS: Final = 60_000  # between two probes of it
MAX_BODY: Final = 20_000  # bytes: what Standard Webhooks advises
TEST: Final = "endpoint.test"


class Outcome(StrEnum):
    """How an attempt ended; all but RETRIED and SKIPPED are final."""

    DELIVERED = "delivered"
    RETRIED = "retried"
    SKIPPED = "skipped"  # not made: the endpoint has been failing, and is only probed
    GONE = "gone"
    DISABLED = "disabled"
    REFUSED = "refused"
    GIVEN_UP = "given_up"
    UNREADABLE = "unreadable"

    @property
    def is_final(self) -> bool:
        return self not in (Outcome.RETRIED, Outcome.SKIPPED)


def secret_bytes(secret: str) -> bytes:
    """The key inside `whsec_<base64>`. Raises ConfigError where it is not 24 to 64 bytes."""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except ValueError as error:
        raise ConfigError("SAFELIGHT_WEBHOOK_SECRET must be whsec_ and valid base64") from error
    if not 24 <= len(key) <= 64:
        raise ConfigError("SAFELIGHT_WEBHOOK_SECRET must hold 24 to 64 bytes")
    return key


def sign(secrets: Sequence[str], message_id: str, timestamp: int, body: bytes) -> Mapping[str, str]:
    """The three headers of a signed webhook, a signature for each secret (standard-webhooks spec 1.0.0)."""
    content = f"{message_id}.{timestamp}.".encode() + body
    digests = (hmac.new(secret_bytes(secret), content, hashlib.sha256).digest() for secret in secrets)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join("v1," + base64.b64encode(digest).decode() for digest in digests),
    }


@dataclass(frozen=True, slots=True)
class Delivery:
    """One webhook on its way: what happened to a job or a batch, as it was then. Times are seconds since the epoch."""

    id: str
    type: str
    tenant: str
    url: str
    created_at: float
    attempts: int  # this one included
    job: Job | None = None
    batch: Batch | None = None  # neither: a test
    endpoint: str | None = None
    since: float = 0.0  # it was first due: at its creation, or when it was asked for again
    turn: str = "0"  # how often it was asked for again
    obstacle: str = ""  # gone, disabled, failing: what stands in the way of one for an endpoint


@dataclass(frozen=True, slots=True)
class Attempt:
    """A line of a delivery's log; `status` is None where no reply came."""

    at: float
    outcome: Outcome
    status: int | None
    seconds: float

    def line(self) -> str:
        return json.dumps([round(self.at, 3), self.outcome, self.status, round(self.seconds, 3)], separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Record:
    """A delivery as its tenant may read it, under way or ended; `outcome` is None while it is under way."""

    id: str
    type: str
    url: str
    created_at: float
    endpoint: str | None
    job_id: str | None
    batch_id: str | None
    attempts: int
    outcome: Outcome | None
    ended_at: float | None
    next_attempt_at: float | None
    log: list[Attempt] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Taken:
    """What `take` found due; `unreadable` are the ids of deliveries whose record makes no sense."""

    deliveries: list[Delivery]
    unreadable: list[str]

    def __len__(self) -> int:
        return len(self.deliveries) + len(self.unreadable)


async def take(redis: Redis, limit: int, *, probe_ms: int = PROBE_MS) -> Taken:
    """The deliveries that are due, held for a minute: until then no other sender sees them."""
    taken = Taken([], [])
    for delivery_id, obstacle, flat in await keys.TAKE.call(redis, limit, HOLD_MS, TRIP, probe_ms):
        try:
            fields = dict(zip(flat[::2], flat[1::2], strict=True))
            taken.deliveries.append(_delivery(delivery_id, obstacle, fields))
        except (LookupError, TypeError, ValueError, AttributeError):
            taken.unreadable.append(delivery_id)
    return taken


async def settle(redis: Redis, delivery_id: str, attempt: Attempt, *, keep_ms: int, turn: str = "") -> None:
    """Done with it: delivered, or given up; its record is kept for `keep_ms` more.

    Where it was asked for again since it was taken, in another turn then, the attempt is logged, and it stays due.
    """
    await keys.SETTLE.call(redis, delivery_id, attempt.outcome, attempt.line(), keep_ms, LIFE_MS, turn)


async def postpone(redis: Redis, delivery_id: str, seconds: float, attempt: Attempt, *, turn: str) -> None:
    """After an attempt that failed: make the next one due in `seconds`, unless it is another turn's by now."""
    await keys.POSTPONE.call(redis, delivery_id, int(seconds * 1000), attempt.line(), turn)


async def put_back(redis: Redis, delivery_id: str, seconds: float, *, turn: str) -> None:
    """Without an attempt made: make it due in `seconds`, and do not count the one it was taken for."""
    await keys.POSTPONE.call(redis, delivery_id, int(seconds * 1000), "", turn)


async def redeliver(redis: Redis, tenant: str, delivery_id: str) -> None:
    """Make a delivery due now, with all its attempts before it. Raises NotFound, Conflict."""
    outcome = await keys.REDELIVER.call(redis, delivery_id, tenant)
    if outcome is None:
        raise NotFound("there is no such webhook delivery")
    if outcome == "changed":
        raise Conflict("what this webhook said is no longer kept, and what it was about has changed or is gone")


async def get(redis: Redis, tenant: str, delivery_id: str) -> Record:
    """A delivery of the tenant's. Raises NotFound."""
    found = await _records(redis, tenant, [delivery_id])
    if not found:
        raise NotFound("there is no such webhook delivery")
    return found[0]


@dataclass(frozen=True, slots=True)
class LogPage:
    """Some deliveries, newest first, and the cursor of the next page."""

    records: list[Record]
    next_cursor: str | None


async def of(redis: Redis, tenant: str, about: str) -> LogPage:
    """The deliveries about a job or a batch of the tenant's, all of them; none for anybody else's."""
    names: Any = await redis.smembers(keys.JOB_DELIVERIES + about)
    found = await _records(redis, tenant, sorted(names))
    return LogPage(sorted(found, key=lambda record: record.created_at, reverse=True), None)


async def latest(redis: Redis, tenant: str, limit: int, cursor: str | None = None) -> LogPage:
    """A page of the tenant's deliveries. Of those of one millisecond a page holds all, so it may be a little longer."""
    index, most = keys.DELIVERIES + tenant, f"({int(cursor)}" if cursor else "+inf"
    found: Any = await redis.zrange(index, most, "-inf", byscore=True, desc=True, offset=0, num=limit, withscores=True)
    if len(found) < limit:
        return LogPage(await _records(redis, tenant, [name for name, _ in found]), None)
    last = int(found[-1][1])
    twins: Any = await redis.zrange(index, last, last, byscore=True, desc=True)
    names = [name for name, at in found if int(at) != last] + list(twins)
    has_more = await redis.zcount(index, "-inf", f"({last}")
    return LogPage(await _records(redis, tenant, names), str(last) if has_more else None)


def body(delivery: Delivery, about: Mapping[str, Any] | None) -> bytes:
    """The JSON that is signed and sent; `about` is the view of the job, its URLs signed now, or of the batch.

    None: a test. Over 20 kB the largest parameters are left out (null), then the metadata, then the outputs, until it
    fits; `truncated` names them, and the job's own link has them.
    """
    happened = datetime.fromtimestamp(delivery.created_at, UTC).isoformat().replace("+00:00", "Z")
    data: dict[str, Any] = {"object": "webhook_endpoint", "id": delivery.endpoint} if about is None else dict(about)
    envelope = {"type": delivery.type, "timestamp": happened, "data": data}
    if len(text := _json(envelope)) <= MAX_BODY or about is None or "params" not in about:
        return text
    params = data["params"] = dict(data["params"])
    left_out: list[str] = []
    for name in [*(f"params.{n}" for n in _largest_first(params)), "metadata", "outputs"]:
        holder, key = (params, name.partition(".")[2]) if name.startswith("params.") else (data, name)
        holder[key] = None
        left_out.append(name)
        if len(text := _json(envelope | {"truncated": left_out})) <= MAX_BODY:
            break
    return text


def _largest_first(params: Mapping[str, Any]) -> list[str]:
    sizes = {name: len(_json(value)) for name, value in params.items()}
    return sorted((name for name, size in sizes.items() if size > 256), key=lambda name: -sizes[name])


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _delivery(delivery_id: str, obstacle: str, fields: Mapping[str, str]) -> Delivery:
    about = fields["type"].partition(".")[0]
    return Delivery(
        id=delivery_id,
        type=fields["type"],
        tenant=fields["tenant"],
        url=fields["url"],
        created_at=int(fields["created_at"]) / 1e3,
        attempts=int(fields["attempts"]),
        job=job_from_hash(json.loads(fields["job"])) if about == "job" else None,
        batch=batch_from_hash(json.loads(fields["batch"])) if about == "batch" else None,
        endpoint=fields.get("endpoint"),
        since=int(fields.get("since", fields["created_at"])) / 1e3,
        turn=fields.get("turn", "0"),
        obstacle=obstacle,
    )


async def _records(redis: Redis, tenant: str, names: Sequence[str]) -> list[Record]:
    pipeline = redis.pipeline(transaction=False)
    for name in names:
        pipeline.hgetall(keys.DELIVERY + name)
        pipeline.zscore(keys.OUTBOX, name)
    replies = await pipeline.execute()
    found = zip(names, replies[::2], replies[1::2], strict=True)
    return [_record(name, fields, due) for name, fields, due in found if fields and fields.get("tenant") == tenant]


def _record(name: str, fields: Mapping[str, str], due: float | None) -> Record:
    return Record(
        id=name,
        type=fields["type"],
        url=fields["url"],
        created_at=int(fields["created_at"]) / 1e3,
        endpoint=fields.get("endpoint"),
        job_id=fields.get("job_id"),
        batch_id=fields.get("batch_id"),
        attempts=int(fields["attempts"]),
        outcome=Outcome(fields["outcome"]) if "outcome" in fields else None,
        ended_at=int(fields["ended_at"]) / 1e3 if "ended_at" in fields else None,
        next_attempt_at=due / 1e3 if due is not None else None,
        log=[_attempt(line) for line in fields.get("log", "").splitlines()],
    )


def _attempt(line: str) -> Attempt:
    at, outcome, status, seconds = json.loads(line)
    return Attempt(at, Outcome(outcome), status, seconds)
