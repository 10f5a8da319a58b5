"""API keys: made by the operator, shown once, kept as a hash; a revoked one stops within a second."""

import hashlib
import hmac
import json
import re
import secrets
import string
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from app.core import redis_keys as keys
from app.core.errors import NotFound

TTL_SECONDS: Final = 1.0  # how long a process trusts what it read
_BASE62: Final = string.digits + string.ascii_letters
_KEY: Final = re.compile(r"sl_([0-9A-Za-z]{8})_[0-9A-Za-z]{32}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of a key; `id` is its public part. Times are seconds since the epoch."""

    id: str
    name: str
    sha256: str
    created_at: float
    revoked_at: float | None = None

    def opens(self, secret: str) -> bool:
        """Whether `secret` is this key, and still good."""
        return self.revoked_at is None and hmac.compare_digest(self.sha256, digest(secret))


def digest(secret: str) -> str:
    """The sha256 of a key. Keys hold 190 bits of chance, so a slow hash would protect nothing more."""
    return hashlib.sha256(secret.encode()).hexdigest()


def create(redis: Redis, name: str) -> tuple[ApiKey, str]:
    """Make a key; its record, and the key itself, `sl_<8 public>_<32 secret>`, which is kept nowhere."""
    public, private = _draw(8), _draw(32)
    secret = f"sl_{public}_{private}"
    key = ApiKey(public, name, digest(secret), time.time())
    redis.hset(keys.API_KEYS, key.id, json.dumps(asdict(key)))
    return key, secret


def list_keys(redis: Redis) -> list[ApiKey]:
    """All keys, revoked ones too, oldest first."""
    found: Any = redis.hvals(keys.API_KEYS)
    return sorted((_parse(text) for text in found), key=lambda key: key.created_at)


def revoke(redis: Redis, key_id: str) -> ApiKey:
    """Make a key useless; it stays in the list. Raises NotFound."""
    text: Any = redis.hget(keys.API_KEYS, key_id)
    if text is None:
        raise NotFound(f"there is no key {key_id[:64]!r}; `safelight keys list` shows those there are")
    key = _parse(text)
    if key.revoked_at is None:
        key = replace(key, revoked_at=time.time())
        redis.hset(keys.API_KEYS, key.id, json.dumps(asdict(key)))
    return key


def has_keys(redis: Redis) -> bool:
    """Whether a key was ever made: one that is revoked closes the service too."""
    return bool(redis.exists(keys.API_KEYS))


class KeyRing:
    """The keys as the API looks them up, at most one read a second and key; keys that do not exist are not kept."""

    def __init__(self, redis: AsyncRedis) -> None:
        self._redis = redis
        self._known: dict[str, tuple[float, ApiKey]] = {}  # by id, with the monotonic time of the read
        self._is_empty = True

    async def find(self, secret: str) -> ApiKey | None:
        """The good key that `secret` is."""
        form = _KEY.fullmatch(secret)
        key = await self._read(form[1]) if form else None
        return key if key and key.opens(secret) else None

    async def is_empty(self) -> bool:
        """Whether no key was ever made; once there was one, the service stays closed."""
        if self._is_empty:
            self._is_empty = not await self._redis.exists(keys.API_KEYS)
        return self._is_empty

    async def _read(self, key_id: str) -> ApiKey | None:
        read_at, key = self._known.get(key_id, (0.0, None))
        if key and time.monotonic() - read_at < TTL_SECONDS:
            return key
        asked_at = time.monotonic()
        text: Any = await self._redis.hget(keys.API_KEYS, key_id)
        if text is None:
            self._known.pop(key_id, None)
            return None
        key = _parse(text)
        self._known[key_id] = (asked_at, key)
        return key


def _draw(length: int) -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(length))


def _parse(text: str | bytes) -> ApiKey:
    fields: Mapping[str, Any] = json.loads(text)
    return ApiKey(**fields)
