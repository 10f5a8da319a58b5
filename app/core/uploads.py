"""Uploads: pictures that callers hand in, kept for a while as clean PNGs, each tenant's by what is in it.

The same picture of the same tenant has the same id. A job that uses one keeps it: it lives at least as long as the
job's record does. The object is written before the record names it, and removed after the record has gone.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio import Redis

from app.core import redis_keys as keys
from app.core.errors import Conflict, InvalidRequest, LimitReached, NotFound
from app.core.images import CleanImage
from app.core.queue import reachable
from app.core.storage import Storage, digest, upload_key

UPLOAD_ID: Final = re.compile(r"upload_[0-9a-hjkmnp-tv-z]{26}", re.ASCII)
MOST: Final = 10_000  # uploads of a tenant
_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"


@dataclass(frozen=True, slots=True)
class Upload:
    """A stored picture of a tenant. Times are seconds since the epoch, by Redis' clock; sizes are pixels."""

    id: str
    key: str
    width: int
    height: int
    bytes: int
    sha256: str
    created_at: float
    expires_at: float


@dataclass(frozen=True, slots=True)
class UploadPage:
    """Some uploads, newest first, and the cursor of the next page."""

    uploads: list[Upload]
    next_cursor: str | None


def upload_id(tenant: str, body: bytes) -> str:
    """The id of a picture among a tenant's: of its bytes, so that the same ones are kept once."""
    number = int.from_bytes(hashlib.sha256(f"{tenant}\0".encode() + body).digest()[:16])
    return "upload_" + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


class Uploads:
    """The uploads of all tenants; `retention_ms` is how long one lives that no job uses."""

    def __init__(self, redis: Redis, storage: Storage, *, retention_ms: int) -> None:
        self._redis = redis
        self._storage = storage
        self._retention_ms = retention_ms

    async def put(self, tenant: str, image: CleanImage) -> Upload:
        """Keep a picture, or keep it longer where it is there already.

        Raises LimitReached where the tenant has too many, StorageUnavailable, QueueUnavailable.
        """
        found = upload_id(tenant, image.body)
        key = upload_key(found, secrets.token_hex(8))
        async with reachable():
            # Before the object is there its key is among those to sweep: if we die, it does not stay for good.
            known = await keys.BEGIN_UPLOAD.call(self._redis, found, tenant, self._retention_ms, key, MOST)
        if known == "full":
            raise LimitReached(f"there are {MOST} uploads of yours; delete some, or wait until they expire")
        if known:
            return _upload(found, known)
        await self._storage.put_async(key, image.body, "image/png")
        about = (image.width, image.height, len(image.body), digest(image.body))
        async with reachable():
            made = await keys.PUT_UPLOAD.call(self._redis, found, tenant, self._retention_ms, key, *about)
        return _upload(found, made)

    async def get(self, tenant: str, found: str) -> Upload:
        """The upload. Raises NotFound, for another tenant's too."""
        async with reachable():
            fields: Any = await self._redis.hgetall(keys.UPLOAD + found) if UPLOAD_ID.fullmatch(found) else {}
        if not fields or fields["tenant"] != tenant:
            raise NotFound("there is no such upload")
        return _from_hash(found, fields)

    async def delete(self, tenant: str, found: str) -> None:
        """Forget an upload; its object goes with the next sweep. Raises NotFound, and Conflict while a job needs it."""
        await self.get(tenant, found)
        async with reachable():
            outcome = await keys.FORGET_UPLOAD.call(self._redis, found, "asked")
        if outcome == "used":
            raise Conflict(f"a job that has not ended uses {found}; wait for it, or cancel it")

    async def list(self, tenant: str, *, limit: int = 20, cursor: str | None = None) -> UploadPage:
        """A page of uploads, newest first. Raises InvalidRequest for a cursor that no page gave."""
        most = f"({_position(cursor)}" if cursor else "+inf"
        async with reachable():
            found: list[Any] = await self._redis.zrange(
                keys.UPLOADS + tenant, most, "-inf", byscore=True, desc=True, offset=0, num=limit + 1, withscores=True
            )
            pipeline = self._redis.pipeline(transaction=False)
            for name, _ in found[:limit]:
                pipeline.hgetall(keys.UPLOAD + name)
            hashes = await pipeline.execute()
        uploads = [_from_hash(name, fields) for (name, _), fields in zip(found, hashes, strict=False) if fields]
        return UploadPage(uploads, str(int(found[limit - 1][1])) if len(found) > limit else None)


def _upload(found: str, flat: list[str]) -> Upload:
    return _from_hash(found, dict(zip(flat[::2], flat[1::2], strict=True)))


def _from_hash(found: str, fields: Mapping[str, str]) -> Upload:
    return Upload(
        id=found,
        key=fields["key"],
        width=int(fields["width"]),
        height=int(fields["height"]),
        bytes=int(fields["bytes"]),
        sha256=fields["sha256"],
        created_at=int(fields["created_us"]) / 1e6,
        expires_at=int(fields["expires_at"]) / 1e3,
    )


def _position(cursor: str) -> int:
    if not cursor.isdigit() or len(cursor) > 17:
        raise InvalidRequest("cursor must be the next_cursor of an earlier page")
    return int(cursor)
