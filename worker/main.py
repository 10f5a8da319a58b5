"""The worker's bootstrap: settings -> pipeline -> engine -> consumer; warm up; run."""

import os
import resource
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version

import structlog
import torch
from redis import Redis
from redis.exceptions import RedisError
from rq import Queue
from rq.serializers import JSONSerializer
from rq.worker.base import WorkerStatus

from app.core import failpoints, logs, processes
from app.core.catalog import Catalog, ModelSpec, load_catalog
from app.core.connections import TIMEOUT, check_server, connect
from app.core.errors import ConfigError
from app.core.exposition import serve_metrics
from app.core.metrics import WorkerMetrics
from app.core.redis_keys import lanes, queue_name
from app.core.settings import Settings, load_settings, redis_url, url_secret
from app.core.storage import open_storage
from worker.budget import device_budget, host_budget
from worker.consumer import Consumer
from worker.engine.calibrate import slowest
from worker.engine.engine import Engine
from worker.engine.target import Target
from worker.finisher import Finisher
from worker.heart import Heart, Pulse
from worker.intake import Intake, Room
from worker.leases import Leases
from worker.pace import Pacer
from worker.pipelines.load import WarmModel, load, pick_device, size
from worker.reaper import Reaper
from worker.sources import Sources
from worker.spool import Spool
from worker.turns import Turns
from worker.viewers import Viewers
from worker.warm import Keeper, Memory
from worker.witness import Witness

log = structlog.get_logger()
CONFIG_EXIT = 2  # tells the supervisor that starting again will not help
BROKEN_EXIT = 70  # tells it that it will: EX_SOFTWARE


class ForwardMetrics:
    """The engine's observer: every forward, by model."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics
        self._denoisers: dict[str, str] = {}
        self.busy_seconds: dict[str, float] = {}

    def attach(self, targets: Mapping[str, Target]) -> None:
        """A model came into memory."""
        found = {name: name.partition(":")[0] for name, target in targets.items() if target.is_denoiser}
        # New ones in place of the old: the thread that reads the gauges may be walking through those.
        self._denoisers = self._denoisers | found
        self.busy_seconds = dict.fromkeys(found.values(), 0.0) | self.busy_seconds

    def forward(self, module_name: str, rows: int, runs: int, seconds: float) -> None:
        self._metrics.forward_seconds_total.labels(*module_name.split(":", 1)).inc(seconds)
        if module_name not in self._denoisers:
            return
        model = self._denoisers[module_name]
        self.busy_seconds[model] += seconds
        self._metrics.step_duration_seconds.labels(model).observe(seconds)
        self._metrics.batch_rows.labels(model).observe(rows)
        self._metrics.batch_runs.labels(model).observe(runs)


class Announcer:
    """Says that this worker lives, to Safelight and to RQ's tools, and reads the slow gauges."""

    def __init__(
        self,
        redis: Redis,
        consumer: Consumer,
        process: processes.Process,
        metrics: WorkerMetrics,
        observer: ForwardMetrics,
    ) -> None:
        self._redis, self._consumer, self._process, self._metrics = redis, consumer, process, metrics
        self._observer = observer
        self._seen = (time.monotonic(), dict(observer.busy_seconds))

    def __call__(self) -> None:
        runs, keeper = self._consumer.room.images, self._consumer.keeper
        process = replace(self._process, runs=runs, models=keeper.served, warm=keeper.warm)
        processes.beat(self._redis, replace(process, paces=self._consumer.pacer.paces()))
        if not self._redis.exists(self._consumer.key):  # Redis was emptied: RQ's tools shall see us again
            self._consumer.register_birth()
            self._consumer.set_state(WorkerStatus.STARTED)
        self._consumer.heartbeat(timeout=60)
        self._gauge()

    def _gauge(self) -> None:
        now, (since, before) = time.monotonic(), self._seen
        for model, busy in self._observer.busy_seconds.items():
            share = (busy - before.get(model, 0.0)) / max(now - since, 1e-6)
            self._metrics.denoiser_busy_ratio.labels(model).set(min(share, 1.0))
        self._seen = (now, dict(self._observer.busy_seconds))
        memory = self._metrics.device_memory_bytes
        memory.labels("cpu", "peak").set(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        keeper = self._consumer.keeper
        memory.labels(keeper.device.type, "models").set(keeper.bytes)
        memory.labels(keeper.device.type, "models_limit").set(keeper.memory.device)
        if keeper.memory.host:
            memory.labels("cpu", "models").set(keeper.parked_bytes)
            memory.labels("cpu", "models_limit").set(keeper.memory.host)
        if torch.cuda.is_available():
            memory.labels("cuda", "allocated").set(torch.cuda.memory_allocated())
            memory.labels("cuda", "peak").set(torch.cuda.max_memory_allocated())


def main() -> None:
    """Run one worker until it is told to stop."""
    try:
        settings = load_settings()
        logs.configure(settings.log_format, "worker")
        run(settings)
    except ConfigError as error:
        print(f"safelight worker: {error.message}", file=sys.stderr)  # noqa: T201  # for the person who starts it
        sys.exit(CONFIG_EXIT)


def run(settings: Settings) -> None:
    """Serve the catalog's models until told to stop. Raises ConfigError."""
    torch.set_num_threads(settings.threads)
    device = settings.device
    work(settings, lambda spec: load(spec, device, spec.dtype), lambda spec: size(spec, device, spec.dtype))


def work(
    settings: Settings,
    load: Callable[[ModelSpec], WarmModel],
    size: Callable[[ModelSpec], int] = lambda _: 0,
) -> None:
    """Build everything, warm up, and work until told to stop. Raises ConfigError.

    `size` says how many bytes a model will take; 0: nobody knows until it was loaded.
    """
    threading.excepthook = _end
    failpoints.arm(settings.failpoints)
    url = redis_url(settings)
    storage = open_storage(settings.storage, public_url=settings.base_url, secret=url_secret(settings).encode())
    metrics = WorkerMetrics()
    observer = ForwardMetrics(metrics)
    engine = Engine({}, observer, max_batch=None if settings.max_batch == "auto" else settings.max_batch)
    device = pick_device(settings.device)
    memory = Memory(device_budget(settings.model_memory, device), host_budget(settings.host_memory, device))
    keeper = Keeper(served(settings), load, engine, metrics, device=device, memory=memory, size=size, observer=observer)
    keeper.start()

    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    rq_connection = connect(url, decode=False)
    _await_redis(rq_connection)
    queues = [queue_name(model) for model in keeper.places]
    rq_queues = [
        Queue(lane, connection=rq_connection, serializer=JSONSerializer) for queue in queues for lane in lanes(queue)
    ]
    limits = {"memory_bytes": settings.spool_memory, "disk_bytes": settings.spool_disk}
    spool = Spool(settings.data / "spool", **limits, metrics=metrics)
    room = Room(settings.max_runs, lambda: spool.has_room)
    pacer = Pacer(engine.batcher, keeper, max_images=room.common)
    consumer = Consumer(
        rq_queues,
        name=name,
        connection=rq_connection,
        serializer=JSONSerializer,
        engine=engine,
        keeper=keeper,
        metrics=metrics,
        room=room,
        pacer=pacer,
        grace_seconds=settings.grace_seconds,
    )

    def leases(timeout: float = TIMEOUT) -> Leases:
        # A connection of its own for each kind of call: a slow pop must not hold up a beat or a commit.
        return Leases(
            connect(url, timeout=timeout),
            name,
            lease_ms=settings.lease_ms,
            retention_ms=settings.retention_ms,
            max_running=settings.tenant_max_running,
        )

    pulse = Pulse(settings.lease_seconds, slowest(engine.batcher.curves.values()))
    process = processes.Process(
        name=name,
        kind="worker",
        metrics=serve_metrics(settings, metrics.registry),
        version=version("safelight"),
        device=str(device),
        max_runs=settings.max_runs,
        started_at=time.time(),
    )
    announcer = Announcer(connect(url), consumer, process, metrics, observer)
    heart = Heart(
        leases(),
        lambda: list(consumer.held.values()),
        pulse,
        announcer,
        lease_seconds=settings.lease_seconds,
        bell=consumer.bell,
        on_hung=_end_hung,
        eta=lambda held: pacer.eta(held, list(consumer.held.values())),
    )
    intake = Intake(leases(), connect(url), Turns(connect(url), name, keeper), room, queues=queues, bell=consumer.bell)
    finisher = Finisher(
        storage,
        spool,
        leases(),
        on_made=consumer.make_room,
        on_refused=consumer.refuse,
        on_end=consumer.end,
    )
    reaper = Reaper(
        leases(),
        connect(url),
        storage,
        metrics.recovered_jobs_total,
        ended=metrics.jobs_total,
        queues=queues,
        lease_seconds=settings.lease_seconds,
    )
    witness = Witness(leases(timeout=min(1.0, settings.lease_seconds / 5)))
    sources = Sources(storage, consumer.bell)
    consumer.use(intake, heart, pulse, finisher, reaper, sources=sources, viewers=Viewers(leases()), witness=witness)
    log.info("worker.ready", name=name, models=keeper.served, warm=keeper.warm, metrics=process.metrics)
    try:
        consumer.work()
    finally:
        _farewell(url, name)
    log.info("worker.left", name=name)


def served(settings: Settings) -> list[ModelSpec]:
    """The models this worker serves: those SAFELIGHT_SERVE names, else all of the catalog. Raises ConfigError."""
    catalog: Catalog = load_catalog(settings.models)
    for name in settings.serve:
        if name not in catalog.models:
            raise ConfigError(f"SAFELIGHT_SERVE: {name!r} is not in {settings.models}; it has {list(catalog.models)}")
    return [m for m in catalog.models.values() if not settings.serve or m.name in settings.serve]


def _end(failure: threading.ExceptHookArgs) -> None:
    # A worker that lacks a thread is worse than none: its jobs go to others, and whoever supervises starts it again.
    log.critical("worker.broken", thread=failure.thread and failure.thread.name, exc_info=failure.exc_value)
    os._exit(BROKEN_EXIT)


def _end_hung() -> None:
    # The thread that hangs is in a call of the device; nothing but the end of the process gets it out of there.
    log.critical("worker.hung", remedy="its jobs go to other workers; look at the device")
    os._exit(BROKEN_EXIT)


def _await_redis(redis: Redis) -> None:
    while True:
        try:
            check_server(redis)
        except (RedisError, OSError) as error:
            log.warning("redis.unavailable", error=type(error).__name__)
            time.sleep(0.5)
        else:
            return


def _farewell(url: str, name: str) -> None:
    try:
        processes.leave(connect(url, timeout=1.0), name)
    except (RedisError, OSError) as error:  # best effort: what we said of ourselves expires
        log.warning("redis.unavailable", error=type(error).__name__)


if __name__ == "__main__":
    main()
