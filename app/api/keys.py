"""API keys, for admins: made, listed, revoked."""

import time
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Path

from app.api.auth import needs
from app.api.deps import Deps
from app.api.problems import responses
from app.api.schemas import KeyMade, KeyRequest, KeyView, ListResponse
from app.core import api_keys
from app.core.api_keys import ApiKey, Scope

router = APIRouter(tags=["keys"])
KeyId = Annotated[str, Path(json_schema_extra={"pattern": "^[0-9A-Za-z]{8}$"}, examples=["00000000"])]


@router.post("/v1/keys", status_code=201, responses=responses(408, 413, 422))
@needs(Scope.ADMIN)
async def create_key(body: KeyRequest, deps: Deps) -> KeyMade:
    """Make a key. `secret` is the key itself: it is shown here, once, and kept nowhere."""
    expires_at = time.time() + body.expires_days * 86400 if body.expires_days else None
    key, secret = api_keys.draw(body.name, body.tenant, body.scopes, expires_at)
    await deps.keys.create(key)
    return KeyMade(**_view(key, None).model_dump(), secret=secret)


@router.get("/v1/keys")
@needs(Scope.ADMIN)
async def list_keys(deps: Deps) -> ListResponse[KeyView]:
    """All tenants' keys, oldest first; those that were revoked too."""
    return ListResponse(data=[_view(key, used) for key, used in await deps.keys.overview()])


@router.delete("/v1/keys/{key_id}", status_code=204, responses=responses(404))
@needs(Scope.ADMIN)
async def revoke_key(key_id: KeyId, deps: Deps) -> None:
    """Make a key useless, within a second; it stays in the list."""
    await deps.keys.revoke(key_id)


def _view(key: ApiKey, used: float | None) -> KeyView:
    return KeyView(
        id=key.id,
        name=key.name,
        tenant=key.tenant,
        scopes=list(key.scopes),
        created_at=datetime.fromtimestamp(key.created_at, UTC),
        expires_at=datetime.fromtimestamp(key.expires_at, UTC) if key.expires_at else None,
        revoked_at=datetime.fromtimestamp(key.revoked_at, UTC) if key.revoked_at else None,
        last_used_at=datetime.fromtimestamp(used, UTC) if used else None,
    )
