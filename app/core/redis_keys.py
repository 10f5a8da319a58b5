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
TENANT_EVENTS: Final = f"{PREFIX}tenant-events:"  # + tenant: stream of its jobs' statuses, and a channel as above
JOBS: Final = f"{PREFIX}jobs:"  # + tenant [+ ":" + status]: zset of ids by creation (microseconds, unique)
WAITING: Final = f"{PREFIX}waiting:"  # + lane: zset of queued ids by creation; RQ's list may hold cancelled ones too
LANE_TURN: Final = f"{PREFIX}lane-turn:"  # + queue: how many jobs were popped while several lanes had some
ALONE: Final = f"{PREFIX}alone:"  # + queue: list of ids that may only run alone
ALONE_TURN: Final = f"{PREFIX}alone-turn:"  # + queue: the worker that is emptying itself to run one of them
TICKET: Final = f"{PREFIX}ticket:"  # + worker: "ticket id fence" of its last claim, asked for again after a lost reply
LEASES: Final = f"{PREFIX}leases"  # zset: id -> when its worker counts as dead (milliseconds)
ABANDONED: Final = (
    f"{PREFIX}abandoned"  # zset: "id/fence" of an attempt that ended without a commit -> when to sweep it
)
RETENTION: Final = f"{PREFIX}retention"  # zset: id -> when job, objects and idempotency key go (milliseconds)
IDEMPOTENCY: Final = f"{PREFIX}idempotency:"  # + tenant + ":" + digest of the key: "fingerprint id"
OUTBOX: Final = f"{PREFIX}outbox"  # zset: delivery id -> when its next attempt is due (milliseconds)
OUTBOX_BELL: Final = f"{PREFIX}outbox-bell"  # channel: the id of a delivery that was just put into the outbox
DELIVERY: Final = f"{PREFIX}delivery:"  # hash: one webhook with a snapshot of its job
DELIVERIES: Final = f"{PREFIX}deliveries:"  # + tenant: zset of its deliveries by creation (milliseconds)
JOB_DELIVERIES: Final = f"{PREFIX}job-deliveries:"  # + job: set of its deliveries
ENDPOINTS: Final = f"{PREFIX}endpoints:"  # + tenant: hash: endpoint id -> JSON, see endpoints.py
HEALTH: Final = f"{PREFIX}endpoint-health:"  # + endpoint: hash: failures in a row, since when, when to probe next
WEBHOOK_SECRETS: Final = f"{PREFIX}webhook-secrets:"  # + tenant: hash: the one in use, the one before, until when
USAGE: Final = f"{PREFIX}usage:"  # + tenant: hash: day:images, day:denoiser_ms
DEADLINES: Final = f"{PREFIX}deadlines"  # zset: job id -> when it must have ended (milliseconds)
PROCESSES: Final = f"{PREFIX}processes"  # zset: name -> last beat (milliseconds)
PROCESS: Final = f"{PREFIX}process:"  # string: what a live process says of itself, JSON
API_KEYS: Final = f"{PREFIX}keys"  # hash: key id -> JSON
API_KEY_USES: Final = f"{PREFIX}key-uses"  # hash: key id -> when it was last used (seconds)
CLOCK: Final = f"{PREFIX}clock"  # string: the last creation time given out, so that no two are equal
WAKE: Final = f"{PREFIX}wake"  # channel: the name of a queue that got a job
CONTROL: Final = f"{PREFIX}control"  # channel: the id of a job whose run must stop

RQ: Final = "rq:"  # RQ's own keys, kept valid so that `rq info` and rq-dashboard read them
QUEUE_PREFIX: Final = "safelight."

_LUA_NAMES = (
    *("TENANT_EVENTS", "ENDPOINTS", "USAGE", "DEADLINES", "DELIVERIES", "JOB_DELIVERIES", "WEBHOOK_SECRETS", "HEALTH"),
    *("JOB", "EVENTS", "JOBS", "WAITING", "LANE_TURN", "ALONE", "ALONE_TURN", "TICKET", "LEASES", "ABANDONED"),
    *("RETENTION", "IDEMPOTENCY", "OUTBOX", "OUTBOX_BELL", "DELIVERY", "CLOCK", "WAKE", "CONTROL", "RQ"),
)


def queue_name(model: str) -> str:
    """The queue that jobs for `model` wait in, in one of its lanes."""
    return f"{QUEUE_PREFIX}{model}"


def lane_name(queue: str, priority: str) -> str:
    """The RQ queue that jobs of one priority wait in; no model's name has a colon in it."""
    return queue if priority == "normal" else f"{queue}:{priority}"


def lanes(queue: str) -> list[str]:
    """All lanes of a queue, the most urgent first."""
    return [lane_name(queue, priority) for priority in ("high", "normal", "low")]


class Script:
    """One of the files in lua/, with the key names and prelude.lua before it; callable on sync and async clients."""

    def __init__(self, name: str) -> None:
        folder = files("app.core") / "lua"
        names = "".join(f"local {n} = '{globals()[n]}'\n" for n in _LUA_NAMES)
        # A full Redis refuses new jobs, and still lets those it has come to their end.
        flags = "" if name == "submit" else " flags=allow-oom"
        code = (folder / "prelude.lua").read_text() + (folder / f"{name}.lua").read_text()
        self.text = f"#!lua{flags}\n{names}{code}"
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
AUDIT = Script("audit")
PURGE = Script("purge")
TAKE = Script("take")
POSTPONE = Script("postpone")
SETTLE = Script("settle")
HEALTH_OF = Script("health")
REDELIVER = Script("redeliver")
TEST_ENDPOINT = Script("test_endpoint")
ROTATE = Script("rotate")
EXPIRE = Script("expire")
