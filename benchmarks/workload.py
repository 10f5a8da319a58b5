"""Workload: what is asked for, and when; all drawn by a seed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PROMPTS = ("a red heart", "a sunflower", "a banana", "a cactus", "a koala", "a panda", "a crab", "a fox", "a magnet")
SCHEDULERS = ("ddim", "euler", "dpmpp_2m", "unipc")
GUIDANCES = (3.0, 4.5, 6.0, 7.5)
LEAST_STEPS, MOST_STEPS = 8, 30


@dataclass(frozen=True)
class Wish:
    """One picture, in the words of every server here."""

    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str

    @property
    def body(self) -> dict[str, Any]:
        return asdict(self)


def mixed(count: int, seed: int) -> list[Wish]:
    """Steps 8 to 30, four noise schedulers, four guidances."""
    dice = random.Random(seed)
    return [
        Wish(
            f"{dice.choice(PROMPTS)} {i}",
            dice.getrandbits(31),
            dice.randint(LEAST_STEPS, MOST_STEPS),
            dice.choice(GUIDANCES),
            dice.choice(SCHEDULERS),
        )
        for i in range(count)
    ]


def identical(count: int, seed: int, steps: int = 20) -> list[Wish]:
    """Other prompts and seeds; all else is the same."""
    dice = random.Random(seed)
    return [Wish(f"{dice.choice(PROMPTS)} {i}", dice.getrandbits(31), steps, 5.0, "ddim") for i in range(count)]


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests arrive, `rate` a second on average, without end."""
    dice, now = random.Random(seed), 0.0
    while True:
        now += dice.expovariate(rate)
        yield now


def denoiser_rows(wishes: Sequence[Wish]) -> int:
    """Rows the denoiser has to compute: guidance takes two a step."""
    return sum(2 * wish.num_inference_steps for wish in wishes)
