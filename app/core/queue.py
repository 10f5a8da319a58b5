"""JobQueue: submit, get, cancel, list, delete, depth. The callers' side of the queue, asynchronous."""

import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.core import failpoints
from app.core import redis_keys as keys
from app.core.errors import (
    Conflict,
    IdempotencyMismatch,
    InvalidParams,
    InvalidRequest,
    NotFound,
    Overloaded,
    QueueUnavailable,
)
from app.core.forecast import Forecast, Outlook
from app.core.job import Job, JobStatus, Priority, Webhook, job_from_hash, new_job_id
from app.core.limits import REFUSALS, Bucket, Limits, bucket_of, refusal, rules
from app.core.params import GenerationParams

Jobs = list[Job]
Texts = list[str]
FULL: Final = 0.8  # of maxmemory: no new jobs from here on
EXPIRE_LIMIT: Final = 100  # jobs of one step
MEMORY_SECONDS: Final = 1.0  # between looks at it
RQ_FUNCTION: Final = "safelight.job"  # a label for RQ's tools: no worker ever imports it


@dataclass(frozen=True, slots=True)
class Submission:
    """What a caller hands in; `request_id` ties the logs of API and worker together."""

    params: GenerationParams
    priority: Priority = "normal"
    deadline_seconds: float | None = None  # from now on
    webhook: Webhook | None = None
    metadata: Mapping[str, Any] | None = None
    idempotency_key: str | None = None
    fingerprint: str = ""  # of the request's body, to tell a repeat from another request under the same key
    request_id: str | None = None


class Submitted(NamedTuple):
    """A job, whether it is new (False: a repeat under the same Idempotency-Key), and what is left of its rate."""

    job: Job
    is_new: bool
    bucket: Bucket | None


@dataclass(frozen=True, slots=True)
class Page:
    """Some jobs, newest first, and the cursor of the next page."""

    jobs: Jobs
    next_cursor: str | None


class JobQueue:
    """The jobs of all tenants in one Redis; every change is one atomic script."""

    def __init__(
        self,
        redis: Redis,
        *,
        retention_ms: int,
        forecast: Forecast | None = None,
        limits: Limits | None = None,
        max_wait: float = 0.0,
    ) -> None:
        """`limits` are for tenants without their own; `max_wait`: seconds a job may be expected to wait (0: any)."""
        self._redis = redis
        self._forecast = forecast
        self._limits = limits or Limits()
        self._max_wait = max_wait
        self._retention_ms = retention_ms
        # Redis' memory, whether it evicts, and when we asked (monotonic).
        self._is_full, self._is_lossy, self._looked_at = False, False, float("-inf")

    async def submit(self, tenant: str, submission: Submission) -> Submitted:
        """Queue a job.

        Raises IdempotencyMismatch where the key was used for another request, QueueUnavailable where Redis is away,
        Overloaded where it is nearly full or the wait would be too long, LimitReached.
        """
        job_id = new_job_id()
        lane = keys.lane_name(keys.queue_name(submission.params.model), submission.priority, tenant)
        digest = key_digest(submission.idempotency_key) if submission.idempotency_key else ""
        async with reachable():
            await self.check_memory()
            outlook = await self.outlook(tenant, submission)
            failpoints.reach("before_submit")
            outcome, found, *bucket = await keys.SUBMIT.call(
                self._redis,
                job_id,
                tenant,
                lane,
                digest,
                submission.fingerprint or "-",
                self._retention_ms,
                json.dumps(record_fields(submission) | ({"work": outlook.work} if outlook else {})),
                self.rules(outlook),
                *rq_fields(job_id, lane),
            )
            failpoints.reach("after_submit", found)
        if outcome == "no_upload":
            raise InvalidParams(f"there is no upload {found}: it has expired or was deleted; upload the picture again")
        if outcome == "mismatch":
            raise key_mismatch()
        if outcome in REFUSALS:
            raise refusal(outcome, float(found), bucket_of(bucket))
        return Submitted(await self.get(tenant, found), outcome == "created", bucket_of(bucket))

    async def work(self, submission: Submission) -> dict[str, str]:
        """The field of the record of a job that is queued later: what it costs."""
        return {"work": (await self._forecast.cost(submission.params)).work} if self._forecast else {}

    def rules(self, outlook: Outlook | None = None, *, part: float = 1.0) -> str:
        """What submit.lua admits a job by; `part` of the longest wait is its own."""
        start = outlook.estimate.start_seconds if outlook and outlook.estimate else 0.0
        return rules(self._limits, start_seconds=start, max_wait=self._max_wait * part)

    async def outlook(self, tenant: str, submission: Submission) -> Outlook | None:
        """What to expect of a job that is handed in now; None where nobody is asked."""
        if self._forecast is None:
            return None
        return await self._forecast.of_request(tenant, submission.params, submission.priority)

    async def find(self, tenant: str, idempotency_key: str, fingerprint: str) -> Job | None:
        """The job that this Idempotency-Key has made. Raises IdempotencyMismatch where it was another request's."""
        async with reachable():
            known: Any = await self._redis.get(f"{keys.IDEMPOTENCY}{tenant}:{key_digest(idempotency_key)}")
        if known is None:
            return None
        first, _, found = known.partition(" ")
        if first != fingerprint:
            raise key_mismatch()
        try:
            return await self.get(tenant, found)
        except NotFound:  # its record has just gone, and the key with it
            return None

    async def get(self, tenant: str, job_id: str) -> Job:
        """The job, with its place in the queue if it waits. Raises NotFound, for another tenant's job too."""
        jobs = await self.read([job_id])
        if not jobs or jobs[0].tenant != tenant:
            raise NotFound("there is no such job")
        return jobs[0]

    async def cancel(self, tenant: str, job_id: str) -> Job:
        """Stop a job for good, whatever it is doing; a finished one stays as it is. Raises NotFound."""
        async with reachable():
            status = await keys.CANCEL.call(self._redis, job_id, tenant, self._retention_ms)
        if status is None:
            raise NotFound("there is no such job")
        return await self.get(tenant, job_id)

    async def expire(self) -> "Texts":
        """End the jobs whose deadline has passed; the model of each that had not ended yet."""
        async with reachable():
            found = await keys.EXPIRE.call(self._redis, EXPIRE_LIMIT, self._retention_ms)
        return [json.loads(params)["model"] for params in found[1::2]]

    async def purge(self, tenant: str, job_id: str) -> None:
        """Forget a finished job's record; its objects are the caller's to remove. Raises NotFound, Conflict."""
        job = await self.get(tenant, job_id)
        if not job.status.is_final:
            raise Conflict(f"job {job_id} is {job.status}; cancel it first")
        async with reachable():
            await keys.PURGE.call(self._redis, job_id)

    async def list(
        self, tenant: str, *, status: JobStatus | None = None, limit: int = 20, cursor: str | None = None
    ) -> Page:
        """A page of jobs, newest first. Raises InvalidRequest for a cursor that no page gave."""
        index = f"{keys.JOBS}{tenant}" + (f":{status}" if status else "")
        most = f"({_position(cursor)}" if cursor else "+inf"
        async with reachable():
            found: list[Any] = await self._redis.zrange(
                index, most, "-inf", byscore=True, desc=True, offset=0, num=limit + 1, withscores=True
            )
        jobs = await self.read([entry[0] for entry in found[:limit]])
        return Page(jobs, str(int(found[limit - 1][1])) if len(found) > limit else None)

    async def depth(self, queue: str) -> tuple[int, float | None]:
        """How many jobs wait in a queue, and since when the oldest does (seconds since the epoch)."""
        async with reachable():
            work: Any = await self._redis.hgetall(keys.WORK + queue)
            pipeline = self._redis.pipeline(transaction=False)
            for lane in (name for name in work if name.startswith(queue)):
                pipeline.zrange(keys.WAITING + lane, 0, 0, withscores=True)
            oldest = [first[0][1] / 1e6 for first in await pipeline.execute() if first]
        return int(work.get("jobs", 0)), min(oldest, default=None)

    async def ping(self) -> None:
        """Raises QueueUnavailable where Redis does not answer."""
        async with reachable():
            await self._redis.ping()

    async def check_memory(self) -> None:
        """Refuse early, so that the jobs that were accepted have room to end. Raises Overloaded, QueueUnavailable."""
        now = time.monotonic()
        if now - self._looked_at > MEMORY_SECONDS:
            self._looked_at = now
            memory = await self._redis.info("memory")
            self._is_lossy = memory.get("maxmemory_policy", "noeviction") != "noeviction"
            self._is_full = 0 < memory["maxmemory"] * FULL <= memory["used_memory"]
        if self._is_lossy:  # looked at when a process starts too, but Redis may be away then, or be set anew
            raise QueueUnavailable("the queue's Redis may throw jobs away: its maxmemory-policy must be noeviction")
        if self._is_full:
            raise Overloaded("the queue's memory is nearly full; try again later", retry_after=10)

    async def read(self, job_ids: Texts) -> Jobs:
        """Those of the jobs that there are, whoever's they are, with their places in the queue."""
        async with reachable():
            pipeline = self._redis.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.hgetall(keys.JOB + job_id)
            found = zip(job_ids, await pipeline.execute(), strict=True)
            hashes = [{"id": job_id, **fields} for job_id, fields in found if fields]
            pipeline = self._redis.pipeline(transaction=False)
            for fields in hashes:
                pipeline.zrank(keys.WAITING + fields["queue"], fields["id"])
            ranks = await pipeline.execute()
        return [job_from_hash(fields, position=rank) for fields, rank in zip(hashes, ranks, strict=True)]


@asynccontextmanager
async def reachable() -> AsyncIterator[None]:
    """Raises QueueUnavailable for what is raised within when Redis is away."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise QueueUnavailable("the queue cannot be reached; try again", retry_after=2) from error


def _position(cursor: str) -> int:
    if not cursor.isdigit() or len(cursor) > 17:
        raise InvalidRequest("cursor must be the next_cursor of an earlier page")
    return int(cursor)


def record_fields(submission: Submission) -> dict[str, str]:
    """What the caller handed in, as the fields of a job's record."""
    # Without defaults: a worker of the version before can read a job that asks for nothing new.
    fields = {"params": submission.params.model_dump_json(exclude_defaults=True)}
    if uploads := submission.params.uploads:
        fields["uploads"] = ",".join(uploads)
    if submission.deadline_seconds:
        fields["deadline_seconds"] = str(submission.deadline_seconds)
    if submission.webhook:
        fields["webhook_url"] = submission.webhook.url
        fields["webhook_events"] = ",".join(submission.webhook.events)
    if submission.metadata:
        fields["metadata"] = json.dumps(submission.metadata)
    if submission.request_id:
        fields["request_id"] = submission.request_id
    return fields


def rq_time(at: datetime | None = None) -> str:
    """A moment as RQ writes it."""
    return (at or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def rq_fields(job_id: str, queue: str) -> Texts:
    """RQ's own hash of the job: field, value, field, value."""
    # The least that RQ's Job.restore reads, because a million waiting jobs have a million of these; test_rq_contract
    # reads it back with RQ. Not compressed: RQ takes both, and so short a text grows.
    call = json.dumps([RQ_FUNCTION, None, [job_id], {}], separators=(",", ":"))
    return ["created_at", rq_time(), "data", call, "origin", queue]


def key_digest(idempotency_key: str) -> str:
    """How an Idempotency-Key is kept: SHA-256, in hex."""
    return hashlib.sha256(idempotency_key.encode()).hexdigest()


def key_mismatch() -> IdempotencyMismatch:
    """The error for a key under which another request came before."""
    return IdempotencyMismatch("this Idempotency-Key was used for another request; use a new key")
