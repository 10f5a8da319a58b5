"""The JSON that routes take and give, besides a job's own (core/job.py) and an error's (problems.py)."""

import json
from datetime import datetime
from typing import Annotated, Any, Final, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from app.core.catalog import Defaults, Limits
from app.core.job import JobStatus, Webhook
from app.core.params import GenerationRequest

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


class JobFilter(BaseModel):
    """Which jobs to list."""

    model_config = ConfigDict(extra="forbid")

    status: JobStatus | None = None
    limit: int = Field(20, ge=1, le=100)
    cursor: str | None = Field(None, pattern=r"^[0-9]{1,17}$", description="The next_cursor of an earlier page.")


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
    served: bool = Field(description="Whether a live worker serves it; jobs are accepted anyway and wait.")
    limits: Limits
    defaults: Defaults
    schedulers: list[str]
    loras: list[str] = []
    examples: list[str] = Field(description="Prompts that work well.")


class WorkerView(BaseModel):
    """A live worker."""

    id: str
    object: Literal["worker"] = "worker"
    models: list[str]
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
