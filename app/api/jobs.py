"""Jobs: submit, look, list, cancel, delete."""

import asyncio
import hashlib
import json
import re
from contextlib import suppress
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response

from app.api.auth import Caller, Identity, needs
from app.api.deps import Deps, Services
from app.api.problems import responses
from app.api.schemas import DryRunView, JobFilter, JobRequest, ListResponse, MemoryView
from app.core.api_keys import Scope
from app.core.errors import NotFound
from app.core.estimates import memory_fit
from app.core.events import OfJob
from app.core.job import Job, JobStatus, JobView
from app.core.limits import headers_of
from app.core.queue import Submission, Submitted
from app.core.storage import job_prefix

MAX_WAIT: Final = 60  # seconds
RECHECK: Final = 10.0  # seconds after which a waiter looks again unasked
_JOB_ID: Final = re.compile(r"job_[0-9a-hjkmnp-tv-z]{26}", re.ASCII)
_WAIT: Final = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?([0-9]{1,9})\"?\s*(?=$|[,;])", re.IGNORECASE | re.ASCII)

router = APIRouter(tags=["jobs"])


def _job_id(
    job_id: Annotated[str, Path(json_schema_extra={"pattern": f"^{_JOB_ID.pattern}$"}, examples=["job_" + "0" * 26])],
) -> str:
    # A malformed id is answered exactly as one that nobody has.
    if not _JOB_ID.fullmatch(job_id):
        raise NotFound("there is no such job")
    return job_id


JobId = Annotated[str, Depends(_job_id)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r"^[\x21-\x7e]{1,255}$",
        description="Sent again with the same body, it gives the same job instead of another one.",
    ),
]
Prefer = Annotated[str | None, Header(description="`wait=SECONDS` (at most 60): reply when the job has ended.")]
DryRun = Annotated[bool, Query(description="Check the request and say what to expect of it; make no job.")]
_STRING: Final = {"schema": {"type": "string"}}
_SUBMIT_HEADERS: Final[dict[str, Any]] = {
    "Location": {"description": "The job's URL.", **_STRING},
    "X-RateLimit-Limit": {"description": "Denoiser-seconds that may be handed in at once.", **_STRING},
    "X-RateLimit-Remaining": {"description": "Those that may be handed in now.", **_STRING},
    "X-RateLimit-Reset": {"description": "Seconds until it is the whole limit again.", **_STRING},
    "Idempotent-Replayed": {"description": "true: this Idempotency-Key had made the job before.", **_STRING},
    "Preference-Applied": {"description": "The wait that was granted.", **_STRING},
}


@router.post(
    "/v1/jobs",
    status_code=202,
    responses={
        200: {
            "model": JobView | DryRunView,
            "description": "Ended within the wait that was preferred, or a dry run.",
            "headers": _SUBMIT_HEADERS,
        },
        202: {"description": "Queued.", "headers": _SUBMIT_HEADERS},
        **responses(404, 408, 413, 422, 429),
    },
    response_model=JobView,
)
@needs(Scope.SUBMIT)
async def submit_job(
    *,
    body: JobRequest,
    request: Request,
    response: Response,
    caller: Caller,
    deps: Deps,
    idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,
    dry_run: DryRun = False,
) -> JobView | Response:
    """Queue a job. The reply has its id and links; with `Prefer: wait` it may have its pictures."""
    if dry_run:
        rehearsed = await _rehearse(body, caller, deps, request.state.request_id)
        return Response(rehearsed.model_dump_json(), media_type="application/json")
    job, is_new, bucket = await hand_in(body, caller, deps, request.state.request_id, idempotency_key)
    response.headers.update(headers_of(bucket))
    if not is_new:
        response.headers["Idempotent-Replayed"] = "true"
    if (seconds := _preferred_wait(prefer)) is not None:
        response.headers["Preference-Applied"] = f"wait={seconds}"
        job = await wait(deps, job, seconds)
        response.status_code = 200 if job.status.is_final else 202
    shown = await deps.view(job)
    response.headers["Location"] = shown.links.self
    return shown


async def _rehearse(body: JobRequest, caller: Identity, deps: Services, request_id: str) -> DryRunView:
    wanted = await submission_of(body, caller, deps, request_id, None)
    outlook = await deps.forecast.of_request(caller.tenant, wanted.params, wanted.priority)
    fit = memory_fit(wanted.params, await deps.forecast.paces(wanted.params.model))
    return DryRunView(
        params=wanted.params,
        estimate=outlook.view,
        cost_is_known=outlook.cost.is_known,
        alone_seconds=round(outlook.cost.alone_seconds, 3),
        memory=MemoryView(fits=fit.fits, reason=fit.reason),
    )


async def hand_in(
    body: JobRequest, caller: Identity, deps: Services, request_id: str, idempotency_key: str | None = None
) -> Submitted:
    """The one way a request becomes a job, whatever its dialect. Raises what its checks and the queue raise."""
    # Before its pictures are looked at: what they were may be gone when the same is asked again.
    if idempotency_key and (known := await deps.queue.find(caller.tenant, idempotency_key, fingerprint_of(body))):
        return Submitted(known, is_new=False, bucket=None)
    return await deps.queue.submit(caller.tenant, await submission_of(body, caller, deps, request_id, idempotency_key))


def fingerprint_of(body: JobRequest) -> str:
    """What tells a repeat from another request under the same Idempotency-Key."""
    canonical = json.dumps(body.model_dump(mode="json", exclude_unset=True), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


async def submission_of(
    body: JobRequest, caller: Identity, deps: Services, request_id: str, idempotency_key: str | None
) -> Submission:
    """A request as the queue takes it, checked and complete. Raises what its checks raise."""
    if body.webhook:
        deps.guard.check_url(body.webhook.url)
    return Submission(
        params=await deps.inputs.complete(caller.tenant, body.generation(), deps.catalog),
        priority=body.priority,
        deadline_seconds=body.deadline_seconds,
        webhook=body.webhook,
        metadata=body.metadata,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint_of(body),
        request_id=request_id,
    )


def _preferred_wait(prefer: str | None) -> int | None:
    # RFC 7240: a preference that cannot be read is as good as none.
    found = _WAIT.search(prefer or "")
    return min(int(found[1]), MAX_WAIT) if found else None


async def wait(deps: Services, job: Job, seconds: float) -> Job:
    """The job when it has ended, or as it is after `seconds`, or when the service stops. Raises what the queue does."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    async with deps.hub.watch(OfJob(job.id)) as bell:
        while True:
            bell.clear()
            async with deps.places:
                job = await deps.queue.get(job.tenant, job.id)
            remaining = deadline - loop.time()
            if job.status.is_final or deps.is_draining or remaining <= 0:
                return job
            with suppress(TimeoutError):
                await asyncio.wait_for(bell.wait(), min(remaining, RECHECK))


@router.get("/v1/jobs", responses=responses(422))
@needs(Scope.READ)
async def list_jobs(caller: Caller, deps: Deps, which: Annotated[JobFilter, Query()]) -> ListResponse[JobView]:
    """Your jobs, newest first."""
    page = await deps.queue.list(caller.tenant, status=which.status, limit=which.limit, cursor=which.cursor)
    return ListResponse(data=await deps.views(page.jobs), next_cursor=page.next_cursor)


@router.get("/v1/jobs/{job_id}", responses=responses(404))
@needs(Scope.READ)
async def get_job(job_id: JobId, caller: Caller, deps: Deps) -> JobView:
    """A job; its outputs' URLs are signed anew each time."""
    return await deps.view(await deps.queue.get(caller.tenant, job_id))


@router.post("/v1/jobs/{job_id}/cancel", responses=responses(404))
@needs(Scope.SUBMIT)
async def cancel_job(job_id: JobId, caller: Caller, deps: Deps) -> JobView:
    """Stop a job, whatever it is doing; one that has ended stays as it is."""
    return await deps.view(await cancel(deps, caller.tenant, job_id))


async def cancel(deps: Services, tenant: str, job_id: str) -> Job:
    """Stop a job; one that has ended stays as it is. Raises NotFound."""
    job = await deps.queue.get(tenant, job_id)
    if job.status.is_final:
        return job
    job = await deps.queue.cancel(tenant, job_id)
    if job.status is JobStatus.CANCELED:
        deps.metrics.jobs_total.labels(job.params.model, job.status).inc()
    return job


@router.delete("/v1/jobs/{job_id}", status_code=204, responses=responses(404))
@needs(Scope.SUBMIT)
async def delete_job(job_id: JobId, caller: Caller, deps: Deps) -> None:
    """Forget a job: cancel it if it runs, then remove its objects and its record."""
    await cancel(deps, caller.tenant, job_id)
    await deps.storage.delete_prefix_async(job_prefix(job_id))
    await deps.queue.purge(caller.tenant, job_id)
