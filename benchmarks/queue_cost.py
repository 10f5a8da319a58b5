"""What the queue costs: at a hundred, ten thousand and a million waiting jobs, and against an empty route.

    python -m benchmarks.queue_cost [--jobs 100,10000,1000000] [--seconds 5]

A call's time is its caller's, who waits for it alone; beside it what Redis itself says it took (INFO commandstats).
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from app.api.auth import Caller
from app.api.deps import Deps
from app.api.jobs import submission_of
from app.api.schemas import JobRequest
from app.core import logs
from app.core import redis_keys as keys
from app.core.connections import connect, connect_async
from app.core.job import new_job_id
from app.core.params import GenerationParams
from app.core.queue import JobQueue, Submission, rq_time
from app.core.settings import Settings
from app.main import Server, create_app, listen
from tests.chaos.nursery import nursery
from tests.chaos.service import service
from tests.servers import RedisServer, free_port, redis_binaries
from worker.leases import Leases

TENANT, MODEL = "default", "emoji"
PARAMS = {
    "model": MODEL,
    "prompt": "a red heart on a wooden table, soft light, seen from above",
    "negative_prompt": "",
    "width": 64,
    "height": 64,
    "num_inference_steps": 20,
    "guidance_scale": 5.0,
    "seed": 4711,
    "num_images": 1,
    "scheduler": "ddim",
    "output_format": "png",
}
CALLS, ROUNDS, CLIENTS, BATCH = 50, 10, 64, 500
BODY = json.dumps({"prompt": PARAMS["prompt"], "seed": 1}).encode()
EMPTY = "/v1/empty"


def fill(redis: Redis, count: int) -> None:
    """Submit `count` jobs by the script itself."""
    lane, fields = keys.queue_name(MODEL), json.dumps({"params": json.dumps(PARAMS)})
    redis.script_load(keys.SUBMIT.text)
    for start in range(0, count, BATCH):
        pipeline = redis.pipeline(transaction=False)
        for _ in range(min(BATCH, count - start)):
            job_id = new_job_id()
            call = json.dumps(["safelight.job", None, [job_id], {}], separators=(",", ":"))
            rq = ["created_at", rq_time(), "data", call, "origin", lane]
            pipeline.evalsha(keys.SUBMIT.sha, 0, job_id, TENANT, lane, "", "-", 86_400_000, fields, "", *rq)
        pipeline.execute()


async def cost(redis: AsyncRedis, call: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """Microseconds a call takes, the caller's and Redis': each the mean of many, in the quietest of some rounds."""
    callers, servers = [], []
    await call()
    for _ in range(ROUNDS):
        await redis.config_resetstat()
        began = time.perf_counter()
        for _ in range(CALLS):
            await call()
        callers.append((time.perf_counter() - began) / CALLS * 1e6)
        stats = await redis.info("commandstats")
        ours = [about["usec"] for name, about in stats.items() if "config" not in name and "info" not in name]
        servers.append(sum(ours) / CALLS)
    return min(callers), min(servers)


async def costs(url: str) -> dict[str, tuple[float, float]]:
    """Of each call, with the jobs that wait now; as many wait afterwards."""
    redis = connect_async(url)
    queue = JobQueue(redis, retention_ms=86_400_000)
    leases = Leases(connect(url), "bench", lease_ms=60_000, retention_ms=86_400_000)
    submission = Submission(GenerationParams.model_validate(PARAMS))
    made: list[str] = []

    async def submit() -> None:
        made.append((await queue.submit(TENANT, submission))[0].id)

    async def claim() -> None:
        assert not isinstance(leases.claim(keys.queue_name(MODEL), is_idle=True), str)

    async def status() -> None:
        await queue.get(TENANT, made[len(made) // 2])

    async def cancel() -> None:
        await queue.cancel(TENANT, made.pop())

    async def page() -> None:
        await queue.list(TENANT, limit=20)

    calls = {"submit": submit, "claim": claim, "status": status, "list": page, "cancel": cancel}
    found = {name: await cost(redis, call) for name, call in calls.items()}
    await redis.aclose()
    return found


def flat(sizes: list[int], folder: Path) -> None:
    server = RedisServer(redis_binaries()["valkey"], folder, "everysec")
    server.start()
    redis = connect(server.url, timeout=120)
    empty = redis.info("memory")["used_memory"]
    first: dict[str, tuple[float, float]] = {}
    waiting = 0
    for size in sizes:
        fill(redis, size - waiting)
        used = (redis.info("memory")["used_memory"] - empty) / size
        found = asyncio.run(costs(server.url))
        first = first or found
        print(f"{size} waiting, {used:.0f} bytes a job", flush=True)
        for name, (caller, own) in found.items():
            ratio, own_ratio = caller / first[name][0], own / first[name][1]
            print(
                f"  {name:<7} {caller:5.0f} us (x{ratio:.2f}), of that Redis {own:4.0f} us (x{own_ratio:.2f})",
                flush=True,
            )
        waiting = redis.zcard(keys.WAITING + keys.queue_name(MODEL))
    server.kill()


def serve_with_empty_route(url: str, port: int, data: str) -> None:
    """The API, and a route that validates as POST /v1/jobs does and then does nothing."""
    logs.configure("json", "api")
    app: FastAPI = create_app(Settings(redis_url=url, port=port, data=Path(data)))

    @app.post(EMPTY, status_code=202)
    async def empty(body: JobRequest, request: Request, caller: Caller, deps: Deps) -> dict[str, str]:
        submission = await submission_of(body, caller, deps, request.state.request_id, None)
        return {"id": submission.fingerprint, "tenant": caller.tenant}

    with listen("127.0.0.1", port) as listener:
        Server(app).run(sockets=[listener])


async def drive(port: int, path: str, seconds: float) -> list[float]:
    """The seconds of each of the requests that many clients make, each as fast as it is answered."""
    lines = [
        f"POST {path} HTTP/1.1",
        "host: 127.0.0.1",
        "content-type: application/json",
        f"content-length: {len(BODY)}",
    ]
    head = "\r\n".join([*lines, "", ""]).encode()
    request, until, took = head + BODY, time.perf_counter() + seconds, list[float]()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (began := time.perf_counter()) < until:
            writer.write(request)
            reply = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(reply.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
            assert reply.startswith(b"http/1.1 202"), reply
            took.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return sorted(took)


def rate(seconds: float, folder: Path, appendfsync: str) -> None:
    """Submits a second of one API process, against the empty route, in turns."""
    server = RedisServer(redis_binaries()["valkey"], folder, appendfsync)
    server.start()
    port = free_port()
    code = f"from benchmarks.queue_cost import *; serve_with_empty_route({server.url!r}, {port}, {str(folder)!r})"
    api = subprocess.Popen([sys.executable, "-c", code], stderr=(folder / "api.log").open("wb"))
    try:
        _await(port)
        asyncio.run(drive(port, EMPTY, 1))
        took: dict[str, list[float]] = {EMPTY: [], "/v1/jobs": []}
        for _ in range(3):
            for path in took:
                took[path] += asyncio.run(drive(port, path, seconds / 3))
    finally:
        api.kill()
        api.wait()
        server.kill()
    rates = {path: len(times) / seconds for path, times in took.items()}
    tails = {path: sorted(times)[int(len(times) * 0.99)] * 1e3 for path, times in took.items()}
    told = ", ".join(f"{path} {rates[path]:.0f}/s p99 {tails[path]:.0f} ms" for path in took)
    print(f"fsync {appendfsync}, {CLIENTS} clients: {told}; ratio {rates['/v1/jobs'] / rates[EMPTY]:.2f}", flush=True)


def _await(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            asyncio.run(drive(port, EMPTY, 0.01))
        except OSError:
            assert time.monotonic() < deadline, "the API did not start"
            time.sleep(0.1)
        else:
            return


def latency(count: int, folder: Path) -> None:
    """From a job's end to its webhook at the receiver, and to its last event at a listener; a job at a time."""
    hooks, streams = [], []
    with nursery() as forks, service(folder, forks, on_disk=True) as built:
        built.start_all(1)
        for seed in range(count):
            job_id = built.submit(seed=seed)
            with built.client.stream("GET", f"/v1/jobs/{job_id}/events") as reply:
                heard = next(time.time() for line in reply.iter_lines() if line == "event: succeeded")
            ended = built.statuses(job_id)[-1][1] / 1e3
            streams.append(heard - ended)
            hooks.append(built.hook.wait_for(seed + 1)[seed].at - ended)
    for name, times in (("webhook received", sorted(hooks)), ("event received", sorted(streams))):
        p50, p99 = (times[int(count * share)] * 1e3 for share in (0.5, 0.99))
        print(f"end of a job to {name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms ({count} jobs)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="queue_cost", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--jobs", default="100,10000,1000000")
    parser.add_argument("--seconds", type=float, default=9.0)
    parser.add_argument("--ends", type=int, default=300, help="jobs whose end is timed")
    options = parser.parse_args()
    for appendfsync in ("always", "everysec"):
        with tempfile.TemporaryDirectory() as folder:
            rate(options.seconds, Path(folder), appendfsync)
    with tempfile.TemporaryDirectory() as folder:
        latency(options.ends, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        flat([int(size) for size in options.jobs.split(",")], Path(folder))


if __name__ == "__main__":
    main()
