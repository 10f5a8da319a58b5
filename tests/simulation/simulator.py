"""Virtual time: the real batcher over a device that is only a curve t(B), and first-come-first-served beside it.

`python -m tests.simulation.simulator` prints the table for 3,000 jobs and five seeds.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean

from worker.engine.batcher import Batcher
from worker.engine.calibrate import measure

SHAPE = (4, 8, 8)
STEPS = (8, 12, 20, 30, 50)
LOAD = 0.8


@dataclass(frozen=True)
class Device:
    """Seconds of a forward of B rows, and of one decode."""

    name: str
    forward: Callable[[int], float]
    decode: float

    def alone(self, steps: int) -> float:
        """Seconds of a job that has the device to itself."""
        return steps * self.forward(1) + self.decode

    def capacity(self, rows: int) -> float:
        """Jobs a second, `rows` at a time."""
        return 1 / (mean(STEPS) * self.forward(rows) / rows + self.decode)


# Estimates for an H200 (eager SD 1.5 is bound by its launches, compiled Flux by its arithmetic).
SD15_512 = Device("SD1.5-512", lambda rows: max(0.018, 0.0034 * rows), 0.006)
FLUX_1024 = Device("Flux-1024", lambda rows: 0.150 * rows, 0.020)


@dataclass(eq=False, slots=True)
class Job:
    arrived: float
    steps: int
    order: int = 0
    tenant: str = ""
    priority: int = 0
    reproducible: bool = False
    step: int = 0
    ended: float = 0.0

    @property
    def remaining(self) -> int:
        return self.steps - self.step

    @property
    def is_decoded(self) -> bool:
        return self.step > self.steps


@dataclass(eq=False, slots=True)
class Call:
    run: Job
    rows: int = 1
    shape: tuple[int, ...] = SHAPE

    @property
    def is_denoiser(self) -> bool:
        return self.run.remaining > 0

    @property
    def name(self) -> str:
        return "unet" if self.is_denoiser else "vae.decode"

    @property
    def key(self) -> str:
        return self.name


@dataclass
class Outcome:
    """What became of the jobs."""

    device: Device
    jobs: list[Job]
    forwards: list[int] = field(default_factory=list)  # rows of each

    @property
    def slowdowns(self) -> list[float]:
        """Time in the system against time alone."""
        return [(job.ended - job.arrived) / self.device.alone(job.steps) for job in self.jobs]

    def p99(self, tenant: str | None = None) -> float:
        chosen = [
            slow for job, slow in zip(self.jobs, self.slowdowns, strict=True) if tenant is None or job.tenant == tenant
        ]
        return sorted(chosen)[int(0.99 * len(chosen))]


def poisson(rate: float, jobs: int, seed: int, *, tenant: str = "", priority: int = 0) -> list[Job]:
    dice, now, made = random.Random(seed), 0.0, []
    for _ in range(jobs):
        now += dice.expovariate(rate)
        made.append(Job(now, dice.choice(STEPS), tenant=tenant, priority=priority))
    return made


def in_turn(device: Device, jobs: list[Job]) -> Outcome:
    """First come, first served, whole jobs."""
    now = 0.0
    for job in jobs:
        now = max(now, job.arrived) + device.alone(job.steps)
        job.ended = now
    return Outcome(device, jobs)


def by_batcher(device: Device, jobs: list[Job]) -> Outcome:
    """As the engine does it: between two forwards all who have arrived park their calls, and the batcher chooses."""
    batcher = Batcher(bucket=8)
    batcher.learn(("unet", SHAPE), measure(device.forward, 1, 64))
    batcher.learn(("vae.decode", SHAPE), {rows: rows * device.decode for rows in (1, 2, 4, 8)})
    jobs = sorted(jobs, key=lambda job: job.arrived)
    for order, job in enumerate(jobs):
        job.order = order
    waiting, parked, now = jobs[::-1], [], 0.0
    outcome = Outcome(device, jobs)
    while waiting or parked:
        if not parked:
            now = max(now, waiting[-1].arrived)
        while waiting and waiting[-1].arrived <= now:
            parked.append(Call(waiting.pop()))
        batch = batcher.choose(parked)
        is_denoiser = batch[0].is_denoiser
        seconds = device.forward(len(batch)) if is_denoiser else device.decode * len(batch)
        now += seconds
        batcher.spent(batch, len(batch), seconds)
        if is_denoiser:
            outcome.forwards.append(len(batch))
        for call in batch:
            call.run.step += 1
            if call.run.is_decoded:
                call.run.ended = now
        parked = [call for call in parked if not call.run.is_decoded]
    return outcome


def ratio(device: Device, jobs: int, seeds: range) -> tuple[float, float]:
    """Mean p99 slowdown of the batcher and of jobs in turn, on the same arrivals at 80 % of what the latter can do."""
    rate = LOAD * device.capacity(1)
    ours = mean(by_batcher(device, poisson(rate, jobs, seed)).p99() for seed in seeds)
    theirs = mean(in_turn(device, poisson(rate, jobs, seed)).p99() for seed in seeds)
    return ours, theirs


if __name__ == "__main__":
    for device in (SD15_512, FLUX_1024):
        ours, theirs = ratio(device, 3000, range(5))
        print(f"{device.name}: mean p99 slowdown {ours:.2f}, in turn {theirs:.2f}: {ours / theirs:.3f}x")
