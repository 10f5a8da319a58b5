"""Batches: many jobs as one resource, promised at once and queued from a plan, some at a time.

A plan is the list of a batch's members in Redis, each complete; one step turns it into the batch. From then on it is
promised, whoever dies: every process of the API queues members from the plans it finds, in steps that hold Redis up for
a few milliseconds, and only as fast as the tenant's limits let jobs in.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, cast

import structlog
from prometheus_client import Counter
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from app.core import redis_keys as keys
from app.core.batch import Batch, BatchStatus, batch_from_hash
from app.core.errors import Conflict, InvalidParams, NotFound, Overloaded, TooLarge, Unavailable
from app.core.job import JobStatus, Priority, new_id, new_job_id
from app.core.params import GenerationParams
from app.core.queue import JobQueue, Page, Submission, key_digest, key_mismatch, reachable, record_fields, rq_fields

log = structlog.get_logger()

MAX_MEMBERS: Final = 10_000
MAX_OPEN: Final = 20  # batches of a tenant
STEP: Final = 20  # members of one step: Redis does nothing else meanwhile
PART: Final = 0.5  # of the longest wait that is allowed: the rest is for what comes one by one
PLAN_STEP: Final = 100  # members written to a plan at a time
PLAN_BYTES: Final = 64 * 2**20  # of a plan: a matrix repeats its request for each member
OPEN_BYTES: Final = 128 * 2**20  # of the plans of a tenant's open batches
OPEN_PART: Final = 0.1  # of Redis' memory, where that is less: no tenant alone fills it
PLAN_SECONDS: Final = 600  # a plan that no batch was made of goes after this
DELETING: Final = "deleting"  # a status that nobody is shown
LOOK_SECONDS: Final = 1.0  # between two looks for batches that another process left

Texts = list[str]
Batches_ = list[Batch]


@dataclass(frozen=True, slots=True)
class BatchSubmission:
    """What a caller hands in beside the members."""

    total: int  # members
    webhook_url: str | None = None
    metadata: Mapping[str, Any] | None = None
    idempotency_key: str | None = None
    fingerprint: str = "-"  # of the request's body
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a plan that was written down takes."""

    uploads: Collection[str]  # that its members are made from
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class BatchPage:
    """Some batches, newest first, and the cursor of the next page."""

    batches: Batches_
    next_cursor: str | None


class Batches:
    """The batches of all tenants. `run` keeps queueing and cancelling their members until it is cancelled itself."""

    def __init__(self, redis: Redis, queue: JobQueue, *, retention_ms: int, jobs_total: Counter) -> None:
        self._redis = redis
        self._queue = queue
        self._retention_ms = retention_ms
        self._jobs_total = jobs_total
        self._bell = asyncio.Event()

    async def find(self, tenant: str, about: BatchSubmission) -> Batch | None:
        """The batch that this Idempotency-Key has made. Raises IdempotencyMismatch where it was another request's."""
        if about.idempotency_key is None:
            return None
        async with reachable():
            known: Any = await self._redis.get(f"{keys.IDEMPOTENCY}{tenant}:{key_digest(about.idempotency_key)}")
        if known is None:
            return None
        fingerprint, _, found = known.partition(" ")
        if fingerprint != about.fingerprint:
            raise key_mismatch()
        try:
            return await self.get(tenant, found)
        except NotFound:  # its record has just gone, and the key with it
            return None

    async def create(
        self, tenant: str, about: BatchSubmission, members: AsyncIterable[Submission]
    ) -> tuple[Batch, bool]:
        """Promise a batch; it, and whether it is new (False: a repeat under the same Idempotency-Key).

        Whatever `members` raises leaves nothing behind. Raises IdempotencyMismatch, Conflict where too many or too
        large batches are open, InvalidParams where an upload has gone, TooLarge, QueueUnavailable, Overloaded.
        """
        batch_id = new_id("batch")
        async with reachable():
            await self._queue.check_memory()
            most = await self._open_bytes()
            try:
                plan = await self._plan(tenant, batch_id, members, min(PLAN_BYTES, most))
            except BaseException:
                # Best effort: it goes by itself after a while.
                with suppress(RedisError, OSError):
                    await asyncio.shield(self._redis.unlink(keys.BATCH_PLAN + batch_id))
                raise
            # If only its reply is lost the batch is promised: its plan must stay.
            outcome, found = await self._create(tenant, batch_id, about, plan, most)
        if outcome == "mismatch":
            raise key_mismatch()
        if outcome == "many":
            raise Conflict(f"you have {MAX_OPEN} batches that have not ended; wait for one, or cancel it")
        if outcome == "heavy":
            raise Conflict(
                f"with this one your batches that have not ended would take more than {most} bytes; "
                "wait for one, or cancel it"
            )
        if outcome == "no_upload":
            raise InvalidParams(f"{found}: there is no such upload any more")
        if outcome == "torn":
            raise Unavailable("the batch took too long to be written down; try again", retry_after=2)
        self._bell.set()
        return await self.get(tenant, found), outcome == "created"

    async def get(self, tenant: str, batch_id: str) -> Batch:
        """A batch. Raises NotFound, for another tenant's too."""
        found = await self._read([batch_id])
        if not found or found[0].tenant != tenant:
            raise NotFound("there is no such batch")
        return found[0]

    async def list(self, tenant: str, *, limit: int, cursor: str | None = None) -> BatchPage:
        """A page of batches, newest first."""
        most = f"({int(cursor)}" if cursor else "+inf"
        async with reachable():
            found: Any = await self._redis.zrange(
                keys.BATCHES + tenant, most, "-inf", byscore=True, desc=True, offset=0, num=limit + 1, withscores=True
            )
        batches = await self._read([entry[0] for entry in found[:limit]])
        return BatchPage(batches, str(int(found[limit - 1][1])) if len(found) > limit else None)

    async def jobs(
        self, tenant: str, batch_id: str, *, status: JobStatus | None, limit: int, cursor: str | None = None
    ) -> Page:
        """A page of a batch's jobs in the order of its requests. Raises NotFound."""
        await self.get(tenant, batch_id)
        index = keys.BATCH_JOBS + batch_id + (f":{status}" if status else "")
        async with reachable():
            found: Any = await self._redis.zrange(
                index,
                f"({int(cursor)}" if cursor else "-inf",
                "+inf",
                byscore=True,
                offset=0,
                num=limit + 1,
                withscores=True,
            )
        jobs = await self._queue.read([entry[0] for entry in found[:limit]])
        return Page(jobs, str(int(found[limit - 1][1])) if len(found) > limit else None)

    async def cancel(self, tenant: str, batch_id: str) -> Batch:
        """Queue no more members and stop those that were queued; one that has ended stays as it is. Raises NotFound."""
        await self._stop(tenant, batch_id, "canceling")
        return await self.get(tenant, batch_id)

    async def delete(self, tenant: str, batch_id: str) -> None:
        """Cancel a batch and forget it at once; its jobs and their objects follow. Raises NotFound."""
        await self._stop(tenant, batch_id, DELETING)

    async def run(self) -> None:
        """Queue, cancel and delete the members of whatever batches there are."""
        while True:
            self._bell.clear()
            try:
                is_idle = not await self._step_all()
            except (RedisError, OSError) as error:
                log.warning("batches.redis_away", error=type(error).__name__)
                is_idle = True
            if is_idle:
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._bell.wait()

    async def _open_bytes(self) -> int:
        """What the plans of a tenant's open batches may take together."""
        memory: Any = await self._redis.info("memory")
        return min(OPEN_BYTES, int(memory["maxmemory"] * OPEN_PART) or OPEN_BYTES)

    async def _plan(self, tenant: str, batch_id: str, members: AsyncIterable[Submission], most: int) -> Plan:
        """Write the members down, in `most` bytes at the most. Raises TooLarge."""
        key, lines, index, uploads, size = keys.BATCH_PLAN + batch_id, Texts(), 0, set[str](), 0
        async for member in members:
            uploads.update(member.params.uploads)
            lines.append(await self._member(tenant, batch_id, index, member))
            index += 1
            size += len(lines[-1])
            if size > most:
                raise TooLarge(f"the batch's jobs take more than {most} bytes; hand it in as several")
            if len(lines) == PLAN_STEP:
                await self._write(key, lines)
                lines = []
        if lines:
            await self._write(key, lines)
        return Plan(uploads, size)

    async def _write(self, key: str, lines: Texts) -> None:
        await self._queue.check_memory()
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.rpush(key, *lines)
        pipeline.expire(key, PLAN_SECONDS)
        await pipeline.execute()

    async def _member(self, tenant: str, batch_id: str, index: int, member: Submission) -> str:
        """What submit.lua takes to queue it, but for the rules of admission, which are those of that moment."""
        job_id = new_job_id()
        lane = keys.lane_name(keys.queue_name(member.params.model), member.priority, tenant)
        fields = record_fields(member) | await self._queue.work(member) | {"batch": batch_id, "batch_index": str(index)}
        about = [job_id, tenant, lane, "", "-", self._retention_ms, json.dumps(fields), ""]
        return json.dumps([*about, *rq_fields(job_id, lane)], separators=(",", ":"))

    async def _create(
        self, tenant: str, batch_id: str, about: BatchSubmission, plan: Plan, most: int
    ) -> tuple[str, str]:
        fields = {"total": str(about.total), "plan_bytes": str(plan.size)}
        if about.webhook_url:
            fields["webhook_url"] = about.webhook_url
        if about.metadata:
            fields["metadata"] = json.dumps(about.metadata)
        if about.request_id:
            fields["request_id"] = about.request_id
        digest = key_digest(about.idempotency_key) if about.idempotency_key else ""
        outcome, found = await keys.BATCH_CREATE.call(
            self._redis,
            batch_id,
            tenant,
            digest,
            about.fingerprint,
            self._retention_ms,
            json.dumps(fields),
            MAX_OPEN,
            most,
            *sorted(plan.uploads),
        )
        return outcome, found

    async def _stop(self, tenant: str, batch_id: str, wanted: str) -> None:
        async with reachable():
            if not await keys.BATCH_STOP.call(self._redis, batch_id, tenant, wanted, self._retention_ms):
                raise NotFound("there is no such batch")
        self._bell.set()

    async def _read(self, batch_ids: Texts) -> Batches_:
        async with reachable():
            pipeline = self._redis.pipeline(transaction=False)
            for batch_id in batch_ids:
                pipeline.hgetall(keys.BATCH + batch_id)
            found = zip(batch_ids, await pipeline.execute(), strict=True)
        known = ({"id": batch_id, **fields} for batch_id, fields in found if fields)
        return [batch_from_hash(fields) for fields in known if fields["status"] != DELETING]

    async def _step_all(self) -> bool:
        """One step for each batch that has something to be done; whether there was any."""
        ids: Any = await self._redis.zrange(keys.BATCH_WORK, 0, -1)
        has_worked = False
        for batch_id in ids:
            began = time.monotonic()
            try:
                has_worked |= await self._step(batch_id)
            except (ValueError, LookupError, TypeError, ResponseError):
                # Written by another version, or a bug of ours: the other batches go on.
                log.exception("batch.not_stepped", batch_id=batch_id)
            # As long again as the step took, Redis is there for the others.
            await asyncio.sleep(time.monotonic() - began)
        return has_worked

    async def _step(self, batch_id: str) -> bool:
        if await self._redis.hget(keys.BATCH + batch_id, "status") == BatchStatus.CREATING:
            return await self._feed(batch_id)
        done, *queues = await keys.BATCH_CLEAR.call(self._redis, batch_id, STEP, self._retention_ms)
        for queue in queues:
            self._jobs_total.labels(queue.removeprefix(keys.QUEUE_PREFIX), JobStatus.CANCELED).inc()
        return int(done) > 0

    async def _feed(self, batch_id: str) -> bool:
        try:
            await self._queue.check_memory()
        except Overloaded:
            return False
        queued, _, _ = await keys.BATCH_FEED.call(
            self._redis, batch_id, STEP, await self._rules(batch_id), self._retention_ms
        )
        return int(queued) > 0

    async def _rules(self, batch_id: str) -> str:
        """What the next members are let in by, as any job, but for a part of the longest wait."""
        text: Any = await self._redis.lindex(keys.BATCH_PLAN + batch_id, 0)
        if text is None:
            return self._queue.rules()
        _, tenant, lane, _, _, _, fields, *_ = json.loads(text)
        member = Submission(
            GenerationParams.model_validate_json(json.loads(fields)["params"]),
            priority=cast(Priority, lane.partition(":")[2] or "normal"),
        )
        return self._queue.rules(await self._queue.outlook(tenant, member), part=PART)
