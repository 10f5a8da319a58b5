"""Forecast: reads what workers say of their pace and what waits in Redis, and hands both to estimates.py."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from redis.asyncio import Redis

from app.core import processes
from app.core import redis_keys as keys
from app.core.estimates import Cost, Estimate, Load, Pace, cost_of, estimate, pace_from
from app.core.job import EstimateView, Job, JobStatus, Priority
from app.core.params import GenerationParams
from app.core.processes import Process

LANES: Final[tuple[Priority, ...]] = ("high", "normal", "low")
FRESH_SECONDS: Final = 1.0  # how long what the workers say is believed


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is expected of a request; `estimate` is None where no live worker has said how fast it is."""

    cost: Cost
    estimate: Estimate | None

    @property
    def view(self) -> EstimateView:
        """As callers see it."""
        known = self.estimate
        return EstimateView(
            cost_seconds=round(self.cost.seconds, 3),
            start_seconds=round(known.start_seconds, 2) if known else None,
            finish_seconds=round(known.finish_seconds, 2) if known else None,
        )

    @property
    def work(self) -> str:
        """As a job's record has it: milliseconds of the denoiser, rows, and milliseconds to its start and its end."""
        known = f"{max(round(1000 * self.cost.seconds), 1)} {self.cost.rows}"
        if self.estimate is None:
            return known
        return f"{known} {round(1000 * self.estimate.start_seconds)} {round(1000 * self.estimate.finish_seconds)}"


class Forecast:
    """The estimates of one process of the API."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._workers: list[tuple[Process, dict[str, Pace]]] = []
        self._paces: dict[str, Pace] = {}  # by model, of late: a worker that is gone for a moment is not forgotten
        self._read_at = float("-inf")  # monotonic

    def forget(self) -> None:
        """Ask the workers again at once, and know nothing of those that are gone."""
        self._read_at, self._paces = float("-inf"), {}

    async def of_request(self, tenant: str, params: GenerationParams, priority: Priority) -> Outlook:
        """What to expect of a request that is handed in now."""
        serving = await self._serving(params.model)
        cost = cost_of(params, self._paces.get(params.model))
        if not serving:
            return Outlook(cost, None)
        seen = await self._look(tenant, params.model, serving)
        return Outlook(cost, _estimate(cost, seen.load(priority), serving, params, priority))

    async def cost(self, params: GenerationParams) -> Outlook:
        """What a request costs, whenever it is handed in."""
        await self._serving(params.model)
        return Outlook(cost_of(params, self._paces.get(params.model)), None)

    async def of_jobs(self, jobs: Sequence[Job]) -> list[Outlook | None]:
        """What to expect of each job from now on; None where it has ended or no worker serves its model."""
        seen: dict[tuple[str, str], _Seen] = {}
        found: list[Outlook | None] = []
        for job in jobs:
            model = job.params.model
            serving = [] if job.status.is_final else await self._serving(model)
            if serving and job.status is JobStatus.QUEUED and (job.tenant, model) not in seen:
                seen[job.tenant, model] = await self._look(job.tenant, model, serving)
            found.append(self._of_job(job, serving, seen.get((job.tenant, model))) if serving else None)
        return found

    def _of_job(self, job: Job, serving: Sequence[Pace], seen: "_Seen | None") -> Outlook | None:
        cost = cost_of(job.params, self._paces[job.params.model])
        if seen is None or job.status is JobStatus.PROCESSING:
            eta = job.progress.eta_seconds if job.progress else None
            return Outlook(cost, Estimate(0.0, cost.alone_seconds if eta is None else eta))
        load = seen.load(job.priority, place=job.queue_position)
        return Outlook(cost, _estimate(cost, load, serving, job.params, job.priority))

    async def paces(self, model: str) -> list[Pace]:
        """How fast the live workers that serve a model say they are."""
        return await self._serving(model)

    async def _serving(self, model: str) -> list[Pace]:
        now = time.monotonic()
        if now - self._read_at > FRESH_SECONDS:
            live = [p for p in await processes.live(self._redis) if p.kind == "worker"]
            self._workers = [(worker, _paces(worker)) for worker in live]
            self._paces.update({name: pace for _, paces in self._workers for name, pace in paces.items()})
            self._read_at = now
        return [paces[model] for _, paces in self._workers if model in paces]

    async def _look(self, tenant: str, model: str, serving: Sequence[Pace]) -> "_Seen":
        others = sorted({name for worker, paces in self._workers if model in paces for name in worker.models} - {model})
        reply = await keys.LOAD.call(self._redis, keys.queue_name(model), tenant, *map(keys.queue_name, others))
        return _Seen(*reply)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The reply of load.lua."""

    running: int
    rows: int
    lanes: Sequence[int]  # what waits in the tenant's lanes: high, normal, low
    counts: Sequence[int]  # how many jobs
    weight: str
    tenants: Sequence[int | str]
    queues: Sequence[int]

    def load(self, priority: Priority, place: int | None = None) -> Load:
        """As a new job of the tenant finds it, or one that is at `place` of its lane."""
        lanes: dict[str, float] = dict(zip(LANES, (work / 1e3 for work in self.lanes), strict=True))
        ahead = lanes.pop(priority)
        if place is not None:
            ahead *= min(place / max(self.counts[LANES.index(priority)], 1), 1.0)
        pairs = zip(self.tenants[::2], self.tenants[1::2], strict=True)
        tenants = [(float(work) / 1e3, float(weight) / float(self.weight)) for work, weight in pairs]
        return Load(ahead, lanes, tenants, [work / 1e3 for work in self.queues], self.running / 1e3, self.rows)


def _estimate(
    cost: Cost, load: Load, serving: Sequence[Pace], params: GenerationParams, priority: Priority
) -> Estimate | None:
    return estimate(cost, load, serving, priority, params.width * params.height)


def _paces(worker: Process) -> dict[str, Pace]:
    found = {}
    for model, about in worker.paces.items():
        # Of another version it may not be readable.
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            found[model] = pace_from(about)
    return found
