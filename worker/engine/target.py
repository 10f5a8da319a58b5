"""Target: a method of a warm module whose calls are parked, and the phase of a run it stands for."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch


class Phase(StrEnum):
    QUEUED = "queued"
    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"


@dataclass(frozen=True, eq=False)
class Target:
    """`ignored` names keyword arguments the method accepts and never reads: dropped, they cannot keep calls apart."""

    module: torch.nn.Module
    phase: Phase
    method: str = "forward"
    ignored: frozenset[str] = frozenset()

    @cached_property
    def original(self) -> Callable[..., Any]:
        """The method as it was when first asked for, which `intercept` does before it takes the method's place."""
        method: Callable[..., Any] = getattr(self.module, self.method)
        return method

    @property
    def is_denoiser(self) -> bool:
        return self.phase is Phase.DENOISING

    @cached_property
    def device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))
