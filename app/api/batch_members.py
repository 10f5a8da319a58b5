"""What a batch may be asked as, and the jobs that it stands for, each checked as a job of its own."""

import asyncio
import hashlib
import itertools
import json
import math
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Annotated, Any, Final, Literal, Self

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from app.api.auth import Identity
from app.api.deps import Services
from app.api.jobs import submission_of
from app.api.schemas import JobRequest, Metadata
from app.core.batches import MAX_MEMBERS
from app.core.errors import InvalidParams, SafelightError
from app.core.params import GenerationRequest
from app.core.queue import Submission
from app.core.uploads import UPLOAD_ID

MAX_PICTURES: Final = 64  # of one batch that are not uploads yet: they are fetched one after another
YIELD_EVERY: Final = 10  # members: others have their turn in between

_JOB_SCHEMA: Final = {"$ref": "#/components/schemas/JobRequest"}
_AXES: Final = frozenset(GenerationRequest.model_fields)
# Members are not validated with the body, which would hold the process up for all ten thousand, but one by one.
Requests = Annotated[
    list[dict[str, Any]],
    Field(min_length=1, max_length=MAX_MEMBERS),
    WithJsonSchema({"type": "array", "items": _JOB_SCHEMA, "minItems": 1, "maxItems": MAX_MEMBERS}),
]
Axis = Annotated[list[Any], Field(min_length=1, max_length=MAX_MEMBERS)]


class BatchWebhook(BaseModel):
    """Whom to tell, by a `batch.completed`, when all jobs of a batch have ended."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(max_length=2048)


class BatchRequest(BaseModel):
    """Many jobs at once: `requests`, a list of them, or `request`, one that a `matrix` of lists multiplies out."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "request": {"num_inference_steps": 20},
                    "matrix": {"prompt": ["a cat", "a dog"], "seed": [1, 2, 3], "guidance_scale": [3.0, 5.0]},
                    "webhook": {"url": "https://example.com/hook"},
                },
                {"requests": [{"prompt": "a cat", "seed": 1}, {"prompt": "a dog", "metadata": {"order": 17}}]},
            ],
            "oneOf": [{"required": ["requests"]}, {"required": ["matrix"]}],
        },
    )

    requests: Requests | None = None
    request: dict[str, Any] | None = Field(None, description="What all jobs of the matrix have in common.")
    matrix: dict[str, Axis] | None = Field(
        None,
        description="Lists of values by the name of a field that decides the picture, as prompt or seed: a job for "
        "each combination, the last list's values in turn first.",
    )
    webhook: BatchWebhook | None = None
    metadata: Metadata | None = Field(None, description="Yours: kept with the batch and shown with it. At most 8 kB.")

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Self:
        if (self.requests is None) == (self.matrix is None):
            raise ValueError("send either requests or matrix (with or without request)")
        if self.request is not None and self.matrix is None:
            raise ValueError("request needs a matrix beside it; a list of requests stands in requests")
        if self.matrix is not None:
            _check_matrix(self.request or {}, self.matrix)
        try:
            json.dumps(self.metadata, allow_nan=False, ensure_ascii=False).encode()
        except ValueError as error:
            raise ValueError("NaN and unpaired surrogates are not accepted") from error
        return self

    @property
    def total(self) -> int:
        """How many jobs it stands for."""
        return len(self.requests) if self.requests is not None else math.prod(map(len, (self.matrix or {}).values()))

    def members(self) -> Iterator[dict[str, Any]]:
        """The jobs' requests, as yet unchecked."""
        if self.requests is not None:
            yield from self.requests
            return
        matrix = self.matrix or {}
        for values in itertools.product(*matrix.values()):
            yield (self.request or {}) | dict(zip(matrix, values, strict=True))

    def fingerprint(self) -> str:
        """A digest of all of it, to tell a repeat from another request. Raises InvalidParams."""
        try:
            text = json.dumps(self.model_dump(exclude_unset=True), sort_keys=True)
        except (RecursionError, ValueError) as error:
            raise InvalidParams("very deep nesting is not accepted") from error
        return hashlib.sha256(b"batch " + text.encode()).hexdigest()


def _check_matrix(request: dict[str, Any], matrix: dict[str, list[Any]]) -> None:
    if not matrix:
        raise ValueError("matrix needs at least one list")
    for name in matrix:
        if name not in _AXES:
            raise ValueError(f"matrix: {name[:64]!r} is not a field that decides the picture")
        if name in request:
            raise ValueError(f"{name} stands in request and in matrix; leave one out")
    if (total := math.prod(map(len, matrix.values()))) > MAX_MEMBERS:
        raise ValueError(f"matrix stands for {total} jobs; at most {MAX_MEMBERS} are accepted")


class Pictures:
    """The pictures that members of a batch name, each taken in once, however many members name it."""

    def __init__(self, deps: Services, tenant: str) -> None:
        self._deps = deps
        self._tenant = tenant
        self._known: dict[str, str] = {}

    async def settle(self, request: JobRequest) -> JobRequest:
        """The request with uploads' ids for its pictures. Raises what ImageInputs raises."""
        change: dict[str, Any] = {}
        for field in ("image", "mask"):
            if (name := getattr(request, field)) is not None:
                change[field] = await self._upload(name)
        if request.controls:
            images = [await self._upload(control.image) for control in request.controls]
            pairs = zip(request.controls, images, strict=True)
            change["controls"] = [control.model_copy(update={"image": image}) for control, image in pairs]
        return request.model_copy(update=change) if change else request

    def known(self, member: Mapping[str, Any]) -> dict[str, Any]:
        """The member with the ids of pictures that were taken in for an earlier one: they may be megabytes of text."""
        found = dict(member) | {field: self._short(member[field]) for field in ("image", "mask") if field in member}
        controls = member.get("controls")
        if isinstance(controls, list):
            found["controls"] = [
                {**control, "image": self._short(control["image"])}
                if isinstance(control, dict) and "image" in control
                else control
                for control in controls
            ]
        return found

    def _short(self, name: Any) -> Any:
        return self._known.get(name, name) if isinstance(name, str) else name

    async def _upload(self, name: str) -> str:
        if UPLOAD_ID.fullmatch(name):
            return name
        if name not in self._known:
            if len(self._known) >= MAX_PICTURES:
                raise InvalidParams(f"a batch names at most {MAX_PICTURES} pictures that are no uploads yet")
            self._known[name] = (await self._deps.inputs.find(self._tenant, name)).id
        return self._known[name]


async def submissions(
    body: BatchRequest, caller: Identity, deps: Services, request_id: str
) -> AsyncGenerator[Submission]:
    """The batch's jobs, complete, in their order. An error of one names its index, and is of its own kind.

    Raises RequestValidationError, and what the request's checks raise.
    """
    form: Literal["requests", "matrix"] = "requests" if body.requests is not None else "matrix"
    pictures = Pictures(deps, caller.tenant)
    for index, member in enumerate(body.members()):
        if index % YIELD_EVERY == 0:
            await asyncio.sleep(0)
        try:
            request = JobRequest.model_validate(pictures.known(member))
            yield await submission_of(await pictures.settle(request), caller, deps, request_id, None)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            raise RequestValidationError(
                [{**line, "loc": ("body", form, index, *line["loc"])} for line in found]
            ) from error
        except SafelightError as error:
            raise type(error)(f"{form}[{index}]: {error.message}", retry_after=error.retry_after) from error
