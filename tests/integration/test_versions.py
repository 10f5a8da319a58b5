"""Two versions of Safelight side by side on one Redis, as in a rollout: processes of an earlier commit, and ours.

The API goes first: the earlier one could not read what this version's workers say of themselves.
"""

import os
import signal
import subprocess
import time

import pytest

from tests.chaos.checker import History, check
from tests.chaos.nursery import ROOT, nursery
from tests.chaos.service import service

# Before the deaths of jobs were compared, tenants had shares, and workers kept pictures on disk.
BEFORE = os.environ.get("CHAOS_BEFORE", "7c15545c")
RESTARTS = int(os.environ.get("CHAOS_VERSION_RESTARTS", "6"))


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A nursery of the earlier version."""
    folder = tmp_path_factory.mktemp("before")
    command = ["git", "archive", BEFORE, "app", "worker", "tests"]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"this clone does not have the commit {BEFORE}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    with nursery(root=folder) as built:
        yield built


def submit(built, seed):
    return built.submit(key=str(seed), seed=seed, num_inference_steps=30)


def test_two_versions_under_rolling_restarts_lose_nothing_and_use_no_try_up(forks, before, tmp_path):
    about = {"SAFELIGHT_LEASE_SECONDS": "5", "SAFELIGHT_GRACE_SECONDS": "0.1"}
    with service(tmp_path, forks, on_disk=True, **about) as built:
        first = built.start("api", forks=before)
        built.start("worker", forks=before)
        built.wait_until(built.is_ready, 60)
        job_ids = [submit(built, i) for i in range(20)]  # some of them wait, and some run, when the others come
        built.retire(first)
        first.child.wait()
        for part, version in (("api", None), ("worker", None), ("sender", before), ("sender", None)):
            built.start(part, forks=version)
        built.wait_until(built.is_ready, 60)
        for number in range(RESTARTS):
            slot = built.workers[number % 2]
            built.wait_until(lambda slot=slot: built.times(slot, "worker.ready") == slot.starts, 60)
            job_ids += [submit(built, len(job_ids) + i) for i in range(6)]
            time.sleep(0.2)
            child = slot.child
            child.send_signal(signal.SIGTERM)
            assert child.wait(20) == 0
            built.wait_until(lambda slot=slot, child=child: slot.child is not child, 10)
        for job_id in job_ids:
            built.wait(job_id, 60)
        built.wait_until(built.outbox_is_empty, 20)
        verdict = check(built, History(tmp_path / "history.jsonl"), job_ids)
        ended = {entry["log"] for entry in built.logged("job.ended")}
    print(f"{RESTARTS} restarts beside {BEFORE}\n{verdict}")
    assert verdict.is_clean, verdict
    assert (set(verdict.died), set(verdict.tries)) == ({0}, {1})
    assert len(ended) == 2  # both took part
