"""Jobs of 4 steps that arrive among jobs of 50, by Poisson, at 60 % of capacity: how long from arrival to picture.

`python -m benchmarks.short_jobs [--seconds 90]`: two minutes and a half. The denoiser sleeps for
t(B) = max(STEP, ROW * B) seconds, by default as SD 1.5 at 512x512 on an H200 is estimated; all else is the service.
Latency counts from the intended arrival, so a service that falls behind cannot hide it.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from statistics import median, quantiles

from benchmarks import servers
from benchmarks.drive import closed_loop, open_loop
from benchmarks.results import FOLDER, Result
from benchmarks.workload import Wish, poisson

SHORT, LONG = 4, 50  # steps
LOAD, MOST = 0.6, 2.0


def wish(steps: int, number: int) -> Wish:
    return Wish(f"a lamp {number}", number, steps, 1.0, "ddim")


def arrivals(asked: argparse.Namespace, rate: float) -> list[tuple[float, Wish]]:
    """As many short ones as long ones."""
    dice = random.Random(asked.seed)
    times = takewhile(lambda at: at < asked.seconds, poisson(rate, asked.seed))
    return [(at, wish(dice.choice([SHORT, LONG]), i)) for i, at in enumerate(times)]


def solo(server: servers.Server, steps: int, count: int) -> list[float]:
    """Seconds of such jobs, each alone in the service."""
    return [closed_loop(server.url, server.make, [wish(steps, 10**6 + i)], 1) for i in range(count)]


def percentile(times: Sequence[float], share: int) -> float:
    return quantiles(times, n=100, method="inclusive")[share - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="of arrivals")
    parser.add_argument("--step", type=float, default=0.018, help="seconds of the shortest forward")
    parser.add_argument("--row", type=float, default=0.0034, help="seconds of a row in a large one")
    parser.add_argument("--solo", type=int, default=30, help="jobs alone")
    parser.add_argument("--seed", type=int, default=4711)
    parser.add_argument("--results", type=Path, default=FOLDER)
    asked = parser.parse_args()
    rate = LOAD / asked.row / ((SHORT + LONG) / 2)
    coming = arrivals(asked, rate)
    with tempfile.TemporaryDirectory() as name, servers.stub(Path(name), asked.step, asked.row) as server:
        solo(server, SHORT, 5)
        alone = {steps: median(solo(server, steps, max(asked.solo * SHORT // steps, 3))) for steps in (SHORT, LONG)}
        took = open_loop(server.url, server.make, coming)
    result = Result(
        "short_jobs",
        f"Jobs of {SHORT} steps among jobs of {LONG}, at {LOAD:.0%} of capacity, a denoiser that sleeps",
        asked.seed,
        ["steps", "jobs", "alone, s", "p50, s", "p99, s", "p99 / alone"],
    )
    for steps, own in alone.items():
        times = [seconds for (_, one), seconds in zip(coming, took, strict=True) if one.num_inference_steps == steps]
        p50, p99 = percentile(times, 50), percentile(times, 99)
        result.row(steps, len(times), f"{own:.3f}", f"{p50:.3f}", f"{p99:.3f}", f"{p99 / own:.2f}")
        if steps == SHORT:
            result.check(f"{p99 / own:.2f}x their solo time at p99, at most {MOST}", holds=p99 <= MOST * own)
    result.notes.append(f"t(B) = max({asked.step}, {asked.row} B) s; {rate:.2f} jobs a second for {asked.seconds:g} s.")
    result.figures = {"took": [(at, one.num_inference_steps, s) for (at, one), s in zip(coming, took, strict=True)]}
    result.save(asked.results)


if __name__ == "__main__":
    main()
