import pytest

from worker.engine.calibrate import knee, measure, predict, refine


def times(*, launch, a_row):
    """A device that takes `launch` seconds for any forward, or its rows' time if that is longer."""
    return lambda copies: max(launch, a_row * copies)


@pytest.mark.parametrize(("launch", "a_row", "expected"), [(8.0, 1.0, 8), (1.0, 1.0, 1), (1.0, 0.001, 64)])
def test_the_cap_is_where_more_rows_no_longer_bring_more_rows_a_second(launch, a_row, expected):
    assert knee(measure(times(launch=launch, a_row=a_row), 1, 64)) == expected


def test_rows_are_counted_and_not_calls():
    assert set(measure(times(launch=1.0, a_row=0.1), 2, 16)) == {2, 4, 8, 12, 14, 16}


def test_measuring_ends_when_two_doublings_brought_nothing():
    assert max(measure(times(launch=1.0, a_row=1.0), 1, 64)) == 4


def test_measuring_ends_where_memory_does():
    curve = measure(lambda copies: 1.0 if copies <= 4 else None, 1, 64)

    assert set(curve) == {1, 2, 3, 4}


@pytest.mark.parametrize(("a_row", "expected"), [(1 / 5.3, 6), (1 / 6.9, 7), (1 / 24, 24)])
def test_the_knee_is_looked_for_between_the_doublings(a_row, expected):
    assert knee(measure(times(launch=1.0, a_row=a_row), 1, 64)) == expected


def test_one_slow_forward_moves_no_cap():
    slow = iter([True])

    def forward(copies):
        return 0.01 * (20 if copies == 4 and next(slow, False) else 1)

    assert knee(measure(forward, 1, 16)) == 16


def test_a_slow_model_is_measured_once_a_size():
    asked = []

    def forward(copies):
        asked.append(copies)
        return 2.0 * copies

    measure(forward, 1, 64)

    assert asked == [1, 1, 2, 4]


def test_a_forward_of_real_work_moves_the_curve_a_little():
    curve = {4: 1.0}
    refine(curve, 4, 1.2)
    refine(curve, 4, 100.0)
    refine(curve, 8, 3.0)

    assert 1.0 < curve[4] < 1.1
    assert curve[8] == 3.0


def test_times_between_and_beyond_what_was_measured_are_guessed():
    curve = {2: 1.0, 4: 2.0, 8: 6.0}

    assert [predict(curve, rows) for rows in (1, 2, 3, 6, 8, 16)] == [1.0, 1.0, 1.5, 4.0, 6.0, 12.0]
