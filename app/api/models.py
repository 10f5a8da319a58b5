"""The models of the catalog."""

from typing import get_args

from fastapi import APIRouter

from app.api.auth import needs
from app.api.deps import Deps, Services
from app.api.problems import responses
from app.api.schemas import ListResponse, ModelView
from app.core.api_keys import Scope
from app.core.catalog import ModelSpec, Quality
from app.core.tasks import tasks_of

router = APIRouter(tags=["models"])


@router.get("/v1/models")
@needs(Scope.READ)
async def list_models(deps: Deps) -> ListResponse[ModelView]:
    """All models, with what each accepts and defaults to."""
    served, warm = await deps.served(), await deps.warm()
    return ListResponse(data=[_view(spec, deps, served, warm) for spec in deps.catalog.models.values()])


@router.get("/v1/models/{model:path}", responses=responses(404))
@needs(Scope.READ)
async def get_model(model: str, deps: Deps) -> ModelView:
    """One model, by its name or an alias."""
    return _view(deps.catalog.get(model), deps, await deps.served(), await deps.warm())


def _view(spec: ModelSpec, deps: Services, served: set[str], warm: set[str]) -> ModelView:
    return ModelView(
        id=spec.name,
        created=spec.created,
        owned_by=spec.owned_by,
        title=spec.title or spec.name,
        default=spec.name == deps.catalog.default.name,
        aliases=list(spec.aliases),
        served=spec.name in served,
        warm=spec.name in warm,
        limits=spec.limits,
        defaults=spec.defaults,
        schedulers=list(spec.schedulers),
        loras=[name for name in spec.loras if name not in deps.catalog.unfit.get(spec.name, {})],
        tasks=tasks_of(spec),
        controls=list(spec.controlnets),
        accepts=list(spec.accepts),
        quality={quality: spec.steps_of(quality) for quality in get_args(Quality)},
        examples=list(spec.examples),
    )
