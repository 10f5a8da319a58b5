"""`make chaos`: the full run, with a seed of its own that it prints; every figure may be set."""

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.chaos.bucket import MODES
from tests.chaos.nursery import nursery
from tests.chaos.run import Plan, run


def main() -> int:
    """Parse, play, print; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="make chaos", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=50, help="kill -9 of a worker")
    parser.add_argument("--stops", type=int, default=10, help="SIGSTOP of a worker for longer than the lease")
    parser.add_argument("--restarts", type=int, default=0, help="SIGTERM of a worker")
    parser.add_argument("--redis-kills", type=int, default=20)
    parser.add_argument("--sender-kills", type=int, default=0)
    parser.add_argument("--store-outages", type=int, default=3)
    parser.add_argument("--cancels", type=float, default=0.0, help="share of the jobs")
    parser.add_argument("--duration", type=float, default=300.0, help="seconds")
    parser.add_argument("--outage", type=float, default=10.0, help="seconds of an outage of the store")
    parser.add_argument("--store-mode", choices=MODES, default="", help="what the store does then; by chance if unset")
    parser.add_argument("--lease", type=float, default=2.0, help="seconds")
    parser.add_argument("--step", type=float, default=0.05, help="seconds of a forward; a picture takes four")
    parser.add_argument("--redis", choices=("valkey", "redis"), default="valkey")
    parser.add_argument("--appendfsync", choices=("always", "everysec"), default="always")
    parser.add_argument("--side", type=int, default=64, help="pixels of a picture; from 72 on it is noise")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the service")
    parser.add_argument("--folder", type=Path, help="for logs and history.jsonl; a new one under /tmp")
    plan = vars(parser.parse_args())
    plan["environment"] = tuple(tuple(each.split("=", 1)) for each in plan.pop("set"))
    folder = plan.pop("folder") or Path(tempfile.mkdtemp(prefix="safelight-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {plan['seed']}, history and logs in {folder}", flush=True)
    with nursery() as forks:
        verdict, said = run(Plan(**plan), forks, folder)
    print(said)
    return 0 if verdict.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
