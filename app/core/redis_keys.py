"""Every Redis key's name, and the Lua that moves a job, shared by the API, the worker and the sender.

Each script runs whole or not at all and reads Redis' own clock, so no process's clock decides anything. The scripts
reach keys that they compute, so Safelight needs one Redis (with replicas if you like), not a cluster.
"""

import hashlib
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Final

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import NoScriptError

PREFIX: Final = "safelight:"
JOB: Final = f"{PREFIX}job:"  # hash: the job, see job.py
EVENTS: Final = f"{PREFIX}events:"  # list of a job's events, and the channel that says "look again"
PREVIEWS: Final = f"{PREFIX}previews:"  # + job: zset of the latest previews (JSON) by number
WATCHERS: Final = f"{PREFIX}watchers:"  # + job: zset: who wants its previews -> until when (milliseconds)
TENANT_EVENTS: Final = f"{PREFIX}tenant-events:"  # + tenant: stream of its jobs' statuses, and a channel as above
JOBS: Final = f"{PREFIX}jobs:"  # + tenant [+ ":" + status]: zset of ids by creation (microseconds, unique)
WAITING: Final = f"{PREFIX}waiting:"  # + lane: zset of queued ids by creation; RQ's list may hold cancelled ones too
LANE_TURN: Final = f"{PREFIX}lane-turn:"  # + share: how many jobs were popped while several of its lanes had some
SHARES: Final = f"{PREFIX}shares:"  # + queue: zset of the shares that have jobs, by virtual time, see lua/shares.lua
RESTED: Final = f"{PREFIX}rested:"  # + queue: zset of shares without jobs that are ahead of those with some
VIRTUAL: Final = f"{PREFIX}virtual:"  # + queue: string: the virtual time of its latest turn
CAPPED: Final = f"{PREFIX}capped:"  # + tenant: set of its shares that wait for one of its jobs to end
WORK: Final = f"{PREFIX}work:"  # + queue: hash: jobs, and denoiser-milliseconds and rows, that wait or run
LIMITS: Final = f"{PREFIX}limits:"  # + tenant: hash: what differs from the service's own limits, see limits.py
BUCKET: Final = f"{PREFIX}bucket:"  # + tenant: hash: denoiser-milliseconds it may still hand in, and as of when
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
UPLOAD: Final = f"{PREFIX}upload:"  # hash: an upload, see uploads.py
UPLOADS: Final = f"{PREFIX}uploads:"  # + tenant: zset of its uploads by creation (microseconds, unique)
UPLOAD_JOBS: Final = f"{PREFIX}upload-jobs:"  # + upload: set of the jobs that use it and have a record, and of batches
UPLOAD_EXPIRY: Final = f"{PREFIX}upload-expiry"  # zset: upload -> when it goes, unless a job uses it (milliseconds)
STRAY_OBJECTS: Final = f"{PREFIX}stray-objects"  # zset: key of an object that no record names -> when to sweep it
BATCH: Final = f"{PREFIX}batch:"  # hash: a batch, see batches.py
BATCHES: Final = f"{PREFIX}batches:"  # + tenant: zset of its batches by creation (microseconds, unique)
BATCHES_OPEN: Final = f"{PREFIX}batches-open:"  # + tenant: set of its batches that have not ended
BATCH_PLAN: Final = f"{PREFIX}batch-plan:"  # + batch: list of the members that are still to be queued
BATCH_JOBS: Final = f"{PREFIX}batch-jobs:"  # + batch [+ ":" + status]: zset of the members' ids by index
BATCH_WORK: Final = f"{PREFIX}batch-work"  # zset: batch that is being queued, cancelled or deleted, by creation
BATCH_RETENTION: Final = f"{PREFIX}batch-retention"  # zset: batch -> when its record goes (milliseconds)
DEADLINES: Final = f"{PREFIX}deadlines"  # zset: job id -> when it must have ended (milliseconds)
PROCESSES: Final = f"{PREFIX}processes"  # zset: name -> last beat (milliseconds)
PROCESS: Final = f"{PREFIX}process:"  # string: what a live process says of itself, JSON
API_KEYS: Final = f"{PREFIX}keys"  # hash: key id -> JSON
API_KEY_USES: Final = f"{PREFIX}key-uses"  # hash: key id -> when it was last used (seconds)
CLOCK: Final = f"{PREFIX}clock"  # string: the last creation time given out, so that no two are equal
WAKE: Final = f"{PREFIX}wake"  # channel: the name of a queue that got a job
CONTROL: Final = f"{PREFIX}control"  # channel: the id of a job whose run must stop

DEFAULT_TENANT: Final = "default"
ADMITTING: Final = frozenset({"submit", "begin_upload", "batch_create", "batch_feed"})  # what a full Redis refuses
RQ: Final = "rq:"  # RQ's own keys, kept valid so that `rq info` and rq-dashboard read them
QUEUE_PREFIX: Final = "safelight."

_LUA_NAMES = (
    *("BATCH", "BATCHES", "BATCHES_OPEN", "BATCH_PLAN", "BATCH_JOBS", "BATCH_WORK", "BATCH_RETENTION"),
    *("PREVIEWS", "WATCHERS"),
    *("UPLOAD", "UPLOADS", "UPLOAD_JOBS", "UPLOAD_EXPIRY", "STRAY_OBJECTS"),
    *("TENANT_EVENTS", "ENDPOINTS", "USAGE", "DEADLINES", "DELIVERIES", "JOB_DELIVERIES", "WEBHOOK_SECRETS", "HEALTH"),
    *("JOB", "EVENTS", "JOBS", "WAITING", "LANE_TURN", "ALONE", "ALONE_TURN", "TICKET", "LEASES", "ABANDONED"),
    *("SHARES", "RESTED", "VIRTUAL", "CAPPED", "WORK", "LIMITS", "BUCKET", "DEFAULT_TENANT"),
    *("RETENTION", "IDEMPOTENCY", "OUTBOX", "OUTBOX_BELL", "DELIVERY", "CLOCK", "WAKE", "CONTROL", "RQ"),
)


def queue_name(model: str) -> str:
    """The queue that jobs for `model` wait in, in one of its lanes."""
    return f"{QUEUE_PREFIX}{model}"


def share_name(queue: str, tenant: str) -> str:
    """What the lanes of one tenant in a queue are called together; no name of a model or tenant has an @ in it."""
    return queue if tenant == DEFAULT_TENANT else f"{queue}@{tenant}"


def lane_name(queue: str, priority: str, tenant: str = DEFAULT_TENANT) -> str:
    """The RQ queue that a tenant's jobs of one priority wait in; no model's or tenant's name has a colon in it."""
    share = share_name(queue, tenant)
    return share if priority == "normal" else f"{share}:{priority}"


def lanes(queue: str, tenant: str = DEFAULT_TENANT) -> list[str]:
    """All lanes of a tenant in a queue, the most urgent first."""
    return [lane_name(queue, priority, tenant) for priority in ("high", "normal", "low")]


class Script:
    """One of the files in lua/, with the key names and what it shares before it; callable on sync and async clients.

    A library written `name()` is another script as a function: it takes what that script takes, as a table.
    """

    def __init__(self, name: str, *libraries: str) -> None:
        folder = files("app.core") / "lua"
        names = "".join(f"local {n} = '{globals()[n]}'\n" for n in _LUA_NAMES)
        # A full Redis refuses new jobs, and still lets those it has come to their end.
        flags = "" if name in ADMITTING else " flags=allow-oom"
        code = "".join(_part(folder, part) for part in ("shares", "prelude", *libraries, name))
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


def _part(folder: Traversable, name: str) -> str:
    text = (folder / f"{name.removesuffix('()')}.lua").read_text()
    return f"local function {name.removesuffix('()')}(ARGV)\n{text}end\n" if name.endswith("()") else text


SUBMIT = Script("submit", "limits")
CLAIM = Script("claim")
BEAT = Script("beat")
MARK = Script("mark")
WATCH = Script("watch")
PREVIEW = Script("preview")
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
PUT_ENDPOINT = Script("put_endpoint")
ROTATE = Script("rotate")
EXPIRE = Script("expire")
LOAD = Script("load")
SET_LIMITS = Script("set_limits")
BEGIN_UPLOAD = Script("begin_upload")
PUT_UPLOAD = Script("put_upload")
FORGET_UPLOAD = Script("forget_upload")
BATCH_CREATE = Script("batch_create")
BATCH_FEED = Script("batch_feed", "limits", "submit()")
BATCH_STOP = Script("batch_stop")
BATCH_CLEAR = Script("batch_clear", "cancel()")
BATCH_PURGE = Script("batch_purge")
