"""What routes are handed: the clients that main.py built, and names for them in signatures."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import Depends, Request
from redis.asyncio import Redis

from app.api.streams import Streams
from app.core import processes
from app.core.addresses import AddressGuard
from app.core.api_keys import KeyRing
from app.core.batches import Batches
from app.core.catalog import Catalog
from app.core.endpoints import Endpoints
from app.core.events import Hub
from app.core.forecast import Forecast, Outlook
from app.core.image_inputs import ImageInputs
from app.core.job import Job, JobStatus, JobView, view
from app.core.limits import Limits
from app.core.metrics import ApiMetrics
from app.core.queue import JobQueue
from app.core.settings import Settings
from app.core.storage import Storage
from app.core.tenants import Secrets
from app.core.uploads import Uploads

PLACES: Final = 16
URL_SECONDS: Final = 3600  # how long an output's URL works


@dataclass(slots=True)
class Services:
    """Everything the API uses, built once; `is_draining` from the moment the server begins to exit."""

    settings: Settings
    catalog: Catalog
    metrics: ApiMetrics
    redis: Redis
    queue: JobQueue
    forecast: Forecast
    limits: Limits  # of tenants without their own
    streams: Streams
    storage: Storage
    hub: Hub
    keys: KeyRing
    guard: AddressGuard
    uploads: Uploads
    inputs: ImageInputs
    batches: Batches
    endpoints: Endpoints
    secrets: Secrets
    places: asyncio.Semaphore  # of streams and waits that read a job at the same moment; the rest is for requests
    is_draining: bool = False

    def drain(self) -> None:
        """End all streams and waits: the server lets nobody go before its replies are complete."""
        self.is_draining = True
        self.hub.ring()

    async def served(self) -> set[str]:
        """The models that a live worker serves."""
        return {model for process in await processes.live(self.redis) for model in process.models}

    async def warm(self) -> set[str]:
        """The models that a live worker has in memory, or is loading."""
        return {model for process in await processes.live(self.redis) for model in process.warm}

    async def view(self, job: Job) -> JobView:
        """A job's JSON, its URLs signed now, with a notice where it waits for a worker that is not there."""
        return (await self.views([job]))[0]

    async def views(self, jobs: Sequence[Job]) -> list[JobView]:
        """The JSON of several jobs."""
        waits = any(job.status is JobStatus.QUEUED for job in jobs)
        served = await self.served() if waits else set()
        outlooks = await self.forecast.of_jobs(jobs)
        return [self._view(job, served, outlook) for job, outlook in zip(jobs, outlooks, strict=True)]

    def _view(self, job: Job, served: set[str], outlook: Outlook | None) -> JobView:
        shown = view(job, self.settings.base_url, lambda output: self.storage.sign(output.key, URL_SECONDS))
        shown.estimate = outlook.view if outlook else None
        if job.status is JobStatus.QUEUED and job.params.model not in served:
            shown.notice = f"no live worker serves model {job.params.model!r}; the job waits for one"
        return shown


def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Deps = Annotated[Services, Depends(get_services)]
