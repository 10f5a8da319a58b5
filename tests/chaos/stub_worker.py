"""A worker as worker/main.py builds it, around a denoiser that sleeps instead of computing and paints by seed alone."""

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from diffusers import DDIMScheduler

from app.core import failpoints, logs
from app.core import redis_keys as keys
from app.core.connections import connect
from app.core.params import GenerationParams
from app.core.settings import load_settings
from worker import main
from worker.encode import encode
from worker.engine.target import Phase, Target
from worker.pipelines.load import WarmModel
from worker.pipelines.variants import Variants

MODEL = "stub"
KILLER = "kill the worker"  # a prompt that does, when its picture is half done
HANG = "hang the worker"  # a prompt whose second forward never returns
HUGE = "more than WebP can hold"  # a prompt whose picture cannot be encoded as one
STEP_VARIABLE = "STUB_STEP_SECONDS"
ROW_VARIABLE = "STUB_ROW_SECONDS"  # of each row of a batch, where they take longer together than a step
CANCELS = "chaos:cancels"  # list in Redis: "place id outcome"
CANCEL_VARIABLE = "STUB_CANCEL_SHARE"  # of the visits to a failpoint, at which the job there is cancelled


class Denoiser(torch.nn.Module):
    """Takes `seconds`, or `row_seconds` for each row if that is more; elementwise, so that company changes no bit."""

    def __init__(self, seconds: float, row_seconds: float) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.9))
        self.seconds, self.row_seconds = seconds, row_seconds

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        took = max(self.seconds, self.row_seconds * len(sample))
        threading.Event().wait(took)  # time.sleep fails under faketime 0.9.10 and Python 3.11
        return (sample * self.scale + timestep[:, None, None, None] / 1000,)


class Pipeline:
    """What tasks.py needs of a diffusers pipeline."""

    def __init__(self, seconds: float, row_seconds: float = 0.0) -> None:
        self.denoiser = Denoiser(seconds, row_seconds).eval()
        self.scheduler = DDIMScheduler()

    def set_progress_bar_config(self, **options) -> None: ...

    def __call__(  # noqa: PLR0917  # as tasks.py calls a pipeline
        self,
        prompt,
        width,
        height,
        num_inference_steps,
        generator,
        output_type,
        return_dict,
        callback_on_step_end=None,
    ):
        scale = 8 if width <= 64 else 1  # a larger picture is noise, which no format makes small
        sample = torch.randn((1, 3, height // scale, width // scale), generator=generator)
        for index in range(num_inference_steps):
            if prompt == KILLER and 2 * index >= num_inference_steps:
                os._exit(failpoints.DEAD)
            if prompt == HANG and index == 1:
                time.sleep(3600)
            sample = self.denoiser(sample=sample, timestep=torch.tensor([index]))[0]
            if callback_on_step_end:
                callback_on_step_end(self, index, index, {})
        if prompt == HUGE:
            return (np.zeros((1, 1, 20_000, 3), np.float32),)
        small = (sample.tanh() / 2 + 0.5).permute(0, 2, 3, 1).numpy()
        return (small.repeat(scale, axis=1).repeat(scale, axis=2),)


def stub_model(seconds: float, row_seconds: float, spec) -> WarmModel:
    pipe = Pipeline(seconds, row_seconds)
    modules = {"denoiser": Target(pipe.denoiser, Phase.DENOISING)}
    return WarmModel(spec, pipe, modules, torch.device("cpu"), torch.float32, Variants(spec, pipe))


def picture_of(params: GenerationParams, index: int = 0) -> str:
    """The sha256 of the bytes that every worker must store for image `index`."""
    return hashlib.sha256(body_of(params, index)).hexdigest()


def body_of(params: GenerationParams, index: int = 0) -> bytes:
    """The bytes that every worker must store for image `index`."""
    with torch.inference_mode():
        pixels = Pipeline(0)(
            params.prompt if params.prompt not in (KILLER, HANG) else "",
            params.width,
            params.height,
            params.num_inference_steps,
            torch.Generator("cpu").manual_seed(params.seed_of(index)),
            "np",
            return_dict=False,
        )[0][0]
    return encode((pixels * 255).round().clip(0, 255).astype(np.uint8), params, params.seed_of(index))


def run() -> None:
    """Work until told to stop, as worker.main.run does."""
    settings = load_settings()
    logs.configure(settings.log_format, "worker")
    torch.set_num_threads(1)
    if share := float(os.environ.get(CANCEL_VARIABLE, "0")):
        arm_cancels(connect(settings.redis_url), share)
    seconds = float(os.environ.get(STEP_VARIABLE, "0.01"))
    main.work(settings, partial(stub_model, seconds, float(os.environ.get(ROW_VARIABLE, "0"))))


def arm_cancels(redis, share: float) -> None:
    """At every failpoint that concerns one job cancel it, just there, in that share of the visits; keep a record."""
    rng = random.Random()
    seen: list[str] = []

    def cancel(place: str, job_id: str) -> None:
        if place == "after_claim" and job_id:
            seen.append(job_id)
            del seen[:-16]
        if rng.random() < share and (job_id or seen):
            chosen = job_id or rng.choice(seen)
            outcome = keys.CANCEL.run(redis, chosen, "default", 3_600_000)
            redis.rpush(CANCELS, f"{place} {chosen} {outcome}")

    act: Callable[[str], None]
    for place in sorted(failpoints.PLACES):
        if not place.endswith(("_submit", "_webhook")):
            act = partial(cancel, place)
            failpoints.arm_with(place, act)
