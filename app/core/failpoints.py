"""Failpoints: named places in a job's walk where a test makes the process die, stall, break or lose its connections.

For tests only, armed by SAFELIGHT_FAILPOINTS: `after_claim=die`, or `before_step=freeze:3@2,after_commit=disconnect`
(`freeze` for 3 seconds, the second time the place is reached). Each goes off once. Unarmed, reaching a place is one
look into an empty dict.
"""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from app.core.errors import ConfigError

log = structlog.get_logger()
# Around a call to Redis `disconnect` also raises what redis-py would: before, the request is lost; after, the reply.
CALLS: Final = ("submit", "claim", "beat", "commit", "release")
AT_REDIS: Final = frozenset(f"{when}_{call}" for call in CALLS for when in ("before", "after"))
PLACES: Final = AT_REDIS | {
    *("before_start", "before_step", "after_step", "before_upload", "after_upload", "before_discard"),
    *("before_webhook", "after_webhook"),
}
DEAD: Final = 137  # what a shell says of a process that was killed
_FORM: Final = re.compile(r"(?P<place>\w+)=(?P<action>\w+)(:(?P<seconds>[0-9.]+))?(@(?P<nth>[0-9]+))?")
_armed: dict[str, Callable[[str], None]] = {}


def reach(place: str, job_id: str = "") -> None:
    """The walk has come to `place`, with `job_id` where it is that of one job."""
    if act := _armed.get(place):
        act(job_id)


def arm(text: str) -> None:
    """Arm what SAFELIGHT_FAILPOINTS says. Raises ConfigError."""
    for part in filter(None, text.split(",")):
        found = _FORM.fullmatch(part)
        if not found or found["place"] not in PLACES or found["action"] not in ACTIONS:
            raise ConfigError(
                f"SAFELIGHT_FAILPOINTS: {part!r} is not PLACE=ACTION[:SECONDS][@NTH]; places are "
                f"{', '.join(sorted(PLACES))}, actions {', '.join(ACTIONS)}; unset it, it is for tests"
            )
        place = found["place"]
        _armed[place] = _Trap(place, ACTIONS[found["action"]], float(found["seconds"] or 1), int(found["nth"] or 1))


def arm_with(place: str, act: Callable[[str], None]) -> None:
    """Arm a place with a function of one's own, which gets the job's id each time the place is reached."""
    assert place in PLACES, place
    _armed[place] = act


def disarm() -> None:
    """Forget all."""
    _armed.clear()


@dataclass(slots=True)
class _Trap:
    place: str
    action: Callable[[str, float], None]
    seconds: float
    left: int

    def __call__(self, _job_id: str) -> None:
        self.left -= 1
        if self.left == 0:
            log.warning("failpoint.reached", place=self.place, action=self.action.__name__.removeprefix("_"))
            self.action(self.place, self.seconds)


def _die(_place: str, _seconds: float) -> None:
    os._exit(DEAD)


def _stall(_place: str, seconds: float) -> None:
    """The thread that came here stands still; the others go on."""
    time.sleep(seconds)


def _freeze(_place: str, seconds: float) -> None:
    """The whole process stands still, as under SIGSTOP or in a machine that is being moved."""
    command = ["/bin/sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"]
    subprocess.Popen(command, start_new_session=True)  # noqa: S603  # numbers only
    os.kill(os.getpid(), signal.SIGSTOP)


def _disconnect(place: str, _seconds: float) -> None:
    """Every TCP connection of the process is cut."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            _cut(os.dup(int(entry.name)))
    if place in AT_REDIS:
        raise ConnectionError(f"failpoint {place}")


def _cut(descriptor: int) -> None:
    try:
        connection = socket.socket(fileno=descriptor)
    except OSError:  # no socket
        os.close(descriptor)
        return
    with connection:
        if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername():
            connection.shutdown(socket.SHUT_RDWR)


def _crash(place: str, _seconds: float) -> None:
    """A bug of ours: an exception that nobody expects."""
    raise RuntimeError(f"failpoint {place}")


ACTIONS: Final = {"die": _die, "crash": _crash, "stall": _stall, "freeze": _freeze, "disconnect": _disconnect}
