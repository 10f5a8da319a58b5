"""A webhook receiver on loopback: real HTTP in threads, keeps what it was sent, answers as a path or a script says."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = tuple[int, dict[str, str], bytes]
OK: Answer = (200, {}, b"ok")


@dataclass(frozen=True)
class Received:
    """One request; `at` is when its last byte came, in seconds since the epoch."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float


@dataclass
class Receiver:
    """What came, and how to answer: `script` has an answer for each request in turn, then it is 200."""

    port: int = 0
    received: list[Received] = field(default_factory=list)
    script: list[Answer] = field(default_factory=list)
    hang: threading.Event | None = None  # no answer until it is set
    lock: threading.Lock = field(default_factory=threading.Lock)

    def url(self, path: str = "/hook") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def answer(self, request: Received) -> Answer:
        with self.lock:
            self.received.append(request)
            return self.script.pop(0) if self.script else OK

    def wait_for(self, count: int, seconds: float = 15) -> list[Received]:
        """The first `count` requests, once they are there."""
        return self.wait_until(lambda received: len(received) >= count, seconds)[:count]

    def wait_until(self, is_enough: Callable[[list[Received]], bool], seconds: float = 15) -> list[Received]:
        deadline = time.monotonic() + seconds
        while not is_enough(self.received):
            assert time.monotonic() < deadline, f"only {len(self.received)} requests came"
            time.sleep(0.005)
        return list(self.received)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request, client_address):
        """A sender that hangs up in mid-reply is part of the tests."""


@contextmanager
def receiver(port: int = 0) -> Iterator[Receiver]:
    """A receiver that listens; hanging requests end with it."""
    state = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, extra, reply = state.answer(Received(self.path, headers, body, time.time()))
            if state.hang:
                state.hang.wait(60)
            self.send_response(status)
            for name, value in {"content-length": str(len(reply)), **extra}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):
                self.wfile.write(reply)

        def log_message(self, *arguments):
            pass

    server = _Server(("127.0.0.1", port), Handler)
    state.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        if state.hang:
            state.hang.set()
        server.shutdown()
        server.server_close()
        thread.join()
