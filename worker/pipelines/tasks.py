"""Tasks: GenerationParams -> runs, each the unmodified pipeline call of one image."""

import copy
import inspect
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from app.core.errors import InvalidOutput
from app.core.params import GenerationParams
from worker.engine.engine import Engine
from worker.engine.run import Run
from worker.pipelines import schedulers
from worker.pipelines.load import WarmModel

Picture = npt.NDArray[np.uint8]


def runs_for(model: WarmModel, params: GenerationParams, job_id: str) -> list[Run]:
    """One run an image, called `job_id/0`, `job_id/1`, ...; its result is a uint8 array of height x width x 3.

    A video's result has the frames before that: frames x height x width x 3. Fails with InvalidOutput on a NaN.
    """
    steps = schedulers.KINDS[params.scheduler].taken(params.num_inference_steps)
    return [
        Run(f"{job_id}/{i}", partial(paint, model, params, params.seed_of(i)), steps) for i in range(params.num_images)
    ]


def paint(model: WarmModel, params: GenerationParams, seed: int, run: Run) -> Picture:
    """Make one picture; within an engine's run, or alone."""
    pipe = copy.copy(model.pipe)
    pipe.scheduler = schedulers.make(params.scheduler, model.pipe.scheduler.config)
    output = pipe(**arguments(pipe, params, seed, run))
    return to_picture(output[0][0])


def arguments(pipe: Any, params: GenerationParams, seed: int, run: Run) -> dict[str, Any]:
    """The keyword arguments of the pipeline's call: of the usual ones those that it has."""
    wanted = {
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt,
        "width": params.width,
        "height": params.height,
        "num_inference_steps": params.num_inference_steps,
        "guidance_scale": params.guidance_scale,
        # The noise is drawn on the CPU, so that a seed means the same picture on every device.
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": "np",
        "return_dict": False,
    } | progress(pipe, run)
    accepted = inspect.signature(pipe.__call__).parameters
    return {name: value for name, value in wanted.items() if name in accepted}


def progress(pipe: Any, run: Run) -> dict[str, Any]:
    """The argument by which the pipeline says after every step that it has done one."""
    accepted = inspect.signature(pipe.__call__).parameters

    def count(pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        run.step, run.steps = index + 1, getattr(pipe, "num_timesteps", run.steps)
        return tensors

    def count_plainly(index: int, _timestep: Any, _latents: Any) -> None:  # PixArt knows no other
        run.step = index + 1

    if "callback_on_step_end" in accepted:
        return {"callback_on_step_end": count}
    return {"callback": count_plainly} if "callback" in accepted else {}


def to_picture(values: npt.NDArray[np.floating[Any]]) -> Picture:
    """0..1 floats -> 0..255. Raises InvalidOutput for values that are no numbers."""
    if not np.isfinite(values).all():
        raise InvalidOutput("the model returned values that are not numbers; try another seed or less guidance")
    return (values * 255).round().clip(0, 255).astype(np.uint8)


def warm_up(model: WarmModel, engine: Engine) -> None:
    """Make a picture of two steps at the default size, measuring each module on the way. Raises what the run raises."""
    spec = model.spec
    given = spec.defaults.model_dump() | {"num_inference_steps": 2}
    params = GenerationParams(model=spec.name, prompt="a lamp", seed=0, num_images=1, output_format="png", **given)
    [run] = runs_for(model, params, "warm-up")
    engine.add(run)
    while not run.is_finished:
        engine.step()
        engine.calibrate()
    if run.error:
        raise run.error
