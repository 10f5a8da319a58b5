"""The short form of `make chaos`: the same run, a fiftieth of the size."""

import os

from tests.chaos.run import Plan, run

SHORT = {
    "jobs": 400,
    "kills": 4,
    "stops": 2,
    "restarts": 2,
    "redis_kills": 2,
    "store_outages": 1,
    "cancels": 0.05,
    "duration": 16.0,
    "outage": 3.0,
    "lease": 1.0,
}


def test_under_chaos_nothing_is_lost_and_nothing_is_done_twice(forks, tmp_path):
    seed = int(os.environ.get("CHAOS_SEED", "20261124"))
    verdict, said = run(Plan(seed=seed, **SHORT), forks, tmp_path)
    print(said)
    assert verdict.is_clean, said
    assert max(verdict.recoveries, default=0) < 30
