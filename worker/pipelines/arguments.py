"""Arguments: GenerationParams -> the keyword arguments of a pipeline's call; what a pipeline has a use for."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from app.core.params import GenerationParams
from app.core.tasks import strength_of
from worker.engine.run import Run
from worker.pipelines.pictures import NOTHING, Source


def arguments(pipe: Any, params: GenerationParams, seed: int, run: Run, source: Source = NOTHING) -> dict[str, Any]:
    """The keyword arguments of the pipeline's call."""
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
    wanted |= _pictures(pipe, params, source)
    if _is_twice_guided(pipe):
        wanted["true_cfg_scale"] = wanted.pop("guidance_scale")
    accepted = parameters(pipe)
    return {name: value for name, value in wanted.items() if name in accepted}


def _pictures(pipe: Any, params: GenerationParams, source: Source) -> dict[str, Any]:
    """What it starts from, and what steers it."""
    found: dict[str, Any] = {}
    if source.image is not None:
        found = {"image": source.image, "strength": strength_of(params)}
    if source.mask is not None:
        found["mask_image"] = source.cells(pipe.vae_scale_factor)
    if source.controls:
        # The pipelines that take no other picture call it image.
        name = "control_image" if "control_image" in parameters(pipe) else "image"
        scales = [control.scale for control in params.controls]
        is_one = len(scales) == 1
        found[name] = source.controls[0] if is_one else list(source.controls)
        found["controlnet_conditioning_scale"] = scales[0] if is_one else scales
    return found


def progress(pipe: Any, run: Run) -> dict[str, Any]:
    """The argument by which the pipeline says after every step that it has done one."""
    accepted = parameters(pipe)

    def count(pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        run.step, run.steps = index + 1, getattr(pipe, "num_timesteps", run.steps)
        return tensors

    def count_plainly(index: int, _timestep: Any, _latents: Any) -> None:  # PixArt knows no other
        run.step = index + 1

    if "callback_on_step_end" in accepted:
        return {"callback_on_step_end": count}
    return {"callback": count_plainly} if "callback" in accepted else {}


def unused(pipe: Any) -> set[str]:
    """The parameters that change nothing in this pipeline's pictures."""
    accepted = parameters(pipe)
    found = {name for name in ("negative_prompt", "guidance_scale") if name not in accepted}
    if "true_cfg_scale" in accepted and not _is_twice_guided(pipe):
        found.add("negative_prompt")  # Flux dev: guidance is an input, and nothing is done twice
    return found


def _is_twice_guided(pipe: Any) -> bool:
    """Whether guidance means a second forward, though the pipeline's guidance_scale means an input of the model.

    Qwen-Image and Flux schnell have no such input, and their pipelines ignore guidance_scale.
    """
    return "true_cfg_scale" in parameters(pipe) and not pipe.transformer.config.guidance_embeds


def parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipe.__call__).parameters
