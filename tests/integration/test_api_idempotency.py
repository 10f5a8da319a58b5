"""One Idempotency-Key, many callers, and an API that is killed in between. ROUNDS=1000 runs the large form."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx2
import pytest

from app.core import redis_keys as keys
from tests.integration.test_api_faults import serve_as_a_process
from tests.servers import free_port

ROUNDS = int(os.environ.get("ROUNDS", "12"))
CALLERS = 64
KILLS = 2


class Mortal:
    """An API process on one port that is killed with -9, and started again."""

    def __init__(self, settings, folder):
        self.settings, self.folder, self.kills = settings, folder, 0
        self.process, self.url = serve_as_a_process(settings, folder)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.kills += 1
        self.process, self.url = serve_as_a_process(self.settings, self.folder)


@pytest.fixture
def mortal(redis_url, catalog_file, tmp_path):
    settings = {"redis_url": redis_url, "models": catalog_file, "data": tmp_path, "port": free_port()}
    mortal = Mortal(settings, tmp_path)
    yield mortal
    mortal.process.kill()
    mortal.process.wait()


@pytest.mark.timeout(120 + ROUNDS // 2)
def test_one_key_makes_one_job_whoever_asks_and_whatever_dies(mortal, redis):
    """A caller whose connection breaks asks again, as the key is there for."""
    again, opened, broken = threading.local(), ExitStack(), []

    def submit(number):
        if not hasattr(again, "client"):
            again.client = opened.enter_context(
                httpx2.Client(base_url=mortal.url, trust_env=False, timeout=30, verify=False)
            )
        for _ in range(500):
            try:
                headers = {"Idempotency-Key": f"round-{number}"}
                reply = again.client.post("/v1/jobs", json={"prompt": f"cat {number}"}, headers=headers)
            except httpx2.TransportError:
                broken.append(number)
                time.sleep(0.25)
            else:
                if reply.status_code != 503:
                    return reply.status_code, reply.json()["id"]
        raise AssertionError("the API did not come back")

    started = time.perf_counter()
    with opened, ThreadPoolExecutor(CALLERS) as pool:
        for number in range(ROUNDS):
            calls = [pool.submit(submit, number) for _ in range(CALLERS)]
            if number % max(1, ROUNDS // KILLS) == 1:
                calls[0].result()  # some were answered, some are in the middle of it
                mortal.kill()
            answers = {call.result() for call in calls}
            assert {status for status, _ in answers} == {202}
            assert len({job for _, job in answers}) == 1
    assert redis.zcard(f"{keys.JOBS}default") == ROUNDS
    seconds = time.perf_counter() - started
    print(f"{ROUNDS} rounds of {CALLERS} in {seconds:.1f} s, {mortal.kills} kills, {len(broken)} broken calls")
    assert mortal.kills >= KILLS
