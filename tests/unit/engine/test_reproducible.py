"""A reproducible run's bits do not depend on who else is in the engine."""

import random

import pytest
import torch

from tests.tiny import build_family, together
from worker.engine.run import Aborted

RUNS = 6


@pytest.fixture(scope="module")
def family():
    return build_family("SD")


@pytest.fixture(scope="module")
def alone(family):
    run = family.run(3, reproducible=True)
    together(family, [run], [0])
    return run.result


@pytest.mark.parametrize("seed", range(4))
def test_a_reproducible_picture_has_the_same_bits_alone_and_in_any_crowd(family, alone, seed):
    dice = random.Random(seed)
    runs = [family.run(i, reproducible=i == 3 or dice.random() < 0.5) for i in range(RUNS)]

    log = together(family, runs, [dice.randrange(5) for _ in runs], max_batch=dice.choice([4, 16, 32]))

    assert torch.equal(runs[3].result, alone)
    assert max(entry[2] for entry in log.of("unet")) > 1


def test_aborting_a_batchmate_changes_no_bit(family, alone):
    from tests.tiny import Log
    from worker.engine.engine import Engine
    from worker.pipelines.load import targets

    engine = Engine(targets(family.pipe), Log())
    runs = [family.run(i, reproducible=True) for i in range(RUNS)]
    for run in runs:
        engine.add(run)
    while runs[3].step < 2:
        engine.step()
    engine.abort("run-4")
    while not engine.is_idle:
        engine.step()
    engine.close()

    assert isinstance(runs[4].error, Aborted)
    assert torch.equal(runs[3].result, alone)


def test_batches_without_a_reproducible_run_are_not_padded(family):
    runs = [family.run(i) for i in range(2)]
    seen: list[int] = []
    unet = family.pipe.unet
    hook = unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("sample", args[0] if args else None).shape[0]), with_kwargs=True
    )
    together(family, runs, [0, 0])
    hook.remove()

    assert max(seen) <= 4
