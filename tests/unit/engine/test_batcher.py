from dataclasses import dataclass, field
from typing import Any

import pytest

from worker.engine.batcher import EVIDENCE, MOST_ROWS, PATIENCE, PRIORITY_SECONDS, PROBE, UNMEASURED_ROWS, Batcher
from worker.engine.calibrate import knee
from worker.engine.shares import SLACK_SECONDS, Shares

SHAPE = (4, 8, 8)


@dataclass(eq=False)
class FakeRun:
    remaining: int = 10
    priority: int = 0
    reproducible: bool = False
    order: int = 0
    arrived: float = 0.0
    tenant: str = ""


@dataclass(eq=False)
class FakeCall:
    run: FakeRun = field(default_factory=FakeRun)
    name: str = "unet"
    key: Any = "key"
    rows: int = 1
    shape: tuple[int, ...] = SHAPE
    is_denoiser: bool = True


def call(remaining=10, *, order=0, priority=0, reproducible=False, arrived=0.0, tenant="", **options):
    return FakeCall(FakeRun(remaining, priority, reproducible, order, arrived, tenant), **options)


def flat(cap, seconds=0.01):
    """The curve of a device that takes as long for `cap` rows as for one, and twice as long for twice as many."""
    return {rows: seconds * max(rows / cap, 1.0) for rows in (1, cap, 2 * cap, 4 * cap)}


def batcher(cap=None, **options):
    policy = Batcher(**({"bucket": 8} | options))
    if cap:
        policy.learn(("unet", SHAPE), flat(cap))
    return policy


def test_all_calls_of_one_key_go_together():
    calls = [call(5, key="a"), call(6, key="b"), call(7, key="a")]

    assert batcher(cap=8).choose(calls) == [calls[0], calls[2]]


def test_above_the_cap_the_shortest_remaining_go_first():
    calls = [call(n, rows=2) for n in (9, 3, 7, 1)]

    assert batcher(cap=4).choose(calls) == [calls[3], calls[1]]


def test_a_call_larger_than_the_cap_goes_alone():
    calls = [call(1, rows=6), call(20)]

    assert batcher(cap=4).choose(calls) == [calls[0]]


def test_among_equals_the_oldest_goes_first():
    calls = [call(5, order=2), call(5, order=1)]

    assert batcher(cap=1).choose(calls) == [calls[1]]


def test_a_higher_priority_goes_before_a_shorter_run():
    calls = [call(5), call(90, priority=1)]

    assert batcher(cap=1).choose(calls) == [calls[1]]


def test_a_run_that_came_long_before_goes_before_a_shorter_one():
    work = 50 * 0.01  # seconds
    old, short = call(50), call(1, arrived=PATIENCE * work + 1)

    assert batcher(cap=1).choose([short, old]) == [old]
    short.run.arrived = PATIENCE * 49 * 0.01 - 1
    assert batcher(cap=1).choose([short, old]) == [short]


def test_work_is_measured_in_seconds_and_not_in_steps():
    policy = batcher(cap=1)
    policy.learn(("unet", (4, 64, 64)), flat(1, seconds=1.0))
    large, small = call(4, shape=(4, 64, 64), key="large"), call(30, key="small")

    assert policy.choose([large, small]) == [small]


def test_a_priority_is_worth_a_time_of_waiting():
    low, high = call(1), call(1, priority=1, arrived=PRIORITY_SECONDS + 1)

    assert batcher(cap=1).choose([high, low]) == [low]
    high.run.arrived -= 2
    assert batcher(cap=1).choose([high, low]) == [high]


def test_a_tenant_ahead_of_its_share_lets_the_other_go_first_and_fills_what_is_left():
    policy = batcher(cap=1, max_batch=2)
    hog, other = [call(1, tenant="hog") for _ in range(3)], call(90, tenant="other")
    policy.choose([*hog, other])
    policy.spent(hog[:2], 2, 3 * SLACK_SECONDS)

    assert policy.choose([*hog, other]) == [other, hog[0]]
    policy.spent([other], 1, 3 * SLACK_SECONDS)
    assert policy.choose([*hog, other])[0] is hog[0]


def test_each_tenant_has_its_part_of_a_batch_however_old_the_work_of_another_is():
    flood, guests = [call(1, tenant="flood") for _ in range(9)], [call(50, tenant="guest") for _ in range(9)]
    for one in guests:
        one.run.arrived = 1000.0
    chosen = batcher(cap=4).choose([*flood, *guests])

    assert [one.run.tenant for one in chosen] == ["flood", "flood", "guest", "guest"]
    assert [one.run.tenant for one in batcher(cap=4).choose([*flood, guests[0]])] == [
        "flood",
        "flood",
        "guest",
        "flood",
    ]


def test_more_tenants_than_rows_go_by_what_is_due():
    calls = [call(steps, tenant=f"t{steps}") for steps in (5, 1, 4, 2, 3)]

    assert [one.run.remaining for one in batcher(cap=4).choose(calls)] == [1, 2, 3, 4]


def test_who_leaves_while_ahead_is_still_ahead_when_coming_back():
    shares = Shares()
    shares.spent({"hog": 40.0}, {"hog", "other"})
    shares.spent({"other": 1.0}, {"other"})

    assert shares.waiting({"hog", "other"}) == {"hog"}
    shares.spent({"other": 40.0}, {"other"})
    assert shares.waiting({"hog", "other"}) == set()
    assert shares.ahead.keys() == {"other"}


def test_nobody_saves_up_more_than_the_slack():
    shares = Shares()
    shares.spent({"busy": 1000.0}, {"busy", "modest"})

    assert shares.ahead["modest"] == -SLACK_SECONDS


def test_the_cap_of_a_larger_shape_shrinks_with_its_size():
    policy = batcher(cap=16)

    assert policy.cap(call(shape=(4, 16, 16))) == 4
    assert policy.cap(call(shape=(4, 64, 64))) == 1
    assert policy.cap(call(shape=(4, 4, 4))) == 16
    assert policy.cap(call(name="vae")) == UNMEASURED_ROWS


def test_max_batch_overrides_what_was_measured_of_the_denoiser():
    policy = batcher(cap=16, max_batch=3)
    policy.learn(("vae", SHAPE), flat(5))

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
        policy.spent([chosen], 1, seconds)

    assert spent[False] == pytest.approx(spent[True], abs=0.8)


def test_other_modules_go_at_once_when_no_denoiser_call_waits():
    policy = batcher()
    decode = call(is_denoiser=False)
    policy.spent([decode], 1, 100.0)

    assert policy.choose([decode]) == [decode]


def test_a_batch_of_decodes_takes_no_longer_than_the_forwards_that_wait_for_it():
    policy = batcher(cap=4)
    policy.learn(("vae", SHAPE), {rows: rows * 0.1 for rows in (1, 2, 4, 8)} | {8: 0.4})  # the knee is at eight
    decodes = [call(name="vae", key="vae", is_denoiser=False) for _ in range(8)]
    step = call()

    assert len(policy.choose(decodes)) == 8
    policy.choose([step])
    policy.spent([step], 1, 0.25)
    assert len(policy.choose([step, *decodes])) == 2


def test_the_cap_follows_what_real_forwards_take():
    policy = batcher(cap=8)
    one = call()
    assert policy.cap(one) == 8
    for _ in range(1000):
        rows = policy.cap(one)
        policy.spent([one], rows, 0.01 * rows)  # the device has changed: eight rows take eight times one
        policy.spent([one], 1, 0.01)

    assert knee(policy.curves["unet", SHAPE]) == 1


def test_the_cap_stays_among_sizes_that_are_as_good():
    policy = Batcher(bucket=8)
    policy.learn(("unet", SHAPE), {1: 0.02, 8: 0.08, 16: 0.162, 32: 0.33})
    one = call()
    assert policy.cap(one) == 8
    for _ in range(100):  # eight rows take four percent longer than they seemed to
        policy.spent([one], 8, 0.0832)
        assert policy.cap(one) == 8
    for _ in range(200):
        policy.spent([one], 8, 0.092)
    assert policy.cap(one) == 16


def test_one_forward_that_was_held_up_moves_no_cap():
    policy = batcher(cap=8)
    policy.spent([call() for _ in range(8)], 8, 30.0)

    assert policy.cap(call()) == 8


def test_the_cap_grows_while_more_rows_bring_more_and_stops_where_memory_did():
    policy = batcher()
    one = call()
    assert policy.cap(one) == UNMEASURED_ROWS
    for _ in range(10):
        rows = policy.cap(one)
        for _ in range(EVIDENCE):
            policy.spent([one], rows, 0.01)  # however many
    assert policy.cap(one) == MOST_ROWS

    policy.limits["unet", SHAPE] = 16
    assert policy.cap(one) == 16


def test_a_limit_of_memory_that_keeps_calls_out_is_tried_again_and_a_slack_one_is_not():
    policy = batcher()
    policy.learn(("unet", SHAPE), dict.fromkeys((8, 16, 32, 64), 0.01))
    policy.limit(("unet", SHAPE), 16)
    for _ in range(2 * PROBE):
        policy.spent([call()], 8, 0.01)
    assert policy.cap(call()) == 16
    caps = []
    for _ in range(2 * PROBE + 1):
        caps.append(policy.cap(call()))
        policy.spent([call()], caps[-1], 0.01)

    assert caps == [16] * PROBE + [32] * PROBE + [MOST_ROWS]


def test_a_few_slow_forwards_of_a_new_shape_do_not_make_its_cap():
    policy = batcher()
    for rows, seconds in ((2, 0.01), (2, 0.01), (4, 0.5), (4, 0.5)):
        policy.spent([call()], rows, seconds)

    assert policy.cap(call()) == UNMEASURED_ROWS


def test_a_cap_that_was_learnt_on_a_bad_day_is_tried_again():
    policy = batcher(cap=2)
    caps = []
    for _ in range(PROBE + 1):
        caps.append(policy.cap(call()))
        policy.spent([call()], caps[-1], 0.01 * caps[-1] / 2)

    assert caps.count(4) == 1
    assert caps.count(2) == PROBE


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
