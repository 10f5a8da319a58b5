"""Variants: the pipelines of a model's other tasks, diffusers' own classes around the same warm modules."""

from collections.abc import Mapping
from typing import Any, Final

from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    MultiControlNetModel,
)
from diffusers.configuration_utils import FrozenDict

from app.core.catalog import Ability, ModelSpec
from app.core.errors import ConfigError
from worker.pipelines.arguments import parameters

_AUTO: Final[dict[Ability, Any]] = {
    "text_to_image": AutoPipelineForText2Image,
    "image_to_image": AutoPipelineForImage2Image,
    "inpainting": AutoPipelineForInpainting,
}


class Plain:
    """A UNet that takes noise alone, under the number of channels by which diffusers' inpainting knows such a one.

    StableDiffusionInpaintPipeline tells UNets that were trained for inpainting from plain ones by 9 or 4 channels, and
    refuses any other; latents it makes as the VAE has them.
    """

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self.config = FrozenDict({**unet.config, "in_channels": 4})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._unet(*args, **kwargs)


class Variants:
    """A pipeline for each task of the catalog's entry. Raises ConfigError for one that the model's kind has not."""

    def __init__(self, spec: ModelSpec, pipe: Any, controlnets: Mapping[str, Any] | None = None) -> None:
        self._spec, self._pipe, self._controlnets = spec, pipe, controlnets or {}
        self._built: dict[tuple[Ability, tuple[str, ...]], Any] = {}
        for ability in spec.tasks:
            if ability in ("text_to_image", "upscaling"):
                self._built[ability, ()] = pipe
            elif ability != "tiling":
                self._built[ability, ()] = _made(spec, pipe, ability)
            elif not hasattr(pipe, "unet"):
                raise _unable(spec, pipe, ability)  # a transformer's positions know where the picture ends
        if not self._built:
            raise ConfigError(f"model {spec.name!r}: none of its tasks makes a picture; add text_to_image")

    def get(self, ability: Ability, controls: tuple[str, ...] = ()) -> Any:
        """The pipeline of a task under ControlNets of these types; it is copied for every run."""
        if (ability, controls) not in self._built:
            nets = [self._controlnets[kind] for kind in controls]
            joined = nets[0] if len(nets) == 1 else MultiControlNetModel(nets)
            self._built[ability, controls] = _made(self._spec, self._pipe, ability, controlnet=joined)
        return self._built[ability, controls]


def _made(spec: ModelSpec, pipe: Any, ability: Ability, **parts: Any) -> Any:
    try:
        made = _AUTO[ability].from_pipe(pipe, **parts)
    except ValueError as error:
        raise _unable(spec, pipe, ability) from error
    if ability != "text_to_image" and "strength" not in parameters(made):
        raise _unable(spec, pipe, ability)  # Flux Kontext and its like edit by words, and know no strength
    made.set_progress_bar_config(disable=True)
    unet = getattr(made, "unet", None)
    if ability == "inpainting" and unet is not None and unet.config.in_channels == made.vae.config.latent_channels:
        vars(made)["unet"] = Plain(unet)  # past DiffusionPipeline's own setter, which takes models only
    return made


def _unable(spec: ModelSpec, pipe: Any, ability: str) -> ConfigError:
    left = [name for name in spec.tasks if name != ability]
    return ConfigError(f"model {spec.name!r}: {type(pipe).__name__} has no pipeline for {ability}; set tasks = {left}")
