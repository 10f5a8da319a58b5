"""Webhooks by Standard Webhooks 1.0: how they are signed, and the outbox they wait in."""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from redis.asyncio import Redis

from app.core import redis_keys as keys
from app.core.errors import ConfigError
from app.core.job import Job, job_from_hash

# Seconds before attempt 2, 3, ...: the schedule Standard Webhooks recommends, three days in all.
SCHEDULE: Final = (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
HOLD_MS: Final = 60_000  # a delivery in a dead sender's hands is due again after this


def secret_bytes(secret: str) -> bytes:
    """The key inside `whsec_<base64>`. Raises ConfigError where it is not 24 to 64 bytes."""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except ValueError as error:
        raise ConfigError("SAFELIGHT_WEBHOOK_SECRET must be whsec_ and valid base64") from error
    if not 24 <= len(key) <= 64:
        raise ConfigError("SAFELIGHT_WEBHOOK_SECRET must hold 24 to 64 bytes")
    return key


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> Mapping[str, str]:
    """The three headers of a signed webhook (standard-webhooks spec 1.0.0, "Signature scheme")."""
    content = f"{message_id}.{timestamp}.".encode() + body
    digest = hmac.new(secret_bytes(secret), content, hashlib.sha256).digest()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }


@dataclass(frozen=True, slots=True)
class Delivery:
    """One webhook on its way: what happened to which job, as it was then. Times are seconds since the epoch."""

    id: str
    type: str
    url: str
    created_at: float
    attempts: int  # this one included
    job: Job


@dataclass(frozen=True, slots=True)
class Taken:
    """What `take` found due; `unreadable` are the ids of deliveries whose record makes no sense."""

    deliveries: list[Delivery]
    unreadable: list[str]

    def __len__(self) -> int:
        return len(self.deliveries) + len(self.unreadable)


async def take(redis: Redis, limit: int) -> Taken:
    """The deliveries that are due, held for a minute: until then no other sender sees them."""
    taken = Taken([], [])
    for delivery_id, flat in await keys.TAKE.call(redis, limit, HOLD_MS):
        try:
            taken.deliveries.append(_delivery(delivery_id, dict(zip(flat[::2], flat[1::2], strict=True))))
        except (LookupError, TypeError, ValueError, AttributeError):
            taken.unreadable.append(delivery_id)
    return taken


async def settle(redis: Redis, delivery_id: str) -> None:
    """Done with it: delivered, or given up."""
    pipeline = redis.pipeline()
    pipeline.zrem(keys.OUTBOX, delivery_id)
    pipeline.delete(keys.DELIVERY + delivery_id)
    await pipeline.execute()


async def postpone(redis: Redis, delivery_id: str, seconds: float) -> None:
    """After an attempt that failed: make the next one due in `seconds`, by Redis' clock."""
    await keys.POSTPONE.call(redis, delivery_id, int(seconds * 1000), 1)


async def put_back(redis: Redis, delivery_id: str, seconds: float) -> None:
    """Without an attempt made: make it due in `seconds`, and do not count the one it was taken for."""
    await keys.POSTPONE.call(redis, delivery_id, int(seconds * 1000), 0)


def body(delivery: Delivery, job: Mapping[str, Any]) -> bytes:
    """The JSON that is signed and sent; `job` is the job's view, its URLs signed now."""
    happened = datetime.fromtimestamp(delivery.created_at, UTC).isoformat().replace("+00:00", "Z")
    return json.dumps({"type": delivery.type, "timestamp": happened, "data": job}, separators=(",", ":")).encode()


def _delivery(delivery_id: str, fields: Mapping[str, str]) -> Delivery:
    return Delivery(
        id=delivery_id,
        type=fields["type"],
        url=fields["url"],
        created_at=int(fields["created_at"]) / 1e3,
        attempts=int(fields["attempts"]) + 1,
        job=job_from_hash(json.loads(fields["job"])),
    )
