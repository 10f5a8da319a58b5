"""The JSON that routes take and give, besides a job's own (core/job.py) and an error's (problems.py)."""

import json
from datetime import date as Date  # noqa: N812  # a field of that name hides it
from datetime import datetime
from typing import Annotated, Any, Final, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from app.core import api_keys
from app.core.api_keys import Scope
from app.core.catalog import Defaults, Limits, OptionalParam, Quality
from app.core.endpoints import Disabled
from app.core.job import (
    DEFAULT_ENDPOINT_EVENTS,
    EndpointEvent,
    EndpointEvents,
    EstimateView,
    JobStatus,
    Priority,
    Webhook,
)
from app.core.params import GenerationParams, GenerationRequest
from app.core.webhooks import Outcome

MAX_METADATA: Final = 8192  # bytes of JSON
MAX_DEPTH: Final = 16

T = TypeVar("T")


def _is_small(metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if _depth(metadata) > MAX_DEPTH:
        raise ValueError(f"metadata may be nested {MAX_DEPTH} deep at most")
    if len(json.dumps(metadata)) > MAX_METADATA:
        raise ValueError(f"metadata may have {MAX_METADATA} bytes of JSON at most")
    return metadata


def _depth(value: JsonValue) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


Metadata = Annotated[dict[str, JsonValue], AfterValidator(_is_small)]


class JobRequest(GenerationRequest):
    """A picture to make: what it shows, and whom to tell."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "a smiling cat"},
                {
                    "prompt": "a smiling cat",
                    "negative_prompt": "dog",
                    "num_inference_steps": 20,
                    "guidance_scale": 5.0,
                    "seed": 7,
                    "num_images": 2,
                    "webhook": {"url": "https://example.com/hook", "events": ["job.succeeded"]},
                    "metadata": {"order": 17},
                },
            ]
        }
    )

    priority: Priority = Field(
        "normal", description="Of thirteen jobs of a model nine high ones, three normal and one low one are taken."
    )
    deadline_seconds: float | None = Field(
        None, ge=0.1, le=7 * 86400, description="Not finished so long after it was accepted, the job ends as expired."
    )
    webhook: Webhook | None = None
    metadata: Metadata | None = Field(None, description="Yours: kept with the job and shown with it. At most 8 kB.")

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        # Python's parser lets NaN and half a surrogate pair through; neither can be written again.
        try:
            json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise ValueError("NaN, unpaired surrogates and very deep nesting are not accepted") from error
        return body

    def generation(self) -> GenerationRequest:
        """The part that decides the picture."""
        return GenerationRequest.model_validate(self.model_dump(include=set(GenerationRequest.model_fields)))


class MemoryView(BaseModel):
    """Whether a worker's memory holds a request."""

    fits: bool | None = Field(description="Null: not known.")
    reason: str


class DryRunView(BaseModel):
    """What would become of a request; nothing was queued."""

    object: Literal["dry_run"] = "dry_run"
    params: GenerationParams = Field(description="Complete, with the seed that was drawn this time.")
    estimate: EstimateView
    cost_is_known: bool = Field(description="False: guessed, because no worker has said how fast the model is.")
    alone_seconds: float = Field(description="From its start to its end where it has a worker to itself.")
    memory: MemoryView


class LimitsChange(BaseModel):
    """Limits of a tenant; null gives it the service's own again, what is absent stays. 0: no limit."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    rate: float | None = Field(None, ge=0, le=1e9, description="Denoiser-seconds it may hand in, a second.")
    burst: float | None = Field(None, ge=0, le=1e9, description="Denoiser-seconds at once; 0: a minute of the rate.")
    max_running: int | None = Field(None, ge=0, le=10**9, description="Jobs in the making, over all workers.")
    max_waiting: int | None = Field(None, ge=0, le=10**9, description="Jobs that wait.")
    max_streams: int | None = Field(None, ge=0, le=10**9, description="Event streams at each process of the API.")
    weight: float | None = Field(None, ge=0.01, le=1000, description="Of its share where several tenants' jobs wait.")


class LimitsView(BaseModel):
    """What holds for a tenant; 0: no limit."""

    object: Literal["limits"] = "limits"
    tenant: str
    rate: float
    burst: float
    max_running: int
    max_waiting: int
    max_streams: int
    weight: float
    own: list[str] = Field(description="Those that are the tenant's own; the others are the service's.")
    running: int = Field(description="Jobs in the making now.")
    waiting: int = Field(description="Jobs that wait now.")


class JobFilter(BaseModel):
    """Which jobs to list."""

    model_config = ConfigDict(extra="forbid")

    status: JobStatus | None = None
    limit: int = Field(20, ge=1, le=100)
    cursor: str | None = Field(None, pattern=r"^[0-9]{1,17}$", description="The next_cursor of an earlier page.")


class BatchFilter(BaseModel):
    """Which batches to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=100)
    cursor: str | None = Field(None, pattern=r"^[0-9]{1,17}$", description="The next_cursor of an earlier page.")


class UploadFilter(BaseModel):
    """Which uploads to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=100)
    cursor: str | None = Field(None, pattern=r"^[0-9]{1,17}$", description="The next_cursor of an earlier page.")


class UploadView(BaseModel):
    """A picture that was handed in, as it is kept: a PNG without metadata."""

    id: str
    object: Literal["upload"] = "upload"
    url: str = Field(description="It expires; get the upload again for a fresh one.")
    width: int
    height: int
    content_type: Literal["image/png"] = "image/png"
    bytes: int
    sha256: str
    created_at: datetime
    expires_at: datetime = Field(description="It lives longer while the record of a job that uses it does.")


class ListResponse(BaseModel, Generic[T]):
    """A page of a list; `next_cursor` is null on the last one."""

    object: Literal["list"] = "list"
    data: list[T]
    next_cursor: str | None = None


class ModelView(BaseModel):
    """A model of the catalog, readable by OpenAI's client."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    title: str
    default: bool = Field(description="Whether requests that name no model get this one.")
    aliases: list[str] = Field([], description="Other names that it answers to.")
    served: bool = Field(description="Whether a live worker serves it; jobs are accepted anyway and wait.")
    warm: bool = Field(description="Whether a live worker has it in memory; otherwise it is loaded when a job comes.")
    limits: Limits
    defaults: Defaults
    schedulers: list[str]
    loras: list[str] = []
    tasks: list[str] = Field(description="What it can be asked for.", examples=[["text_to_image", "inpainting"]])
    controls: list[str] = Field([], description="The types of its ControlNets.")
    accepts: list[OptionalParam] = Field(description="What not every model has a use for.")
    quality: dict[Quality, int] = Field(description="The steps that OpenAI's names of quality stand for.")
    examples: list[str] = Field(description="Prompts that work well.")


class WorkerView(BaseModel):
    """A live worker."""

    id: str
    object: Literal["worker"] = "worker"
    models: list[str] = Field(description="That it serves.")
    warm: list[str] = Field(description="Of these in memory, or being loaded.")
    device: str
    version: str
    runs: int = Field(description="Images in the making.")
    max_runs: int
    metrics: str = Field(description="host:port of its /metrics.")
    started_at: datetime


class TargetGroup(BaseModel):
    """Addresses for Prometheus' http_sd."""

    targets: list[str] = Field(examples=[["10.0.0.7:9100"]])
    labels: dict[str, str]


class Health(BaseModel):
    status: Literal["ok", "ready"]


def _is_printable(text: str) -> str:
    # It is shown in terminals and lists, where control characters would do something.
    if not text.isprintable():
        raise ValueError("only printable characters are accepted")
    return text


Printable = Annotated[str, AfterValidator(_is_printable)]
TenantName = Annotated[str, Field(pattern=api_keys.TENANT_FORM)]


class KeyRequest(BaseModel):
    """A key to make."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Printable = Field(min_length=1, max_length=api_keys.MAX_NAME, description="What lists show it by.")
    tenant: TenantName = Field(api_keys.DEFAULT_TENANT, description="Whose jobs it opens.")
    scopes: list[Annotated[Scope, Field(strict=False)]] = Field(
        list(api_keys.EVERYDAY), min_length=1, max_length=len(Scope)
    )
    expires_days: int | None = Field(None, ge=1, le=3650, description="Null: it does not expire.")


class KeyView(BaseModel):
    """An API key, without what makes it one."""

    id: str
    object: Literal["key"] = "key"
    name: str
    tenant: str
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None = Field(description="To the minute.")


class KeyMade(KeyView):
    """A key that was just made."""

    secret: str = Field(description="The key itself. It is not shown again.")


class UsageQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    days: int = Field(30, ge=1, le=400, description="How many days back, today included.")


class UsageDay(BaseModel):
    date: Date
    images: int
    denoiser_seconds: float


class UsageView(BaseModel):
    """What a tenant's finished jobs have used."""

    object: Literal["usage"] = "usage"
    tenant: str
    since: Date
    images: int
    denoiser_seconds: float
    days: list[UsageDay] = Field(description="Days without use are left out.")


class EndpointRequest(BaseModel):
    """A receiver of webhooks."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"url": "https://example.com/hook", "events": ["job.succeeded"]}]},
    )

    url: str = Field(max_length=2048)
    events: EndpointEvents = DEFAULT_ENDPOINT_EVENTS
    description: Printable = Field("", max_length=200)


class EndpointChange(BaseModel):
    """What to change about a receiver; what is absent or null stays."""

    model_config = ConfigDict(extra="forbid")

    url: str | None = Field(None, max_length=2048)
    events: EndpointEvents | None = None
    description: Printable | None = Field(None, max_length=200)
    enabled: bool | None = None


class EndpointView(BaseModel):
    """A receiver of webhooks, and how it is doing."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    url: str
    events: list[EndpointEvent]
    description: str
    enabled: bool
    disabled_reason: Disabled | None = Field(
        description="paused: by you; gone: it answered 410; failing: it did nothing else for five days."
    )
    disabled_at: datetime | None
    failures: int = Field(description="Attempts in a row that failed.")
    failing_since: datetime | None
    created_at: datetime


class DeliveryFilter(BaseModel):
    """Which deliveries to list."""

    model_config = ConfigDict(extra="forbid")

    job: str | None = Field(None, max_length=64, description="Only those about this job, all in one page.")
    batch: str | None = Field(None, max_length=64, description="Only those about this batch, all in one page.")
    limit: int = Field(20, ge=1, le=100, description="Of one millisecond a page holds all, so it may be longer.")
    cursor: str | None = Field(None, pattern=r"^[0-9]{1,16}$", description="The next_cursor of an earlier page.")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(part is not None for part in (self.job, self.batch, self.cursor)) > 1:
            raise ValueError("send one of job, batch and cursor at most")
        return self


class AttemptView(BaseModel):
    """One attempt at a delivery."""

    at: datetime
    outcome: Outcome
    response_status: int | None = Field(description="What the receiver answered; null: nothing.")
    seconds: float


class DeliveryView(BaseModel):
    """A webhook on its way to one receiver, or what became of it; its id is the webhook-id that the receiver sees."""

    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    type: str
    url: str
    endpoint: str | None = Field(description="The registered endpoint; null: the URL that the request named.")
    job: str | None = Field(description="Null in a test, and where it is about a batch.")
    batch: str | None
    status: Outcome | Literal["pending"]
    created_at: datetime
    ended_at: datetime | None
    next_attempt_at: datetime | None
    attempts: list[AttemptView] = Field(description="The latest; an attempt that is under way is not among them.")


class TenantQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tenant: TenantName | None = Field(None, description="For admins; your own if absent.")


class RotateRequest(BaseModel):
    """How to change a secret."""

    model_config = ConfigDict(extra="forbid")

    overlap_seconds: float = Field(86400, ge=0, le=7 * 86400, description="How long the one before stays valid.")


class SecretView(BaseModel):
    """What a receiver verifies webhooks with."""

    object: Literal["webhook_secret"] = "webhook_secret"
    secret: str
    previous_secret: str | None
    previous_valid_until: datetime | None
