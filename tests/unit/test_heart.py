"""When a step loop counts as hung."""

import time

from worker.heart import FORWARDS, LONGEST, Pulse


def test_a_loop_that_waits_for_a_forward_as_long_as_one_that_was_measured_is_not_hung():
    pulse = Pulse(0.05, 0.0)
    time.sleep(0.1)
    assert not pulse.is_beating
    pulse.expect(1.0)
    assert pulse.is_beating


def test_what_the_loop_itself_took_long_for_counts_for_no_more_than_part_of_a_lease():
    pulse = Pulse(0.04, 0.0)
    time.sleep(0.1)
    pulse.moved()
    time.sleep(FORWARDS * LONGEST * 0.04 + 0.02)
    assert not pulse.is_beating
