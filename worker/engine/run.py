"""Run: one image in the making; its pipeline call, suspended between two calls of a warm module."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from worker.engine.lora import Stack
from worker.engine.target import Phase


class Aborted(BaseException):
    """Thrown into a run that was aborted; no `except Exception` of a pipeline can swallow it."""


@dataclass(slots=True, eq=False)
class Run:
    """One image in the making.

    `body` is called with the run, in a greenlet of its own, and returns the result. It keeps `step` and `steps` true;
    `phase` follows the calls it makes. When `is_finished`, either `result` or `error` says how it ended: `error` is a
    JobError or another SafelightError (with the original as its cause), or Aborted.

    The body may set `sketch`. Asked between two steps it gives what draws a small picture of the run as it then stands,
    for any thread to call, or None where there is nothing to draw yet.
    """

    id: str
    body: Callable[["Run"], Any]
    steps: int  # denoising steps in all, as the noise scheduler counts them
    step: int = 0  # of these done
    phase: Phase = Phase.QUEUED
    priority: int = 0  # higher goes first; see batcher.PRIORITY_SECONDS
    tenant: str = ""  # whose share of the denoiser it takes
    reproducible: bool = False  # its bits shall not depend on the company it has in a batch
    tiling: bool = False  # its picture shall repeat without a seam: convolutions go round its edges
    adapters: Stack = ()  # of low rank, and their weights
    order: int = -1  # of arrival, given by Engine.add
    arrived: float = 0.0  # when that was, by the engine's clock
    seconds: float = 0.0  # of denoiser time it used: its rows' share of each forward
    rows: int = 0  # of the denoiser's forwards that were its own, in all
    sketch: Callable[[], Callable[[], Any] | None] | None = None
    result: Any = None
    error: BaseException | None = None
    is_finished: bool = False
    greenlet: Any = field(default=None, repr=False)

    @property
    def remaining(self) -> int:
        """Denoising steps still to do."""
        return max(self.steps - self.step, 0)
