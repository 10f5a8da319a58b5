"""Service: a whole Safelight of forked processes around a stub model, whose parts a test kills and which come back."""

import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
from redis.exceptions import RedisError

from app.core import redis_keys as keys
from app.core.connections import connect
from app.core.redis_keys import EVENTS, JOB, LEASES, OUTBOX
from tests.chaos.bucket import bucket
from tests.chaos.nursery import Child, Nursery
from tests.chaos.stub_worker import MODEL, STEP_VARIABLE
from tests.receiver import receiver
from tests.servers import free_port, redis_binaries, redis_server

CATALOG = """
[models.{name}]
title = "Stub"
source = "none"
schedulers = ["ddim"]
[models.{name}.defaults]
width = 64
height = 64
num_inference_steps = 4
scheduler = "ddim"
"""
SECRET = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
RESTART_SECONDS = 0.3


def model_name(number: int) -> str:
    return f"{MODEL}-{number}"


@dataclass
class Slot:
    """A process that is meant to run, started anew when it ends; its traps are for its first life."""

    name: str
    part: str
    environment: dict[str, str]
    traps: str
    forks: Nursery
    child: Child | None = None
    starts: int = 0
    ended_at: float = 0.0
    is_wanted: bool = True


class Service:
    """`submit`, `job`, `wait`; `workers` may be killed: whatever ends is started again."""

    def __init__(self, folder: Path, forks: Nursery, *, server, store, hook, models: int, **environment) -> None:
        self.folder, self.redis_server, self.store, self.hook = folder, server, store, hook
        self._forks = forks
        catalog = folder / "models.toml"
        catalog.write_text("".join(CATALOG.format(name=model_name(i)) for i in range(models)))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {
            "SAFELIGHT_REDIS_URL": server.url,
            "SAFELIGHT_STORAGE_URL": store.url if store else "",
            "SAFELIGHT_DATA": str(folder / "data"),
            "SAFELIGHT_PORT": str(port),
            "SAFELIGHT_MODELS": str(catalog),
            "SAFELIGHT_WEBHOOK_ALLOW": "127.0.0.0/8",
            "SAFELIGHT_WEBHOOK_SECRET": SECRET,
            "SAFELIGHT_LEASE_SECONDS": "2",
            "SAFELIGHT_MAX_RUNS": "16",
            "SAFELIGHT_MAX_BATCH": "64",
            "SAFELIGHT_LOG_FORMAT": "json",
            STEP_VARIABLE: "0.01",
            **(store.environment if store else {}),
            **environment,
        }
        self.slots: list[Slot] = []
        self.client = httpx2.Client(base_url=self.url, timeout=10, trust_env=False, verify=False)
        self.redis = connect(server.url, timeout=2)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._tender = threading.Thread(target=self._tend_forever, daemon=True)
        self._tender.start()

    @property
    def workers(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.part == "worker"]

    def start(self, part: str, traps: str = "", forks: Nursery | None = None, **environment: str) -> Slot:
        """Start a part and keep it alive; `traps` are failpoints, armed in its first life only."""
        with self._lock:
            slot = Slot(f"{part}-{len(self.slots)}", part, environment, traps, forks or self._forks)
            self._launch(slot)
            self.slots.append(slot)
        return slot

    def _launch(self, slot: Slot) -> None:
        traps = "" if slot.starts else slot.traps
        environment = self.environment | slot.environment | {"SAFELIGHT_FAILPOINTS": traps}
        slot.child = slot.forks.start(slot.part, environment, self.log(slot))
        slot.starts += 1

    def log(self, slot: Slot) -> Path:
        return self.folder / f"{slot.name}.log"

    def times(self, slot: Slot, event: str) -> int:
        """How often a part has logged an event; its log may not be there yet."""
        log = self.log(slot)
        return log.read_text().count(event) if log.exists() else 0

    def retire(self, slot: Slot) -> None:
        """Kill a part for good."""
        slot.is_wanted = False
        slot.child.send_signal(signal.SIGCONT)
        slot.child.kill()

    def _tend_forever(self) -> None:
        while not self._closed.wait(0.02):
            for slot in list(self.slots):
                if not slot.is_wanted or slot.child.poll() is None:
                    slot.ended_at = 0.0
                elif not slot.ended_at:
                    slot.ended_at = time.monotonic()
                elif time.monotonic() - slot.ended_at > RESTART_SECONDS:
                    self._launch(slot)

    def start_all(self, workers: int = 2) -> None:
        self.start("api")
        self.start("sender")
        for _ in range(workers):
            self.start("worker")
        self.wait_until(self.is_ready, 60)

    def is_ready(self) -> bool:
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def submit(self, *, key: str | None = None, patience: float = 60, **request) -> str:
        """Submit as a careful caller does: again, under the same key, until there is an answer; the job's id."""
        body = {"prompt": "a lamp", "webhook": {"url": self.hook.url()}} | request
        headers = {"Idempotency-Key": key or f"key-{random.randbytes(8).hex()}"}
        deadline = time.monotonic() + patience
        while True:
            try:
                reply = self.client.post("/v1/jobs", json=body, headers=headers)
            except httpx2.TransportError:
                reply = None
            if reply is not None and reply.status_code == 202:
                return reply.json()["id"]
            assert reply is None or reply.status_code == 503, reply.text
            assert time.monotonic() < deadline, "nobody takes the job"
            time.sleep(0.1)

    def job(self, job_id: str) -> dict | None:
        """The job as the API tells it; None while nobody does."""
        with suppress(httpx2.TransportError):
            reply = self.client.get(f"/v1/jobs/{job_id}")
            if reply.status_code == 200:
                return reply.json()
            assert reply.status_code == 503, reply.text
        return None

    def cancel(self, job_id: str) -> str | None:
        with suppress(httpx2.TransportError):
            reply = self.client.post(f"/v1/jobs/{job_id}/cancel")
            return reply.json()["status"] if reply.status_code == 200 else None
        return None

    def wait(self, job_id: str, seconds: float = 30) -> dict:
        found: list[dict] = []

        def is_final() -> bool:
            found[:] = [job] if (job := self.job(job_id)) else found
            return bool(found and found[0]["completed_at"])

        self.wait_until(is_final, seconds)
        return found[0]

    def unfinished(self, job_ids: list[str]) -> list[str]:
        """Those of the jobs that are known and have not ended, all of them while Redis is away."""
        with suppress(RedisError, OSError), self.redis.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hmget(JOB + job_id, "status", "completed_at")
            found = zip(job_ids, pipeline.execute(), strict=True)
            return [job_id for job_id, (status, ended) in found if status and not ended]
        return job_ids

    def held_by(self, slot: Slot) -> list[str]:
        """The jobs that a worker's process has a lease on, as Redis knows; none while it is away."""
        mark = f"-{slot.child.pid}-"
        with suppress(RedisError, OSError):
            ids = self.redis.zrange(LEASES, 0, -1)
            return [i for i in ids if mark in (self.redis.hget(JOB + i, "worker") or "")]
        return []

    def statuses(self, job_id: str) -> list[tuple[str, int]]:
        """Every status the job had, and when (milliseconds of Redis' clock)."""
        entries = self.redis.lrange(EVENTS + job_id, 0, -1)
        told = [json.loads(entry.partition(" ")[2]) for entry in entries if entry.startswith("status ")]
        return [(event["status"], event["at"]) for event in told]

    def outbox_is_empty(self) -> bool:
        try:
            return self.redis.zcard(OUTBOX) == 0
        except (RedisError, OSError):
            return False

    def logged(self, event: str) -> list[dict]:
        """What all processes logged under that name."""
        found = []
        for log in sorted(self.folder.glob("*.log")):
            for line in log.read_text(errors="replace").splitlines():
                if f'"{event}"' in line:
                    with suppress(ValueError):
                        found.append(json.loads(line) | {"log": log.name})
        return found

    def close(self) -> None:
        self._closed.set()
        self._tender.join()
        self.client.close()
        self.redis.close()
        for slot in self.slots:
            slot.child.send_signal(signal.SIGCONT)
            slot.child.kill()
        for slot in self.slots:
            slot.child.wait()

    @staticmethod
    def wait_until(is_true, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_true():
            assert time.monotonic() < deadline, f"not so within {seconds} s"
            time.sleep(0.05)


@contextmanager
def service(
    folder: Path,
    forks: Nursery,
    *,
    redis: str = "valkey",
    appendfsync: str = "always",
    on_disk: bool = False,
    models: int = 1,
    **environment,
) -> Iterator[Service]:
    """A service without processes yet, on a Redis, a store and a receiver of its own."""
    with ExitStack() as stack:
        server = stack.enter_context(redis_server(folder, redis_binaries()[redis], appendfsync))
        store = None if on_disk else stack.enter_context(bucket(folder))
        hook = stack.enter_context(receiver())
        built = Service(folder, forks, server=server, store=store, hook=hook, models=models, **environment)
        stack.callback(built.close)
        yield built


def cancel_in_redis(redis, job_id: str) -> str | None:
    return keys.CANCEL.run(redis, job_id, "default", 3_600_000)
