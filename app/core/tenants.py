"""What belongs to a tenant besides jobs and keys: the secret that signs its webhooks, and what it has used."""

import secrets
import time
from base64 import b64encode
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

from redis.asyncio import Redis

from app.core import redis_keys as keys
from app.core.api_keys import DEFAULT_TENANT
from app.core.errors import Conflict
from app.core.settings import Settings, webhook_secret

DAY: Final = 86400  # seconds
_EPOCH: Final = date(1970, 1, 1)


@dataclass(frozen=True, slots=True)
class WebhookSecret:
    """The secret in use, and the one before it for as long as that is valid; `until` is seconds since the epoch."""

    current: str
    previous: str | None = None
    until: float | None = None

    @property
    def valid(self) -> tuple[str, ...]:
        """Those to sign with now."""
        return (self.current, self.previous) if self.previous else (self.current,)


class Secrets:
    """Every tenant's webhook secret; the default tenant's is the service's own until it is rotated."""

    def __init__(self, redis: Redis, default: str, *, is_fixed: bool = False) -> None:
        """`is_fixed`: the operator has set the default tenant's, and nobody else changes it."""
        self._redis = redis
        self._default = default
        self._is_fixed = is_fixed

    async def of(self, tenant: str) -> WebhookSecret:
        """A tenant's secret, made when it is first asked for."""
        if tenant == DEFAULT_TENANT and self._is_fixed:
            return WebhookSecret(self._default)
        kept: Any = await self._redis.hgetall(keys.WEBHOOK_SECRETS + tenant)
        if "current" not in kept:
            kept = {"current": await self._first(tenant)}
        until = int(kept.get("until", 0)) / 1e3
        if until <= time.time():
            return WebhookSecret(kept["current"])
        return WebhookSecret(kept["current"], kept["previous"], until)

    async def rotate(self, tenant: str, overlap: float) -> WebhookSecret:
        """Draw a new one; the one before stays valid for `overlap` seconds. Raises Conflict."""
        if tenant == DEFAULT_TENANT and self._is_fixed:
            raise Conflict("the default tenant's secret is the setting SAFELIGHT_WEBHOOK_SECRET; change it there")
        before = await self.of(tenant)
        await keys.ROTATE.call(self._redis, tenant, new_secret(), int(overlap * 1000), before.current)
        return await self.of(tenant)

    async def _first(self, tenant: str) -> str:
        if tenant == DEFAULT_TENANT:
            return self._default
        # Of several processes that draw one at the same moment the first one's counts.
        await self._redis.hsetnx(keys.WEBHOOK_SECRETS + tenant, "current", new_secret())
        found: Any = await self._redis.hget(keys.WEBHOOK_SECRETS + tenant, "current")
        return str(found)


def open_secrets(settings: Settings, redis: Redis) -> Secrets:
    """The secrets as the settings have them. Raises ConfigError."""
    return Secrets(redis, webhook_secret(settings), is_fixed=settings.webhook_secret is not None)


def new_secret() -> str:
    return "whsec_" + b64encode(secrets.token_bytes(32)).decode()


@dataclass(frozen=True, slots=True)
class DayOfUse:
    """What was finished on one day (UTC)."""

    date: date
    images: int
    denoiser_seconds: float


async def usage(redis: Redis, tenant: str, days: int) -> list[DayOfUse]:
    """What a tenant has used on each of the last days, today included, oldest first; days without use are left out."""
    first = (datetime.now(UTC).date() - timedelta(days=days - 1) - _EPOCH).days
    kept: Any = await redis.hgetall(keys.USAGE + tenant)
    found: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for name, value in kept.items():
        day, _, what = name.partition(":")
        if int(day) >= first:
            found[int(day)][what] = int(value)
    return [
        DayOfUse(_EPOCH + timedelta(days=day), used.get("images", 0), used.get("denoiser_ms", 0) / 1e3)
        for day, used in sorted(found.items())
    ]
