"""Batcher: which parked calls go into the next forward; a policy, pure Python.

Denoiser calls come first; text and VAE work gets at most half of the time while denoiser calls wait, and a batch of it
takes no longer than their forwards do. Among the calls of one side those that are due earliest go first, and the first
takes with it the calls of its key, up to the cap. A run is due PATIENCE times its remaining work after it arrived: the
shortest first, and the long ones grow old. Each tenant has an equal part of a batch's rows before the rest is given
out, and those who are ahead of their share let the others go first (see shares).

Starvation bound: of the runs of its tenant, none of no higher priority that arrives later than PATIENCE times a run's
work after it ever goes before it; a priority more counts as PRIORITY_SECONDS of waiting. So it ends when the work that
came before then is done, at the pace of its tenant's share, which is 1/n of the denoiser beside n - 1 others, give or
take the slack of the shares.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import prod
from typing import Protocol, TypeVar

from worker.engine.calibrate import GAIN, Curve, is_near, knee, predict, refine
from worker.engine.shares import Shares

PATIENCE = 20.0  # chosen by tests/simulation: 10 keeps short runs waiting, 40 the long ones
PRIORITY_SECONDS = 300.0
UNMEASURED_ROWS = 8  # the cap of a module no forward of which was measured
UNMEASURED_SECONDS = 0.05  # of a row of it
MOST_ROWS = 64
EVIDENCE = 8  # forwards of a number of rows before their time has a say in the cap
PROBE = 200  # forwards at a cap or limit after which twice the rows are tried: it must not stay too low for good
Shape = tuple[str, tuple[int, ...]]  # a module's name, and the shape of one sample


class Waiting(Protocol):
    """What the policy sees of a run."""

    @property
    def remaining(self) -> int: ...
    @property
    def priority(self) -> int: ...
    @property
    def tenant(self) -> str: ...
    @property
    def reproducible(self) -> bool: ...
    @property
    def arrived(self) -> float: ...
    @property
    def order(self) -> int: ...


class Parked(Protocol):
    """What the policy sees of a call."""

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
        self.curves: dict[Shape, Curve] = {}
        self.limits: dict[Shape, int] = {}  # rows that memory holds, where it was seen to end
        self.solitary: set[Hashable] = set()  # keys whose merged forwards fail though each call succeeds alone
        self.shares = Shares()
        self._present: set[str] = set()  # tenants with a denoiser call parked
        self._knees: dict[Shape, int] = {}  # in use
        self._seen: Counter[tuple[Shape, int]] = Counter()
        self._full: Counter[Shape] = Counter()  # forwards of as many rows as the knee, or more
        self._limited: Counter[Shape] = Counter()  # forwards of as many rows as the limit lets in
        self._debt = 0.0  # seconds of text and VAE work that the denoiser has not had back
        self._pace = 0.0  # seconds of a forward of the denoiser, of late
        self._row_seconds: dict[Shape, float] = {}  # in a full batch; what was worked out of the curves

    def learn(self, shape: Shape, curve: Curve) -> None:
        """Take what was measured."""
        self.curves[shape] = curve
        self._seen.update({(shape, rows): EVIDENCE for rows in curve})
        self._row_seconds.pop(shape, None)
        self._knees.pop(shape, None)

    def limit(self, shape: Shape, rows: int) -> None:
        """Remember that memory holds this many rows, and not twice as many."""
        self.limits[shape] = rows
        self._limited[shape] = 0

    def choose(self, parked: Sequence[P]) -> list[P]:
        """The calls of the next forward: all of one key, the most urgent first. `parked` must not be empty."""
        denoisers = [call for call in parked if call.is_denoiser]
        others = [call for call in parked if not call.is_denoiser]
        self._present = {call.run.tenant for call in denoisers}
        if denoisers and (not others or self._debt > 0):
            behind = self.shares.waiting(self._present)
            ranked = sorted(denoisers, key=lambda call: (call.run.tenant in behind, self.due(call), call.run.order))
            most = self._most(ranked[0])
            return self._fill(self._parted(ranked, most, behind), most)
        ranked = sorted(others, key=lambda call: (self.due(call), call.run.order))
        return self._fill(ranked, self._bounded(ranked[0]) if denoisers else self._most(ranked[0]))

    def _parted(self, ranked: Sequence[P], most: int, behind: set[str]) -> list[P]:
        """`ranked`, with each tenant's equal part of the batch before the rest; the first stays the first.

        Due times let old work of a flood go before a guest's new job; beside it there are rows enough for both.
        """
        part = most // len(self._present)
        if len(self._present) == 1 or not part:
            return list(ranked)
        first, had = ranked[0], Counter[str]()
        had[first.run.tenant] = first.rows
        early: list[P] = [first]
        late: list[P] = []
        for call in ranked[1:]:
            tenant = call.run.tenant
            is_part = call.key == first.key and tenant not in behind and had[tenant] + call.rows <= part
            had[tenant] += call.rows if is_part else 0
            (early if is_part else late).append(call)
        return early + late

    def due(self, call: Parked) -> float:
        """When the call's run ought to have ended, in seconds of the clock that its arrival was read from."""
        work = call.run.remaining * call.rows * self.row_seconds(call) if call.is_denoiser else 0.0
        return call.run.arrived + PATIENCE * work - PRIORITY_SECONDS * call.run.priority

    def spent(self, batch: Sequence[Parked], rows: int, seconds: float) -> None:
        """Note what a forward of `rows` rows, padding included, took."""
        first = batch[0]
        self._refine((first.name, first.shape), rows, seconds)
        self._relax((first.name, first.shape), rows + first.rows)
        if not first.is_denoiser:
            self._debt += seconds
            return
        self._debt = max(self._debt - seconds, 0.0)
        self._pace = seconds if not self._pace else self._pace + 0.1 * (seconds - self._pace)
        per_row = seconds / sum(call.rows for call in batch)
        used = dict.fromkeys((call.run.tenant for call in batch), 0.0)
        for call in batch:
            used[call.run.tenant] += per_row * call.rows
        self.shares.spent(used, self._present)

    def _refine(self, shape: Shape, rows: int, seconds: float) -> None:
        curve = self.curves.setdefault(shape, {})
        self._seen[shape, rows] += 1
        if rows in curve or self._seen[shape, rows] > 1:  # the very first one loads kernels
            refine(curve, rows, seconds)
            self._row_seconds.pop(shape, None)
        known = self._known(shape)
        self._full[shape] += bool(known) and rows >= self._knee(shape, known)

    def _relax(self, shape: Shape, next_rows: int) -> None:
        """Raise a limit that has kept the next call out PROBE times: what else filled the device may be gone."""
        limit = self.limits.get(shape)
        if limit is None or next_rows <= limit:
            return
        self._limited[shape] += 1
        if self._limited[shape] == PROBE:
            self.limit(shape, 2 * limit)
            if 2 * limit >= MOST_ROWS:
                del self.limits[shape]

    def _knee(self, shape: Shape, known: Curve) -> int:
        """The knee, which stays where it is while that is good: runs that keep step with each other end together."""
        held = self._knees.get(shape)
        if held is None or not is_near(known, held, GAIN):
            held = self._knees[shape] = knee(known)
        return held

    def _known(self, shape: Shape) -> Curve:
        """Of the curve what was seen often enough."""
        return {n: t for n, t in self.curves.get(shape, {}).items() if self._seen[shape, n] >= EVIDENCE}

    def cap(self, call: Parked) -> int:
        """The most rows of a forward like `call`."""
        shape = (call.name, call.shape)
        if self.max_batch and call.is_denoiser:
            return self.max_batch
        known = self._known(shape)
        cap = self._measured(call, known) if known else self._guessed(call)
        return min(cap, self.limits.get(shape, MOST_ROWS))

    def padding(self, batch: Sequence[Parked]) -> int:
        """Rows to add, so that a reproducible run sees the same number of rows whatever its company."""
        if not batch[0].is_denoiser or not any(call.run.reproducible for call in batch):
            return 0
        return max(self.bucket - sum(call.rows for call in batch), 0)

    def _measured(self, call: Parked, known: Curve) -> int:
        """The knee; more where nothing larger was tried, or now and then, in case it has moved."""
        found = self._knee((call.name, call.shape), known)
        if found == max(known):
            return min(max(2 * found, self._guessed(call)), MOST_ROWS)
        is_probing = self._full[call.name, call.shape] % PROBE == PROBE - 1
        return min(2 * found, MOST_ROWS) if is_probing else found

    def _guessed(self, call: Parked) -> int:
        """The cap of a measured shape of the same module, less if its samples are smaller than this one."""
        size = max(prod(call.shape), 1)
        for name, shape in self.curves:
            known = self._known((name, shape)) if name == call.name and shape != call.shape else {}
            if known:
                return max(knee(known) * min(prod(shape), size) // size, 1)
        return UNMEASURED_ROWS

    def row_seconds(self, call: Parked) -> float:
        """Seconds a row, in a full batch."""
        shape = (call.name, call.shape)
        if shape not in self._row_seconds:
            curve = self.curves.get(shape)
            found = min(seconds / rows for rows, seconds in curve.items()) if curve else UNMEASURED_SECONDS
            self._row_seconds[shape] = found
        return self._row_seconds[shape]

    def _bounded(self, first: Parked) -> int:
        """Rows of text or VAE work that take no longer than one forward of the denoiser that waits for them."""
        curve, rows = self.curves.get((first.name, first.shape)), self._most(first)
        while curve and rows > first.rows and predict(curve, rows) > self._pace:
            rows -= 1
        return rows

    def _fill(self, ranked: Sequence[P], most: int) -> list[P]:
        first = ranked[0]
        batch, rows = [first], first.rows
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
