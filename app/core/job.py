"""A job as everyone sees it: its record in Redis, and the JSON that the API, its events and its webhooks show."""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from app.core.params import GenerationParams

Priority = Literal["high", "normal", "low"]


class JobStatus(StrEnum):
    """Where a job stands; the last four are final."""

    QUEUED = "queued"
    PROCESSING = "processing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        return self not in (JobStatus.QUEUED, JobStatus.PROCESSING)


Role = Literal["image", "grid"]


class Safety(BaseModel):
    """What the model's safety checker said of a picture, and whether it was blurred for it."""

    flagged: bool
    scores: dict[str, float] = Field(description="By the checker's own labels.")
    blurred: bool = False


class Output(BaseModel):
    """A stored picture: where it lies and what it is. A URL is made when somebody asks."""

    type: Literal["image"] = "image"
    role: Role = "image"  # grid: all images of the job on one sheet
    key: str
    seed: int
    width: int
    height: int
    content_type: str
    bytes: int
    sha256: str
    safety: Safety | None = None  # of models with a checker


class Progress(BaseModel):
    """How far a running job is: its phase, and denoising steps done of all its images together."""

    phase: str = Field(examples=["denoising"])
    step: int
    steps: int
    eta_seconds: float | None = Field(None, description="Until it has ended, as the worker saw it at that moment.")


class Timings(BaseModel):
    """Seconds spent in each part of a job's life."""

    queue_seconds: float
    encode_seconds: float
    denoise_seconds: float
    decode_seconds: float
    store_seconds: float


class JobFailure(BaseModel):
    """Why a job failed: a stable code and a sentence; never exception text."""

    code: str
    message: str


WebhookEvent = Literal["job.processing", "job.succeeded", "job.failed", "job.canceled", "job.expired"]
TERMINAL_EVENTS: Final[list[WebhookEvent]] = ["job.succeeded", "job.failed", "job.canceled", "job.expired"]
WebhookEvents = Annotated[list[WebhookEvent], Field(min_length=1, max_length=5)]
EndpointEvent = WebhookEvent | Literal["batch.completed"]
EndpointEvents = Annotated[list[EndpointEvent], Field(min_length=1, max_length=6)]
DEFAULT_ENDPOINT_EVENTS: Final[list[EndpointEvent]] = [*TERMINAL_EVENTS, "batch.completed"]


class Webhook(BaseModel):
    """Where to tell about a job, and of what; terminal events unless `events` says otherwise."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(max_length=2048)
    events: WebhookEvents = TERMINAL_EVENTS


@dataclass(frozen=True, slots=True)
class Job:
    """A job's record. Times are seconds since the epoch, by Redis' clock."""

    id: str
    tenant: str
    queue: str
    status: JobStatus
    params: GenerationParams
    created_at: float
    created_us: int
    fence: int
    tries: int
    deaths: int
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    deadline_at: float | None = None
    progress: Progress | None = None
    outputs: tuple[Output, ...] = ()
    uploads: Mapping[str, str] = field(default_factory=dict)  # those its params name -> their storage keys
    error: JobFailure | None = None
    timings: Timings | None = None
    webhook: Webhook | None = None
    metadata: Mapping[str, Any] | None = None
    request_id: str | None = None
    batch_id: str | None = None
    batch_index: int | None = None  # which of the batch's requests it is, from 0
    queue_position: int | None = None  # 0: next in its lane; known only to those who ask for it
    work: str = ""  # what was expected of it when it was handed in, see forecast.Outlook

    @property
    def expected_seconds(self) -> float | None:
        """How long it was expected to take, from its submission to its end; None where that was not known."""
        parts = self.work.split()
        return int(parts[3]) / 1e3 if len(parts) > 3 else None

    @property
    def priority(self) -> Priority:
        """The lane it was submitted to."""
        return cast(Priority, self.queue.partition(":")[2] or "normal")


T = TypeVar("T", bound=BaseModel)

_OUTPUTS = TypeAdapter(tuple[Output, ...])
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def new_job_id() -> str:
    """A fresh id: see `new_id`."""
    return new_id("job")


def new_id(kind: str) -> str:
    """48 bits of time and 80 of chance in Crockford's base 32 (the ULID layout), so ids of a kind sort by age."""
    number = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    return f"{kind}_" + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def job_from_hash(fields: Mapping[str, str], *, position: int | None = None) -> Job:
    """Read a job's hash as Redis holds it, with its id beside."""
    return Job(
        id=fields["id"],
        tenant=fields["tenant"],
        queue=fields["queue"],
        status=JobStatus(fields["status"]),
        params=GenerationParams.model_validate_json(fields["params"]),
        created_at=int(fields["created_us"]) / 1e6,
        created_us=int(fields["created_us"]),
        fence=int(fields.get("fence", 0)),
        tries=int(fields.get("tries", 0)),
        deaths=int(fields.get("deaths", 0)),
        started_at=_seconds(fields.get("started_at")),
        completed_at=_seconds(fields.get("completed_at")),
        expires_at=_seconds(fields.get("expires_at")),
        deadline_at=_seconds(fields.get("deadline_at")),
        progress=_parsed(Progress, fields.get("progress")),
        outputs=_OUTPUTS.validate_json(fields.get("outputs", "[]")),
        uploads=dict(pair.split("=", 1) for pair in fields.get("uploads", "").split(",") if pair),
        error=_parsed(JobFailure, fields.get("error")),
        timings=_parsed(Timings, fields.get("timings")),
        webhook=_webhook(fields),
        metadata=json.loads(fields["metadata"]) if "metadata" in fields else None,
        request_id=fields.get("request_id"),
        batch_id=fields.get("batch"),
        batch_index=int(fields["batch_index"]) if "batch_index" in fields else None,
        queue_position=position,
        work=fields.get("work", ""),
    )


def _seconds(milliseconds: str | None) -> float | None:
    return int(milliseconds) / 1e3 if milliseconds else None


def _parsed(kind: type[T], text: str | None) -> T | None:
    return kind.model_validate_json(text) if text else None


def _webhook(fields: Mapping[str, str]) -> Webhook | None:
    if "webhook_url" not in fields:
        return None
    return Webhook.model_validate({"url": fields["webhook_url"], "events": fields["webhook_events"].split(",")})


class OutputView(BaseModel):
    """A picture as callers see it; the URL expires."""

    type: Literal["image"]
    role: Role = Field("image", description="grid: all images of the job on one sheet.")
    url: str
    seed: int
    width: int
    height: int
    content_type: str
    bytes: int
    sha256: str
    safety: Safety | None = Field(None, description="Of models with a safety checker.")


class Links(BaseModel):
    self: str
    events: str
    cancel: str


class EstimateView(BaseModel):
    """What to expect of a job from now on, if nothing else is handed in that goes before it."""

    cost_seconds: float = Field(description="Of the denoiser, in full batches: what limits and shares are counted in.")
    start_seconds: float | None = Field(description="Until a worker takes it; null: no live worker serves the model.")
    finish_seconds: float | None = Field(description="Until it has ended.")


class JobView(BaseModel):
    """A job as callers see it, the same in every reply, event and webhook."""

    id: str
    object: Literal["job"] = "job"
    status: JobStatus
    model: str
    params: GenerationParams
    priority: Priority
    progress: Progress | None
    queue_position: int | None
    estimate: EstimateView | None = Field(None, description="Null where the job has ended, or nothing is known.")
    outputs: list[OutputView]
    error: JobFailure | None
    metadata: dict[str, Any]
    batch_id: str | None
    batch_index: int | None
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    expires_at: datetime | None
    deadline_at: datetime | None
    timings: Timings | None
    links: Links
    notice: str | None = None  # what a caller should know, e.g. that no worker serves the model


def view(job: Job, public_url: str, sign: Callable[[Output], str]) -> JobView:
    """The JSON of a job; `sign` makes an expiring URL for an output, now."""
    base = f"{public_url}/v1/jobs/{job.id}"
    return JobView(
        id=job.id,
        status=job.status,
        model=job.params.model,
        params=job.params,
        priority=job.priority,
        progress=job.progress,
        queue_position=job.queue_position,
        outputs=[OutputView(url=sign(o), **o.model_dump(exclude={"key"})) for o in job.outputs],
        error=job.error,
        metadata=dict(job.metadata or {}),
        batch_id=job.batch_id,
        batch_index=job.batch_index,
        created_at=_time(job.created_at),
        started_at=_time(job.started_at) if job.started_at else None,
        completed_at=_time(job.completed_at) if job.completed_at else None,
        expires_at=_time(job.expires_at) if job.expires_at else None,
        deadline_at=_time(job.deadline_at) if job.deadline_at else None,
        timings=job.timings,
        links=Links(self=base, events=f"{base}/events", cancel=f"{base}/cancel"),
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
