"""Odds: how many innocent jobs would be called poison in a full chaos run, under each rule; in virtual time.

`python -m tests.chaos.odds` prints the mean over many seeds. A model of the run, not of the code: two workers, jobs of
four steps that arrive evenly, kills at random moments, a store that goes away three times.
"""

import random
import sys
from collections import defaultdict
from dataclasses import dataclass, field

TICK = 0.05  # seconds: a step
STEPS, STORING = 4, 1  # ticks
DURATION, OUTAGE, LEASE, RESTART = 300.0, 10.0, 2.2, 1.0  # seconds
JOBS, WORKERS, KILLS, OUTAGES, ROOM = 10_000, 2, 50, 3, 16
RULES = ("every death counts", "not while it waits for the store", "nor alone at another place")


@dataclass(eq=False, slots=True)
class Job:
    deaths: int = 0
    step: int = 0  # STEPS: it is made
    stored: int = 0
    place: int | None = None  # where it died last


@dataclass(eq=False, slots=True)
class Worker:
    jobs: list[Job] = field(default_factory=list)
    away_until: float = 0.0


def run(seed: int, rule: int) -> tuple[int, int]:
    """Innocent jobs that became poison, and those that died twice or more."""
    rng = random.Random(seed)
    kills = sorted(rng.uniform(0.05, 0.95) * DURATION for _ in range(KILLS))
    outages = [rng.uniform(0.05, 0.95) * DURATION for _ in range(OUTAGES)]
    workers = [Worker() for _ in range(WORKERS)]
    queue: list[Job] = []  # the next is the last
    alone: list[Job] = []
    back: dict[int, list[Job]] = defaultdict(list)  # by tick: jobs that are reaped then
    poison = twice = 0
    for tick in range(int((DURATION + 60) / TICK)):
        now = tick * TICK
        due = int(JOBS * min(now / (0.95 * DURATION), 1)) - int(JOBS * min((now - TICK) / (0.95 * DURATION), 1))
        queue[:0] = [Job() for _ in range(due if tick else 0)]
        for job in back.pop(tick, []):
            (alone if job.deaths >= 2 else queue).append(job)
        is_down = any(0 <= now - began < OUTAGE for began in outages)
        for worker in workers:
            if now >= worker.away_until:
                _work(worker, queue, alone, is_down=is_down, rule=rule)
        while kills and kills[0] <= now:
            kills.pop(0)
            victim = rng.choice(workers)
            died, victim.jobs, victim.away_until = victim.jobs, [], now + RESTART
            for job in died:
                is_alone = job.deaths >= 2
                if not (rule and job.step == STEPS):
                    is_elsewhere = rule == 2 and is_alone and job.step != job.place
                    job.deaths += not is_elsewhere
                    job.place = job.step
                    twice += job.deaths == 2 and not is_alone
                    if is_alone and job.deaths >= 3:
                        poison += 1
                        continue
                job.step = job.stored = 0
                back[tick + int(LEASE / TICK)].append(job)
    return poison, twice


def _work(worker: Worker, queue: list[Job], alone: list[Job], *, is_down: bool, rule: int) -> None:
    making = [job for job in worker.jobs if job.step < STEPS]
    taken = making if rule else worker.jobs  # what takes up room
    if alone:
        if not taken:
            worker.jobs.append(alone.pop())
    elif not any(job.deaths >= 2 for job in taken):
        while queue and len(taken) < ROOM:
            worker.jobs.append(queue.pop())
            taken = [*taken, worker.jobs[-1]]
    for job in worker.jobs:
        if job.step < STEPS:
            job.step += 1
        elif not is_down:
            job.stored += 1
    worker.jobs = [job for job in worker.jobs if job.stored < STORING]


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    for rule, name in enumerate(RULES):
        found = [run(seed, rule) for seed in range(runs)]
        hit = sum(poison > 0 for poison, _ in found)
        mean = sum(twice for _, twice in found) / runs
        total = sum(poison for poison, _ in found) / runs
        print(f"{name}: {mean:.1f} jobs die twice, {total:.3f} called poison a run; {hit} of {runs} runs lose a job")


if __name__ == "__main__":
    main()
