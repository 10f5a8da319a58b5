"""What a tenant has used."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query

from app.api.auth import Caller, needs
from app.api.deps import Deps
from app.api.problems import responses
from app.api.schemas import UsageDay, UsageQuery, UsageView
from app.core import tenants
from app.core.api_keys import Scope

router = APIRouter(tags=["keys"])


@router.get("/v1/usage", responses=responses(422))
@needs(Scope.READ)
async def get_usage(caller: Caller, deps: Deps, which: Annotated[UsageQuery, Query()]) -> UsageView:
    """Images and denoiser seconds of your jobs that ended by themselves, in all and by the day (UTC)."""
    days = await tenants.usage(deps.redis, caller.tenant, which.days)
    return UsageView(
        tenant=caller.tenant,
        since=datetime.now(UTC).date() - timedelta(days=which.days - 1),
        images=sum(day.images for day in days),
        denoiser_seconds=round(sum(day.denoiser_seconds for day in days), 3),
        days=[UsageDay(date=d.date, images=d.images, denoiser_seconds=d.denoiser_seconds) for d in days],
    )
