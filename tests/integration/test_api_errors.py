"""Every failure is a problem (RFC 9457) with a request id, and OpenAPI knows it."""

import json
import socket
import time

import pytest
from fastapi import APIRouter

from app.api import middleware
from app.api.middleware import MAX_BODY
from tests.integration.test_api_jobs import NOBODY

# How failures are documented: our own, and those of OpenAI's dialect.
SHAPES = {False: ("application/problem+json", "Problem"), True: ("application/json", "ErrorReply")}


def problem_of(reply, status, code):
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    body = reply.json()
    assert body["type"] == "about:blank"
    assert body["title"]
    assert body["detail"]
    assert (body["status"], body["code"]) == (status, code)
    assert body["request_id"] == reply.headers["x-request-id"]
    return body


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/jobs/", 404, "not_found"),
        ("GET", f"/v1/jobs/{NOBODY}", 404, "not_found"),
        ("PUT", "/v1/jobs", 405, "method_not_allowed"),
        ("POST", "/livez", 405, "method_not_allowed"),
        ("GET", "/v1/jobs?limit=0", 422, "invalid_request"),
        ("GET", "/readyz", 503, "unavailable"),
    ],
)
def test_a_failure_is_a_problem(client, method, path, status, code):
    problem_of(client.request(method, path), status, code)


@pytest.mark.parametrize(
    ("path", "allowed"), [("/livez", "GET"), ("/v1/jobs", "GET, POST"), ("/v1/jobs/x", "DELETE, GET")]
)
def test_a_refused_method_names_all_that_are_allowed(client, path, allowed):
    assert client.put(path).headers["allow"] == allowed


BODIES = {
    "empty": b"",
    "not json": b"{",
    "not text": b"\xff\xfe",
    "a list": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "no prompt": b"{}",
    "half a surrogate pair": rb'{"prompt": "\ud800"}',
    "half a surrogate pair as a name": rb'{"prompt": "x", "\ud800": 1}',
    "NaN": b'{"prompt": "x", "guidance_scale": NaN}',
    "infinity": b'{"prompt": "x", "guidance_scale": 1e999}',
    "infinity in metadata": b'{"prompt": "x", "metadata": {"a": 1e999}}',
    "a huge seed": b'{"prompt": "x", "seed": %s}' % (b"9" * 400),
    "a number of 5000 digits": b'{"prompt": "x", "seed": %s}' % (b"9" * 5000),
    "nested 100,000 deep": b'{"prompt": "x", "metadata": {"a": %s}}' % (b"[" * 100_000 + b"]" * 100_000),
    "nested 900 deep": b'{"prompt": "x", "metadata": {"a": %s}}' % (b"[" * 900 + b"]" * 900),
    "an unknown field": b'{"prompt": "x", "steps": 3}',
    "a long unknown field": b'{"prompt": "x", "%s": 3}' % (b"y" * 5000),
    "an unknown webhook field": b'{"prompt": "x", "webhook": {"url": "https://example.com", "secret": "s"}}',
    "an unknown event": b'{"prompt": "x", "webhook": {"url": "https://example.com", "events": ["job.queued"]}}',
    "no event": b'{"prompt": "x", "webhook": {"url": "https://example.com", "events": []}}',
    "a list as metadata": b'{"prompt": "x", "metadata": []}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_is_no_request_is_refused_without_being_echoed(client, body):
    reply = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    found = problem_of(reply, 422, "invalid_request")
    assert len(reply.content) < 3000
    for error in found.get("errors", []):
        assert set(error) == {"loc", "msg"}


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"width": 65}, "multiple of 8"),
        ({"height": 256}, "64 to 128"),
        ({"num_inference_steps": 250, "scheduler": "nope"}, "ddim, euler"),
        ({"num_images": 5}, "at most 4"),
        ({"guidance_scale": 31}, "at most 30"),
        ({"prompt": "x" * 201}, "200 characters"),
        ({"negative_prompt": "x" * 201}, "200 characters"),
    ],
)
def test_a_models_limits_are_named_where_they_are_passed(client, fields, word):
    found = problem_of(client.post("/v1/jobs", json={"prompt": "x"} | fields), 422, "invalid_params")
    assert word in found["detail"]


@pytest.mark.parametrize(("model", "status"), [("nope", 404), ("../x", 422), ("", 422)])
def test_a_model_that_is_not_in_the_catalog_is_not_found(client, model, status):
    code = {404: "model_not_found", 422: "invalid_request"}[status]
    problem_of(client.post("/v1/jobs", json={"prompt": "x", "model": model}), status, code)


def test_odd_but_lawful_text_is_taken_and_given_back(client):
    prompt = "\x00\x07\u202e 🐈 é \\ \" ' \u2028 {{}} %s"
    metadata = {"\x00": [None, True, -0.5, 10**30, {"é": "\U0001f408"}]}
    job = client.post("/v1/jobs", json={"prompt": prompt, "metadata": metadata}).json()
    shown = client.get(f"/v1/jobs/{job['id']}").json()
    assert (shown["params"]["prompt"], shown["metadata"]) == (prompt, metadata)


def test_a_body_of_another_type_than_json_is_refused(client):
    reply = client.post("/v1/jobs", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    problem_of(reply, 422, "invalid_request")


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_over_the_limit_is_refused(client, is_chunked):
    body = json.dumps({"name": "x" * MAX_BODY}).encode()
    content = iter([body[:1000], body[1000:]]) if is_chunked else body
    reply = client.post("/v1/keys", content=content, headers={"Content-Type": "application/json"})
    problem_of(reply, 413, "too_large")
    assert client.get("/livez").status_code == 200


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/batches", "/v1/images/generations"])
@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":[' + b"[]," * 2_700_000 + b"0]}",
        b"{" + b",".join(b'"%x":1' % n for n in range(700_000)) + b"}",
        b'{"loras":[' + b"{}," * 700_000 + b"0]}",
    ],
    ids=["lists", "fields", "objects"],
)
def test_a_body_of_a_million_values_is_refused_before_it_holds_up_the_others(client, path, body):
    started = time.perf_counter()
    reply = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, "too_large" in reply.text) == (413, True)
    assert time.perf_counter() - started < 1.0


def test_a_body_that_drips_is_given_up(api, monkeypatch):
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.4)
    started = time.perf_counter()
    with socket.create_connection(("127.0.0.1", api.settings.port), timeout=5) as connection:
        connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n{")
        reply = connection.recv(1000)
    assert reply.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in reply
    assert time.perf_counter() - started < 3


def test_a_head_over_the_limit_is_refused(api):
    with socket.create_connection(("127.0.0.1", api.settings.port), timeout=5) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"y" * 70_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_what_nobody_foresaw_is_a_500_that_tells_nothing_and_is_logged(start_api, caplog):
    api, router = start_api(), APIRouter()

    @router.get("/broken")
    def broken():
        raise ValueError("the secret is 42")

    api.app.include_router(router)
    with api.client() as client:
        reply = client.get("/broken", headers={"X-Request-ID": "mine"})
    problem_of(reply, 500, "internal_error")
    assert "42" not in reply.text
    assert "http.unhandled" in caplog.text
    assert "mine" in caplog.text


@pytest.mark.parametrize(
    ("sent", "is_kept"), [("abc-1.2_3", True), ("x" * 128, True), ("x" * 129, False), ("a b", False)]
)
def test_a_sane_request_id_is_kept_and_another_is_replaced(client, sent, is_kept):
    given = client.get("/livez", headers={"X-Request-ID": sent}).headers["x-request-id"]
    assert (given == sent) is is_kept
    assert given


@pytest.mark.parametrize("path", ["/livez", "/nothing", "/v1/jobs", "/docs"])
def test_every_reply_has_the_security_headers(client, path):
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert ("default-src 'none'" in headers.get("content-security-policy", "")) == (path != "/docs")
    assert "server" not in headers


def test_another_origin_may_read_only_where_the_operator_says_so(client, start_api):
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.options("/v1/jobs", headers=asked).headers
    with start_api(cors_origins="https://app.example").client() as own:
        allowed = own.options("/v1/jobs", headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        assert own.options("/v1/jobs", headers=asked | {"Origin": "https://evil.example"}).status_code == 400
        failed = own.get("/nothing", headers=asked)
        assert failed.headers["access-control-allow-origin"] == "https://app.example"


# OpenAPI


@pytest.fixture
def document(client):
    return client.get("/openapi.json").json()


def test_every_route_documents_its_failures_as_problems(document):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            failures = {s: r for s, r in operation["responses"].items() if s >= "400"}
            if "security" in operation:
                assert {"401", "403", "503"} <= set(failures), (method, path)
            if "{job_id}" in path:
                assert "404" in failures
            kind, name = SHAPES["/v1/images/" in path]
            for reply in failures.values():
                assert reply["content"][kind]["schema"] == {"$ref": f"#/components/schemas/{name}"}


def test_every_schema_that_is_named_is_there(document):
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(document["components"]["schemas"])
    assert "HTTPValidationError" not in names


def test_the_examples_in_the_document_are_accepted(client, document):
    for example in document["components"]["schemas"]["JobRequest"]["examples"]:
        assert client.post("/v1/jobs", json=example).status_code == 202


def test_only_routes_that_need_no_key_are_without_the_security_scheme(document):
    is_open = {p for p, methods in document["paths"].items() for o in methods.values() if "security" not in o}
    assert is_open == {"/livez", "/readyz", "/v1/files/{key}"}
