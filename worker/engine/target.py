"""Target: a method of a warm module whose calls are parked, and the phase of a run it stands for."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch

from worker.engine.lora import Adapters


class Phase(StrEnum):
    QUEUED = "queued"
    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"


@dataclass(frozen=True, eq=False)
class Target:
    """Where the merge rule of `call` is wrong or wasteful for a class, its exceptions stand here.

    `ignored` names keyword arguments the method accepts and never reads: dropped, they cannot keep calls apart.
    `ragged` names lists of one tensor a row whose sizes may differ within a forward, because the method pads them.
    `padded` names text embeddings and their mask: filled up, texts of other lengths share a forward.
    """

    module: torch.nn.Module
    phase: Phase
    method: str = "forward"
    ignored: frozenset[str] = frozenset()
    ragged: frozenset[str] = frozenset()
    padded: tuple[str, str] | None = None
    adapters: Adapters | None = None

    @cached_property
    def original(self) -> Callable[..., Any]:
        """The method as it was when first asked for, which `intercept` does before it takes the method's place."""
        method: Callable[..., Any] = getattr(self.module, self.method)
        return method

    @property
    def is_denoiser(self) -> bool:
        return self.phase is Phase.DENOISING

    @property
    def is_encoder(self) -> bool:
        """Whether it returns the same for the same arguments, and small things: a text encoder, not a VAE."""
        return self.phase is Phase.ENCODING and self.method == "forward"

    @cached_property
    def convolutions(self) -> tuple[torch.nn.Conv2d, ...]:
        """Those whose padding goes round the edges of a picture that shall repeat without a seam."""
        return tuple(m for m in self.module.modules() if isinstance(m, torch.nn.Conv2d) and any(m.padding))

    @cached_property
    def device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))
