"""Sixty-four mixed requests at once over HTTP: how near the service comes to the bare denoiser, and to what others do.

`python -m benchmarks.saturated [--requests 64] [--rounds 3]`: three minutes on two cores. Each contestant computes with
one thread (`--threads`); the medians of interleaved rounds.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import bare, servers
from benchmarks.alike import alike
from benchmarks.drive import closed_loop
from benchmarks.results import FOLDER, Result
from benchmarks.rivals.painter import Painter
from benchmarks.servers import Server
from benchmarks.workload import Wish, denoiser_rows, mixed

NEAR, SHARE, GAIN = 0.90, 0.85, 1.6


def spent(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Seconds of forwards, by module, and rows of the denoiser, between two readings."""
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    found = {"rows": 0.0, "forwards": 0.0, "denoiser": 0.0, "others": 0.0}
    for name, value in grown.items():
        if name.startswith("safelight_forward_seconds_total"):
            found["denoiser" if 'module="unet"' in name else "others"] += value
        elif name.startswith("safelight_batch_rows_sum"):
            found["rows"] += value
        elif name.startswith("safelight_batch_rows_count"):
            found["forwards"] += value
    return found


def by_safelight(server: Server, wishes: Sequence[Wish]) -> dict[str, float]:
    """Seconds from the first request to the last picture, and what the worker did in them."""
    before = server.metrics()
    seconds = closed_loop(server.url, server.make, wishes, len(wishes))
    return spent(before, server.metrics()) | {"seconds": seconds}


def in_ms(curve: bare.Curve) -> str:
    return ", ".join(f"{rows}: {1e3 * seconds:.1f}" for rows, seconds in curve.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=4711)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=bare.REPEATS, help="of each forward of the bare denoiser")
    parser.add_argument("--results", type=Path, default=FOLDER)
    asked = parser.parse_args()
    wishes, warm = mixed(asked.requests, asked.seed), mixed(4, asked.seed + 1)
    painter = Painter()
    ours: list[dict[str, float]] = []
    plain, curves = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with servers.safelight(folder, THREADS=str(asked.threads)) as server:
            closed_loop(server.url, server.make, warm, len(warm))
            for _ in range(asked.rounds):
                curves.append(bare.measure(painter, repeats=asked.repeats))
                ours.append(by_safelight(server, wishes))
                plain.append(bare.one_by_one(painter, wishes))
        with servers.plain_fastapi(folder, asked.threads) as rival:
            closed_loop(rival.url, rival.make, warm, len(warm))
            fastapi = closed_loop(rival.url, rival.make, wishes, len(wishes))
    report(asked, wishes, Times(ours, plain, fastapi, curves))


@dataclass
class Times:
    """Of each round."""

    ours: Sequence[Mapping[str, float]]
    plain: Sequence[float]
    fastapi: float
    curves: Sequence[tuple[bare.Curve, bare.Curve]]


def report(asked: argparse.Namespace, wishes: Sequence[Wish], times: Times) -> None:
    denoiser, vae = ({n: median(c[part][n] for c in times.curves) for n in times.curves[0][part]} for part in (0, 1))
    ours, plain, fastapi = times.ours, times.plain, times.fastapi
    ceiling, rows = bare.best(denoiser), denoiser_rows(wishes)
    result = Result(
        "saturated",
        f"{len(wishes)} mixed requests at once, {asked.threads} thread",
        asked.seed,
        ["", "seconds", "images/s", "denoiser rows/s", "of the ceiling"],
    )
    middle = sorted(ours, key=lambda run: run["seconds"])[len(ours) // 2]
    denoising = middle["seconds"] - middle["others"]
    for name, seconds in [
        ("Safelight", middle["seconds"]),
        ("Safelight, less its text and VAE forwards", denoising),
        ("plain diffusers, one after another, no server", median(plain)),
        ("plain FastAPI and diffusers", fastapi),
    ]:
        rate = rows / seconds
        result.row(name, f"{seconds:.1f}", f"{len(wishes) / seconds:.2f}", f"{rate:.0f}", f"{rate / ceiling:.2f}")
    result.row("bare denoiser at its best batch size", "", "", f"{ceiling:.0f}", "1.00")
    least = denoiser[2]
    alone = rows / 2 * least + len(wishes) * vae[1]
    allowed = alone / (rows / ceiling + len(wishes) / bare.best(vae))
    gain, near = median(plain) / middle["seconds"], rows / denoising / ceiling
    by_denoiser = ceiling * least / 2
    per_forward = middle["rows"] / max(middle["forwards"], 1)
    result.notes += [
        f"t(B) of the denoiser, ms by rows: {in_ms(denoiser)}. Guidance takes two rows a picture and step.",
        f"t(B) of the VAE's decode, ms by pictures: {in_ms(vae)}.",
        f"Safelight: {per_forward:.1f} rows a forward, {middle['others']:.1f} s in text encoder and VAE.",
        f"The denoiser's t(B) allows {by_denoiser:.2f}x of plain diffusers; with the VAE's, {allowed:.2f}x.",
    ]
    result.check(f"rows/s while denoising {near:.2f} of the ceiling, at least {NEAR}", holds=near >= NEAR)
    result.check(
        f"{gain:.2f}x plain diffusers, at least {SHARE:.0%} of the {allowed:.2f}x allowed ({gain / allowed:.0%})",
        holds=gain >= SHARE * allowed,
    )
    result.check(f"{gain:.2f}x plain diffusers, at least {GAIN}x", holds=gain >= GAIN)
    result.figures = {"ours": list(ours), "plain": list(plain), "fastapi": fastapi, "denoiser": denoiser, "vae": vae}
    result.save(asked.results)


if __name__ == "__main__":
    alike()
    main()
