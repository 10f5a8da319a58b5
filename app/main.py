"""The API's bootstrap: settings -> clients -> routes -> server. Nothing else builds clients for the API."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, suppress
from importlib.metadata import version
from typing import Any, Final

import structlog
import uvicorn
from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from redis.exceptions import RedisError

from app.api import batches, events, files, jobs, keys, limits, models, ops, uploads, usage, webhooks, workers
from app.api.auth import authenticate, check_exposure
from app.api.compat.openai import routes as openai
from app.api.compat.openai.errors import refusal
from app.api.deps import PLACES, Services
from app.api.middleware import BodyLimit, RequestContext
from app.api.problems import add_to, install, responses
from app.api.streams import Streams
from app.core import failpoints
from app.core.addresses import AddressGuard
from app.core.api_keys import KeyRing
from app.core.batches import Batches
from app.core.catalog import Catalog, load_catalog
from app.core.chores import stop
from app.core.connections import check_server, connect, connect_async
from app.core.endpoints import Endpoints
from app.core.errors import ConfigError, QueueUnavailable
from app.core.events import Hub
from app.core.forecast import Forecast
from app.core.image_inputs import ImageInputs
from app.core.image_process import ImageProcesses
from app.core.job import JobStatus
from app.core.limits import defaults
from app.core.lora_check import check_adapters
from app.core.metrics import ApiMetrics, api_metrics
from app.core.queue import JobQueue
from app.core.settings import Settings, redis_url, url_secret
from app.core.storage import DiskStorage, Storage, open_storage
from app.core.tenants import open_secrets
from app.core.uploads import Uploads

log = structlog.get_logger()

DEADLINE_SECONDS: Final = 0.5  # between two looks at what is past its deadline
GRACE_SECONDS: Final = 10  # for replies in the making when the server stops; streams and waits end at once
LOOK_SECONDS: Final = 0.25
STALLED_LOOKS: Final = 6  # without a byte taken, once the server stops
ASKED_HEADERS: Final = ["Authorization", "Idempotency-Key", "Last-Event-ID", "Prefer", "X-Request-ID"]
RATE_HEADERS: Final = ["X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"]
SHOWN_HEADERS: Final = [
    *RATE_HEADERS,
    *("Location", "Idempotent-Replayed", "Preference-Applied", "Retry-After", "X-Request-ID"),
]


def create_app(settings: Settings, catalog: Catalog | None = None) -> FastAPI:
    """The API as an ASGI application; it connects when it starts and closes when it stops. Raises ConfigError."""
    metrics, catalog = api_metrics(), catalog or load_catalog(settings.models)
    check_adapters(catalog)
    storage = open_storage(settings.storage, public_url=settings.base_url, secret=url_secret(settings).encode())
    app = FastAPI(
        title="Safelight",
        version=version("safelight"),
        summary="Pictures from diffusion models, as durable jobs.",
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=_lifespan(settings, catalog, metrics, storage),
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
    )
    install(app)
    _add_middleware(app, settings, metrics)
    _add_routes(app, storage)
    _describe_problems(app)
    return app


def _lifespan(
    settings: Settings, catalog: Catalog, metrics: ApiMetrics, storage: Storage
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        redis = connect_async(redis_url(settings))
        hub = Hub(redis)
        forecast, base = Forecast(redis), defaults(settings)
        queue = JobQueue(
            redis, retention_ms=settings.retention_ms, forecast=forecast, limits=base, max_wait=settings.max_wait
        )
        uploads = Uploads(redis, storage, retention_ms=int(settings.upload_retention * 1000))
        processes = ImageProcesses()
        guard = AddressGuard(settings.image_allow)
        app.state.services = Services(
            settings=settings,
            catalog=catalog,
            metrics=metrics,
            redis=redis,
            queue=queue,
            forecast=forecast,
            limits=base,
            streams=Streams(redis, base),
            storage=storage,
            hub=hub,
            keys=KeyRing(redis),
            guard=AddressGuard(settings.webhook_allow),
            uploads=uploads,
            inputs=ImageInputs(queue, storage, uploads, processes, guard),
            batches=Batches(redis, queue, retention_ms=settings.retention_ms, jobs_total=metrics.jobs_total),
            endpoints=Endpoints(redis),
            secrets=open_secrets(settings, redis),
            places=asyncio.Semaphore(PLACES),
        )
        await hub.start()
        chores = [
            asyncio.create_task(_keep_deadlines(app.state.services)),
            asyncio.create_task(app.state.services.batches.run()),
        ]
        try:
            yield
        finally:
            await stop(*chores)
            await hub.stop()
            await processes.close()
            await redis.aclose()

    return lifespan


async def _keep_deadlines(services: Services) -> None:
    """End the jobs whose deadline has passed; each API process does, so that it happens while any of them lives."""
    while True:
        with suppress(QueueUnavailable):
            for model in await services.queue.expire():
                services.metrics.jobs_total.labels(model, JobStatus.EXPIRED).inc()
        await asyncio.sleep(DEADLINE_SECONDS)


def _operation_id(route: APIRoute) -> str:
    return route.name


def _add_middleware(app: FastAPI, settings: Settings, metrics: ApiMetrics) -> None:
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, shapes={"/v1/images/": lambda error: refusal(error).reply()})
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=ASKED_HEADERS,
            expose_headers=SHOWN_HEADERS,
        )
    app.add_middleware(RequestContext, metrics=metrics)


def _add_routes(app: FastAPI, storage: Storage) -> None:
    guarded = (jobs, batches, uploads, events, webhooks, keys, limits, usage, models, workers, ops)
    for router in (module.router for module in guarded):
        # Not left to the routes: one that forgot to ask who calls would be open.
        app.include_router(router, dependencies=[Depends(authenticate)], responses=responses(401, 403, 503))
    # Its errors have a shape of their own.
    app.include_router(openai.router, dependencies=[Depends(authenticate)])
    app.include_router(ops.public)
    if isinstance(storage, DiskStorage):
        app.include_router(files.router)


def _describe_problems(app: FastAPI) -> None:
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        document = describe()
        add_to(document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend the document


class Server(uvicorn.Server):
    """A uvicorn that ends streams and waits when it begins to stop, for it lets no connection go before its reply."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                # h11 bounds a request's head; the faster parser does not.
                http="h11",
                h11_max_incomplete_event_size=32 * 1024,
                lifespan="on",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # links begin with SAFELIGHT_PUBLIC_URL, whatever a proxy says
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.services.drain()
        cutting = asyncio.create_task(self._cut_stalled())
        await super().shutdown(sockets)
        cutting.cancel()

    async def _cut_stalled(self) -> None:
        """Abort the connections of callers who take nothing of what was written: their replies never end."""
        sizes: dict[Any, tuple[int, int]] = {}  # bytes that wait to be taken, and in how many looks they were as many
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for connection in list(self.server_state.connections):
                waiting = connection.transport.get_write_buffer_size()
                before, looks = sizes.get(connection, (0, 0))
                sizes[connection] = waiting, looks + 1 if waiting == before else 0
                if waiting and sizes[connection][1] >= STALLED_LOOKS:
                    connection.transport.abort()


def serve(settings: Settings) -> None:
    """Serve the API until SIGINT or SIGTERM; port 0 takes a free one. Raises ConfigError, QueueUnavailable."""
    failpoints.arm(settings.failpoints)
    _check_exposure(settings)
    with listen(settings.host, settings.port) as listener:
        bound = settings.model_copy(update={"port": listener.getsockname()[1]})
        server = Server(create_app(bound))
        # uvicorn raises the signal again once it has stopped: with these it returns, and the process exits with 0.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.handle_exit)
        log.info("api.listening", host=bound.host, port=bound.port, url=bound.base_url)
        if bound.is_unspecified and not bound.public_url:
            remedy = "set SAFELIGHT_PUBLIC_URL to the URL that callers use"
            log.warning("public_url.missing", links_begin_with=bound.base_url, remedy=remedy)
        server.run(sockets=[listener])


def _check_exposure(settings: Settings) -> None:
    with closing(connect(redis_url(settings))) as redis:
        try:
            check_server(redis)
            check_exposure(settings, redis)
        except RedisError as error:
            if not (settings.is_loopback or settings.api_key):
                raise QueueUnavailable("Redis cannot be reached, so nobody knows whether there are API keys") from error
            log.warning("redis.away", error=type(error).__name__, meanwhile="everything but /livez answers 503")


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that links can name a port that the system chose. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, since asyncio sends small replies at once (TCP_NODELAY) only then.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; set SAFELIGHT_HOST and SAFELIGHT_PORT"
        ) from error
    return listener
