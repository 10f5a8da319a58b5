"""Schedulers: the noise schedulers a request may name, and how many steps each really takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers

from app.core.errors import ConfigError


def _as_asked(steps: int) -> int:
    return steps


@dataclass(frozen=True)
class Kind:
    """A diffusers scheduler and what of its configuration the name stands for."""

    class_name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    taken: Callable[[int], int] = _as_asked  # steps asked for -> timesteps taken

    @property
    def is_flow(self) -> bool:
        """Whether it is for models trained by flow matching, which others cannot read."""
        return is_flow({"_class_name": self.class_name, **self.overrides})

    @property
    def is_video(self) -> bool:
        """Whether it is CogVideoX's own: its schedule reaches pure noise, which no other can start from."""
        return self.class_name.startswith("CogVideoX")


FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
KINDS: dict[str, Kind] = {
    "ddim": Kind("DDIMScheduler"),
    "ddpm": Kind("DDPMScheduler"),
    "euler": Kind("EulerDiscreteScheduler"),
    "euler_a": Kind("EulerAncestralDiscreteScheduler"),
    "dpmpp_2m": Kind("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_karras": Kind(
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}
    ),
    "dpmpp_2m_sde": Kind("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": Kind("UniPCMultistepScheduler"),
    "heun": Kind("HeunDiscreteScheduler", taken=lambda steps: 2 * steps - 1),
    "pndm": Kind("PNDMScheduler", {"skip_prk_steps": True}, taken=lambda steps: steps + (steps > 1)),
    "lcm": Kind("LCMScheduler"),
    "flow_euler": Kind("FlowMatchEulerDiscreteScheduler"),
    "flow_heun": Kind("FlowMatchHeunDiscreteScheduler", taken=lambda steps: 2 * steps - 1),
    "flow_unipc": Kind("UniPCMultistepScheduler", FLOW_SIGMAS),
    "flow_dpmpp_2m": Kind("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **FLOW_SIGMAS}),
    "cogvideox_ddim": Kind("CogVideoXDDIMScheduler"),
    "cogvideox_dpm": Kind("CogVideoXDPMScheduler"),
}


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is for flow matching; UniPC and DPM++ can be set to it."""
    named = str(config.get("_class_name", "")).startswith("FlowMatch")
    return named or bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"


def make(name: str, base_config: Mapping[str, Any]) -> Any:
    """A fresh noise scheduler, for one run only: diffusers keeps the step's index inside."""
    kind, config = KINDS[name], dict(base_config)
    if kind.is_flow:  # one number, two names
        shift = config.pop("shift", None) or config.pop("flow_shift", None) or 1.0
        config["shift" if kind.class_name.startswith("FlowMatch") else "flow_shift"] = shift
    return getattr(diffusers, kind.class_name).from_config(config, **kind.overrides)


def check(names: tuple[str, ...], own: Any, model: str) -> None:
    """Raise ConfigError for a scheduler that does not exist or that the training of a model with `own` rules out."""
    trained = Kind(type(own).__name__, {k: v for k, v in own.config.items() if k != "_class_name"})
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"model {model!r}: there is no scheduler {name!r}; there are {', '.join(KINDS)}")
        if (KINDS[name].is_flow, KINDS[name].is_video) != (trained.is_flow, trained.is_video):
            of = "flow matching" if trained.is_flow else "noise prediction"
            raise ConfigError(f"model {model!r} was trained by {of}: scheduler {name!r} cannot step it")
