"""What the engine costs a request that is alone in it: against the same pipeline called plainly, in one process.

`python -m benchmarks.engine_alone [--model FOLDER] [--steps 20] [--pairs 7]`; the ratio should be at most 1.05. Pairs
are interleaved, and which of the two goes first alternates, so that what else the machine does meets both alike.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from app.core.catalog import Defaults, ModelSpec
from app.core.params import GenerationParams
from benchmarks.alike import alike
from benchmarks.results import FOLDER, Result
from worker.engine.engine import Engine
from worker.pipelines.load import WarmModel, load
from worker.pipelines.tasks import runs_for, warm_up
from worker.pipelines.tiny_model import write_tiny

MOST = 1.05


def spec_of(folder: Path, steps: int, side: int) -> ModelSpec:
    defaults = Defaults(width=side, height=side, num_inference_steps=steps, guidance_scale=5.0, scheduler="ddim")
    return ModelSpec(name="alone", source=folder, defaults=defaults, schedulers=("ddim",))


def params_of(spec: ModelSpec, i: int) -> GenerationParams:
    """Another prompt every time, lest the engine answers it from memory."""
    given = spec.defaults.model_dump()
    return GenerationParams(model=spec.name, prompt=f"lamp {i}", seed=i, num_images=1, output_format="png", **given)


def plainly(model: WarmModel, i: int) -> None:
    [run] = runs_for(model, params_of(model.spec, i), f"plain-{i}")
    with torch.inference_mode():
        run.body(run)


def by_engine(model: WarmModel, engine: Engine, i: int) -> None:
    [run] = runs_for(model, params_of(model.spec, i), f"run-{i}")
    engine.add(run)
    while not run.is_finished:
        engine.step()
    if run.error:
        raise run.error


def seconds(call: Callable[[], None]) -> float:
    gc.collect()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a diffusers folder; without it tiny random weights")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=FOLDER)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if asked.model is None:
            write_tiny(Path(folder))
        model = load(spec_of(asked.model or Path(folder), asked.steps, asked.side), asked.device)
    engine = Engine(model.modules)
    warm_up(model, engine)
    plainly(model, 0)
    ratios, plain, ours = [], [], []
    for pair in range(asked.pairs):
        both = [
            lambda i=2 * pair + 1: plain.append(seconds(lambda: plainly(model, i))),
            lambda i=2 * pair + 2: ours.append(seconds(lambda: by_engine(model, engine, i))),
        ]
        for one in both if pair % 2 else both[::-1]:
            one()
        ratios.append(ours[-1] / plain[-1])
    engine.close()
    name = type(model.pipe).__name__
    result = Result(
        "engine_alone",
        f"One request alone, {name} on {model.device}, {asked.steps} steps at {asked.side} pixels, in process",
        0,
        ["", "median, ms"],
    )
    result.row("plain diffusers", f"{median(plain) * 1e3:.1f}")
    result.row("alone in the engine", f"{median(ours) * 1e3:.1f}")
    ratio = median(ratios)
    result.check(f"{ratio:.3f}x plain diffusers (median of {asked.pairs} pairs), at most {MOST}", holds=ratio <= MOST)
    result.figures = {"plain": plain, "ours": ours}
    result.save(asked.results)


if __name__ == "__main__":
    alike()
    main()
