"""A toy model for tests of the engine alone: a row a call, faults to order."""

from functools import partial
from typing import Any

import torch

from worker.engine.engine import Engine
from worker.engine.run import Run
from worker.engine.target import Phase, Target


class Toy(torch.nn.Module):
    """sample + timestep, a row at a time; `fits` rows at most, and never with a `poison` in them."""

    def __init__(self, *, fits: int = 1000, poison: float | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.fits, self.poison = fits, poison
        self.batches: list[int] = []
        self.saw_grad = False

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor]:
        self.batches.append(sample.shape[0])
        self.saw_grad |= torch.is_grad_enabled()
        if sample.shape[0] > self.fits:
            raise torch.OutOfMemoryError("no room")
        if self.poison is not None and (sample == self.poison).any():
            raise RuntimeError("poisoned")
        return (sample + scale * timestep[:, None] * self.weight,)


def engine_of(toy: torch.nn.Module, **options: Any) -> Engine:
    return Engine({"toy": Target(toy, Phase.DENOISING)}, **options)


def toy_run(toy: torch.nn.Module, name: str, steps: int, value: float = 0.0, **options: Any) -> Run:
    """A run whose result is value + 1 + 2 + ... + steps."""
    return Run(name, partial(walk, toy, steps, value), steps, **options)


@torch.no_grad()
def walk(toy: torch.nn.Module, steps: int, value: float, run: Run) -> float:
    sample = torch.full((1, 4), value)
    for i in range(steps):
        sample = toy(sample, torch.tensor(i + 1))[0]
        run.step = i + 1
    return sample[0, 0].item()


def finish(engine: Engine, most: int = 1000) -> list[str]:
    """Step until all is done; the names of the runs in the order they finished."""
    finished: list[str] = []
    for _ in range(most):
        finished += [run.id for run in engine.step()]
        if engine.is_idle:
            return finished
    raise AssertionError(f"not done after {most} steps")
