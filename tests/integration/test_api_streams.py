"""The stream of all a tenant's jobs, and many streams on one process. STREAMS=1000 runs the large form."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from app.api import events
from app.core import api_keys
from app.core import redis_keys as keys
from tests.integration.test_api_auth import BOOTSTRAP, bearer
from tests.integration.test_api_events import parse
from tests.integration.test_api_faults import serve_as_a_process
from tests.integration.test_api_jobs import submit
from tests.integration.test_sender import percentile

STREAMS = int(os.environ.get("STREAMS", "150"))
STALLED = STREAMS // 10
JOBS = 20
HISTORY = 10_000


class Listener:
    """`GET /v1/events` in a thread: what it heard, until it is closed."""

    def __init__(self, api, after=None, **headers):
        self.heard, self.is_open = [], threading.Event()
        self.client = api.client(headers=headers | ({"Last-Event-ID": str(after)} if after is not None else {}))
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()
        assert self.is_open.wait(10)

    def _listen(self):
        block = []
        with self.client.stream("GET", "/v1/events") as reply:
            try:
                for line in reply.iter_lines():
                    self.is_open.set()
                    if line:
                        block.append(line)
                    elif found := parse([*block, ""]):
                        self.heard += found
                        block = []
            except httpx2.TransportError:
                pass

    def close(self):
        self.client.close()


@pytest.fixture
def listen(api):
    opened = []

    def start(after=None, of=api, **headers):
        opened.append(Listener(of, after, **headers))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_the_statuses_of_all_jobs_are_heard_from_now_on_in_order(client, worker, listen, wait_until):
    before = submit(client)["id"]
    listener = listen()
    first, second = submit(client)["id"], submit(client)["id"]
    worker.claim()
    job = worker.claim()
    worker.step(job, 3)  # progress is for the stream of the job itself
    worker.succeed(job)
    client.post(f"/v1/jobs/{second}/cancel")
    wait_until(lambda: len(listener.heard) == 6)
    assert [(data["job"], data["status"]) for _, _, data in listener.heard] == [
        (first, "queued"),
        (second, "queued"),
        (before, "processing"),
        (first, "processing"),
        (first, "succeeded"),
        (second, "canceled"),
    ]
    assert {kind for _, kind, _ in listener.heard} == {"status"}
    numbers = [number for number, _, _ in listener.heard]
    assert numbers == list(range(numbers[0], numbers[0] + 6))


def test_resumed_at_any_cut_the_list_is_the_same(client, listen, wait_until):
    for _ in range(6):
        client.post(f"/v1/jobs/{submit(client)['id']}/cancel")
    whole = listen(after=0)
    wait_until(lambda: len(whole.heard) == 12)
    for cut in range(12):
        rest = listen(after=cut)
        wait_until(lambda rest=rest, cut=cut: len(rest.heard) == 12 - cut)
        assert rest.heard == whole.heard[cut:]


def test_a_resumption_over_several_reads_misses_nothing(client, redis, listen, wait_until):
    fill(redis, 350)
    listener = listen(after=5)
    wait_until(lambda: len(listener.heard) == 345)
    assert [number for number, _, _ in listener.heard] == list(range(6, 351))


def test_what_is_no_longer_kept_is_said_to_be_missed(client, redis, listen, wait_until):
    fill(redis, 30)
    redis.xtrim(f"{keys.TENANT_EVENTS}default", maxlen=10, approximate=False)
    listener = listen(after=5)
    wait_until(lambda: len(listener.heard) == 11)
    assert listener.heard[0] == (20, "missed", {"after": 5, "until": 20})
    assert [number for number, _, _ in listener.heard[1:]] == list(range(21, 31))
    ahead = listen(after=900)  # of a Redis that was emptied since
    wait_until(lambda: ahead.heard)
    assert ahead.heard[0][:2] == (30, "missed")


def test_the_history_is_bounded(client, redis):
    fill(redis, 10_300)
    submit(client)
    assert redis.xlen(f"{keys.TENANT_EVENTS}default") <= 10_100


def test_another_tenant_hears_nothing(start_api, redis, listen):
    api = start_api(api_key=BOOTSTRAP)
    mine, theirs = (bearer(api_keys.create(redis, name, name)[1]) for name in ("mine", "theirs"))
    listener = listen(of=api, after=0, **theirs)
    with api.client(headers=mine) as client:
        submit(client)
    time.sleep(0.5)
    assert listener.heard == []


def test_a_stream_ends_soon_after_its_key_does(start_api, redis, listen, monkeypatch):
    monkeypatch.setattr(events, "KEEP_ALIVE", 0.2)
    api = start_api(api_key=BOOTSTRAP)
    key, secret = api_keys.create(redis, "app")
    listener = listen(of=api, **bearer(secret))
    time.sleep(0.5)
    assert listener.thread.is_alive()
    api_keys.revoke(redis, key.id)
    listener.thread.join(3)
    assert not listener.thread.is_alive()


def fill(redis, count, padding=""):
    """A history of so many events of the default tenant."""
    pipeline = redis.pipeline(transaction=False)
    for number in range(count):
        fields = {"job": f"job_{number:026}{padding}", "status": "succeeded", "at": 1700000000000}
        pipeline.xadd(f"{keys.TENANT_EVENTS}default", fields, id="0-*")
    pipeline.execute()


# Many streams


class Crowd:
    """Streams over bare sockets; those that are stalled ask for the whole history and read none of it."""

    def __init__(self, port):
        self.port, self.heard, self.tasks, self.stalled = port, [], [], []

    async def open(self, live, stalled):
        for _ in range(stalled):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", self.port))
            connection.sendall(self._request("Last-Event-ID: 0\r\n"))
            self.stalled.append(connection)
        for begin in range(0, live, 50):
            await asyncio.gather(*(self._open() for _ in range(begin, min(begin + 50, live))))

    def _request(self, header=""):
        return f"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n{header}\r\n".encode()

    async def _open(self):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**16)
        writer.write(self._request())
        assert b"200" in await reader.readline()
        while await reader.readline() != b": open\n":
            pass
        found = []
        self.heard.append(found)
        self.tasks.append(asyncio.create_task(self._read(reader, writer, found)))

    async def _read(self, reader, writer, found):
        while line := await reader.readline():
            if line.startswith(b"data: "):
                found.append((json.loads(line[6:]), time.time()))
        writer.close()

    async def wait(self, count, seconds=60):
        deadline = time.monotonic() + seconds
        while any(len(found) < count for found in self.heard):
            assert time.monotonic() < deadline, f"{min(map(len, self.heard))} of {count} events were heard"
            await asyncio.sleep(0.05)


def drained(connection):
    """How many bytes there are left to read on a connection; then it is closed."""
    count = 0
    with connection, suppress(ConnectionError):
        while read := len(connection.recv(2**16)):
            count += read
    return count


def resident(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])  # kB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_many_streams_some_of_them_stalled_on_one_process(redis, redis_url, catalog_file, tmp_path):
    fill(redis, HISTORY, padding="x" * 600)  # more than the kernel takes for one who does not read
    others = {one["id"] for one in redis.client_list()}
    settings = {"redis_url": redis_url, "models": catalog_file, "data": tmp_path, "port": 0}
    process, url = serve_as_a_process(settings, tmp_path)
    try:
        asyncio.run(_crowd(redis, others, process, url))
    finally:
        process.kill()
        process.wait()


async def _crowd(redis, others, process, url):
    port = int(url.rpartition(":")[2])
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:
        await client.get("/v1/jobs")
        crowd, before = Crowd(port), resident(process)
        await crowd.open(STREAMS - STALLED, STALLED)
        await asyncio.sleep(1)
        for _ in range(JOBS):
            job = (await client.post("/v1/jobs", json={"prompt": "x"})).json()["id"]
            await client.post(f"/v1/jobs/{job}/cancel")
            await asyncio.sleep(0.05)
        await crowd.wait(2 * JOBS)
        each = (resident(process) - before) / STREAMS
        lags = [at - data["at"] / 1e3 for found in crowd.heard for data, at in found]
        connections = [one for one in redis.client_list() if one["id"] not in others]
    first = [data for data, _ in crowd.heard[0]]
    assert [data["status"] for data in first] == ["queued", "canceled"] * JOBS
    assert all([data for data, _ in found] == first for found in crowd.heard)
    assert sum(int(one["sub"]) > 0 for one in connections) == 1
    started = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(process.wait, 20)
    stopped = time.perf_counter() - started
    await asyncio.gather(*crowd.tasks)
    left = [drained(connection) for connection in crowd.stalled]
    p50, p99 = (percentile(lags, share) * 1e3 for share in (0.5, 0.99))
    print(
        f"{STREAMS} streams, {STALLED} stalled: {each:.0f} kB a stream, lag p50 {p50:.0f} ms, p99 {p99:.0f} ms, "
        f"{len(connections)} connections to Redis, stopped in {stopped:.1f} s"
    )
    assert process.returncode == 0
    assert all(count < HISTORY * 600 for count in left)  # they did stall: most of the history was never written
    assert each < 100
    assert stopped < 12
