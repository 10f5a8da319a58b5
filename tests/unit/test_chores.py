"""Tasks that run as long as their process, and how they end."""

import asyncio
import time

import pytest
from structlog.testing import capture_logs

from app.core import chores


def test_a_task_that_lost_its_cancellation_ends_too(monkeypatch):
    monkeypatch.setattr(chores, "AGAIN_SECONDS", 0.01)
    lost = []

    async def deaf() -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost.append(1)
                if len(lost) == 3:
                    raise

    async def main() -> None:
        tasks = [asyncio.create_task(deaf()), asyncio.create_task(asyncio.sleep(60))]
        await asyncio.sleep(0)
        await chores.stop(*tasks)
        assert all(task.cancelled() for task in tasks)

    started = time.monotonic()
    asyncio.run(main())
    assert len(lost) == 3
    assert time.monotonic() - started < 5


def test_a_task_that_has_failed_is_said_and_the_others_end():
    async def failing() -> None:
        raise ValueError("of itself")

    async def main() -> None:
        tasks = [asyncio.create_task(failing(), name="first"), asyncio.create_task(asyncio.sleep(60))]
        await asyncio.sleep(0.01)
        await chores.stop(*tasks)
        assert tasks[1].cancelled()

    with capture_logs() as said:
        asyncio.run(main())
    assert [(line["event"], line["chore"]) for line in said] == [("chore.failed", "first")]


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_end_ends_at_once(count):
    async def main() -> None:
        tasks = [asyncio.create_task(asyncio.sleep(0)) for _ in range(count)]
        await asyncio.sleep(0.01)
        await chores.stop(*tasks)

    asyncio.run(main())
