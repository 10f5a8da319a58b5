"""Checker: reads what happened, and decides what of the promises P1, P2, P6 and P9 was broken."""

import hashlib
import json
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from app.core import redis_keys as keys
from app.core.params import GenerationParams
from tests.chaos.service import Service
from tests.chaos.stub_worker import picture_of

FINAL = ("succeeded", "failed", "canceled", "expired")


class History:
    """What was done and seen, in order, in memory and in a file: submit, read, fault, cancel."""

    def __init__(self, file: Path) -> None:
        self.entries: list[dict] = []
        self.file = file
        self._lock = threading.Lock()

    def note(self, kind: str, **about) -> None:
        entry = {"at": time.time(), "kind": kind, **about}
        with self._lock:
            self.entries.append(entry)
            with self.file.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def of(self, kind: str) -> list[dict]:
        with self._lock:
            return [entry for entry in self.entries if entry["kind"] == kind]


@dataclass
class Verdict:
    """What was broken, by kind, and figures."""

    broken: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    jobs: int = 0
    died: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # deaths -> jobs
    tries: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    recoveries: list[float] = field(default_factory=list)  # seconds from a kill to the next start
    webhooks: int = 0
    orphans: int = 0
    forgotten: int = 0  # jobs that Redis acknowledged and does not know, where that may be
    chances: int = 0  # deaths that did not count, see reap.lua

    @property
    def is_clean(self) -> bool:
        return not any(self.broken.values())

    def __str__(self) -> str:
        kinds = ("lost", "double", "dangling", "webhook", "cancelled", "wrong", "rq info")
        counts = ", ".join(f"{len(self.broken[kind])} {kind}" for kind in kinds)
        times = sorted(self.recoveries)
        recovery = f"recovery of {len(times)} jobs p50 {_share(times, 0.5):.1f} s p99 {_share(times, 0.99):.1f} s"
        lines = [f"{self.jobs} jobs: {counts}; {self.webhooks} webhooks", recovery if times else "no job to recover"]
        lines.append(f"deaths {dict(sorted(self.died.items()))}, tries {dict(sorted(self.tries.items()))}")
        lines.append(f"{self.chances} deaths were not a job's doing by the marks, besides those of pictures made")
        lines += [f"{self.forgotten} acknowledged jobs were forgotten by Redis"] if self.forgotten else []
        lines.append(f"{self.orphans} objects of attempts that never committed, left to the sweep")
        lines += [f"  {kind}: {text}" for kind, texts in self.broken.items() for text in texts[:10]]
        return "\n".join(lines)


def _share(times: list[float], share: float) -> float:
    return times[min(int(len(times) * share), len(times) - 1)] if times else 0.0


def check(service: Service, history: History, job_ids: list[str], *, may_forget: bool = False) -> Verdict:
    """Judge these jobs, all of which must have ended, and whose webhooks must have been sent.

    `may_forget`: Redis was not told to sync every write, and what it lost is counted only.
    """
    verdict = Verdict(jobs=len(job_ids))
    cancelled = {entry["job"] for entry in history.of("cancel") if entry["outcome"] == "canceled"}
    hooks = _webhooks(service)
    verdict.webhooks = sum(len(found) for found in hooks.values())
    reads = {entry["job"]: entry for entry in history.of("read")}  # of final ones only
    objects = _objects(service)
    committed = _commits(service)
    for job_id in job_ids:
        job = service.job(job_id)
        if job is None and may_forget:
            verdict.forgotten += 1
            continue
        if job is None:
            verdict.broken["lost"].append(f"{job_id} is not known any more")
            continue
        statuses = service.statuses(job_id)
        _check_end(verdict, job, cancelled)
        _check_once(verdict, job, statuses, committed[job_id], reads.get(job_id))
        _check_objects(verdict, service, job, objects)
        _check_hooks(verdict, job, hooks[job_id])
        record = service.redis.hgetall(keys.JOB + job_id)
        verdict.died[int(record.get("deaths", 0))] += 1
        verdict.tries[int(record.get("tries", 0))] += 1
        verdict.chances += int(record.get("chances", 0))
    verdict.orphans = len(objects)
    for fault in history.of("kill"):
        for job_id in fault["jobs"]:
            again = [at for status, at in service.statuses(job_id) if status == "processing" and at > fault["at"] * 1e3]
            verdict.recoveries += [again[0] / 1e3 - fault["at"]] if again else []
    return verdict


def _check_end(verdict: Verdict, job: dict, cancelled: set[str]) -> None:
    if job["id"] in cancelled:
        if job["status"] != "canceled" or job["outputs"]:
            verdict.broken["cancelled"].append(f"{job['id']} was cancelled and is {job['status']}")
    elif job["status"] != "succeeded":
        verdict.broken["lost"].append(f"{job['id']} ended as {job['status']}: {job['error']}")


def _check_once(verdict: Verdict, job: dict, statuses, fences: set[int], read: dict | None) -> None:
    names = [status for status, _ in statuses]
    if [name for name in names if name in FINAL] != [job["status"]] or names[-1:] != [job["status"]]:
        verdict.broken["double"].append(f"{job['id']} went through {names}")
    if len(fences) > 1:
        verdict.broken["double"].append(f"{job['id']} was committed under the fences {fences}")
    if read and (read["status"], read["sha256"]) != (job["status"], [o["sha256"] for o in job["outputs"]]):
        verdict.broken["double"].append(f"{job['id']} was read as {read['status']} and is {job['status']} with others")


def _check_objects(verdict: Verdict, service: Service, job: dict, objects: dict[str, Path]) -> None:
    record = json.loads(service.redis.hget(keys.JOB + job["id"], "outputs") or "[]")
    params = GenerationParams.model_validate(job["params"])
    if job["status"] == "succeeded" and len(record) != params.num_images:
        verdict.broken["dangling"].append(f"{job['id']} succeeded with {len(record)} of {params.num_images} pictures")
    for index, output in enumerate(record):
        path = objects.pop(output["key"], None)
        body = path.read_bytes() if path and path.exists() else b""
        if (len(body), hashlib.sha256(body).hexdigest()) != (output["bytes"], output["sha256"]):
            verdict.broken["dangling"].append(f"{output['key']} has {len(body)} of {output['bytes']} bytes, or others")
        elif output["sha256"] != picture_of(params, index):
            verdict.broken["wrong"].append(f"{output['key']} is not the picture of seed {output['seed']}")


def _check_hooks(verdict: Verdict, job: dict, hooks: list[tuple[str, dict]]) -> None:
    ids = {delivery for delivery, _ in hooks}
    if len(ids) != 1:
        verdict.broken["webhook"].append(f"{job['id']} ({job['status']}) was told {len(ids)} times: {ids}")
    for _, body in hooks:
        told = [output["sha256"] for output in body["data"]["outputs"]]
        if body["type"] != f"job.{job['status']}" or told != [output["sha256"] for output in job["outputs"]]:
            verdict.broken["webhook"].append(f"{job['id']} is {job['status']} and was told as {body['type']}")


def _webhooks(service: Service) -> dict[str, list[tuple[str, dict]]]:
    found: dict[str, list[tuple[str, dict]]] = defaultdict(list)
    for request in list(service.hook.received):
        body = json.loads(request.body)
        found[body["data"]["id"]].append((request.headers["webhook-id"], body))
    return found


def _objects(service: Service) -> dict[str, Path]:
    if service.store:
        return service.store.objects()
    root = Path(service.environment["SAFELIGHT_DATA"]) / "objects"
    return {path.relative_to(root).as_posix(): path for path in root.rglob("*.png")}


def _commits(service: Service) -> dict[str, set[int]]:
    """The fences under which workers say that they committed a job."""
    found: dict[str, set[int]] = defaultdict(set)
    for entry in service.logged("job.ended"):
        found[entry["job_id"]].add(entry["fence"])
    return found
