"""A batch as everyone sees it: its record in Redis, and the JSON that the API, its events and its webhook show."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.core.job import JobStatus

WAITS_FOR = {
    "rate": "the next members are queued as your rate limit allows",
    "waiting": "the next members are queued when fewer of your jobs wait",
    "overloaded": "the next members are queued when the service has less to do",
}


class BatchStatus(StrEnum):
    """Where a batch stands; the last two are final."""

    CREATING = "creating"  # members are still being queued
    PROCESSING = "processing"
    CANCELING = "canceling"
    COMPLETED = "completed"
    CANCELED = "canceled"

    @property
    def is_final(self) -> bool:
        return self in (BatchStatus.COMPLETED, BatchStatus.CANCELED)


class Counts(BaseModel):
    """How many members stand where; they add up to `total`."""

    planned: int = Field(description="Not queued yet.")
    queued: int
    processing: int
    succeeded: int
    failed: int
    canceled: int
    expired: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch's record. Times are seconds since the epoch, by Redis' clock."""

    id: str
    tenant: str
    status: BatchStatus
    total: int
    counts: Counts
    created_at: float
    created_us: int
    completed_at: float | None = None
    expires_at: float | None = None
    waits_for: str | None = None  # why no more members are queued now
    metadata: Mapping[str, Any] | None = None


def batch_from_hash(fields: Mapping[str, str]) -> Batch:
    """Read a batch's hash as Redis holds it, with its id beside."""
    counts = {status.value: int(fields.get(f"n:{status}", 0)) for status in JobStatus}
    total = int(fields["total"])
    return Batch(
        id=fields["id"],
        tenant=fields["tenant"],
        status=BatchStatus(fields["status"]),
        total=total,
        counts=Counts(planned=total - sum(counts.values()), **counts),
        created_at=int(fields["created_us"]) / 1e6,
        created_us=int(fields["created_us"]),
        completed_at=int(fields["completed_at"]) / 1e3 if "completed_at" in fields else None,
        expires_at=int(fields["expires_at"]) / 1e3 if "expires_at" in fields else None,
        waits_for=fields.get("waits_for"),
        metadata=json.loads(fields["metadata"]) if "metadata" in fields else None,
    )


class BatchLinks(BaseModel):
    self: str
    jobs: str
    events: str
    cancel: str


class BatchView(BaseModel):
    """A batch as callers see it, the same in every reply, event and webhook."""

    id: str
    object: Literal["batch"] = "batch"
    status: BatchStatus
    total: int
    counts: Counts
    metadata: dict[str, Any]
    created_at: datetime
    completed_at: datetime | None
    expires_at: datetime | None
    links: BatchLinks
    notice: str | None = None  # why members are not queued yet


def batch_view(batch: Batch, public_url: str) -> BatchView:
    """The JSON of a batch."""
    base = f"{public_url}/v1/batches/{batch.id}"
    return BatchView(
        id=batch.id,
        status=batch.status,
        total=batch.total,
        counts=batch.counts,
        metadata=dict(batch.metadata or {}),
        created_at=datetime.fromtimestamp(batch.created_at, UTC),
        completed_at=datetime.fromtimestamp(batch.completed_at, UTC) if batch.completed_at else None,
        expires_at=datetime.fromtimestamp(batch.expires_at, UTC) if batch.expires_at else None,
        links=BatchLinks(self=base, jobs=f"{base}/jobs", events=f"{base}/events", cancel=f"{base}/cancel"),
        notice=WAITS_FOR.get(batch.waits_for or ""),
    )
