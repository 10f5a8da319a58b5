"""Errors in OpenAI's shape, for every way in which a request of the dialect can fail."""

import json
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from app.api.compat.openai.schemas import UNSUPPORTED
from app.api.problems import translated
from app.core.errors import InvalidRequest, QueueUnavailable, SafelightError
from app.core.job import Job, JobStatus

# What our checks call a thing -> what the dialect calls it.
PARAMS: Final = {
    "width": "size",
    "height": "size",
    "num_images": "n",
    "output_quality": "output_compression",
    "num_inference_steps": "quality",
}
KNOWN: Final = frozenset({"model", "prompt", "negative_prompt", "seed", "guidance_scale", "scheduler", "image", "mask"})
NO_RETRY: Final = {"x-should-retry": "false"}  # OpenAI's clients would make the same job twice more


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """What went wrong, as OpenAI says it."""

    error: ErrorBody


class Refused(Exception):  # noqa: N818  # it is no error of ours, but an answer
    """A reply in OpenAI's shape; 400 invalid_request_error unless it says otherwise."""

    def __init__(
        self,
        message: str,
        *,
        status: int = HTTPStatus.BAD_REQUEST,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = "invalid_value",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = ErrorReply(error=ErrorBody(message=message, type=kind, param=param, code=code))

    def reply(self) -> Response:
        # In ASCII: the name of a field may hold what UTF-8 cannot write.
        return Response(json.dumps(self.body.model_dump()), self.status, self.headers, "application/json")


class DialectRoute(APIRoute):
    """A route whose errors leave in OpenAI's shape, those of its dependencies and of its body too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except (Refused, SafelightError, RedisError, RequestValidationError, HTTPException) as error:
                return refusal(error).reply()

        return handler


def refusal(error: Exception) -> Refused:
    """An error in OpenAI's shape."""
    match error:
        case Refused():
            return error
        case SafelightError():
            return _of(error)
        case RedisError():
            return _of(QueueUnavailable("the queue cannot be reached; try again", retry_after=2))
        case RequestValidationError():
            return invalid(error.errors()[0])
        case HTTPException():
            found = _of(translated(error))
            found.headers = error.headers
            return found
    raise error


def _of(error: SafelightError) -> Refused:
    status = HTTPStatus(error.status)
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    code = error.code
    if status == HTTPStatus.UNAUTHORIZED:
        code = "invalid_api_key"
    elif status == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "requests"
    elif isinstance(error, InvalidRequest):
        status = HTTPStatus.BAD_REQUEST
    headers = error.headers | ({"Retry-After": str(error.retry_after)} if error.retry_after else {})
    return Refused(error.message, status=status, kind=kind, param=_param(error.message), code=code, headers=headers)


def _param(message: str) -> str | None:
    """The field that a message begins with, as all of our checks of fields do."""
    first = message.replace(":", " ", 1).split(" ", 1)[0]
    return PARAMS.get(first) or (first if first in KNOWN else None)


def invalid(found: Mapping[str, Any]) -> Refused:
    """What pydantic says of a field, as OpenAI would say it."""
    parts = [str(part)[:64] for part in found["loc"] if part != "body"]
    name = ".".join(parts[:8]) or None
    known = (name or "").partition("[")[0]  # svg[model] in a form
    if known in UNSUPPORTED:
        return Refused(f"{known} is not supported: {UNSUPPORTED[known]}", param=known, code="unsupported_parameter")
    match found["type"]:
        case "missing" if name:
            return Refused(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
        case "extra_forbidden":
            return Refused(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
        case "json_invalid":
            return Refused("The body is not valid JSON.", code="invalid_json")
    return Refused(f"Invalid value for '{name or 'body'}': {found['msg']}.", param=name)


def not_made(job: Job) -> Refused:
    """What to say of a job that ended without a picture."""
    code, message = job.status.value, f"job {job.id} was {job.status}"
    if job.error:
        code, message = job.error.code, f"{job.error.message} (job {job.id})"
    if code == "content_refused":
        return Refused(message, kind="image_generation_user_error", code="moderation_blocked")
    if code == "prompt_too_long":
        return Refused(message, param="prompt", code=code)
    status = {JobStatus.CANCELED: HTTPStatus.CONFLICT, JobStatus.EXPIRED: HTTPStatus.GATEWAY_TIMEOUT}
    found = status.get(job.status, HTTPStatus.INTERNAL_SERVER_ERROR)
    return Refused(message, status=found, kind="server_error", code=code, headers=NO_RETRY)
