"""Errors as application/problem+json (RFC 9457), for every way in which a request can fail."""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, Field
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from app.core.errors import InvalidRequest, NotFound, QueueUnavailable, SafelightError, TooLarge

MEDIA_TYPE: Final = "application/problem+json"
MAX_ERRORS: Final = 20
MAX_DEPTH: Final = 8  # how much of a path to a refused field is shown


class FieldError(BaseModel):
    loc: list[str | int] = Field(examples=[["body", "width"]])
    msg: str


class Problem(BaseModel):
    """What went wrong; `code` is stable, `detail` is for people."""

    type: str = Field("about:blank", examples=["about:blank"])
    title: str = Field(examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: str
    code: str = Field(examples=["invalid_request"])
    request_id: str
    errors: list[FieldError] | None = Field(None, description="The fields that were refused, where there are any.")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI of the errors a route may give."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def add_to(document: dict[str, Any]) -> None:
    """Put the schema of problems into an OpenAPI document, and take out FastAPI's own, which no route gives."""
    schemas = document["components"]["schemas"]
    schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= schema.pop("$defs", {}) | {"Problem": schema}
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for methods in document["paths"].values():
        for operation in methods.values():
            # Added by FastAPI where we document no 422: nothing that such a route takes can be invalid.
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]


def problem(error: SafelightError, request_id: str, errors: Sequence[FieldError] | None = None) -> Response:
    """The reply for an error."""
    status = HTTPStatus(error.status)
    body = Problem(
        title=status.phrase,
        status=status,
        detail=error.message,
        code=error.code,
        request_id=request_id,
        errors=list(errors) if errors is not None else None,
    )
    headers = error.headers | ({"Retry-After": str(error.retry_after)} if error.retry_after else {})
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    # json.dumps escapes what UTF-8 cannot hold: a field's name may have come with half a surrogate pair.
    text = json.dumps(body.model_dump(exclude_none=True), separators=(",", ":"))
    return Response(text, status, headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Let every error of the app leave as a problem; what nobody foresaw is left to the outermost middleware."""
    app.add_exception_handler(SafelightError, _safelight)
    app.add_exception_handler(RedisError, _redis)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)


def _safelight(request: Request, error: Exception) -> Response:
    assert isinstance(error, SafelightError)
    return problem(error, request.state.request_id)


def _redis(request: Request, _: Exception) -> Response:
    return problem(QueueUnavailable("the queue cannot be reached; try again", retry_after=2), request.state.request_id)


def _validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fields = [_field(found) for found in error.errors()[:MAX_ERRORS]]
    detail = "; ".join(f"{'.'.join(map(str, f.loc))}: {f.msg}" for f in fields[:3])
    return problem(InvalidRequest(detail), request.state.request_id, fields)


def _field(found: Mapping[str, Any]) -> FieldError:
    loc = [part if isinstance(part, int) else str(part)[:64] for part in found["loc"][:MAX_DEPTH]]
    return FieldError(loc=loc, msg=found["msg"])


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reply = problem(translated(error), request.state.request_id)
    reply.headers.update(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        reply.headers["Allow"] = ", ".join(sorted(_methods(request)))
    return reply


def _methods(request: Request) -> set[str]:
    # The router names only those of the first route that has the path.
    routes = iter_route_contexts(request.app.routes)
    return {m for r in routes if r.methods and r.path_regex.match(request.url.path) for m in r.methods}


def translated(error: HTTPException) -> SafelightError:
    """What the framework refused, as an error of ours."""
    match error.status_code:
        case HTTPStatus.BAD_REQUEST:  # FastAPI's word for a body that is not JSON, and not even text
            return InvalidRequest(
                "the body cannot be read: it is not what its Content-Type says, or has too many parts"
            )
        case HTTPStatus.NOT_FOUND:
            return NotFound("there is nothing at this address")
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return TooLarge(error.detail)
    status = HTTPStatus(error.status_code)
    other = SafelightError(status.phrase)
    other.status, other.code = status, status.phrase.lower().replace(" ", "_")
    return other
