"""Claim, beat, commit, hand back: each one fenced, atomic step in Redis. A fence that has moved on means: not yours."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple

from redis import Redis

from app.core import failpoints
from app.core import redis_keys as keys
from app.core.job import Job, JobFailure, JobStatus, job_from_hash
from app.core.queue import EXPIRE_LIMIT, rq_time

REAP_LIMIT: Final = 100
AUDIT_LIMIT: Final = 10
UNREAD_MS: Final = 300_000  # a new version is rolled out within this
POISON: Final = JobFailure(code="poison", message="The job ended its worker three times, at last while alone in it.")


class Turn(Enum):
    """What a worker hears that asked for a job and got none."""

    NOTHING = "nothing waits"
    AGAIN = "ask again: there were only cancelled jobs so far"
    DRAIN = "become empty first: a job that must run alone waits"


@dataclass(frozen=True, slots=True)
class Claim:
    """A job in this worker's hands, for as long as `fence` holds. `job` is None where its record cannot be read."""

    id: str
    fence: int
    is_alone: bool
    job: Job | None

    @property
    def tenant(self) -> str:
        """Whose job it is; nobody's where its record cannot be read."""
        return self.job.tenant if self.job else ""


@dataclass(frozen=True, slots=True)
class Beat:
    """One held job and, where it moved, its progress as JSON."""

    id: str
    fence: int
    progress: str = ""


class Heard(NamedTuple):
    """What Redis says to a beat: the ids that are no longer ours, and those that somebody wants previews of."""

    lost: list[str]
    watched: set[str]


class Leases:
    """The worker's side of the queue. `redis` decodes replies; every call is one script."""

    def __init__(self, redis: Redis, worker: str, *, lease_ms: int, retention_ms: int, max_running: int = 0) -> None:
        """`max_running`: jobs of a tenant at once, over all workers, where its own limits do not say; 0: any number."""
        self._redis = redis
        self._max_running = max_running
        self._worker = worker
        self._lease_ms = lease_ms
        self._retention_ms = retention_ms
        self._ticket = 0

    def claim(self, queue: str, *, is_idle: bool, passing: Iterable[str] = ()) -> Claim | Turn:
        """Pop the next job of a queue and take it, or hear why there is none; none of the tenants `passing`.

        After an error the next call gives the job that the lost reply held, if it took one. One thread calls this.
        """
        failpoints.reach("before_claim")
        about = (self._worker, queue, self._lease_ms, int(is_idle), rq_time(), self._ticket, self._max_running)
        reply = keys.CLAIM.run(self._redis, *about, *passing)
        failpoints.reach("after_claim", reply[1] if reply and reply[0] == "job" else "")
        self._ticket += 1
        if reply is None:
            return Turn.NOTHING
        if reply[0] != "job":
            return Turn.DRAIN if reply[0] == "drain" else Turn.AGAIN
        _, job_id, fence, alone, *flat = reply
        return Claim(job_id, int(fence), alone == "1", _read(job_id, dict(zip(flat[::2], flat[1::2], strict=True))))

    def beat(self, beats: Iterable[Beat]) -> Heard:
        """Extend the leases of these jobs and write their progress."""
        flat = [part for b in beats for part in (b.id, b.fence, b.progress)]
        failpoints.reach("before_beat")
        lost, watched = keys.BEAT.run(self._redis, self._lease_ms, *flat)
        failpoints.reach("after_beat")
        return Heard(lost, set(watched))

    def show(self, claim: Claim, preview: str, *, kept: int) -> bool:
        """Publish a preview (JSON) to those who watch, the latest `kept` of the job being kept; False: not ours."""
        return bool(keys.PREVIEW.run(self._redis, claim.id, claim.fence, kept, preview))

    def mark(self, marks: Iterable[tuple[Claim, str]]) -> None:
        """Say where in their walk jobs are: should their worker die, it was there. See HeldJob.walk."""
        keys.MARK.run(self._redis, *(part for claim, walk in marks for part in (claim.id, claim.fence, walk)))

    def commit(self, claim: Claim, status: JobStatus, fields: Mapping[str, Any]) -> bool:
        """Write a job's end; False where the fence no longer holds. Safe to repeat after a lost reply."""
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
        failpoints.reach("before_commit", claim.id)
        outcome = keys.COMMIT.run(
            self._redis, claim.id, claim.fence, status, self._retention_ms, json.dumps(texts), rq_time()
        )
        failpoints.reach("after_commit", claim.id)
        return bool(outcome != "lost")

    def release(self, claim: Claim) -> bool:
        """Hand a job back unfinished, its tries unchanged; False where the fence no longer holds."""
        failpoints.reach("before_release", claim.id)
        outcome = keys.RELEASE.run(self._redis, claim.id, claim.fence, "")
        failpoints.reach("after_release", claim.id)
        return bool(outcome == "done")

    def pass_on(self, claim: Claim) -> bool:
        """Leave a job that we cannot read to a worker of another version; False where there was none for too long."""
        return bool(keys.RELEASE.run(self._redis, claim.id, claim.fence, UNREAD_MS) != "unreadable")

    def is_committed(self, claim: Claim) -> bool:
        """Whether this very claim's end is what the job's record holds."""
        return bool(self._redis.hget(keys.JOB + claim.id, "committed") == str(claim.fence))

    def reap(self) -> dict[str, str]:
        """Put the jobs of the dead back; what became of each: requeued, alone or poison."""
        reply = keys.REAP.run(self._redis, REAP_LIMIT, self._retention_ms, POISON.model_dump_json(), rq_time())
        return dict(zip(reply[::2], reply[1::2], strict=True))

    def expire(self) -> list[str]:
        """End the jobs whose deadline has passed, whoever has them; the model of each."""
        found = keys.EXPIRE.run(self._redis, EXPIRE_LIMIT, self._retention_ms)
        return [json.loads(params)["model"] for params in found[1::2]]

    def audit(self, queue: str) -> list[str]:
        """Put jobs that are in no place where they belong; their ids."""
        found: list[str] = keys.AUDIT.run(self._redis, queue, AUDIT_LIMIT)
        return found


def _read(job_id: str, fields: Mapping[str, str]) -> Job | None:
    try:
        return job_from_hash({"id": job_id, **fields})
    except (KeyError, ValueError):  # written by another version: the job fails, the worker lives
        return None
