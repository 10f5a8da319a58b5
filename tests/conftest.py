"""What tests share: a real Valkey, a catalog, the API behind a real uvicorn, and a worker that paints nothing."""

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2
import pytest
import structlog
from fastapi import FastAPI

from app.core import logs, processes
from app.core import redis_keys as keys
from app.core.catalog import load_catalog
from app.core.connections import connect
from app.core.processes import Process
from app.core.queue import rq_time
from app.core.settings import Settings
from app.core.storage import object_key
from app.main import Server, create_app, listen
from tests.servers import redis_server as start_redis

# What measures time, or waits for a bound of it, has the machine to itself, and so has what takes all of it.
ALONE = (
    "tests/benchmarks/",
    "tests/chaos/",
    "tests/simulation/",
    "tests/e2e/test_walk.py",
    "tests/integration/test_deadlines.py",
    "tests/integration/test_estimates.py::test_what_was_expected",
    "tests/integration/test_failpoints.py",
    "tests/integration/test_limits_load.py",
    "tests/integration/test_sender.py::test_dead_hosts_among_many",
    "tests/integration/test_sender.py::test_the_first_attempt_follows",
)

CATALOG = """
[models.{name}]
title = "Tiny"
source = "tiny"
default = {default}
created = 1700000000
schedulers = ["ddim", "euler"]
examples = ["a red heart"]
tasks = ["text_to_image", "image_to_image", "inpainting", "tiling"]
[models.{name}.defaults]
width = 64
height = 64
num_inference_steps = 20
guidance_scale = 5.0
scheduler = "ddim"
[models.{name}.limits]
max_side = 128
max_images = 4
max_prompt = 200
"""
PNG = b"\x89PNG\r\n\x1a\n" + b"pixels" * 100


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(ALONE):
            item.add_marker(pytest.mark.alone)


# As in production, but through logging, so that pytest shows them where a test fails.
structlog.configure(
    processors=[*logs.SHARED, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
    logger_factory=structlog.stdlib.LoggerFactory(),
)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    import os

    for name in os.environ:
        if name.startswith("SAFELIGHT_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """A Valkey for the whole session; AOF on, every write synced."""
    with start_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_url(redis_server):
    """Its URL, and nothing in it."""
    client = connect(redis_server.url)
    client.flushall()
    client.close()
    return redis_server.url


@pytest.fixture
def redis(redis_url):
    """A synchronous client."""
    client = connect(redis_url)
    yield client
    client.close()


@pytest.fixture(scope="session")
def catalog_file(tmp_path_factory):
    """A models.toml of two models, `tiny` (the default) and `other`; neither has weights."""
    file = tmp_path_factory.mktemp("models") / "models.toml"
    file.write_text(CATALOG.format(name="tiny", default="true") + CATALOG.format(name="other", default="false"))
    return file


@dataclass
class Api:
    """An API that serves."""

    url: str
    settings: Settings
    app: FastAPI
    server: Server
    thread: threading.Thread

    def client(self, **options) -> httpx2.Client:
        # verify=False spares each client the reading of all certificates: this is plain HTTP.
        return httpx2.Client(base_url=self.url, timeout=30, trust_env=False, verify=False, **options)

    def stop(self) -> float:
        """Seconds it took to stop."""
        started = time.perf_counter()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()
        return time.perf_counter() - started


@contextmanager
def serve_api(settings: Settings) -> Iterator[Api]:
    """The API behind a real uvicorn in a thread, on a free port."""
    with listen("127.0.0.1", 0) as listener:
        bound = settings.model_copy(update={"port": listener.getsockname()[1]})
        app = create_app(bound)
        server = Server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        api = Api(f"http://127.0.0.1:{bound.port}", bound, app, server, thread)
        try:
            _wait_until(lambda: server.started or not thread.is_alive())
            yield api
        finally:
            api.stop()


@pytest.fixture
def start_api(tmp_path, redis_url, catalog_file):
    """Start an API of one's own: `start_api(api_key="...")` gives it, running; it stops with the test."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(**changes) -> Api:
            options = {"redis_url": redis_url, "models": catalog_file, "data": tmp_path / "data"} | changes
            return stack.enter_context(serve_api(Settings(**options)))

        yield start


@pytest.fixture(scope="session")
def _shared_api(redis_server, catalog_file, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    with serve_api(Settings(redis_url=redis_server.url, models=catalog_file, data=data)) as api:
        yield api


@pytest.fixture
def api(_shared_api, redis_url):
    """An API without keys, shared by the session, on an empty Redis."""
    return _shared_api


@pytest.fixture
def client(api):
    with api.client() as client:
        yield client


@pytest.fixture(scope="session")
def forks():
    """Forks workers with a stub model, APIs and senders in milliseconds."""
    from tests.chaos.nursery import nursery

    with nursery() as built:
        yield built


class PretendWorker:
    """Takes jobs and ends them by the real scripts, and paints nothing."""

    def __init__(self, redis, data, models=("tiny",)):
        self.redis, self.data, self.models = redis, data, models

    def live(self, **about):
        fields = {"name": "w1", "kind": "worker", "metrics": "127.0.0.1:9100", "version": "0", "models": self.models}
        processes.beat(self.redis, Process(**fields | about))

    def claim(self, model="tiny"):
        """Take the next job: its id and fence."""
        ticket = secrets.token_hex(4)
        reply = keys.CLAIM.run(self.redis, "w1", keys.queue_name(model), 15_000, "1", rq_time(), ticket)
        assert reply, "no job waits"
        return reply[1], reply[2]

    def step(self, job, step, steps=20):
        job_id, fence = job
        progress = json.dumps({"phase": "denoising", "step": step, "steps": steps})
        assert keys.BEAT.run(self.redis, 15_000, job_id, fence, progress)[0] == []

    def store(self, job_id, attempt=1):
        key = object_key(job_id, attempt, 0, "png")
        path = self.data / "objects" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
        return key

    def succeed(self, job, **more):
        job_id, fence = job
        output = {
            "type": "image",
            "key": self.store(job_id, fence),
            "seed": 7,
            "width": 64,
            "height": 64,
            "content_type": "image/png",
            "bytes": len(PNG),
            "sha256": hashlib.sha256(PNG).hexdigest(),
        }
        parts = ("queue", "encode", "denoise", "decode", "store")
        fields = {
            "outputs": json.dumps([output]),
            "timings": json.dumps({f"{part}_seconds": 0.5 for part in parts}),
            **{name: str(value) for name, value in more.items()},
        }
        assert self._commit(job, "succeeded", fields) == "done"

    def fail(self, job):
        error = json.dumps({"code": "generation_failed", "message": "the denoiser gave NaN"})
        assert self._commit(job, "failed", {"error": error}) == "done"

    def _commit(self, job, status, fields):
        return keys.COMMIT.run(self.redis, *job, status, 3_600_000, json.dumps(fields), rq_time())


@pytest.fixture
def worker(redis, api):
    """A worker of the shared API; say `worker.live()` to have it seen."""
    return PretendWorker(redis, api.settings.data)


@pytest.fixture
def catalog(catalog_file):
    return load_catalog(catalog_file)


def _wait_until(is_true, seconds=15):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def wait_until():
    return _wait_until
