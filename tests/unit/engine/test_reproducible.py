"""A reproducible run's bits do not depend on who else is in the engine."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.tiny import Log, build_family, together
from worker.engine.engine import Engine
from worker.engine.run import Aborted, Run
from worker.pipelines import load

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


def test_in_200_random_mixes_no_bit_differs():
    family = build_family("Flux")
    dice = random.Random(9)

    def one(k, i, *, reproducible):
        body = partial(family.make, i, num_inference_steps=2 + i % 2)
        return Run(f"run-{k}", body, 2 + i % 2, reproducible=reproducible)

    alone = []
    for i in range(6):
        alone.append(one(0, i, reproducible=True))
        together(family, [alone[i]], [0])
    differ = checked = shared = 0
    for _ in range(200):
        asked = [(dice.randrange(6), dice.random() < 0.7) for _ in range(dice.randint(2, 5))]
        runs = [one(k, i, reproducible=reproducible) for k, (i, reproducible) in enumerate(asked)]
        log = together(family, runs, [dice.randrange(3) for _ in runs], max_batch=dice.choice([3, 8, 16]))
        shared += max(entry[2] for entry in log.forwards) > 1
        for run, (i, reproducible) in zip(runs, asked, strict=True):
            checked += reproducible
            differ += reproducible and not torch.equal(run.result, alone[i].result)
    print(f"{checked} reproducible pictures in 200 mixes, {shared} of these shared, {differ} differ")

    assert differ == 0
    assert shared > 150


def test_aborting_a_batchmate_changes_no_bit(family, alone):
    engine = Engine(load.targets(family.pipe), Log())
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


def test_cancelling_one_of_16_is_done_within_a_step_and_the_15_others_keep_every_bit():
    family = build_family("SD3")
    made = {}
    for aborts in (False, True):
        log = Log()
        engine = Engine(load.targets(family.pipe), log, bucket=32)  # two rows a run
        runs = [replace(family.run(4), id=f"run-{i}", reproducible=True) for i in range(16)]
        for i, run in enumerate(runs):
            run.body = partial(family.make, i, num_inference_steps=8, guidance_scale=2.0 + i)
            engine.add(run)
        while runs[7].step < 3:
            engine.step()
        if aborts:
            engine.abort("run-7")
            log.forwards.clear()
            engine.step()
            assert [entry[2] for entry in log.of("transformer")] == [15]
        while not engine.is_idle:
            engine.step()
        engine.close()
        made[aborts] = runs

    assert isinstance(made[True][7].error, Aborted)
    others = [i for i in range(16) if i != 7]
    assert all(torch.equal(made[True][i].result, made[False][i].result) for i in others)
    assert min((made[True][0].result - made[True][i].result).abs().max() for i in others[1:]) > 0.01


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
