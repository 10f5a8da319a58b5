"""Webhooks: registered endpoints, the secret that signs, and what became of each delivery."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query

from app.api.auth import Caller, Identity, needs
from app.api.deps import Deps
from app.api.problems import responses
from app.api.schemas import (
    AttemptView,
    DeliveryFilter,
    DeliveryView,
    EndpointChange,
    EndpointRequest,
    EndpointView,
    ListResponse,
    RotateRequest,
    SecretView,
    TenantQuery,
)
from app.core import webhooks
from app.core.api_keys import Scope
from app.core.endpoints import Endpoint, Health
from app.core.errors import Forbidden
from app.core.tenants import WebhookSecret
from app.core.webhooks import Record

router = APIRouter(tags=["webhooks"])
EndpointId = Annotated[str, Path(json_schema_extra={"pattern": "^whe_[0-9a-f]{20}$"}, examples=["whe_" + "0" * 20])]
DeliveryId = Annotated[
    str, Path(json_schema_extra={"pattern": "^msg_[0-9a-z_]{1,80}$"}, examples=["msg_" + "0" * 26 + "_succeeded"])
]


@router.post("/v1/webhook-endpoints", status_code=201, responses=responses(408, 409, 413, 422))
@needs(Scope.SUBMIT)
async def create_endpoint(body: EndpointRequest, caller: Caller, deps: Deps) -> EndpointView:
    """Have the events of all your jobs from now on sent to a URL."""
    deps.guard.check_url(body.url)
    endpoint = await deps.endpoints.add(caller.tenant, body.url, body.events, body.description)
    return _endpoint(endpoint, Health())


@router.get("/v1/webhook-endpoints")
@needs(Scope.READ)
async def list_endpoints(caller: Caller, deps: Deps) -> ListResponse[EndpointView]:
    """Your endpoints, oldest first, and how they are doing."""
    return ListResponse(data=[_endpoint(*found) for found in await deps.endpoints.list(caller.tenant)])


@router.get("/v1/webhook-endpoints/{endpoint_id}", responses=responses(404))
@needs(Scope.READ)
async def get_endpoint(endpoint_id: EndpointId, caller: Caller, deps: Deps) -> EndpointView:
    """An endpoint, and how it is doing."""
    return _endpoint(*await deps.endpoints.get(caller.tenant, endpoint_id))


@router.patch("/v1/webhook-endpoints/{endpoint_id}", responses=responses(404, 408, 413, 422))
@needs(Scope.SUBMIT)
async def change_endpoint(endpoint_id: EndpointId, body: EndpointChange, caller: Caller, deps: Deps) -> EndpointView:
    """Change what is given; what waits goes to the new URL. `enabled: true` forgives an endpoint that we disabled."""
    changes = body.model_dump(exclude_none=True, exclude={"enabled"})
    if body.url is not None:
        deps.guard.check_url(body.url)
    await deps.endpoints.change(caller.tenant, endpoint_id, changes)
    if body.enabled is not None:
        await (deps.endpoints.enable(endpoint_id) if body.enabled else deps.endpoints.pause(endpoint_id))
    return _endpoint(*await deps.endpoints.get(caller.tenant, endpoint_id))


@router.delete("/v1/webhook-endpoints/{endpoint_id}", status_code=204, responses=responses(404))
@needs(Scope.SUBMIT)
async def delete_endpoint(endpoint_id: EndpointId, caller: Caller, deps: Deps) -> None:
    """Forget an endpoint; what is still on its way to it is given up."""
    await deps.endpoints.remove(caller.tenant, endpoint_id)


@router.post("/v1/webhook-endpoints/{endpoint_id}/test", status_code=202, responses=responses(404))
@needs(Scope.SUBMIT)
async def test_endpoint(endpoint_id: EndpointId, caller: Caller, deps: Deps) -> DeliveryView:
    """Send an `endpoint.test` to it, once, also while it is disabled; ask for the delivery to see what came of it."""
    delivery = await deps.endpoints.test(caller.tenant, endpoint_id)
    return _delivery(await webhooks.get(deps.redis, caller.tenant, delivery))


@router.get("/v1/webhook-deliveries", responses=responses(422))
@needs(Scope.READ)
async def list_deliveries(
    caller: Caller, deps: Deps, which: Annotated[DeliveryFilter, Query()]
) -> ListResponse[DeliveryView]:
    """What was sent to you, or will be, newest first; kept as long as a finished job."""
    if about := which.job or which.batch:
        page = await webhooks.of(deps.redis, caller.tenant, about)
    else:
        page = await webhooks.latest(deps.redis, caller.tenant, which.limit, which.cursor)
    return ListResponse(data=[_delivery(record) for record in page.records], next_cursor=page.next_cursor)


@router.get("/v1/webhook-deliveries/{delivery_id}", responses=responses(404))
@needs(Scope.READ)
async def get_delivery(delivery_id: DeliveryId, caller: Caller, deps: Deps) -> DeliveryView:
    """A delivery and its attempts."""
    return _delivery(await webhooks.get(deps.redis, caller.tenant, delivery_id))


@router.post("/v1/webhook-deliveries/{delivery_id}/redeliver", status_code=202, responses=responses(404, 409))
@needs(Scope.SUBMIT)
async def redeliver(delivery_id: DeliveryId, caller: Caller, deps: Deps) -> DeliveryView:
    """Send it once more, under the same webhook-id, with all its attempts before it."""
    await webhooks.redeliver(deps.redis, caller.tenant, delivery_id)
    return _delivery(await webhooks.get(deps.redis, caller.tenant, delivery_id))


@router.get("/v1/webhook-secret", responses=responses(422))
@needs(Scope.SUBMIT)
async def get_webhook_secret(caller: Caller, deps: Deps, which: Annotated[TenantQuery, Query()]) -> SecretView:
    """The secret that signs your webhooks; an admin may ask for another tenant's."""
    return _secret(await deps.secrets.of(_tenant(caller, which)))


@router.post("/v1/webhook-secret/rotate", responses=responses(408, 409, 413, 422))
@needs(Scope.SUBMIT)
async def rotate_webhook_secret(
    body: RotateRequest, caller: Caller, deps: Deps, which: Annotated[TenantQuery, Query()]
) -> SecretView:
    """Draw a new secret. Until the overlap ends webhooks carry two signatures: by it and by the one before."""
    return _secret(await deps.secrets.rotate(_tenant(caller, which), body.overlap_seconds))


def _tenant(caller: Identity, which: TenantQuery) -> str:
    if which.tenant is not None and which.tenant != caller.tenant and not caller.is_admin:
        raise Forbidden("this needs a key with the scope admin")
    return which.tenant or caller.tenant


def _time(seconds: float | None) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds is not None else None


def _endpoint(endpoint: Endpoint, health: Health) -> EndpointView:
    return EndpointView(
        id=endpoint.id,
        url=endpoint.url,
        events=endpoint.events,
        description=endpoint.description,
        enabled=health.disabled is None,
        disabled_reason=health.disabled,
        disabled_at=_time(health.disabled_at),
        failures=health.failures,
        failing_since=_time(health.failing_since),
        created_at=datetime.fromtimestamp(endpoint.created_at, UTC),
    )


def _delivery(record: Record) -> DeliveryView:
    return DeliveryView(
        id=record.id,
        type=record.type,
        url=record.url,
        endpoint=record.endpoint,
        job=record.job_id,
        batch=record.batch_id,
        status=record.outcome or "pending",
        created_at=datetime.fromtimestamp(record.created_at, UTC),
        ended_at=_time(record.ended_at),
        next_attempt_at=_time(record.next_attempt_at),
        attempts=[
            AttemptView(
                at=datetime.fromtimestamp(a.at, UTC), outcome=a.outcome, response_status=a.status, seconds=a.seconds
            )
            for a in record.log
        ],
    )


def _secret(secret: WebhookSecret) -> SecretView:
    return SecretView(secret=secret.current, previous_secret=secret.previous, previous_valid_until=_time(secret.until))
