import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from worker.engine.batcher import PRIORITY_STEPS, UNMEASURED_ROWS, Batcher

SHAPE = (4, 8, 8)


@dataclass(eq=False)
class FakeRun:
    remaining: int = 10
    priority: int = 0
    reproducible: bool = False
    order: int = 0


@dataclass(eq=False)
class FakeCall:
    run: FakeRun = field(default_factory=FakeRun)
    name: str = "unet"
    key: Any = "key"
    rows: int = 1
    shape: tuple[int, ...] = SHAPE
    is_denoiser: bool = True
    passed: int = 0


def call(remaining=10, *, order=0, priority=0, reproducible=False, **options):
    return FakeCall(FakeRun(remaining, priority, reproducible, order), **options)


def batcher(cap=None, **options):
    policy = Batcher(**({"bucket": 8} | options))
    if cap:
        policy.caps["unet", SHAPE] = cap
    return policy


def test_all_calls_of_one_key_go_together():
    calls = [call(5, key="a"), call(6, key="b"), call(7, key="a")]

    assert batcher(cap=8).choose(calls) == [calls[0], calls[2]]


def test_above_the_cap_the_shortest_remaining_go_first():
    calls = [call(n, rows=2) for n in (9, 3, 7, 1)]

    assert batcher(cap=4).choose(calls) == [calls[3], calls[1]]


def test_a_call_larger_than_the_cap_goes_alone():
    calls = [call(1, rows=6), call(2)]

    assert batcher(cap=4).choose(calls) == [calls[0]]


def test_among_equals_the_oldest_goes_first():
    calls = [call(5, order=2), call(5, order=1)]

    assert batcher(cap=1).choose(calls) == [calls[1]]


def test_a_higher_priority_goes_before_a_shorter_run():
    calls = [call(5), call(90, priority=1)]

    assert batcher(cap=1).choose(calls) == [calls[1]]


@pytest.mark.parametrize("seed", range(5))
def test_no_call_waits_longer_than_the_bound(seed):
    dice = random.Random(seed)
    policy = batcher(cap=2)
    waits: dict[FakeCall, tuple[int, int]] = {}  # -> forward at which it parked, bound
    parked, most = [], 12
    for turn in range(3000):
        while len(parked) < most:  # the heaviest load there can be: each run that ends is replaced by a short one
            fresh = call(dice.choice([1, 1, 1, 2, 60]), order=turn, key=dice.choice("abc"), rows=dice.choice([1, 2]))
            parked.append(fresh)
            waits[fresh] = (turn, fresh.run.remaining + most)
        for gone in policy.choose(parked):
            parked.remove(gone)
            since, bound = waits.pop(gone)
            assert turn - since <= bound
    assert all(3000 - since <= bound for since, bound in waits.values())


def test_a_lower_priority_is_passed_over_only_for_so_long():
    policy = batcher(cap=1)
    low = call(5)
    turns = 0
    while low not in policy.choose([low, call(1, priority=1, order=turns + 1)]):
        turns += 1

    assert turns <= PRIORITY_STEPS + 5 + 2


def test_the_cap_of_a_larger_shape_shrinks_with_its_size():
    policy = batcher(cap=16)

    assert policy.cap(call(shape=(4, 16, 16))) == 4
    assert policy.cap(call(shape=(4, 64, 64))) == 1
    assert policy.cap(call(shape=(4, 4, 4))) == 16
    assert policy.cap(call(name="vae")) == UNMEASURED_ROWS


def test_max_batch_overrides_what_was_measured_of_the_denoiser():
    policy = batcher(cap=16, max_batch=3)
    policy.caps["vae", SHAPE] = 5

    assert policy.cap(call()) == 3
    assert policy.cap(call(name="vae", is_denoiser=False)) == 5


def test_other_modules_get_no_more_time_than_the_denoiser_that_waits_for_them():
    policy = batcher(cap=1)
    denoise, decode = call(key="unet"), call(key="vae", name="vae", is_denoiser=False)
    spent = {True: 0.0, False: 0.0}
    for _ in range(100):
        [chosen] = policy.choose([denoise, decode])
        seconds = 0.1 if chosen.is_denoiser else 0.7
        spent[chosen.is_denoiser] += seconds
        policy.spent(seconds, is_denoiser=chosen.is_denoiser)

    assert spent[False] == pytest.approx(spent[True], abs=0.8)


def test_other_modules_go_at_once_when_no_denoiser_call_waits():
    policy = batcher()
    policy.spent(100.0, is_denoiser=False)
    decode = call(is_denoiser=False)

    assert policy.choose([decode]) == [decode]


def test_a_batch_with_a_reproducible_run_is_filled_and_padded_to_the_bucket():
    policy = batcher(cap=64)
    calls = [call(1, reproducible=True, rows=2), call(2, rows=2), call(3, rows=2)]

    assert policy.choose(calls) == calls
    assert policy.padding(calls) == 2
    assert policy.padding([calls[1]]) == 0


def test_a_reproducible_run_takes_no_part_in_a_batch_that_would_not_be_padded():
    calls = [call(1), call(2, reproducible=True), call(3)]

    assert batcher(cap=64).choose(calls) == [calls[0], calls[2]]


def test_a_reproducible_decode_goes_alone_and_unpadded():
    policy = batcher()
    calls = [call(0, reproducible=True, is_denoiser=False), call(0, is_denoiser=False)]

    assert policy.choose(calls) == [calls[0]]
    assert policy.padding([calls[0]]) == 0


def test_a_key_that_cannot_be_merged_goes_one_call_at_a_time():
    policy = batcher(cap=64)
    policy.solitary.add("key")

    assert len(policy.choose([call(), call(), call()])) == 1
