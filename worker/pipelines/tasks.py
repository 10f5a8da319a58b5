"""Tasks: GenerationParams -> runs, each the unmodified pipeline call of one image."""

import copy
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from app.core.errors import GenerationFailed, InvalidOutput
from app.core.params import GenerationParams
from worker.engine.engine import Engine
from worker.engine.run import Run
from worker.pipelines import schedulers
from worker.pipelines.arguments import arguments
from worker.pipelines.load import WarmModel

Picture = npt.NDArray[np.uint8]


def runs_for(model: WarmModel, params: GenerationParams, job_id: str) -> list[Run]:
    """One run an image, called `job_id/0`, `job_id/1`, ...; its result is a uint8 array of height x width x 3.

    A video's result has the frames before that: frames x height x width x 3. Fails with InvalidOutput on a NaN.
    Raises GenerationFailed for an adapter that this worker has not loaded.
    """
    for lora in params.loras:
        if lora.name not in model.spec.loras:
            raise GenerationFailed(
                f"the worker has no adapter {lora.name!r} of model {params.model!r}; try again later"
            )
    return [
        Run(
            id=f"{job_id}/{i}",
            body=partial(paint, model, params, params.seed_of(i)),
            steps=schedulers.KINDS[params.scheduler].taken(params.num_inference_steps),
            adapters=tuple((lora.name, lora.weight) for lora in params.loras if lora.weight),
            reproducible=params.reproducible,
        )
        for i in range(params.num_images)
    ]


def paint(model: WarmModel, params: GenerationParams, seed: int, run: Run) -> Picture:
    """Make one picture; within an engine's run, or alone."""
    pipe = copy.copy(model.pipe)
    pipe.scheduler = schedulers.make(params.scheduler, model.pipe.scheduler.config)
    output = pipe(**arguments(pipe, params, seed, run))
    return to_picture(output[0][0])


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
