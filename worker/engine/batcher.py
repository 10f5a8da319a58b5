"""Batcher: which parked calls go into the next forward; a policy, pure Python.

Denoiser calls come first; text and VAE work gets at most half of the time while denoiser calls wait, so a decode never
takes more from the others than they get back after it. Among the calls of one side the shortest remaining run goes
first, less one step for every forward that went ahead of it, and takes with it the calls of its key, up to the cap.

Starvation bound: a call with r steps remaining, beside n other runs of no higher priority, goes after at most r + n
forwards of its side. For only calls parked within r forwards after it can come before it, of these each run has one
at a time, and each forward takes the first. A run of a priority p higher adds PRIORITY_STEPS * p to r.
"""

from collections.abc import Hashable, Sequence
from math import prod
from typing import Protocol, TypeVar

PRIORITY_STEPS = 100
UNMEASURED_ROWS = 8  # the cap of a module no forward of which was measured


class Waiting(Protocol):
    """What the policy sees of a run."""

    @property
    def remaining(self) -> int: ...
    @property
    def priority(self) -> int: ...
    @property
    def reproducible(self) -> bool: ...
    @property
    def order(self) -> int: ...


class Parked(Protocol):
    """What the policy sees of a call."""

    passed: int

    @property
    def run(self) -> Waiting: ...
    @property
    def name(self) -> str: ...
    @property
    def key(self) -> Hashable: ...
    @property
    def rows(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def is_denoiser(self) -> bool: ...


P = TypeVar("P", bound=Parked)


class Batcher:
    """`bucket` rows has every denoiser batch with a reproducible run in it; `max_batch` rows overrides all caps."""

    def __init__(self, *, bucket: int, max_batch: int | None = None) -> None:
        self.bucket = bucket
        self.max_batch = max_batch
        self.caps: dict[tuple[str, tuple[int, ...]], int] = {}  # (module, shape) -> rows
        self.solitary: set[Hashable] = set()  # keys whose merged forwards fail though each call succeeds alone
        self._debt = 0.0  # seconds of text and VAE work that the denoiser has not had back

    def choose(self, parked: Sequence[P]) -> list[P]:
        """The calls of the next forward: all of one key, the most urgent first. `parked` must not be empty."""
        side = self._side(parked)
        ranked = sorted(side, key=_urgency)
        batch = self._fill(ranked)
        for call in side:
            call.passed += 1  # those taken never come back: the next call of their run is another one
        return batch

    def spent(self, seconds: float, *, is_denoiser: bool) -> None:
        """Note what a forward took."""
        self._debt = max(self._debt - seconds, 0.0) if is_denoiser else self._debt + seconds

    def cap(self, call: Parked) -> int:
        """The most rows of a forward like `call`.

        A shape that was not measured gets the cap of a measured one of its module, scaled by the size of a sample.
        """
        if self.max_batch and call.is_denoiser:
            return self.max_batch
        if (call.name, call.shape) in self.caps:
            return self.caps[call.name, call.shape]
        for (name, shape), rows in self.caps.items():
            if name == call.name:
                return (
                    max(rows * prod(shape) // max(prod(call.shape), 1), 1) if prod(shape) < prod(call.shape) else rows
                )
        return UNMEASURED_ROWS

    def padding(self, batch: Sequence[Parked]) -> int:
        """Rows to add, so that a reproducible run sees the same number of rows whatever its company."""
        if not batch[0].is_denoiser or not any(call.run.reproducible for call in batch):
            return 0
        return max(self.bucket - sum(call.rows for call in batch), 0)

    def _side(self, parked: Sequence[P]) -> list[P]:
        denoisers = [call for call in parked if call.is_denoiser]
        others = [call for call in parked if not call.is_denoiser]
        return denoisers if denoisers and (not others or self._debt > 0) else others

    def _fill(self, ranked: Sequence[P]) -> list[P]:
        first = ranked[0]
        batch, rows, most = [first], first.rows, self._most(first)
        for call in ranked[1:]:
            # In a batch that was not padded a reproducible run would have to be alone: it waits until it is first.
            is_fit = call.key == first.key and (first.run.reproducible or not call.run.reproducible)
            if is_fit and rows + call.rows <= most:
                batch.append(call)
                rows += call.rows
        return batch

    def _most(self, first: Parked) -> int:
        if first.key in self.solitary:
            return first.rows
        if first.run.reproducible:
            return self.bucket if first.is_denoiser else first.rows  # a VAE or text call goes alone: no padding to pay
        return self.cap(first)


def _urgency(call: Parked) -> tuple[int, int]:
    return call.run.remaining - call.passed - PRIORITY_STEPS * call.run.priority, call.run.order
