"""Tasks: GenerationParams -> runs, each the unmodified pipeline call of one image."""

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from app.core.catalog import Ability, ModelSpec
from app.core.errors import GenerationFailed, InvalidOutput
from app.core.params import GenerationParams
from app.core.tasks import ability_of, strength_of
from worker.engine.engine import CALIBRATED_ROWS, Engine
from worker.engine.run import Run
from worker.pipelines import previews, schedulers
from worker.pipelines.arguments import arguments
from worker.pipelines.load import WarmModel
from worker.pipelines.own import own
from worker.pipelines.pictures import NOTHING, Picture, Source, prepare
from worker.pipelines.prompts import with_prompts


def runs_for(model: WarmModel, params: GenerationParams, job_id: str, source: Source = NOTHING) -> list[Run]:
    """One run an image, called `job_id/0`, `job_id/1`, ...; its result is a uint8 array of height x width x 3.

    `source` is what it starts from. A video's result has the frames before that: frames x height x width x 3. Fails
    with InvalidOutput on a NaN. Raises GenerationFailed for a task, a ControlNet or an adapter that this worker has not
    loaded.
    """
    _check_there(model, params)
    return [
        Run(
            id=f"{job_id}/{i}",
            body=partial(paint, model, params, source, params.seed_of(i)),
            steps=steps_of(params),
            tiling=params.tiling,
            adapters=tuple((lora.name, lora.weight) for lora in params.loras if lora.weight),
            reproducible=params.reproducible,
        )
        for i in range(params.num_images)
    ]


def _check_there(model: WarmModel, params: GenerationParams) -> None:
    """The catalog that the API read may be newer than this worker's, or say what could not be loaded."""
    missing = [f"adapter {lora.name!r}" for lora in params.loras if lora.name not in model.spec.loras]
    missing += [f"ControlNet {c.type!r}" for c in params.controls if c.type not in model.spec.controlnets]
    missing += [f"pipeline for {ability_of(params)}"] if ability_of(params) not in model.spec.tasks else []
    if missing:
        raise GenerationFailed(f"the worker has no {missing[0]} of model {params.model!r}; try again later")


def steps_of(params: GenerationParams) -> int:
    """Denoising steps of one picture; a pipeline that starts from an image says itself when it differs by one."""
    strength = strength_of(params)
    asked = params.num_inference_steps
    return schedulers.KINDS[params.scheduler].taken(asked if strength is None else min(int(asked * strength), asked))


def paint(model: WarmModel, params: GenerationParams, source: Source, seed: int, run: Run) -> Picture:
    """Make one picture; within an engine's run, or alone."""
    controls = tuple(control.type for control in params.controls)
    pipe = own(model.variants.get(ability_of(params), controls), model.device)
    pipe.scheduler = schedulers.make(params.scheduler, model.pipe.scheduler.config)
    previews.follow(run, pipe, model.previewer, params.height, params.width)
    asked = arguments(pipe, params, seed, run, source)
    try:
        output = pipe(**with_prompts(asked, pipe, params, in_pieces=model.spec.long_prompts))
    finally:
        previews.leave(pipe)
    return source.kept_in(to_picture(output[0][0]))


def to_picture(values: npt.NDArray[np.floating[Any]]) -> Picture:
    """0..1 floats -> 0..255. Raises InvalidOutput for values that are no numbers."""
    if not np.isfinite(values).all():
        raise InvalidOutput("the model returned values that are not numbers; try another seed or less guidance")
    return (values * 255).round().clip(0, 255).astype(np.uint8)


def warm_up(model: WarmModel, engine: Engine, rows: int = CALIBRATED_ROWS) -> None:
    """Make a picture of two steps at the default size, measuring each module up to `rows` rows on the way.

    It is of the first of the model's tasks. Raises what the run raises.
    """
    spec = model.spec
    given = spec.defaults.model_dump() | {"num_inference_steps": 2} | _given(spec)
    params = GenerationParams(model=spec.name, prompt="a lamp", seed=0, num_images=1, output_format="png", **given)
    size = (spec.defaults.width, spec.defaults.height)
    source = prepare(params, {"grey": Image.new("RGB", size, "grey"), "white": Image.new("L", size, "white")})
    [run] = runs_for(model, params, "warm-up", source)
    engine.add(run)
    while not run.is_finished:
        engine.step()
        engine.calibrate(rows)
    if run.error:
        raise run.error


def _given(spec: ModelSpec) -> dict[str, Any]:
    """What the first of the model's tasks starts from."""
    start: dict[Ability, dict[str, Any]] = {
        "text_to_image": {},
        "image_to_image": {"image": "grey", "strength": 1.0},
        "inpainting": {"image": "grey", "mask": "white", "strength": 1.0},
        "upscaling": {"image": "grey", "upscale": spec.upscale_factor, "upscale_method": "model"},
    }
    return next(start[ability] for ability in spec.tasks if ability in start)
