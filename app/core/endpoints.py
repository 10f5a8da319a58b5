"""Webhook endpoints: receivers that a tenant registers once, for all its jobs, and how they are doing."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from pydantic import BaseModel
from redis.asyncio import Redis

from app.core import redis_keys as keys
from app.core.errors import Conflict, NotFound
from app.core.job import EndpointEvent

MAX_ENDPOINTS: Final = 16  # of a tenant: each gets a copy of an event in the step that changes a job's status


class Disabled(StrEnum):
    """Why an endpoint gets nothing: its owner wants it so, it answered 410, or it failed for days."""

    PAUSED = "paused"
    GONE = "gone"
    FAILING = "failing"


class Endpoint(BaseModel):
    """What its owner says of an endpoint; kept as JSON, which `prelude.lua` reads too."""

    id: str
    url: str
    events: list[EndpointEvent]
    description: str = ""
    created_at: float  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class Health:
    """How an endpoint is doing. Times are seconds since the epoch."""

    disabled: Disabled | None = None
    disabled_at: float | None = None
    failures: int = 0  # attempts in a row
    failing_since: float | None = None


class Endpoints:
    """The endpoints of all tenants."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def add(self, tenant: str, url: str, events: list[EndpointEvent], description: str) -> Endpoint:
        """Register one. Raises Conflict where there are too many."""
        endpoint = Endpoint(
            id=f"whe_{secrets.token_hex(10)}", url=url, events=events, description=description, created_at=time.time()
        )
        if not await keys.PUT_ENDPOINT.call(
            self._redis, tenant, endpoint.id, "", endpoint.model_dump_json(), MAX_ENDPOINTS
        ):
            raise Conflict(f"there are {MAX_ENDPOINTS} webhook endpoints, and no more are taken; delete one first")
        return endpoint

    async def get(self, tenant: str, endpoint_id: str) -> tuple[Endpoint, Health]:
        """One of the tenant's. Raises NotFound."""
        text: Any = await self._redis.hget(keys.ENDPOINTS + tenant, endpoint_id)
        if text is None:
            raise NotFound("there is no such webhook endpoint")
        health: Any = await self._redis.hgetall(keys.HEALTH + endpoint_id)
        return Endpoint.model_validate_json(text), _health(health)

    async def list(self, tenant: str) -> "Found":
        """All of the tenant's, oldest first."""
        texts: Any = await self._redis.hvals(keys.ENDPOINTS + tenant)
        known = sorted(map(Endpoint.model_validate_json, texts), key=lambda endpoint: endpoint.created_at)
        pipeline = self._redis.pipeline(transaction=False)
        for endpoint in known:
            pipeline.hgetall(keys.HEALTH + endpoint.id)
        return [(endpoint, _health(kept)) for endpoint, kept in zip(known, await pipeline.execute(), strict=True)]

    async def change(self, tenant: str, endpoint_id: str, changes: Mapping[str, Any]) -> None:
        """Change what its owner says of it. Raises NotFound."""
        is_changed = False
        while not is_changed:  # somebody else may change it as well
            text: Any = await self._redis.hget(keys.ENDPOINTS + tenant, endpoint_id)
            if text is None:
                raise NotFound("there is no such webhook endpoint")
            changed = Endpoint.model_validate_json(text).model_copy(update=changes).model_dump_json()
            is_changed = await keys.PUT_ENDPOINT.call(self._redis, tenant, endpoint_id, text, changed, MAX_ENDPOINTS)

    async def enable(self, endpoint_id: str) -> None:
        """Let it have events again, whatever it did before."""
        await self._redis.delete(keys.HEALTH + endpoint_id)

    async def pause(self, endpoint_id: str) -> None:
        """Let it have no events until it is enabled."""
        fields: dict[Any, Any] = {"disabled": Disabled.PAUSED.value, "disabled_at": int(time.time() * 1000)}
        await self._redis.hset(keys.HEALTH + endpoint_id, mapping=fields)

    async def remove(self, tenant: str, endpoint_id: str) -> None:
        """Forget it; what is on its way to it is given up. Raises NotFound."""
        if not await self._redis.hdel(keys.ENDPOINTS + tenant, endpoint_id):
            raise NotFound("there is no such webhook endpoint")
        await self._redis.delete(keys.HEALTH + endpoint_id)

    async def test(self, tenant: str, endpoint_id: str) -> str:
        """Put a test for it into the outbox; the delivery's id. Raises NotFound."""
        delivery = f"msg_test_{secrets.token_hex(10)}"
        if not await keys.TEST_ENDPOINT.call(self._redis, tenant, endpoint_id, delivery):
            raise NotFound("there is no such webhook endpoint")
        return delivery


Found = list[tuple[Endpoint, Health]]


def _health(kept: Mapping[str, str]) -> Health:
    def seconds(name: str) -> float | None:
        return int(kept[name]) / 1e3 if name in kept else None

    return Health(
        disabled=Disabled(kept["disabled"]) if "disabled" in kept else None,
        disabled_at=seconds("disabled_at"),
        failures=int(kept.get("failures", 0)),
        failing_since=seconds("failing_since"),
    )
