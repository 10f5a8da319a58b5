"""Who calls: a bearer key, or nobody in particular where the service is open on loopback."""

import hmac
import ipaddress
from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from redis import Redis
from starlette.datastructures import URL

from app.api.deps import Deps, Services
from app.core import api_keys
from app.core.errors import ConfigError, Forbidden, Unauthorized
from app.core.settings import Settings

TENANT: Final = "default"
_bearer = HTTPBearer(auto_error=False, description="A key of `safelight keys create`, or SAFELIGHT_API_KEY.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose jobs a request may touch, and whether it may look at the service itself."""

    tenant: str
    is_admin: bool


async def authenticate(request: Request, deps: Deps, given: Credentials) -> Identity:
    """Raises Unauthorized without a good key; Forbidden where the service is open but called by a name not its own."""
    if given and _is_bootstrap(deps.settings, given.credentials):
        return Identity(TENANT, is_admin=True)
    if await _is_open(deps):
        _check_host(request)
        return Identity(TENANT, is_admin=True)
    if given and await deps.keys.find(given.credentials):
        return Identity(TENANT, is_admin=False)
    raise Unauthorized("send a good key, as in Authorization: Bearer KEY")


Caller = Annotated[Identity, Depends(authenticate)]


async def require_admin(caller: Caller) -> None:
    """Raises Forbidden."""
    if not caller.is_admin:
        raise Forbidden("this needs the admin key, SAFELIGHT_API_KEY")


def check_exposure(settings: Settings, redis: Redis) -> None:
    """Raises ConfigError where the service would listen beyond this machine while no key guards it."""
    if settings.is_loopback or settings.api_key or api_keys.has_keys(redis):
        return
    raise ConfigError(
        f"SAFELIGHT_HOST={settings.host} is not loopback and there is no API key; "
        "set SAFELIGHT_API_KEY, run `safelight keys create --name NAME`, or listen on 127.0.0.1"
    )


def _is_bootstrap(settings: Settings, secret: str) -> bool:
    if not settings.api_key:
        return False
    return hmac.compare_digest(settings.api_key.get_secret_value().encode(), secret.encode())


async def _is_open(deps: Services) -> bool:
    settings = deps.settings
    return settings.is_loopback and not settings.api_key and await deps.keys.is_empty()


def _check_host(request: Request) -> None:
    # A page of another site whose name was made to resolve to 127.0.0.1 (DNS rebinding) sends that name.
    host = request.headers.get("host", "")
    if not _is_loopback(host):
        raise Forbidden("without keys this service answers to localhost only; make a key to use another name")


def _is_loopback(host: str) -> bool:
    try:
        name = URL(f"http://{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
