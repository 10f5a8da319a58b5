"""What comes from outside: schemathesis over the OpenAPI with every kind of key, and bytes that are hardly HTTP.

EXAMPLES=200 runs the large form.
"""

import os
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from app.core import api_keys
from app.core import redis_keys as keys
from app.core.api_keys import Scope
from tests.conftest import PretendWorker
from tests.integration.test_api_auth import BOOTSTRAP, bearer
from tests.integration.test_api_tenants import everything_of

EXAMPLES = int(os.environ.get("EXAMPLES", "6"))  # of each kind, for each operation; every key sends them
# Replies that do not end, which test_api_streams reads, and those that wait for a picture, which test_openai asks for.
ENDLESS = {("GET", "/v1/events"), *(("POST", f"/v1/images/{name}") for name in ("generations", "edits", "variations"))}
# What a schema cannot say: that a URL must lead to a public address, a size suit the model, an id exist.
UNSAID = {"positive_data_acceptance"}
CHECKED = [CHECKS.get_one(name) for name in CHECKS.get_all_names() if name not in UNSAID]


@pytest.fixture(scope="module")
def _server(redis_server, catalog_file, tmp_path_factory):
    from app.core.settings import Settings
    from tests.conftest import serve_api

    data = tmp_path_factory.mktemp("outside")
    options = {"redis_url": redis_server.url, "models": catalog_file, "data": data, "webhook_allow": "127.0.0.0/8"}
    with serve_api(Settings(**options, api_key=BOOTSTRAP)) as api:
        yield api


@pytest.fixture
def fuzzed(_server, redis_url):
    """An API on an empty Redis."""
    return _server


@pytest.fixture
def callers(fuzzed, redis):
    """The headers of each kind of caller, and the ids of what the own tenant has."""
    _, own = api_keys.create(redis, "own", "own", Scope)
    _, foreign = api_keys.create(redis, "foreign", "foreign", [Scope.SUBMIT, Scope.READ])
    _, expired = api_keys.create(redis, "expired", "own", Scope, expires_at=time.time() - 1)
    worker = PretendWorker(redis, fuzzed.settings.data)
    worker.live()
    redis.persist(keys.PROCESS + "w1")  # for as long as the test takes
    with fuzzed.client(headers=bearer(own)) as client:
        ids = everything_of(client, worker)
    headers = {"none": {}, "expired": bearer(expired), "foreign": bearer(foreign), "own": bearer(own)}
    return headers, ids


@pytest.fixture(scope="module")
def operations(_server):
    schema = schemathesis.openapi.from_url(f"{_server.url}/openapi.json")
    return [found.ok() for found in schema.get_all_operations()]


def test_no_request_that_the_document_allows_or_forbids_gets_an_answer_it_does_not_know(callers, operations):
    headers, ids = callers
    seen = {caller: Counter() for caller in headers}
    for operation in operations:
        is_endless = (operation.method.upper(), operation.path) in ENDLESS
        asking = {name: own for name, own in headers.items() if not is_endless or name in ("expired", "none")}
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
            fuzz(operation, mode, ids, asking, seen)
    for caller, statuses in seen.items():
        print(f"{caller}: {statuses.total()} cases, {dict(sorted(statuses.items()))}")
        assert max(statuses) < 500
        assert statuses.total() > EXAMPLES * 30


def fuzz(operation, mode, ids, callers, seen):
    """Have each of the callers send the same; who may do the most asks last."""
    cases = operation.as_strategy(generation_mode=mode)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases, is_real=st.booleans())
    def run(case, is_real):
        if is_real:
            case.path_parameters = {name: ids.get(name, value) for name, value in (case.path_parameters or {}).items()}
        for caller, headers in callers.items():
            note(f"sent by {caller}")
            response = case.call(headers=headers, timeout=30)
            seen[caller][response.status_code] += 1
            case.validate_response(response, checks=CHECKED)

    # Of what takes nothing, nothing can be wrong.
    with suppress(Unsatisfiable) if mode is GenerationMode.NEGATIVE else nullcontext():
        run()


# Bytes that are hardly HTTP

HOST = b"Host: localhost\r\n"
LINE = b"GET /livez HTTP/1.1\r\n"
POST = b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
JSON = b'{"prompt": "x"}'
CORPUS = {
    "nothing": b"",
    "a blank line": b"\r\n\r\n",
    "zeros": bytes(1000),
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "SSH": b"SSH-2.0-OpenSSH_9.9\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "HTTP/0.9": b"GET /livez\r\n\r\n",
    "HTTP/9.9": b"GET /livez HTTP/9.9\r\n" + HOST + b"\r\n",
    "only line feeds": b"GET /livez HTTP/1.1\nHost: localhost\n\n",
    "no host": LINE + b"\r\n",
    "two hosts": LINE + HOST + b"Host: evil.example\r\n\r\n",
    "a host with a slash": LINE + b"Host: a/b\r\n\r\n",
    "a folded header": LINE + HOST + b"X: a\r\n b\r\n\r\n",
    "a header without a colon": LINE + HOST + b"nonsense\r\n\r\n",
    "a header without a name": LINE + HOST + b": x\r\n\r\n",
    "a blank before the colon": LINE + HOST + b"X : y\r\n\r\n",
    "a zero in a header": LINE + HOST + b"X: a\0b\r\n\r\n",
    "latin-1 in a header": LINE + HOST + b"X-Request-ID: \xe9\xff\r\n\r\n",
    "a thousand headers": LINE + HOST + b"".join(b"X-%d: y\r\n" % i for i in range(1000)) + b"\r\n",
    "a head of 64 kB": LINE + HOST + b"X: " + b"y" * 65536 + b"\r\n\r\n",
    "a path of 20 kB": b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "a path of zeros": b"GET /%00%00 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a path that climbs": b"GET /v1/files/../../etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n",
    "a path that climbs, encoded": b"GET /v1/files/%2e%2e%2f%2e%2e%2fetc/passwd?token=x HTTP/1.1\r\n" + HOST + b"\r\n",
    "a path of half a character": b"GET /v1/jobs/%ff%fe%c3 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a path with a surrogate": b"GET /v1/jobs/%ed%a0%80 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a query of half a character": b"GET /v1/jobs?cursor=%ff&status=%ed%a0%80 HTTP/1.1\r\n" + HOST + b"\r\n",
    "an absolute target": b"GET http://evil.example/livez HTTP/1.1\r\n" + HOST + b"\r\n",
    "an asterisk": b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
    "CONNECT": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n",
    "TRACE": b"TRACE / HTTP/1.1\r\n" + HOST + b"\r\n",
    "a method of its own": b"M\xc3\x96P / HTTP/1.1\r\n" + HOST + b"\r\n",
    "a long method": b"A" * 5000 + b" / HTTP/1.1\r\n" + HOST + b"\r\n",
    "an upgrade to a web socket": LINE
    + HOST
    + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    + b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    "an upgrade to HTTP/2": LINE
    + HOST
    + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n",
    "two lengths": POST + b"Content-Length: 15\r\nContent-Length: 3\r\n\r\n" + JSON,
    "a length and chunks": POST
    + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nf\r\n"
    + JSON
    + b"\r\n0\r\n\r\n",
    "chunks, said twice": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "another encoding": POST + b"Transfer-Encoding: gzip\r\n\r\nxx",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n" + JSON,
    "a length with a sign": POST + b"Content-Length: +15\r\n\r\n" + JSON,
    "a length of 30 digits": POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n" + JSON,
    "a length of another alphabet": POST + "Content-Length: ¹⁵\r\n\r\n".encode() + JSON,
    "a chunk of another size": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + JSON + b"\r\n0\r\n\r\n",
    "a chunk of 2^64": POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + JSON,
    "a chunk with an extension": POST + b"Transfer-Encoding: chunked\r\n\r\nf;a=" + b"b" * 30000 + b"\r\n" + JSON,
    "trailers": POST + b"Transfer-Encoding: chunked\r\n\r\nf\r\n" + JSON + b"\r\n0\r\nAuthorization: Bearer x\r\n\r\n",
    "a body that stops": POST + b"Content-Length: 1000\r\n\r\n" + JSON,
    "a body where none belongs": LINE + HOST + b"Content-Length: 5\r\n\r\nhello",
    "two requests at once": LINE + HOST + b"\r\n" + LINE + HOST + b"\r\n",
    "a request smuggled in a body": POST + b"Content-Length: 0\r\n\r\nGET /v1/keys HTTP/1.1\r\n" + HOST + b"\r\n",
    "a gzipped body": POST + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00",
    "utf-16": POST + b"Content-Length: 32\r\n\r\n" + JSON.decode().encode("utf-16"),
    "another charset": POST.replace(b"json", b"json; charset=utf-7") + b"Content-Length: 15\r\n\r\n" + JSON,
    "a form": POST.replace(b"application/json", b"multipart/form-data; boundary=x") + b"Content-Length: 4\r\n\r\n--x\r",
    "a form without a boundary": POST.replace(b"application/json", b"multipart/form-data")
    + b"Content-Length: 1\r\n\r\nx",
    "an expectation": POST + b"Expect: 100-continue\r\nContent-Length: 15\r\n\r\n" + JSON,
    "another expectation": POST + b"Expect: the unexpected\r\nContent-Length: 15\r\n\r\n" + JSON,
    "a range": b"GET /v1/files/x?token=y HTTP/1.1\r\n" + HOST + b"Range: bytes=" + b"0-0," * 4000 + b"\r\n\r\n",
    "a key of two lines": LINE.replace(b"livez", b"v1/jobs") + HOST + b"Authorization: Bearer a\r\n b\r\n\r\n",
    "a key of zeros": LINE.replace(b"livez", b"v1/jobs") + HOST + b"Authorization: Bearer \x80\x81\r\n\r\n",
    "an event id of 10 kB": LINE.replace(b"livez", b"v1/events")
    + HOST
    + b"Last-Event-ID: "
    + b"9" * 10000
    + b"\r\n\r\n",
    "a preference of 10 kB": POST + b"Prefer: " + b"wait=1," * 1500 + b"\r\nContent-Length: 2\r\n\r\n{}",
}


def send(port, data, seconds=0.5):
    """What the server says before it falls silent or hangs up."""
    reply = b""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        try:
            connection.sendall(data)
            connection.settimeout(seconds)
            while part := connection.recv(65536):
                reply += part
        except (TimeoutError, ConnectionError):
            pass
    return reply


@pytest.fixture(scope="module")
def replies(_server):
    """What the server said to each of the corpus, sent side by side: most of the time is spent waiting for silence."""
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(CORPUS, pool.map(partial(send, _server.settings.port), CORPUS.values()), strict=True))


@pytest.mark.parametrize("name", CORPUS)
def test_bytes_that_are_hardly_http_harm_nothing(fuzzed, replies, name):
    reply = replies[name]
    statuses = [part[:3] for part in reply.split(b"HTTP/1.1 ")[1:]]
    assert all(status[:1] in (b"1", b"2", b"4") for status in statuses), reply
    assert b"202" not in statuses  # without a key no job is made, in whatever disguise
    assert b"Traceback" not in reply
    with fuzzed.client() as client:
        assert client.get("/livez").status_code == 200
        assert client.get("/v1/jobs", headers=bearer(BOOTSTRAP)).json()["data"] == []
