"""Run: jobs are submitted while, at moments drawn from a seed, workers, Redis, the sender and the store fail."""

import random
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tests.chaos.bucket import MODES
from tests.chaos.checker import History, Verdict, check
from tests.chaos.nursery import Nursery
from tests.chaos.rq_info import RqInfo
from tests.chaos.service import Service, service

SUBMITTERS = 8
PAGE = resource.getpagesize()


@dataclass(frozen=True)
class Plan:
    """What is to happen, and how often; all moments and choices come from `seed`."""

    seed: int
    jobs: int
    workers: int = 2
    kills: int = 0  # kill -9 of a worker
    stops: int = 0  # SIGSTOP of a worker for longer than the lease
    restarts: int = 0  # SIGTERM of a worker: it drains, and another comes
    redis_kills: int = 0  # kill -9 of Redis
    sender_kills: int = 0
    store_outages: int = 0
    cancels: float = 0.0  # share of the jobs
    duration: float = 60.0  # seconds over which all this is spread
    outage: float = 5.0  # seconds
    store_mode: str = ""  # what the store does meanwhile; unset: one of bucket.MODES by chance
    lease: float = 2.0  # seconds
    step: float = 0.05  # seconds of a forward; four make a picture
    settle: float = 240.0  # seconds everything may take to end after the last fault
    redis: str = "valkey"
    appendfsync: str = "always"
    side: int = 64  # pixels of a picture; from 72 on it is noise, 3 bytes a pixel
    environment: tuple[tuple[str, str], ...] = ()  # settings of the service

    def faults(self) -> list[tuple[float, str]]:
        rng = random.Random(self.seed)
        counts = {
            "kill": self.kills,
            "stop": self.stops,
            "restart": self.restarts,
            "redis": self.redis_kills,
            "sender": self.sender_kills,
            "store": self.store_outages,
        }
        moments = [(rng.uniform(0.05, 0.95) * self.duration, kind) for kind, n in counts.items() for _ in range(n)]
        return sorted(moments)


class Run:
    """One run of a plan on a service."""

    def __init__(self, plan: Plan, built: Service, history: History) -> None:
        self.plan, self.built, self.history = plan, built, history
        self._rng = random.Random(plan.seed + 1)
        self._began = time.monotonic()
        self._is_over = threading.Event()
        self._errands: list[threading.Thread] = []
        self.memory = self.spooled = 0.0
        self.redis_back: list[float] = []  # seconds from Redis' answer to the API's readiness
        self.rq_info = RqInfo(built.redis, built.redis_server.url)

    def play(self) -> Verdict:
        watchers = [threading.Thread(target=each, daemon=True) for each in (self._read, self._watch_memory)]
        for watcher in watchers:
            watcher.start()
        self.rq_info.start()
        with ThreadPoolExecutor(SUBMITTERS) as pool:
            submitting = pool.map(self._submit, range(self.plan.jobs))
            for at, kind in self.plan.faults():
                time.sleep(max(0.0, self._began + at - time.monotonic()))
                getattr(self, f"_{kind}")()
            job_ids = list(submitting)
        for errand in self._errands:
            errand.join()
        self._settle(job_ids)
        self._is_over.set()
        for watcher in watchers:
            watcher.join()
        self.rq_info.close()
        self.rq_info.look_at_the_end()
        verdict = check(self.built, self.history, job_ids, may_forget=self.plan.appendfsync != "always")
        verdict.broken["rq info"] += self.rq_info.broken
        return verdict

    def _submit(self, number: int) -> str:
        rng = random.Random(self.plan.seed * 1_000_003 + number)
        at = number / self.plan.jobs * self.plan.duration * 0.95
        time.sleep(max(0.0, self._began + at - time.monotonic()))
        priority = rng.choice(("high", "normal", "normal", "low"))
        key = f"{self.plan.seed}-{number}"
        job_id = self.built.submit(
            key=key,
            patience=120,
            seed=number,
            num_images=rng.choice((1, 1, 1, 2)),
            priority=priority,
            width=self.plan.side,
            height=self.plan.side,
        )
        self.history.note("submit", job=job_id, key=key)
        if rng.random() < self.plan.cancels:
            time.sleep(rng.uniform(0, 0.5))
            outcome = self.built.cancel(job_id)
            # A cancel whose answer was lost may have been done: ask until it is told.
            while outcome is None:
                time.sleep(0.2)
                outcome = self.built.cancel(job_id)
            self.history.note("cancel", job=job_id, outcome=outcome)
        return job_id

    def _read(self) -> None:
        """Look at jobs at random, and keep what was final: it must stay so."""
        rng = random.Random(self.plan.seed + 2)
        with httpx2.Client(base_url=self.built.url, timeout=10, trust_env=False, verify=False) as client:
            while not self._is_over.wait(0.05):
                submitted = self.history.of("submit")[-500:]
                with suppress(httpx2.TransportError, IndexError):
                    reply = client.get(f"/v1/jobs/{rng.choice(submitted)['job']}")
                    if reply.status_code == 200 and (job := reply.json())["completed_at"]:
                        sums = [output["sha256"] for output in job["outputs"]]
                        self.history.note("read", job=job["id"], status=job["status"], sha256=sums)

    def _watch_memory(self) -> None:
        """The most that a worker and its files took: megabytes."""
        spool = Path(self.built.environment["SAFELIGHT_DATA"]) / "spool"
        while not self._is_over.wait(0.2):
            for slot in self.built.workers:
                with suppress(OSError, ValueError):
                    pages = int(Path(f"/proc/{slot.child.pid}/statm").read_text().split()[1])
                    self.memory = max(self.memory, pages * PAGE / 1e6)
            with suppress(OSError):
                self.spooled = max(self.spooled, sum(f.stat().st_size for f in spool.glob("*/*")) / 1e6)

    def _choose(self):
        return self._rng.choice(self.built.workers)

    def _kill(self) -> None:
        slot = self._choose()
        held = self.built.held_by(slot)
        slot.child.kill()
        self.history.note("kill", worker=slot.name, jobs=held)

    def _stop(self) -> None:
        slot = self._choose()
        child = slot.child
        seconds = self.plan.lease * self._rng.uniform(1.2, 2.5)
        child.send_signal(signal.SIGSTOP)
        self.history.note("stop", worker=slot.name, seconds=seconds)
        self._later(seconds, lambda: child.send_signal(signal.SIGCONT))

    def _restart(self) -> None:
        slot = self._choose()
        slot.child.send_signal(signal.SIGTERM)
        self.history.note("restart", worker=slot.name)

    def _sender(self) -> None:
        slot = next(slot for slot in self.built.slots if slot.part == "sender")
        slot.child.kill()
        self.history.note("sender")

    def _redis(self) -> None:
        self.built.redis_server.kill()
        time.sleep(self._rng.uniform(0, 1.0))
        self.built.redis_server.start()
        came = time.monotonic()
        self.built.wait_until(self.built.is_ready, 60)
        self.redis_back.append(time.monotonic() - came)
        self.history.note("redis", ready=self.redis_back[-1])

    def _store(self) -> None:
        mode = self.plan.store_mode or self._rng.choice(MODES)
        self.built.store.fail(mode)
        self.history.note("store", mode=mode)
        self._later(self.plan.outage, lambda: self.built.store.fail("ok"))

    def _later(self, seconds: float, act) -> None:
        def wait() -> None:
            time.sleep(seconds)
            act()

        errand = threading.Thread(target=wait)
        errand.start()
        self._errands.append(errand)

    def _settle(self, job_ids: list[str]) -> None:
        """Wait until every job has ended and every webhook is sent; what has not by then is for the checker."""
        deadline = time.monotonic() + self.plan.settle
        left = list(job_ids)
        while left and time.monotonic() < deadline:
            left = self.built.unfinished(left)
            time.sleep(0.2)
        while not self.built.outbox_is_empty() and time.monotonic() < deadline:
            time.sleep(0.1)


def run(plan: Plan, forks: Nursery, folder: Path) -> tuple[Verdict, str]:
    """Play a plan; the verdict, and what to print."""
    environment = {"SAFELIGHT_LEASE_SECONDS": str(plan.lease), "STUB_STEP_SECONDS": str(plan.step)}
    environment |= dict(plan.environment)
    with service(folder, forks, redis=plan.redis, appendfsync=plan.appendfsync, **environment) as built:
        built.start_all(plan.workers)
        history = History(folder / "history.jsonl")
        played = Run(plan, built, history)
        began = time.monotonic()
        verdict = played.play()
        took = time.monotonic() - began
    counts = ", ".join(f"{len(history.of(k))} {k}" for k in ("kill", "stop", "restart", "redis", "sender", "store"))
    info = played.rq_info
    said = [f"seed {plan.seed}: {counts}; {took:.0f} s", str(verdict)]
    said.append(
        f"rq info {info.runs} times, {info.compared} counts compared, {info.samples} samples of our own indexes"
    )
    said.append(f"most memory of a worker {played.memory:.0f} MB, most on disk for the store {played.spooled:.1f} MB")
    if played.redis_back:
        said.append(f"ready again after Redis: at most {max(played.redis_back):.2f} s")
    return verdict, "\n".join(said)
