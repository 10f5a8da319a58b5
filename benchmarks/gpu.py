"""A GPU's t(B): eager, compiled and as CUDA graphs, at the real shapes with random weights; then the engine's images/s.

`python -m benchmarks.gpu [--models sd15 sdxl flux]`: some fifteen minutes on one GPU of 40 GB or more, in bfloat16.
Nothing is downloaded. `--size tiny --device cpu` is what the tests run. The engine makes `--images` pictures at once,
of denoiser steps alone: random weights have nothing to decode. A model's result is printed as soon as it is there.
"""

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.gpu_shapes import SHAPES, Shape
from benchmarks.results import FOLDER, Result
from worker.engine.engine import Engine
from worker.engine.run import Run
from worker.engine.target import Phase, Target

ROWS = (1, 2, 4, 8, 16)
MODES = ("eager", "channels_last", "compiled", "graphs", "compiled graphs")
REPEATS = 7
Forward = Callable[[], object]


@dataclass(frozen=True)
class Place:
    """Where, and in which precision."""

    device: torch.device
    dtype: torch.dtype

    def put(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self.put(v) for name, v in value.items()}
        return value.to(self.device, self.dtype) if isinstance(value, torch.Tensor) else value

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def seconds(forward: Forward, place: Place) -> float:
    """The median of a few; each until the device was done."""
    times = []
    for _ in range(REPEATS):
        place.synchronize()
        began = time.perf_counter()
        forward()
        place.synchronize()
        times.append(time.perf_counter() - began)
    return median(times)


def captured(module: torch.nn.Module, arguments: dict[str, Any]) -> Forward:
    """The forward as a CUDA graph over these very tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a capture may not do, as choosing kernels, is done before
        for _ in range(3):
            module(**arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(**arguments)
    return graph.replay


def build(shape: Shape, place: Place) -> torch.nn.Module:
    with torch.device(place.device):
        module = shape.build()
    # Not the model's own `to`, which warns that some models keep some modules in float32: none of these does.
    return torch.nn.Module.to(module, place.device, place.dtype).eval().requires_grad_(requires_grad=False)


def prepare(module: torch.nn.Module, mode: str) -> None:
    """Put the module into a mode; they are tried in the order of MODES, and each keeps what those before did."""
    if mode == "channels_last":
        module.to(memory_format=torch.channels_last)
    if mode == "compiled":
        module.compile_repeated_blocks(fullgraph=True)


def possible(place: Place, wanted: list[str]) -> list[str]:
    return [mode for mode in wanted if "graphs" not in mode or place.device.type == "cuda"]


@torch.inference_mode()
def times_of(shape: Shape, place: Place, modes: list[str], rows: list[int]) -> tuple[dict[str, dict[int, float]], int]:
    """Seconds of a forward by mode and rows, and how many graphs were compiled for them."""
    found: dict[str, dict[int, float]] = {}
    counters.clear()
    for mode in modes:
        module = build(shape, place)
        before = MODES[: MODES.index(mode) + 1]
        # Graphs of eager kernels come before compiling: "graphs" is eager, "compiled graphs" is not.
        for step in before:
            if step != "compiled" or mode.startswith("compiled"):
                prepare(module, step)
        found[mode] = {}
        for count in rows:
            arguments = place.put(shape.arguments(count))
            try:
                forward = partial(module, **arguments)
                forward()  # loads and compiles
                forward = captured(module, arguments) if "graphs" in mode else forward
                found[mode][count] = seconds(forward, place)
            except torch.OutOfMemoryError:
                break
        del module
        empty(place)
    return found, counters["stats"]["unique_graphs"]


@torch.inference_mode()
def by_engine(shape: Shape, place: Place, mode: str, images: int) -> tuple[float, float]:
    """Pictures a second of the engine at saturation, and rows a forward."""
    module = build(shape, place)
    for step in MODES[: MODES.index(mode) + 1]:
        prepare(module, step)
    log = Rows()
    engine = Engine({"denoiser": Target(module, Phase.DENOISING)}, log)

    def walk(run: Run) -> None:
        arguments = place.put(shape.arguments(shape.rows))
        for step in range(shape.steps):
            module(**arguments)
            run.step = step + 1

    engine.add(Run("first", walk, shape.steps))
    engine.step()
    engine.calibrate(max(ROWS) * shape.rows)
    while not engine.is_idle:
        engine.step()
    runs = [Run(str(i), walk, shape.steps) for i in range(images)]
    log.rows.clear()
    place.synchronize()
    began = time.perf_counter()
    for run in runs:
        engine.add(run)
    while not engine.is_idle:
        engine.step()
    took = time.perf_counter() - began
    engine.close()
    for run in runs:
        if run.error:
            raise run.error
    return images / took, sum(log.rows) / len(log.rows)


class Rows:
    """An observer that notes how many rows each forward had."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def forward(self, module_name: str, rows: int, runs: int, seconds: float) -> None:
        self.rows.append(rows)


def empty(place: Place) -> None:
    gc.collect()
    if place.device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sd15", "sdxl", "flux"], choices=list(SHAPES["full"]))
    parser.add_argument("--size", default="full", choices=list(SHAPES))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=4711)
    parser.add_argument("--results", type=Path, default=FOLDER)
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    device = torch.device(asked.device)
    place = Place(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    for name in asked.models:
        report(asked, name, SHAPES[asked.size][name], place)


def report(asked: argparse.Namespace, name: str, shape: Shape, place: Place) -> None:
    found, graphs = times_of(shape, place, possible(place, asked.modes), asked.rows)
    result = Result(
        f"gpu_{name}" if asked.size == "full" else f"gpu_{name}_{asked.size}",
        f"{shape.title}, {str(place.dtype).removeprefix('torch.')} on {place.device.type}",
        asked.seed,
        ["ms by rows", *map(str, asked.rows), "best rows/s"],
    )
    for mode, curve in found.items():
        cells = [f"{1e3 * curve[n]:.1f}" if n in curve else "-" for n in asked.rows]
        result.row(mode, *cells, f"{max(n / t for n, t in curve.items()):.1f}")
    engine_modes = [mode for mode in ("channels_last", "compiled") if mode in found] or list(found)[:1]
    for mode in engine_modes:
        rate, per_forward = by_engine(shape, place, mode, asked.images)
        empty(place)
        ceiling = max(n / t for n, t in found[mode].items()) / shape.rows / shape.steps
        of_it = f"{shape.steps} steps, {shape.rows} rows a step, {per_forward:.1f} rows a forward"
        allowed = f"the bare denoiser's best allows {ceiling:.3g}, the floor of an H200 is {shape.floor}"
        result.notes.append(f"Engine, {mode}: {rate:.3g} images/s ({of_it}); {allowed}.")
        result.figures[f"images/s {mode}"] = rate
    result.notes.append(f"{graphs} graphs compiled for {len(asked.rows)} batch sizes.")
    if shape.aim and place.device.type == "cuda":
        reached = max(rate for key, rate in result.figures.items() if key.startswith("images/s"))
        result.check(f"{reached:.3g} images/s, aim {shape.aim}", holds=reached >= shape.aim)
    result.figures |= {"t": found, "graphs": graphs}
    result.save(asked.results)


if __name__ == "__main__":
    main()
