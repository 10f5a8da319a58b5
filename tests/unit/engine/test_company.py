"""The engine's one promise: made in company equals made alone."""

import os
import random

import pytest
import torch

from tests.tiny import FAMILIES, build_family, together
from worker.pipelines.load import DENOISERS

RUNS = 8


@pytest.fixture(scope="module")
def dice():
    """The arrivals of this session's requests; to have them again, set SEED to the number it prints."""
    seed = int(os.environ.get("SEED") or random.randrange(2**16))
    print(f"SEED={seed}")
    return random.Random(seed)


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_made_in_company_equal_those_made_alone(name, dice):
    family = build_family(name)
    alone = [family.alone(i) for i in range(RUNS)]
    runs = [family.run(i) for i in range(RUNS)]
    arrivals = [dice.randrange(4) for _ in range(RUNS)]
    print(f"{name}: arrivals {arrivals}")

    log = together(family, runs, arrivals)

    assert [run.error for run in runs] == [None] * RUNS
    spread = torch.stack(alone).std()
    off = max((run.result - one).abs().max() / spread for run, one in zip(runs, alone, strict=True))
    apart = min((a - b).abs().max() / spread for i, a in enumerate(alone) for b in alone[:i])
    denoised = [entry for entry in log.forwards if entry[0] in DENOISERS]
    shared = sum(entry[2] for entry in denoised) / len(denoised)
    print(f"{name}: error/spread {off:.1e}, others {apart:.1e} apart, {shared:.1f} runs a forward")
    assert off < 1e-4
    assert apart > 100 * off
    assert shared > 2


def test_a_run_alone_in_the_engine_equals_the_plain_pipeline():
    family = build_family("SDXL")
    run = family.run(4)

    together(family, [run], [0])

    assert (run.result - family.alone(4)).abs().max() <= 1e-6 * family.alone(4).std()
