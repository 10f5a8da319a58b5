"""Calibrate: the time of a forward against its rows, and the cap that follows from it.

Beyond the knee a larger batch only makes everyone wait: 0.83 times the images per second were seen on a CPU.
"""

from collections.abc import Callable

GAIN = 1.05  # a doubling of the rows that brings less than this brings nothing
REPEATS = 3
SLOW_SECONDS = 0.5  # a forward as long as this is measured once: a start must not take minutes
Curve = dict[int, float]  # rows -> seconds of one forward


def measure(forward: Callable[[int], float | None], rows: int, most: int) -> Curve:
    """Time forwards of 1, 2, 4, ... calls of `rows` rows until `most` rows, or until two doublings brought nothing.

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
    return curve


def _quickest(forward: Callable[[int], float | None], copies: int) -> float | None:
    """The time of the quickest of a few forwards: whatever else the machine does can only add to it."""
    first = forward(copies)
    if first is None or first > SLOW_SECONDS:
        return first
    again = [forward(copies) for _ in range(REPEATS)]
    return None if None in again else min(t for t in again if t is not None)


def knee(curve: Curve) -> int:
    """The fewest rows that reach the best rows per second, less what a doubling has to bring."""
    best = max(rows / seconds for rows, seconds in curve.items())
    return min(rows for rows, seconds in curve.items() if rows / seconds * GAIN >= best)
