"""Who calls: a bearer key, or nobody in particular where the service is open on loopback; and what he may do."""

import hmac
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from redis import Redis
from starlette.datastructures import URL

from app.api.deps import Deps, Services
from app.core import api_keys
from app.core.api_keys import DEFAULT_TENANT, Scope
from app.core.errors import ConfigError, Forbidden, Unauthorized
from app.core.settings import Settings

_bearer = HTTPBearer(auto_error=False, description="A key of `safelight keys create`, or SAFELIGHT_API_KEY.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
Route = TypeVar("Route", bound=Callable[..., Any])
_NEEDS: Final = "__safelight_needs__"  # what a route's function is marked with


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose jobs a request may touch, and what it may do with them; `key_id` is None without a key of the ring."""

    tenant: str
    scopes: frozenset[Scope]
    key_id: str | None = None

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or self.is_admin

    @property
    def is_admin(self) -> bool:
        return Scope.ADMIN in self.scopes


ANYTHING: Final = Identity(DEFAULT_TENANT, frozenset(Scope))


def needs(scope: Scope) -> Callable[[Route], Route]:
    """Marks a route with the scope it asks for. A route without a mark is for admins: nobody opens one by oversight."""

    def mark(route: Route) -> Route:
        vars(route)[_NEEDS] = scope
        return route

    return mark


def needed(endpoint: Callable[..., Any]) -> Scope:
    """The scope that a route asks for."""
    found: Scope = vars(endpoint).get(_NEEDS, Scope.ADMIN)
    return found


async def authenticate(request: Request, deps: Deps, given: Credentials) -> Identity:
    """Raises Unauthorized without a good key, and Forbidden for one that may not do this.

    Also Forbidden where the service is open but called by a name not its own, or from a page of another site.
    """
    caller = await _identify(request, deps, given)
    scope = needed(request.scope["endpoint"])
    if not caller.may(scope):
        raise Forbidden(f"this needs a key with the scope {scope}; yours has {', '.join(sorted(caller.scopes))}")
    return caller


Caller = Annotated[Identity, Depends(authenticate)]


async def _identify(request: Request, deps: Services, given: HTTPAuthorizationCredentials | None) -> Identity:
    if given and _is_bootstrap(deps.settings, given.credentials):
        return ANYTHING
    if await _is_open(deps):
        _check_host(request)
        _check_origin(request, deps.settings)
        return ANYTHING
    if given and (key := await deps.keys.find(given.credentials)):
        return Identity(key.tenant, frozenset(key.scopes), key.id)
    raise Unauthorized("send a good key, as in Authorization: Bearer KEY")


async def is_still_good(deps: Services, caller: Identity) -> bool:
    """Whether the key behind a long reply has been neither revoked nor expired since it began."""
    return caller.key_id is None or await deps.keys.is_good(caller.key_id)


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


def _check_origin(request: Request, settings: Settings) -> None:
    # A page of any site may have the browser on this machine post a form here, unasked; it then says whose page it is.
    origin = request.headers.get("origin")
    if origin is None or origin in settings.cors_origins or "*" in settings.cors_origins:
        return
    if not _is_loopback(origin.partition("://")[2]):
        raise Forbidden("without keys this service takes nothing from pages of other sites: see SAFELIGHT_CORS_ORIGINS")


def _is_loopback(host: str) -> bool:
    try:
        name = URL(f"http://{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
