"""Limits: what holds for a tenant, and, for admins, changing it."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Path

from app.api.auth import Caller, needs
from app.api.deps import Deps, Services
from app.api.problems import responses
from app.api.schemas import LimitsChange, LimitsView
from app.core import redis_keys as keys
from app.core.api_keys import TENANT_FORM, Scope
from app.core.job import JobStatus
from app.core.limits import change_limits, merged, own_limits

router = APIRouter(tags=["keys"])
Tenant = Annotated[str, Path(pattern=TENANT_FORM, examples=["default"])]


@router.get("/v1/limits")
@needs(Scope.READ)
async def get_limits(caller: Caller, deps: Deps) -> LimitsView:
    """What holds for you, and how much of it is in use."""
    return await _view(deps, caller.tenant, await own_limits(deps.redis, caller.tenant))


@router.get("/v1/tenants/{tenant}/limits", responses=responses(422))
@needs(Scope.ADMIN)
async def get_tenant_limits(tenant: Tenant, deps: Deps) -> LimitsView:
    """What holds for a tenant; needs an admin key."""
    return await _view(deps, tenant, await own_limits(deps.redis, tenant))


@router.patch("/v1/tenants/{tenant}/limits", responses=responses(408, 413, 422))
@needs(Scope.ADMIN)
async def change_tenant_limits(tenant: Tenant, body: LimitsChange, deps: Deps) -> LimitsView:
    """Change a tenant's limits; they hold at once. Needs an admin key."""
    return await _view(deps, tenant, await change_limits(deps.redis, tenant, body.model_dump(exclude_unset=True)))


async def _view(deps: Services, tenant: str, own: dict[str, float]) -> LimitsView:
    running = await deps.redis.zcard(f"{keys.JOBS}{tenant}:{JobStatus.PROCESSING}")
    waiting = await deps.redis.zcard(f"{keys.JOBS}{tenant}:{JobStatus.QUEUED}")
    held = asdict(merged(own, deps.limits))
    return LimitsView(tenant=tenant, own=sorted(own), running=running, waiting=waiting, **held)
