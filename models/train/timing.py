"""Timing: how fast the exported folder loads and paints on one thread; true only while nothing else runs."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from models.train.evaluate import GUIDANCE, STEPS, Figures, write
from models.train.words import LENGTH

ROWS = (1, 2, 4, 8, 12, 16, 24, 32)
ROUNDS = 9


def timing(target: Path) -> Figures:
    """Measure on one thread, add to evaluation.json and the card; the figures (seconds, bytes)."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    pipe = StableDiffusionPipeline.from_pretrained(target, dtype=torch.float32, local_files_only=True)
    loaded = time.perf_counter() - began
    pipe.set_progress_bar_config(disable=True)
    each = _forwards(pipe.unet)
    rates = {rows: rows / seconds for rows, seconds in each.items()}
    best = max(rates, key=lambda rows: rates[rows])
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
    figures = {
        "load_seconds": round(loaded, 2),
        "seconds_a_picture": round(_measure(lambda: pipe("koala", **options), 5), 3),
        "folder_bytes": sum(f.stat().st_size for f in target.rglob("*") if f.is_file()),
        "weights_bytes": sum(f.stat().st_size for f in target.rglob("*.safetensors")),
        "milliseconds_a_forward": {str(rows): round(1000 * seconds, 2) for rows, seconds in each.items()},
        "best_rows": best,
        "best_over_two": round(rates[best] / rates[2], 2),
        "torch": torch.__version__,
    }
    write(target, {"timing": figures})
    return {"timing": figures}


@torch.inference_mode()
def _forwards(unet: UNet2DConditionModel) -> dict[int, float]:
    """Seconds of one forward by number of rows; the medians of rounds over all sizes, so that drift hits all alike."""
    inputs = {
        rows: (torch.randn(rows, 16, 8, 8), torch.full((rows,), 500), torch.randn(rows, LENGTH, 256)) for rows in ROWS
    }
    taken: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(ROUNDS):
        for rows, given in inputs.items():
            taken[rows].append(_measure(lambda given=given: unet(*given, return_dict=False), 1))
    return {rows: median(seconds) for rows, seconds in taken.items()}


def _measure(work: Callable[[], object], repeats: int) -> float:
    """The median of `repeats` runs after one that is not counted."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken)
