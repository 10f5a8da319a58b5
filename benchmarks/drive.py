"""Drive: HTTP load on a server, closed loop (so many clients, each its next when its last is done) or open loop."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

import httpx2

from benchmarks.workload import Wish

Make = Callable[[httpx2.AsyncClient, Wish], Awaitable[bytes]]
PNG = b"\x89PNG"


def client(url: str) -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False)


async def from_safelight(http: httpx2.AsyncClient, wish: Wish) -> bytes:
    """The picture itself, by its URL, as from the other servers."""
    reply = await http.post("/v1/jobs", json=wish.body, headers={"Prefer": "wait=60"})
    job = reply.raise_for_status().json()
    while job["status"] in ("queued", "processing"):
        job = (await http.get(job["links"]["self"])).raise_for_status().json()
        await asyncio.sleep(0.05)
    assert job["status"] == "succeeded", job
    return (await http.get(job["outputs"][0]["url"])).raise_for_status().content


async def from_rival(http: httpx2.AsyncClient, wish: Wish) -> bytes:
    return (await http.post("/generate", json=wish.body)).raise_for_status().content


async def _checked(make: Make, http: httpx2.AsyncClient, wish: Wish) -> None:
    body = await make(http, wish)
    assert body.startswith(PNG), body[:100]


def closed_loop(url: str, make: Make, wishes: Sequence[Wish], clients: int) -> float:
    """Seconds from the first request to the last picture."""

    async def run() -> float:
        coming = iter(wishes)
        async with client(url) as http:

            async def one() -> None:
                for wish in coming:
                    await _checked(make, http, wish)

            began = time.perf_counter()
            await asyncio.gather(*(one() for _ in range(clients)))
            return time.perf_counter() - began

    return asyncio.run(run())


def open_loop(url: str, make: Make, arrivals: Iterable[tuple[float, Wish]]) -> list[float]:
    """Seconds from each request's intended arrival to its picture, whatever the others do."""

    async def run() -> list[float]:
        async with client(url) as http:
            began = time.perf_counter()

            async def one(at: float, wish: Wish) -> float:
                await asyncio.sleep(at - (time.perf_counter() - began))
                await _checked(make, http, wish)
                return time.perf_counter() - began - at

            return await asyncio.gather(*(one(at, wish) for at, wish in arrivals))

    return asyncio.run(run())
