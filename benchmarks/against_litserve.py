"""Safelight against LitServe with its own batching, on the same model: identical or mixed requests, at once, over HTTP.

`python -m benchmarks.against_litserve identical` and `... mixed`: interleaved pairs, five minutes each on two cores. A
pair is one run of each on the same requests, and another pair has others. LitServe gets the best of some batch sizes,
found in the same run. Interrupted, it goes on from the pairs it has (`--afresh`: from the beginning).
"""

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import servers
from benchmarks.alike import alike
from benchmarks.drive import closed_loop
from benchmarks.results import FOLDER, Result
from benchmarks.servers import Server
from benchmarks.workload import identical, mixed

LEAST = {"identical": 0.95, "mixed": 1.6}
DRAW = {"identical": identical, "mixed": mixed}
SIZES = (4, 8, 12, 16, 24)
TRIAL = 48  # requests to try a batch size with


def best_size(folder: Path, kind: str, threads: int, seed: int) -> tuple[int, dict[int, float]]:
    """LitServe's batch size with the most pictures a second, and the pictures a second of each."""
    rates: dict[int, float] = {}
    wishes = DRAW[kind](TRIAL, seed)
    for size in SIZES:
        with servers.litserve(folder, threads, size) as rival:
            closed_loop(rival.url, rival.make, wishes[:size], size)
            rates[size] = TRIAL / closed_loop(rival.url, rival.make, wishes, TRIAL)
    return max(rates, key=lambda size: rates[size]), rates


def pair(number: int, asked: argparse.Namespace, ours: Server, theirs: Server) -> tuple[float, float]:
    """Seconds of each; which goes first alternates, so that what else the machine does meets both alike."""
    wishes = DRAW[asked.kind](asked.requests, asked.seed + number)
    order = [ours, theirs] if number % 2 else [theirs, ours]
    seconds = {server.name: closed_loop(server.url, server.make, wishes, len(wishes)) for server in order}
    return seconds[ours.name], seconds[theirs.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(DRAW))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=4711)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, help="LitServe's max_batch_size; the best of some without it")
    parser.add_argument("--afresh", action="store_true")
    parser.add_argument("--results", type=Path, default=FOLDER)
    asked = parser.parse_args()
    asked.results.mkdir(parents=True, exist_ok=True)
    state = asked.results / f"against_litserve_{asked.kind}.partial"
    asking = [asked.requests, asked.seed, asked.threads, asked.size]
    known: dict[str, Any] = {"asking": asking, "size": asked.size, "rates": {}, "pairs": []}
    if state.exists() and not asked.afresh and (before := json.loads(state.read_text()))["asking"] == asking:
        known = before
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        if known["size"] is None:
            known["size"], known["rates"] = best_size(folder, asked.kind, asked.threads, asked.seed)
        ours = stack.enter_context(servers.safelight(folder, THREADS=str(asked.threads)))
        theirs = stack.enter_context(servers.litserve(folder, asked.threads, known["size"]))
        for server in (ours, theirs):
            closed_loop(server.url, server.make, DRAW[asked.kind](4, asked.seed - 1), 4)
        while len(known["pairs"]) < asked.pairs:
            known["pairs"].append(pair(len(known["pairs"]), asked, ours, theirs))
            state.write_text(json.dumps(known))
            print(f"pair {len(known['pairs'])}: {known['pairs'][-1]}", flush=True)
    report(asked, known)
    state.unlink()


def report(asked: argparse.Namespace, known: dict[str, Any]) -> None:
    result = Result(
        f"against_litserve_{asked.kind}",
        f"{asked.requests} {asked.kind} requests at once, against LitServe, {asked.threads} thread each",
        asked.seed,
        ["pair", "Safelight, s", f"LitServe (batches of {known['size']}), s", "times as fast"],
    )
    ratios = [theirs / ours for ours, theirs in known["pairs"]]
    for i, (ours, theirs) in enumerate(known["pairs"], 1):
        result.row(i, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}")
    middle, least = median(ratios), LEAST[asked.kind]
    result.row("median", *(f"{median(column):.2f}" for column in zip(*known["pairs"], strict=True)), f"{middle:.2f}")
    if known["rates"]:
        told = ", ".join(f"{size}: {float(rate):.2f}" for size, rate in known["rates"].items())
        result.notes.append(f"LitServe, images/s by max_batch_size, {TRIAL} requests each: {told}.")
    result.check(f"{middle:.2f}x LitServe's best, at least {least}", holds=middle >= least)
    result.figures = known
    result.save(asked.results)


if __name__ == "__main__":
    alike()
    main()
