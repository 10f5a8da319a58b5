"""The workers that live, for the operator."""

from datetime import UTC, datetime

from fastapi import APIRouter

from app.api.auth import needs
from app.api.deps import Deps
from app.api.schemas import ListResponse, WorkerView
from app.core import processes
from app.core.api_keys import Scope
from app.core.processes import Process

router = APIRouter(tags=["operation"])


@router.get("/v1/workers")
@needs(Scope.ADMIN)
async def list_workers(deps: Deps) -> ListResponse[WorkerView]:
    """All live workers, their models and their load; needs an admin key."""
    return ListResponse(data=[_view(p) for p in await processes.live(deps.redis) if p.kind == "worker"])


def _view(process: Process) -> WorkerView:
    return WorkerView(
        id=process.name,
        models=list(process.models),
        warm=list(process.warm),
        device=process.device,
        version=process.version,
        runs=process.runs,
        max_runs=process.max_runs,
        metrics=process.metrics,
        started_at=datetime.fromtimestamp(process.started_at, UTC),
    )
