"""The models of the catalog."""

from fastapi import APIRouter

from app.api.auth import needs
from app.api.deps import Deps
from app.api.schemas import ListResponse, ModelView
from app.core.api_keys import Scope
from app.core.catalog import ModelSpec
from app.core.tasks import tasks_of

router = APIRouter(tags=["models"])


@router.get("/v1/models")
@needs(Scope.READ)
async def list_models(deps: Deps) -> ListResponse[ModelView]:
    """All models, with what each accepts and defaults to."""
    served, default = await deps.served(), deps.catalog.default.name
    data = [_view(m, is_default=m.name == default, is_served=m.name in served) for m in deps.catalog.models.values()]
    return ListResponse(data=data)


def _view(spec: ModelSpec, *, is_default: bool, is_served: bool) -> ModelView:
    return ModelView(
        id=spec.name,
        created=spec.created,
        owned_by=spec.owned_by,
        title=spec.title or spec.name,
        default=is_default,
        served=is_served,
        limits=spec.limits,
        defaults=spec.defaults,
        schedulers=list(spec.schedulers),
        loras=list(spec.loras),
        tasks=tasks_of(spec),
        controls=list(spec.controlnets),
        examples=list(spec.examples),
    )
