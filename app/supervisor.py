"""`safelight up`: starts the parts, restarts what dies, drains."""

import ctypes
import fcntl
import http.client
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Final, NoReturn, Self

from app.core.errors import ConfigError
from app.core.settings import PREFIX, Settings, webhook_secret
from app.embedded_redis import EmbeddedRedis

CONFIG_EXIT: Final = 2  # what a process ends with when a setting is wrong: starting it again would not help
TICK_SECONDS: Final = 0.2
BACKOFF: Final = (0.5, 10.0)  # seconds before the first restart, and the most
STABLE_SECONDS: Final = 30.0  # alive this long: the next restart is the first again
API_SECONDS: Final = 15.0  # what a part may take to end, before it is killed
SENDER_SECONDS: Final = 20.0
REDIS_SECONDS: Final = 30.0
CLOSE_SECONDS: Final = 5.0  # of Redis, where there is no time to drain
MARGIN_SECONDS: Final = 10.0  # of the worker, after its grace
LOG_BYTES: Final = 32 * 2**20  # a log that is longer becomes NAME.log.1
TAIL_LINES: Final = 12
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h

Commands = Mapping[str, Sequence[str]]
COMMANDS: Final[Commands] = {
    "api": (sys.executable, "-m", "app.cli", "api"),
    "worker": (sys.executable, "-m", "app.cli", "worker"),
    "sender": (sys.executable, "-m", "app.cli", "sender"),
}


class Stopped(Exception):  # noqa: N818  # no error: somebody asked
    """Somebody asked us to stop while we waited."""


class ChildProcess:
    """A part that runs as a child, in a session of its own, and dies if we do."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, log: Path) -> None:
        with log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603  # our own commands
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C in a terminal is for the supervisor alone
                preexec_fn=_die_with_parent(),  # noqa: PLW1509  # we have one thread only
            )

    def poll(self) -> int | None:
        """None while it lives, else its exit code."""
        return self._process.poll() if self._process else 0

    def send_signal(self, number: signal.Signals) -> None:
        if self._process:
            self._process.send_signal(number)


def _die_with_parent() -> Callable[[], None] | None:
    """What a child does before it becomes its command, so that the kernel kills it when we die. Linux only."""
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # we died in between
            os._exit(1)

    return prepare


@dataclass(slots=True, eq=False)
class Part:
    """One part of the service, and how its restarts go."""

    name: str
    process: ChildProcess | EmbeddedRedis
    log: Path
    stop_seconds: float
    failures: int = 0
    started_at: float = 0.0
    restart_at: float | None = None  # None: it is meant to run
    log_start: int = 0  # bytes in the log before its last start

    def start(self) -> None:
        _rotate(self.log)
        self.log_start = _size(self.log)
        self.process.start(self.log)
        self.started_at, self.restart_at = time.monotonic(), None

    def is_alive(self) -> bool:
        return self.restart_at is None and self.started_at > 0 and self.process.poll() is None

    def schedule_restart(self) -> float:
        """Seconds until it is to start again: twice as long each time, from half a second after a long life."""
        now = time.monotonic()
        self.failures = 1 if now - self.started_at > STABLE_SECONDS else self.failures + 1
        delay = min(BACKOFF[0] * 2.0 ** (self.failures - 1), BACKOFF[1])
        self.restart_at = now + delay
        return delay

    def last_words(self) -> str:
        """The end of what it wrote since its last start: its plain lines if it wrote any, else its structured ones."""
        if not self.log.exists():  # a Redis that was found writes elsewhere
            return ""
        with self.log.open("rb") as log:
            log.seek(max(min(self.log_start, _size(self.log)), _size(self.log) - 16384))
            lines = log.read().decode(errors="replace").splitlines()
        plain = [line for line in lines if not line.startswith("{")]
        return "\n".join((plain or lines)[-TAIL_LINES:])


class Signals:
    """Waits for a while, or until a signal comes; no handler of ours runs in the middle of anything."""

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, signal.SIGCHLD):
            signal.signal(number, _ignore)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()

    def wait(self, seconds: float = TICK_SECONDS) -> bool:
        """Whether we were asked to stop; returns early when a child dies."""
        select.select([self._reader], [], [], seconds)
        with suppress(BlockingIOError):
            return any(number in STOP_SIGNALS for number in self._reader.recv(4096))
        return False


class Supervisor:
    """Runs the whole service on one DATA folder; `commands` are what the API, the worker and the sender are.

    A worker that has not ended `margin_seconds` after its grace is killed.
    """

    def __init__(
        self, settings: Settings, commands: Commands = COMMANDS, *, margin_seconds: float = MARGIN_SECONDS
    ) -> None:
        self._settings = settings
        self._margin_seconds = margin_seconds
        self._data = settings.data.resolve()
        self._commands = commands
        self._parts: list[Part] = []
        self._signals = Signals()
        self._port = 0

    def run(self) -> int:
        """Run until told to stop; the exit code. Raises ConfigError, also for one that a part ended with."""
        self._make_data()
        with (self._data / "lock").open("a+") as lock, self._signals:
            self._lock(lock)
            self._port = _listenable(self._settings)
            webhook_secret(self._settings)  # made before several processes want it
            try:
                self._start()
                self._watch()
            except Stopped:
                _say("draining; once more to stop at once")
                return 0 if self._drain() else 1
            except ConfigError:
                self._drain()
                raise
            finally:
                self._kill()

    def _make_data(self) -> None:
        try:
            (self._data / "logs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"SAFELIGHT_DATA: cannot write {self._data}: {error.strerror}; name another") from error

    def _lock(self, lock: IO[str]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise ConfigError(
                f"SAFELIGHT_DATA: Safelight already runs on {self._data} (process {lock.read().strip()}); "
                "stop it, or name another folder"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()

    def _start(self) -> None:
        url = self._settings.redis_url or self._start_redis()
        grace = self._settings.grace_seconds + self._margin_seconds
        for name, stop_seconds in (("api", API_SECONDS), ("worker", grace), ("sender", SENDER_SECONDS)):
            process = ChildProcess(self._commands[name], self._environment(name, url))
            self._add(name, process, stop_seconds)

    def _add(self, name: str, process: ChildProcess | EmbeddedRedis, stop_seconds: float) -> Part:
        part = Part(name, process, self._data / "logs" / f"{name}.log", stop_seconds)
        self._parts.append(part)
        part.start()
        return part

    def _start_redis(self) -> str:
        redis = EmbeddedRedis(self._data)
        part = self._add("redis", redis, REDIS_SECONDS)
        while not redis.answers():
            if not part.is_alive():
                raise ConfigError(f"SAFELIGHT_DATA: the embedded Redis does not start:\n{part.last_words()}")
            if self._signals.wait():
                raise Stopped
        return redis.url

    def _environment(self, name: str, url: str) -> dict[str, str]:
        given = self._settings.metrics_port
        ports = {"worker": given, "sender": given + 1 if 0 < given < 65535 else 0}  # two listeners, one setting
        ours = {
            "REDIS_URL": url,
            "PORT": self._port,
            "DATA": self._data,
            "METRICS_PORT": ports.get(name, 0),
        }
        return {**os.environ, **{PREFIX + key: str(value) for key, value in ours.items()}}

    def _watch(self) -> NoReturn:
        """Restart what dies, and say once that all is ready. Raises Stopped, ConfigError."""
        is_ready = False
        while not self._signals.wait():
            for part in self._parts:
                self._tend(part)
            if not is_ready and _answers(self._settings.host, self._port):
                is_ready = True
                print(f"Safelight is ready: {self._address()}", flush=True)  # noqa: T201  # the one line of the contract
        raise Stopped

    def _address(self) -> str:
        return self._settings.model_copy(update={"port": self._port}).base_url

    def _tend(self, part: Part) -> None:
        if part.restart_at is not None:
            if time.monotonic() >= part.restart_at:
                self._restart(part)
            return
        code = part.process.poll()
        if code is None:
            _rotate(part.log)
        elif code == CONFIG_EXIT and part.name != "redis":
            raise ConfigError(part.last_words() or f"the {part.name} ended with exit code {code}; see {part.log}")
        else:
            last_words = part.last_words()
            delay = part.schedule_restart()
            _say(f"the {part.name} died ({_cause(code)}); starting it again in {delay:g} s; see {part.log}")
            if code:
                _say(last_words)

    def _restart(self, part: Part) -> None:
        try:
            part.start()
        except OSError as error:  # no memory, no processes left: later there may be
            _say(f"cannot start the {part.name} ({error.strerror}); again in {part.schedule_restart():g} s")

    def _drain(self) -> bool:
        """End the parts one by one, so that each finds what it needs to finish; Redis last. False: cut short."""
        for part in sorted(self._parts, key=lambda part: part.name == "redis"):
            if not part.is_alive():
                continue
            part.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + part.stop_seconds
            while part.is_alive():
                if self._signals.wait(0.05):
                    _say("stopping at once")
                    return False
                if time.monotonic() > deadline:
                    _say(f"the {part.name} did not end within {part.stop_seconds:g} s; it is killed")
                    part.process.send_signal(signal.SIGKILL)
                    deadline = float("inf")
        return True

    def _kill(self) -> None:
        """End what is left: at once, but for Redis, which only has to close its file."""
        left = [part for part in self._parts if part.is_alive()]
        for part in left:
            part.process.send_signal(signal.SIGTERM if part.name == "redis" else signal.SIGKILL)
        deadline = time.monotonic() + CLOSE_SECONDS
        while left := [part for part in left if part.is_alive()]:
            time.sleep(0.02)
            if time.monotonic() > deadline:
                left[0].process.send_signal(signal.SIGKILL)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Signals are read from the wake-up descriptor; a handler is needed only so that one is written there."""


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(f"safelight: {text}", file=sys.stderr, flush=True)  # noqa: T201  # a person watches


def _cause(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _rotate(log: Path) -> None:
    # Emptied in place: the part goes on appending to the file it has open.
    if _size(log) > LOG_BYTES:
        with suppress(OSError):  # best effort: on a full disk there is room only once the log is emptied
            shutil.copyfile(log, log.with_suffix(".log.1"))
        with suppress(OSError):  # next time, then: no log is worth the service
            os.truncate(log, 0)


def _listenable(settings: Settings) -> int:
    """The port that the API will listen on, a free one for 0. Raises ConfigError where it cannot."""
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        with socket.create_server(address[:2], family=family) as server:
            return int(server.getsockname()[1])
    except socket.gaierror as error:
        raise ConfigError(f"SAFELIGHT_HOST: {settings.host!r} is no address of this machine; correct it") from error
    except OSError as error:
        raise ConfigError(
            f"PORT: cannot listen on {settings.host}:{settings.port} ({error.strerror}); "
            f"stop what does, or choose another with PORT (SAFELIGHT_PORT)"
        ) from error


def _answers(host: str, port: int) -> bool:
    """Whether /readyz says 200."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # asked, not bound
    connection = http.client.HTTPConnection(local, port, timeout=1)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def up(settings: Settings) -> int:
    """Run the whole service until told to stop; the exit code. Raises ConfigError."""
    return Supervisor(settings).run()
