"""Bucket: the part of S3's protocol that Safelight speaks, on files, with faults to order.

`PUT /_faults` with a mode as its body: ok; error (503 to everything); hang (nothing is answered); truncate (a put keeps
half); forget (a put is acknowledged and not kept); corrupt (a byte is changed, the size and ETag are those of what is
kept); cut (the connection is reset in the middle of a body). Run as a module: PORT FOLDER.
"""

import hashlib
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree as ET

import httpx2

from tests.servers import S3_ENVIRONMENT, free_port

MODES = ("error", "hang", "truncate", "forget", "corrupt", "cut")
NAME = "pictures"


class Bucket:
    """A running bucket; `fail(mode)` begins an outage, `fail("ok")` ends it."""

    environment = S3_ENVIRONMENT

    def __init__(self, port: int, folder: Path) -> None:
        self.folder = folder
        self.endpoint = f"http://127.0.0.1:{port}"
        self.url = f"s3://{NAME}/?endpoint={quote(self.endpoint, safe='')}&region=us-east-1"

    def fail(self, mode: str) -> None:
        httpx2.put(f"{self.endpoint}/_faults", content=mode, trust_env=False).raise_for_status()

    def objects(self) -> dict[str, Path]:
        """What is stored, by key."""
        return {unquote(path.name): path for path in self.folder.iterdir() if not path.name.endswith(".part")}


@contextmanager
def bucket(folder: Path) -> Iterator[Bucket]:
    port = free_port()
    objects = folder / "bucket"
    objects.mkdir(exist_ok=True)
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-m", "tests.chaos.bucket", str(port), str(objects)], cwd=root)
    try:
        _await(port)
        yield Bucket(port, objects)
    finally:
        process.kill()
        process.wait()


def _await(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline, "the bucket did not start"
            time.sleep(0.02)
        else:
            return


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    mode = "ok"
    folder = Path()

    def handle_error(self, request, client_address) -> None: ...


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_PUT(self) -> None:
        if self.path == "/_faults":
            self.server.mode = self._body().decode()
            return self._reply(200)
        mode = self.server.mode
        if mode == "cut":
            self.rfile.read(1)
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return self.connection.close()
        body = self._body()
        if self._is_down():
            return None
        etag = hashlib.md5(body).hexdigest()
        if mode == "truncate":
            body = body[: len(body) // 2]
        if mode == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
            etag = hashlib.md5(body).hexdigest()
        if mode != "forget":
            path = self._path()
            part = path.with_name(f"{path.name}.{threading.get_ident()}.part")
            part.write_bytes(body)
            part.rename(path)
        return self._reply(200, ETag=f'"{etag}"')

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self._is_down():
            return None
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        if "list-type" in query:
            return self._list(query.get("prefix", [""])[0])
        path = self._path()
        if not path.exists():
            return self._reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
        body = path.read_bytes()
        modified = formatdate(path.stat().st_mtime, usegmt=True)
        return self._reply(200, body, **{"ETag": f'"{hashlib.md5(body).hexdigest()}"', "Last-Modified": modified})

    def do_DELETE(self) -> None:
        if not self._is_down():
            self._path().unlink(missing_ok=True)
            self._reply(204)

    def do_POST(self) -> None:
        body = self._body()
        if self._is_down():
            return
        keys = [found.text for found in ET.fromstring(body).iter() if found.tag.endswith("Key")]
        for key in keys:
            (self.server.folder / quote(key, safe="")).unlink(missing_ok=True)
        told = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self._reply(200, f"<DeleteResult>{told}</DeleteResult>".encode())

    def _list(self, prefix: str) -> None:
        found = []
        for path in self.server.folder.iterdir():
            key = unquote(path.name)
            if key.startswith(prefix) and path.suffix != ".part":
                stat = path.stat()
                at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stat.st_mtime))
                found.append(
                    f"<Contents><Key>{key}</Key><LastModified>{at}</LastModified><Size>{stat.st_size}</Size></Contents>"
                )
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(found)}</ListBucketResult>"
        self._reply(200, text.encode())

    def _is_down(self) -> bool:
        if self.server.mode == "error":
            self._reply(503, b"<Error><Code>SlowDown</Code></Error>")
            return True
        while self.server.mode == "hang":
            time.sleep(0.05)
        return False

    def _path(self) -> Path:
        return self.server.folder / quote(unquote(urlsplit(self.path).path).removeprefix(f"/{NAME}/"), safe="")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments) -> None: ...


if __name__ == "__main__":
    server = _Server(("127.0.0.1", int(sys.argv[1])), _Handler)
    server.folder = Path(sys.argv[2])
    server.serve_forever(poll_interval=0.05)
