"""JobQueue: submit, get, cancel, list, delete, depth. The callers' side of the queue, asynchronous."""

import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.core import redis_keys as keys
from app.core.errors import Conflict, IdempotencyMismatch, InvalidRequest, NotFound, QueueUnavailable
from app.core.job import Job, JobStatus, Webhook, job_from_hash, new_job_id
from app.core.params import GenerationParams

Jobs = list[Job]
Texts = list[str]
RQ_FUNCTION: Final = "safelight.job"  # a label for RQ's tools: no worker ever imports it


@dataclass(frozen=True, slots=True)
class Submission:
    """What a caller hands in; `request_id` ties the logs of API and worker together."""

    params: GenerationParams
    webhook: Webhook | None = None
    metadata: Mapping[str, Any] | None = None
    idempotency_key: str | None = None
    fingerprint: str = ""  # of the request's body, to tell a repeat from another request under the same key
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Some jobs, newest first, and the cursor of the next page."""

    jobs: Jobs
    next_cursor: str | None


class JobQueue:
    """The jobs of all tenants in one Redis; every change is one atomic script."""

    def __init__(self, redis: Redis, *, retention_ms: int) -> None:
        self._redis = redis
        self._retention_ms = retention_ms

    async def submit(self, tenant: str, submission: Submission) -> tuple[Job, bool]:
        """Queue a job; the job, and whether it is new (False: a repeat under the same Idempotency-Key).

        Raises IdempotencyMismatch where the key was used for another request, QueueUnavailable where Redis is away.
        """
        job_id = new_job_id()
        queue = keys.queue_name(submission.params.model)
        digest = hashlib.sha256(submission.idempotency_key.encode()).hexdigest() if submission.idempotency_key else ""
        async with _reachable():
            outcome, found = await keys.SUBMIT.call(
                self._redis,
                job_id,
                tenant,
                queue,
                digest,
                submission.fingerprint or "-",
                self._retention_ms,
                json.dumps(_fields(submission)),
                *_rq_fields(job_id, queue),
            )
        if outcome == "mismatch":
            raise IdempotencyMismatch("this Idempotency-Key was used for another request; use a new key")
        return await self.get(tenant, found), outcome == "created"

    async def get(self, tenant: str, job_id: str) -> Job:
        """The job, with its place in the queue if it waits. Raises NotFound, for another tenant's job too."""
        jobs = await self._read([job_id])
        if not jobs or jobs[0].tenant != tenant:
            raise NotFound("there is no such job")
        return jobs[0]

    async def cancel(self, tenant: str, job_id: str) -> Job:
        """Stop a job for good, whatever it is doing; a finished one stays as it is. Raises NotFound."""
        async with _reachable():
            status = await keys.CANCEL.call(self._redis, job_id, tenant, self._retention_ms)
        if status is None:
            raise NotFound("there is no such job")
        return await self.get(tenant, job_id)

    async def purge(self, tenant: str, job_id: str) -> None:
        """Forget a finished job's record; its objects are the caller's to remove. Raises NotFound, Conflict."""
        job = await self.get(tenant, job_id)
        if not job.status.is_final:
            raise Conflict(f"job {job_id} is {job.status}; cancel it first")
        async with _reachable():
            await keys.PURGE.call(self._redis, job_id)

    async def list(
        self, tenant: str, *, status: JobStatus | None = None, limit: int = 20, cursor: str | None = None
    ) -> Page:
        """A page of jobs, newest first. Raises InvalidRequest for a cursor that no page gave."""
        index = f"{keys.JOBS}{tenant}" + (f":{status}" if status else "")
        most = f"({_position(cursor)}" if cursor else "+inf"
        async with _reachable():
            found: list[Any] = await self._redis.zrange(
                index, most, "-inf", byscore=True, desc=True, offset=0, num=limit + 1, withscores=True
            )
        jobs = await self._read([entry[0] for entry in found[:limit]])
        return Page(jobs, str(int(found[limit - 1][1])) if len(found) > limit else None)

    async def depth(self, queue: str) -> tuple[int, float | None]:
        """How many jobs wait in a queue, and since when the oldest does (seconds since the epoch)."""
        async with _reachable():
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.zcard(keys.WAITING + queue)
            pipeline.zrange(keys.WAITING + queue, 0, 0, withscores=True)
            count, oldest = await pipeline.execute()
        return count, oldest[0][1] / 1e6 if oldest else None

    async def ping(self) -> None:
        """Raises QueueUnavailable where Redis does not answer."""
        async with _reachable():
            await self._redis.ping()

    async def _read(self, job_ids: Texts) -> Jobs:
        async with _reachable():
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
async def _reachable() -> AsyncIterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise QueueUnavailable("the queue cannot be reached; try again", retry_after=2) from error


def _position(cursor: str) -> int:
    if not cursor.isdigit() or len(cursor) > 17:
        raise InvalidRequest("cursor must be the next_cursor of an earlier page")
    return int(cursor)


def _fields(submission: Submission) -> dict[str, str]:
    fields = {"params": submission.params.model_dump_json()}
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


def _rq_fields(job_id: str, queue: str) -> Texts:
    # The least that RQ's Job.restore reads, because a million waiting jobs have a million of these; test_rq_contract
    # reads it back with RQ. Not compressed: RQ takes both, and so short a text grows.
    call = json.dumps([RQ_FUNCTION, None, [job_id], {}], separators=(",", ":"))
    return ["created_at", rq_time(), "data", call, "origin", queue]
