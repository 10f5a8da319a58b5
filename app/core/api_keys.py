"""API keys: each opens one tenant for some scopes; shown once, kept as a hash; a revoked one stops within a second."""

import hashlib
import hmac
import json
import re
import secrets
import string
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Final

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError

from app.core import redis_keys as keys
from app.core.errors import InvalidRequest, NotFound

TTL_SECONDS: Final = 1.0  # how long a process trusts what it read
USE_SECONDS: Final = 60.0  # how often the time of a key's last use is written, at most
DEFAULT_TENANT: Final = keys.DEFAULT_TENANT
MAX_NAME: Final = 100  # characters
TENANT_FORM: Final = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_BASE62: Final = string.digits + string.ascii_letters
_KEY: Final = re.compile(r"sl_([0-9A-Za-z]{8})_[0-9A-Za-z]{32}", re.ASCII)


class Scope(StrEnum):
    """What a key may do: look, change, or run the service. `admin` includes the others, for its own tenant's jobs."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


EVERYDAY: Final = (Scope.SUBMIT, Scope.READ)  # what a key may do unless it is said


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of a key; `id` is its public part. Times are seconds since the epoch."""

    id: str
    name: str
    sha256: str
    created_at: float
    revoked_at: float | None = None
    tenant: str = DEFAULT_TENANT
    scopes: tuple[Scope, ...] = EVERYDAY
    expires_at: float | None = None

    def opens(self, secret: str) -> bool:
        """Whether `secret` is this key, and still good."""
        return self.is_good and hmac.compare_digest(self.sha256, digest(secret))

    @property
    def is_good(self) -> bool:
        """Whether it is neither revoked nor expired, by this machine's clock."""
        return self.revoked_at is None and (self.expires_at is None or time.time() < self.expires_at)


def digest(secret: str) -> str:
    """The sha256 of a key. Keys hold 190 bits of chance, so a slow hash would protect nothing more."""
    return hashlib.sha256(secret.encode()).hexdigest()


def check_tenant(name: str) -> None:
    """Raises InvalidRequest for what cannot be a tenant's name."""
    if not re.fullmatch(TENANT_FORM, name, re.ASCII):
        raise InvalidRequest(
            "a tenant's name has 1 to 64 of a-z, 0-9, '.', '_' and '-', and begins with one of a-z, 0-9"
        )


def draw(
    name: str,
    tenant: str = DEFAULT_TENANT,
    scopes: Iterable[Scope] = EVERYDAY,
    expires_at: float | None = None,
) -> tuple[ApiKey, str]:
    """A key that is kept nowhere yet, and its secret, `sl_<8 public>_<32 secret>`. Raises InvalidRequest."""
    check_tenant(tenant)
    if not 0 < len(name) <= MAX_NAME:
        raise InvalidRequest(f"a key's name has 1 to {MAX_NAME} characters")
    public, private = _draw(8), _draw(32)
    secret = f"sl_{public}_{private}"
    ordered = tuple(scope for scope in Scope if scope in set(scopes)) or EVERYDAY
    key = ApiKey(public, name, digest(secret), time.time(), tenant=tenant, scopes=ordered, expires_at=expires_at)
    return key, secret


def create(
    redis: Redis,
    name: str,
    tenant: str = DEFAULT_TENANT,
    scopes: Iterable[Scope] = EVERYDAY,
    expires_at: float | None = None,
) -> tuple[ApiKey, str]:
    """Make a key; its record, and the key itself, which is kept nowhere. Raises InvalidRequest."""
    key, secret = draw(name, tenant, scopes, expires_at)
    redis.hset(keys.API_KEYS, key.id, _text(key))
    return key, secret


def list_keys(redis: Redis) -> list[ApiKey]:
    """All keys, revoked ones too, oldest first."""
    found: Any = redis.hvals(keys.API_KEYS)
    return sorted((_parse(text) for text in found), key=lambda key: key.created_at)


def last_uses(redis: Redis) -> dict[str, float]:
    """When each key was last used, to the minute, by its id."""
    found: Any = redis.hgetall(keys.API_KEY_USES)
    return {key_id: float(at) for key_id, at in found.items()}


def revoke(redis: Redis, key_id: str) -> ApiKey:
    """Make a key useless; it stays in the list. Raises NotFound."""
    text: Any = redis.hget(keys.API_KEYS, key_id)
    key = _revoked(text, key_id)
    redis.hset(keys.API_KEYS, key.id, _text(key))
    return key


def has_keys(redis: Redis) -> bool:
    """Whether a key was ever made: one that is revoked closes the service too."""
    return bool(redis.exists(keys.API_KEYS))


class KeyRing:
    """The keys as the API uses them, at most one read a second and key; keys that do not exist are not kept."""

    def __init__(self, redis: AsyncRedis) -> None:
        self._redis = redis
        self._known: dict[str, tuple[float, ApiKey]] = {}  # by id, with the monotonic time of the read
        self._used: dict[str, float] = {}  # by id, when we last wrote that it was used (monotonic)
        self._is_empty = True

    async def find(self, secret: str) -> ApiKey | None:
        """The good key that `secret` is; it counts as used."""
        form = _KEY.fullmatch(secret)
        key = await self._read(form[1]) if form else None
        if not key or not key.opens(secret):
            return None
        await self._use(key.id)
        return key

    async def is_good(self, key_id: str) -> bool:
        """Whether a key that was good is so still."""
        key = await self._read(key_id)
        return key is not None and key.is_good

    async def create(self, key: ApiKey) -> None:
        """Keep a key that was drawn."""
        await self._redis.hset(keys.API_KEYS, key.id, _text(key))

    async def overview(self) -> list[tuple[ApiKey, float | None]]:
        """All keys with the time of their last use, revoked ones too, oldest first."""
        found: Any = await self._redis.hvals(keys.API_KEYS)
        uses: Any = await self._redis.hgetall(keys.API_KEY_USES)
        known = sorted((_parse(text) for text in found), key=lambda key: key.created_at)
        return [(key, float(uses[key.id]) if key.id in uses else None) for key in known]

    async def revoke(self, key_id: str) -> None:
        """Make a key useless, here at once and elsewhere within a second; it stays in the list. Raises NotFound."""
        text: Any = await self._redis.hget(keys.API_KEYS, key_id)
        key = _revoked(text, key_id)
        await self._redis.hset(keys.API_KEYS, key.id, _text(key))
        self._known.pop(key_id, None)

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

    async def _use(self, key_id: str) -> None:
        if time.monotonic() - self._used.get(key_id, float("-inf")) < USE_SECONDS:
            return
        self._used[key_id] = time.monotonic()
        with suppress(RedisError, OSError):  # nice to know, no more: the request it opens goes on
            await self._redis.hset(keys.API_KEY_USES, key_id, str(int(time.time())))


def _draw(length: int) -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(length))


def _revoked(text: str | None, key_id: str) -> ApiKey:
    if text is None:
        raise NotFound(f"there is no key {key_id[:64]!r}; `safelight keys list` shows those there are")
    key = _parse(text)
    return key if key.revoked_at else replace(key, revoked_at=time.time())


def _text(key: ApiKey) -> str:
    return json.dumps(asdict(key))


def _parse(text: str | bytes) -> ApiKey:
    fields: Mapping[str, Any] = json.loads(text)
    return ApiKey(**{**fields, "scopes": tuple(map(Scope, fields.get("scopes", EVERYDAY)))})
