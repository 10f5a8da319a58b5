"""Costs and estimates: pure arithmetic."""

from dataclasses import asdict, replace

import pytest

from app.core.estimates import (
    Load,
    Measured,
    Pace,
    cost_of,
    estimate,
    forward_seconds,
    memory_fit,
    pace_from,
    remaining_seconds,
    steps_taken,
    waiting_before,
)
from tests.integration.test_leases import params
from worker.pipelines.schedulers import KINDS

CURVE = {1: 0.1, 2: 0.1, 4: 0.12, 8: 0.24}
PACE = Pace([Measured(64 * 64, CURVE)], max_images=4)
PIXELS = 64 * 64


def test_a_cost_is_rows_times_steps_times_pictures_in_the_best_batch():
    cost = cost_of(params(num_inference_steps=10, num_images=3, guidance_scale=1.0), PACE)
    assert (cost.rows, cost.steps, cost.is_known) == (3, 10, True)
    assert cost.seconds == pytest.approx(10 * 3 * 0.03)


def test_guidance_doubles_the_rows_where_the_model_does_it_that_way():
    asked = params(guidance_scale=5.0)
    assert cost_of(asked, PACE).rows == 2
    assert cost_of(asked, replace(PACE, guided_rows=1)).rows == 1


def test_the_work_grows_with_the_pixels():
    small, large = cost_of(params(), PACE), cost_of(params(width=128, height=128), PACE)
    assert large.seconds == pytest.approx(4 * small.seconds)


def test_a_picture_made_from_another_takes_its_strength_of_the_steps():
    whole = cost_of(params(num_inference_steps=10), PACE)
    part = cost_of(params(num_inference_steps=10, image="upload_x", strength=0.5), PACE)
    assert part.seconds == pytest.approx(whole.seconds / 2)
    subtle = cost_of(params(num_inference_steps=10, image="upload_x", variation="subtle"), PACE)
    assert subtle.seconds == pytest.approx(whole.seconds * 0.4)
    heun = cost_of(params(num_inference_steps=10, image="upload_x", strength=0.5, scheduler="heun"), PACE)
    assert heun.steps == 9


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_noise_schedulers_take_the_steps_that_the_worker_counts(name, steps):
    assert steps_taken(name, steps) == KINDS[name].taken(steps)


def test_without_a_worker_a_cost_is_a_guess_and_says_so():
    cost = cost_of(params(), None)
    assert not cost.is_known
    assert cost.seconds > 0
    assert estimate(cost, Load(), [], "normal", PIXELS) is None


def test_a_forward_between_two_that_were_measured_takes_what_lies_between():
    assert forward_seconds(CURVE, 6) == pytest.approx(0.18)
    assert forward_seconds(CURVE, 16) == pytest.approx(0.48)


def test_an_idle_service_starts_at_once_and_takes_what_the_job_takes_alone():
    cost = cost_of(params(num_inference_steps=10), PACE)
    found = estimate(cost, Load(), [PACE], "normal", PIXELS)
    assert found.start_seconds == 0
    assert found.finish_seconds == pytest.approx(cost.alone_seconds) == pytest.approx(1.0)


def test_a_job_starts_when_what_lies_before_it_is_done_and_two_workers_do_it_twice_as_fast():
    cost = cost_of(params(), PACE)
    load = Load(ahead=60.0, running=0.96, running_rows=8)  # the room of four pictures is full
    assert estimate(cost, load, [PACE], "normal", PIXELS).start_seconds == pytest.approx(60)
    slow = replace(PACE, full_drag=1.5)
    assert estimate(cost, load, [slow], "normal", PIXELS).start_seconds == pytest.approx(90)
    both = estimate(cost, replace(load, running_rows=16), [PACE, PACE], "normal", PIXELS)
    assert both.start_seconds == pytest.approx(30)


def test_others_get_their_share_meanwhile_and_no_more_than_they_have():
    assert waiting_before(Load(ahead=10, tenants=[(100, 1.0)]), "normal") == 20
    assert waiting_before(Load(ahead=10, tenants=[(4, 1.0)]), "normal") == 14
    assert waiting_before(Load(ahead=10, tenants=[(100, 0.5), (100, 2.0)]), "normal") == 10 + 5 + 20
    assert waiting_before(Load(ahead=0, tenants=[(1000, 1.0)]), "normal") == 0
    assert waiting_before(Load(ahead=10, queues=[100, 3]), "normal") == 23


def test_other_priorities_take_their_turns_between():
    assert waiting_before(Load(ahead=9, lanes={"normal": 100, "low": 100}), "high") == 9 + 3 + 1
    assert waiting_before(Load(ahead=1, lanes={"high": 100, "normal": 2}), "low") == 1 + 9 + 2


def test_a_running_job_waits_for_what_is_due_before_its_last_picture():
    assert remaining_seconds([(5.0, 1.0), (9.0, 2.0)], [(1.0, 10.0), (8.0, 20.0), (10.0, 40.0)]) == 33.0
    assert remaining_seconds([], [(1.0, 10.0)]) == 0.0


def test_what_a_worker_says_of_itself_is_read_back_and_what_it_does_not_say_is_refused():
    assert pace_from(asdict(PACE) | {"from": "a later version"}) == PACE
    for about in ({}, {"measured": []}, {"measured": [{"pixels": 1, "curve": {}}]}):
        with pytest.raises((KeyError, ValueError)):
            pace_from(about)


def test_memory_holds_what_was_made_and_not_what_ran_out():
    small, same, large = (params(width=side, height=side) for side in (64, 128, 256))
    measured = replace(PACE, measured=[Measured(128 * 128, CURVE)])
    assert memory_fit(small, [measured]).fits
    assert memory_fit(same, [measured]).fits
    assert memory_fit(large, [measured]).fits is None
    assert memory_fit(large, [replace(measured, not_fitting=[200 * 200])]).fits is False
    assert memory_fit(large, [replace(measured, not_fitting=[200 * 200]), measured]).fits is None
    assert memory_fit(small, []).fits is None
