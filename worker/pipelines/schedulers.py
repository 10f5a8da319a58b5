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
        return self.class_name.startswith("FlowMatch")


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
}


def make(name: str, base_config: Mapping[str, Any]) -> Any:
    """A fresh noise scheduler, for one run only: diffusers keeps the step's index inside."""
    kind = KINDS[name]
    return getattr(diffusers, kind.class_name).from_config(dict(base_config), **kind.overrides)


def check(names: tuple[str, ...], base_config: Mapping[str, Any], model: str) -> None:
    """Raise ConfigError for a scheduler that does not exist or that the model's training rules out."""
    is_flow = str(base_config.get("_class_name", "")).startswith("FlowMatch")
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"model {model!r}: there is no scheduler {name!r}; there are {', '.join(KINDS)}")
        if KINDS[name].is_flow != is_flow:
            of = "flow matching" if is_flow else "noise prediction"
            raise ConfigError(f"model {model!r} was trained by {of}: scheduler {name!r} cannot step it")
