"""Every failpoint x {die, freeze, stall, connection lost, crash}, in real processes: nothing lost, nothing twice.

Each case has a model, and so a queue and workers, of its own; they run side by side, and one checker judges them all.
"""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx2
import pytest

from app.core import failpoints
from app.core import redis_keys as keys
from app.core.errors import ConfigError
from tests.chaos.checker import History, check
from tests.chaos.service import model_name, service
from tests.servers import free_port

pytestmark = pytest.mark.timeout(900)  # all cases are played before the first test
ACTIONS = ("die", "freeze", "stall", "disconnect", "crash")
SECONDS = 2.2  # a freeze or stall lasts; the lease is one
NTH = {"after_step": 20, "before_step": 1, "before_beat": 2, "after_beat": 2}
AT_ONCE = 12


@dataclass
class Case:
    place: str
    action: str
    number: int
    job_ids: list[str] = field(default_factory=list)

    @property
    def traps(self) -> str:
        return f"{self.place}={self.action}:{SECONDS}@{NTH.get(self.place, 1)}"

    def __str__(self) -> str:
        return f"{self.place}-{self.action}"


CASES = [
    Case(place, action, i * len(ACTIONS) + j)
    for i, place in enumerate(sorted(failpoints.PLACES))
    for j, action in enumerate(ACTIONS)
    if (place, action) != ("before_start", "crash")  # fails this one job, as any request that cannot be begun
]


class Stage:
    """Plays a case on the shared service."""

    def __init__(self, built, history):
        self.built, self.history = built, history

    def play(self, case):
        kind = case.place.rpartition("_")[2]
        play = {"submit": self._api, "webhook": self._sender}.get(kind, self._worker)
        try:
            play(case)
        except AssertionError as error:
            return f"{case}: {error}"
        return None

    def _worker(self, case):
        model = model_name(case.number)
        grace = "0" if case.place.endswith("_release") else "20"
        about = {"SAFELIGHT_SERVE": model, "SAFELIGHT_GRACE_SECONDS": grace}
        victim = self.built.start("worker", case.traps, **about)
        steps = 150 if case.place.endswith(("_release", "_discard", "_beat")) else 30
        case.job_ids = [self.built.submit(model=model, num_inference_steps=steps, seed=i) for i in range(3)]
        if grace == "0":
            self._await_start(case)
            victim.child.send_signal(signal.SIGTERM)
        elif case.place == "before_discard":
            self._await_start(case)
            assert self.built.cancel(case.job_ids[0]) == "canceled"
            self.history.note("cancel", job=case.job_ids[0], outcome="canceled")
        self._await_spring(victim)
        rescuer = self.built.start("worker", **about)
        for job_id in case.job_ids:
            self.built.wait(job_id, 120)
        time.sleep(SECONDS)  # whoever was frozen comes back, and does what it was about to
        self.built.retire(victim)
        self.built.retire(rescuer)

    def _await_start(self, case):
        def all_run():
            return all((self.built.job(i) or {}).get("progress") for i in case.job_ids)

        self.built.wait_until(all_run, 60)

    def _await_spring(self, slot):
        log = self.built.log(slot)
        self.built.wait_until(lambda: "failpoint.reached" in log.read_text(), 60)

    def _sender(self, case):
        model = model_name(case.number)
        victim = self.built.start("sender", case.traps)
        worker = self.built.start("worker", SAFELIGHT_SERVE=model)

        def is_sprung():
            case.job_ids.append(self.built.submit(model=model, seed=len(case.job_ids)))
            time.sleep(0.05)
            return "failpoint.reached" in self.built.log(victim).read_text()

        self.built.wait_until(is_sprung, 60)
        for job_id in case.job_ids:
            self.built.wait(job_id, 120)
        time.sleep(SECONDS)
        self.built.retire(victim)
        self.built.retire(worker)

    def _api(self, case):
        port = str(free_port())
        model = model_name(case.number)
        victim = self.built.start("api", case.traps, SAFELIGHT_PORT=port)
        worker = self.built.start("worker", SAFELIGHT_SERVE=model)
        headers = {"Idempotency-Key": str(case)}
        body = {"prompt": "a lamp", "model": model, "seed": 1, "webhook": {"url": self.built.hook.url()}}
        answers = set()

        def is_taken():
            try:
                url = f"http://127.0.0.1:{port}/v1/jobs"
                reply = httpx2.post(url, json=body, headers=headers, timeout=5, trust_env=False)
            except httpx2.TransportError:
                return False
            assert reply.status_code in (202, 500 if case.action == "crash" else 503), reply.text
            answers.update([reply.json()["id"]] if reply.status_code == 202 else [])
            return bool(answers)

        self.built.wait_until(is_taken, 30)
        case.job_ids = list(answers)
        self._await_spring(victim)
        self.built.wait(case.job_ids[0], 120)
        known = self.built.redis.zcard(keys.WAITING + keys.queue_name(model))
        assert known == 0, "the job was made twice"
        self.built.retire(victim)
        self.built.retire(worker)


@pytest.fixture(scope="module")
def outcomes(forks, tmp_path_factory):
    """What went wrong in each case, by its name."""
    folder = tmp_path_factory.mktemp("failpoints")
    with service(folder, forks, models=CASES[-1].number + 1, SAFELIGHT_LEASE_SECONDS="1") as built:
        history = History(folder / "history.jsonl")
        built.start("api")
        built.start("sender")
        warden = built.start("worker", SAFELIGHT_SERVE=model_name(0))
        built.wait_until(built.is_ready, 60)
        built.retire(warden)
        stage = Stage(built, history)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            failures = dict(zip(map(str, CASES), pool.map(stage.play, CASES), strict=True))
        for delivery in built.redis.zrange(keys.OUTBOX, 0, -1):
            built.redis.zadd(keys.OUTBOX, {delivery: 0})  # the hold of a dead sender, a minute, has passed
        built.wait_until(built.outbox_is_empty, 20)
        verdict = check(built, history, [job_id for case in CASES for job_id in case.job_ids])
    print(f"{len(CASES)} cases\n{verdict}")
    broken = [f"{kind}: {text}" for kind, texts in verdict.broken.items() for text in texts]
    for case in CASES:
        found = [text for text in broken if any(job_id in text for job_id in case.job_ids)]
        if found:
            failures[str(case)] = f"{failures[str(case)]} {found}"
    return failures


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fault_at_this_point_loses_nothing_and_does_nothing_twice(outcomes, case):
    assert outcomes[str(case)] is None


def test_a_failpoint_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match="after_lunch"):
        failpoints.arm("after_lunch=die")


def test_nothing_is_armed_by_default():
    assert failpoints._armed == {}
