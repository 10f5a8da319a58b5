"""Every Redis key's name, and the Lua that moves a job, shared by the API, the worker and the sender.

Each script runs whole or not at all and reads Redis' own clock, so no process's clock decides anything. The scripts
reach keys that they compute, so Safelight needs one Redis (with replicas if you like), not a cluster.
"""

import hashlib
from importlib.resources import files
from typing import Any, Final

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import NoScriptError

PREFIX: Final = "safelight:"
JOB: Final = f"{PREFIX}job:"  # hash: the job, see job.py
EVENTS: Final = f"{PREFIX}events:"  # list of a job's events, and the channel that says "look again"
JOBS: Final = f"{PREFIX}jobs:"  # + tenant [+ ":" + status]: zset of ids by creation (microseconds, unique)
WAITING: Final = f"{PREFIX}waiting:"  # + queue: zset of queued ids by creation; RQ's list may hold cancelled ones too
ALONE: Final = f"{PREFIX}alone:"  # + queue: list of ids that may only run alone
ALONE_TURN: Final = f"{PREFIX}alone-turn:"  # + queue: the worker that is emptying itself to run one of them
LEASES: Final = f"{PREFIX}leases"  # zset: id -> when its worker counts as dead (milliseconds)
RETENTION: Final = f"{PREFIX}retention"  # zset: id -> when job, objects and idempotency key go (milliseconds)
IDEMPOTENCY: Final = f"{PREFIX}idempotency:"  # + tenant + ":" + digest of the key: "fingerprint id"
OUTBOX: Final = f"{PREFIX}outbox"  # zset: delivery id -> when its next attempt is due (milliseconds)
OUTBOX_BELL: Final = f"{PREFIX}outbox-bell"  # channel: the id of a delivery that was just put into the outbox
DELIVERY: Final = f"{PREFIX}delivery:"  # hash: one webhook with a snapshot of its job
PROCESSES: Final = f"{PREFIX}processes"  # zset: name -> last beat (milliseconds)
PROCESS: Final = f"{PREFIX}process:"  # string: what a live process says of itself, JSON
API_KEYS: Final = f"{PREFIX}keys"  # hash: key id -> JSON
CLOCK: Final = f"{PREFIX}clock"  # string: the last creation time given out, so that no two are equal
WAKE: Final = f"{PREFIX}wake"  # channel: the name of a queue that got a job
CONTROL: Final = f"{PREFIX}control"  # channel: the id of a job whose run must stop

RQ: Final = "rq:"  # RQ's own keys, kept valid so that `rq info` and rq-dashboard read them
QUEUE_PREFIX: Final = "safelight."

_LUA_NAMES = (
    *("JOB", "EVENTS", "JOBS", "WAITING", "ALONE", "ALONE_TURN", "LEASES", "RETENTION", "IDEMPOTENCY"),
    *("OUTBOX", "OUTBOX_BELL", "DELIVERY", "CLOCK", "WAKE", "CONTROL", "RQ"),
)


def queue_name(model: str) -> str:
    """The RQ queue that jobs for `model` wait in."""
    return f"{QUEUE_PREFIX}{model}"


class Script:
    """One of the files in lua/, with the key names and prelude.lua before it; callable on sync and async clients."""

    def __init__(self, name: str) -> None:
        folder = files("app.core") / "lua"
        names = "".join(f"local {n} = '{globals()[n]}'\n" for n in _LUA_NAMES)
        self.text = names + (folder / "prelude.lua").read_text() + (folder / f"{name}.lua").read_text()
        self.sha = hashlib.sha1(self.text.encode()).hexdigest()  # noqa: S324  # Redis names scripts by SHA-1

    def run(self, redis: "Redis", *args: Any) -> Any:
        """Run on a synchronous client; loads the script where Redis does not have it."""
        try:
            return redis.evalsha(self.sha, 0, *args)
        except NoScriptError:
            return redis.eval(self.text, 0, *args)

    async def call(self, redis: "AsyncRedis", *args: Any) -> Any:
        """Run on an asynchronous client; loads the script where Redis does not have it."""
        try:
            return await redis.evalsha(self.sha, 0, *args)
        except NoScriptError:
            return await redis.eval(self.text, 0, *args)


SUBMIT = Script("submit")
CLAIM = Script("claim")
BEAT = Script("beat")
COMMIT = Script("commit")
RELEASE = Script("release")
CANCEL = Script("cancel")
REAP = Script("reap")
PURGE = Script("purge")
TAKE = Script("take")
POSTPONE = Script("postpone")
