"""Calibrate: the time of a forward against its rows, and the cap that follows from it.

Beyond the knee a larger batch only makes everyone wait: 0.83 times the images per second were seen on a CPU.
"""

from collections.abc import Callable, Iterable

GAIN = 1.05  # a doubling of the rows that brings less than this brings nothing
NEAR = 1.03  # the best rows per second, given up at most for smaller batches
REPEATS = 3
SLOW_SECONDS = 0.5  # a forward as long as this is measured once: a start must not take minutes
WEIGHT = 0.03  # of one forward of real work against what is known
Curve = dict[int, float]  # rows -> seconds of one forward


def measure(forward: Callable[[int], float | None], rows: int, most: int) -> Curve:
    """Time forwards of 1, 2, 4, ... calls of `rows` rows until `most` rows, or until two doublings brought nothing.

    Then halve the step before the knee until it is an eighth of it: 8 rows are no quicker than 6, and everyone waits.
    `forward(copies)` returns the seconds it took, or None where it does not fit into memory.
    """
    curve: Curve = {}
    forward(1)  # the very first one loads kernels
    idle, copies = 0, 1
    while idle < 2 and (copies == 1 or copies * rows <= most):
        seconds = _quickest(forward, copies)
        if seconds is None:
            break
        best = max((n / t for n, t in curve.items()), default=0.0)
        curve[copies * rows] = seconds
        idle = idle + 1 if copies * rows / seconds < GAIN * best else 0
        copies *= 2
    while curve and (copies := _before_knee(curve, rows)):
        seconds = _quickest(forward, copies)
        if seconds is None:
            break
        curve[copies * rows] = seconds
    return curve


def _before_knee(curve: Curve, rows: int) -> int:
    """Calls half-way between the knee and what was measured below it; 0 if that is near enough."""
    found = knee(curve)
    below = max((n for n in curve if n < found), default=found)
    middle = (below + found) // 2 // rows
    return middle if found - below > max(found // 8, rows) and below < middle * rows < found else 0


def _quickest(forward: Callable[[int], float | None], copies: int) -> float | None:
    """The time of the quickest of a few forwards: whatever else the machine does can only add to it."""
    first = forward(copies)
    if first is None or first > SLOW_SECONDS:
        return first
    again = [forward(copies) for _ in range(REPEATS)]
    return None if None in again else min(t for t in again if t is not None)


def refine(curve: Curve, rows: int, seconds: float) -> None:
    """Let a forward of real work move the curve a little; one that was held up by others moves it no more."""
    if rows in curve:
        seconds = curve[rows] + WEIGHT * (min(seconds, 2 * curve[rows]) - curve[rows])
    curve[rows] = seconds


def predict(curve: Curve, rows: int) -> float:
    """Seconds of a forward of `rows` rows, between and beyond those measured."""
    below = max((n for n in curve if n <= rows), default=None)
    above = min((n for n in curve if n >= rows), default=None)
    if below is None or above is None:
        nearest = below or above or rows
        return curve[nearest] * max(rows / nearest, 1.0)
    part = (rows - below) / max(above - below, 1)
    return curve[below] + part * (curve[above] - curve[below])


def slowest(curves: Iterable[Curve]) -> float:
    """Seconds of the longest forward that was measured."""
    return max((seconds for curve in curves for seconds in curve.values()), default=0.0)


def knee(curve: Curve) -> int:
    """The fewest rows that come near the best rows per second."""
    return min(rows for rows in curve if is_near(curve, rows, NEAR))


def is_near(curve: Curve, rows: int, factor: float) -> bool:
    """Whether forwards of `rows` rows, which were measured, make at least 1 / `factor` of the best rows per second."""
    return rows / curve[rows] * factor >= max(n / seconds for n, seconds in curve.items())
