"""The sender's arithmetic: what Retry-After means, and where a delivery for a busy host goes."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import pytest

from app.core.webhooks import SCHEDULE
from app.sender import FAR_SECONDS, MAX_RETRY_AFTER, PER_HOST, Host, _retry_after


def reply(status, value):
    return httpx2.Response(status, headers={"retry-after": value})


@pytest.mark.parametrize(("value", "seconds"), [("0", 0), ("17", 17), ("999999999999999999999", MAX_RETRY_AFTER)])
def test_retry_after_in_seconds_is_honoured_up_to_an_hour(value, seconds):
    assert _retry_after(reply(429, value)) == seconds


def test_retry_after_as_a_date_is_honoured_up_to_an_hour():
    soon, late, past = (
        format_datetime(datetime.now(UTC) + timedelta(seconds=s), usegmt=True) for s in (60, 86400, -60)
    )
    assert 58 < _retry_after(reply(503, soon)) <= 60
    assert _retry_after(reply(503, late)) == MAX_RETRY_AFTER
    assert _retry_after(reply(503, past)) == 0


@pytest.mark.parametrize("value", ["", "-5", "soon", "1.5", "²", "Sun, 06 Nov 1994 08:49:37", "Mon, 99 Foo 2026"])
def test_a_retry_after_that_makes_no_sense_is_ignored(value):
    assert _retry_after(httpx2.Response(429, headers=[(b"retry-after", value.encode())])) == 0


def test_only_a_busy_receiver_may_ask_for_time():
    assert _retry_after(reply(500, "60")) == 0


def test_the_schedule_lasts_three_days():
    assert 72 < sum(SCHEDULE) / 3600 < 78


def test_a_silent_host_gets_one_place_and_any_other_four():
    assert Host(running=PER_HOST - 1).has_room
    assert not Host(running=PER_HOST).has_room
    assert Host(is_silent=True).has_room
    assert not Host(running=1, is_silent=True).has_room


def test_what_is_put_back_comes_up_one_after_the_other_at_the_hosts_pace():
    host = Host(running=4, seconds=2.0)
    delays = [host.delay(now=100.0) for _ in range(4)]
    assert delays == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_nothing_is_put_back_further_than_five_minutes():
    host = Host(running=1, is_silent=True, seconds=15)
    assert [host.delay(now=0.0) for _ in range(100)][-1] == FAR_SECONDS
