"""Nursery: forks parts of the service out of a process that has imported everything, in milliseconds.

The forked process is the same as a started one: it reads its settings from its own environment and runs a part's own
main function. Run as a module, this is that process; it ends, and kills what it forked, when its standard input does.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Child:
    """A forked process."""

    def __init__(self, pid: int, exits: dict[int, int]) -> None:
        self.pid = pid
        self._exits = exits

    def poll(self) -> int | None:
        """None while it lives, else its exit code, negative for a signal."""
        return self._exits.get(self.pid)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ended, and we are about to be told
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, seconds: float = 30) -> int:
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"process {self.pid} did not end within {seconds} s"
            time.sleep(0.005)
        return code


class Nursery:
    """`start("worker", environment, log)`; parts are worker, api and sender."""

    def __init__(self, prefix: tuple[str, ...] = (), root: Path = ROOT) -> None:
        command = [*prefix, sys.executable, "-m", "tests.chaos.nursery"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, text=True)
        self._exits: dict[int, int] = {}
        self._born: list[int] = []
        self._said = threading.Condition()
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            told = json.loads(line)
            with self._said:
                if "code" in told:
                    self._exits[told["pid"]] = told["code"]
                else:
                    self._born.append(told["pid"])
                self._said.notify_all()

    def start(self, part: str, environment: Mapping[str, str], log: Path) -> Child:
        with self._lock, self._said:
            self._process.stdin.write(json.dumps([part, dict(environment), str(log)]) + "\n")
            self._process.stdin.flush()
            self._said.wait_for(lambda: self._born or self._process.poll() is not None, 120)
            assert self._born, "the nursery does not answer"
            return Child(self._born.pop(), self._exits)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._reader.join(5)
        self._process.stdout.close()


@contextmanager
def nursery(*prefix: str, root: Path = ROOT) -> Iterator[Nursery]:
    """A nursery of the tree in `root`, started by `prefix` (a command that takes a command, as faketime does)."""
    built = Nursery(prefix, root)
    try:
        yield built
    finally:
        built.close()


def _parts():
    from app import sender
    from app.core import logs
    from app.core.settings import load_settings
    from app.main import serve
    from tests.chaos import stub_worker

    def started(name, run):
        def start() -> None:
            settings = load_settings()
            logs.configure(settings.log_format, name)
            run(settings)

        return start

    return {"worker": stub_worker.run, "api": started("api", serve), "sender": started("sender", sender.run)}


def _serve() -> None:
    parts = _parts()
    children: set[int] = set()
    pending = b""
    while True:
        readable, _, _ = select.select([0], [], [], 0.01)
        if readable:
            chunk = os.read(0, 65536)
            if not chunk:
                break
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                pid = _fork(parts, *json.loads(line))
                children.add(pid)
                _say(pid=pid)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            children.discard(pid)
            _say(pid=pid, code=os.waitstatus_to_exitcode(status))
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)  # nothing to tidy up, and torch takes its time over it


def _fork(parts, part: str, environment: dict[str, str], log: str) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 1)
        os.dup2(1, 2)
        os.environ.update(environment)
        parts[part]()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001  # whatever it is, this process ends here
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _say(**told: int) -> None:
    os.write(1, (json.dumps(told) + "\n").encode())


if __name__ == "__main__":
    _serve()
