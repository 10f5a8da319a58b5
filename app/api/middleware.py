"""What happens to every request: an id, security headers, a measurement, a limit on its body. Pure ASGI."""

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from typing import Final
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import problem
from app.core.errors import SafelightError, TooLarge
from app.core.metrics import ApiMetrics

log = structlog.get_logger()

MAX_BODY: Final = 1024 * 1024  # bytes
LARGER: Final = {  # bytes, where pictures come along: base64 in JSON, or as they are
    "/v1/jobs": 8 * 2**20,
    "/v1/batches": 8 * 2**20,
    "/v1/uploads": 21 * 2**20,
    "/v1/images/edits": 43 * 2**20,  # an image and its mask
    "/v1/images/variations": 21 * 2**20,
}
# Quotes, commas and opening brackets in JSON. Parsing and checking hold up everyone: 8 MiB of them are three seconds.
MAX_MARKS: Final = 250_000
MORE_MARKS: Final = {"/v1/batches": 1_000_000}  # ten thousand requests, with their prompts
MARKS: Final = (b'"', b",", b"[", b"{")
BODY_SECONDS: Final = 30.0  # from the request's head to the end of its body
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNLOGGED: Final = frozenset({"/livez", "/readyz", "/metrics", "/metrics/targets"})  # asked every few seconds
SECURITY: Final = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-site",
    "cache-control": "no-store",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
NO_CONTENT: Final = "default-src 'none'; frame-ancestors 'none'"  # of what is data, should a browser take it for a page
CLOSE: Final = {"connection": "close"}  # the rest of the body is not read
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)


class RequestContext:
    """The outermost middleware: whatever happens inside, the reply has a request id and is measured."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started, status = _request_id(scope), time.perf_counter(), 0
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(message, request_id)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_headers)
            except Exception:
                log.exception("http.unhandled")
                if not status:  # else the server cuts the reply off, which tells the caller as much
                    unknown = SafelightError("something went wrong here; the log has the request id")
                    await problem(unknown, request_id)(scope, receive, send_with_headers)
            finally:
                self._observe(scope, status, time.perf_counter() - started)

    def _observe(self, scope: Scope, status: int, seconds: float) -> None:
        # The route's template, never the path: that holds ids, and whatever callers make up.
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.metrics.http_request_seconds.labels(route, method, str(status)).observe(seconds)
        if route not in UNLOGGED:
            log.info("http.request", method=method, route=route, status=status, seconds=round(seconds, 4))


class BodyLimit:
    """Refuses bodies over `MAX_BODY` (or what `LARGER` says of a path) and those that take longer than `BODY_SECONDS`.

    What is not multipart may be read as JSON, and has no more than `MAX_MARKS` (or what `MORE_MARKS` says) either.
    FastAPI's own limit answers in plain text, outside all middleware; nothing else limits the time. `shapes` are how a
    dialect's paths are answered, by what they begin with.
    """

    def __init__(self, app: ASGIApp, shapes: Mapping[str, Callable[[SafelightError], Response]]) -> None:
        self.app = app
        self.shapes = shapes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = LARGER.get(scope["path"], MAX_BODY)
        if _content_length(scope) > most:
            reply = self._refusal(scope, TooLarge(f"a body has at most {most} bytes"))
            reply.headers["connection"] = "close"  # the rest of the body is not read
            await reply(scope, receive, send)
            return
        size, marks, is_complete = 0, 0, False
        is_json = not Headers(scope=scope).get("content-type", "").lower().startswith("multipart/")
        most_marks = MORE_MARKS.get(scope["path"], MAX_MARKS)
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        async def receive_limited() -> Message:
            nonlocal size, marks, is_complete
            if is_complete:  # what comes now is the end of the connection
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, headers=CLOSE) from None
            is_complete = not message.get("more_body")
            part = message.get("body", b"")
            size += len(part)
            marks += sum(map(part.count, MARKS)) if is_json else 0
            if size > most:
                # Not TooLarge: FastAPI lets only this class pass while it reads a body.
                raise HTTPException(413, f"a body has at most {most} bytes", CLOSE)
            if marks > most_marks:
                raise HTTPException(413, f"a body has at most {most_marks} quotes, commas and opening brackets", CLOSE)
            return message

        await self.app(scope, receive_limited, send)

    def _refusal(self, scope: Scope, error: SafelightError) -> Response:
        shape = next((shape for start, shape in self.shapes.items() if scope["path"].startswith(start)), None)
        return shape(error) if shape else problem(error, scope["state"]["request_id"])


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{uuid4().hex}"


def _add_headers(message: Message, request_id: str) -> None:
    headers = MutableHeaders(scope=message)
    headers["x-request-id"] = request_id
    for name, value in SECURITY.items():
        headers.setdefault(name, value)
    if not headers.get("content-type", "").startswith("text/html"):
        headers.setdefault("content-security-policy", NO_CONTENT)


def _content_length(scope: Scope) -> int:
    text = Headers(scope=scope).get("content-length", "")
    return int(text[:20]) if text.isdecimal() else 0
