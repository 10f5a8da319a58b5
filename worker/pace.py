"""Pacer: how fast this worker makes pictures of each model, for those who estimate; and when a job will have ended."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any, Final

from app.core.estimates import Measured, Pace, forward_seconds, remaining_seconds
from worker.engine.batcher import PATIENCE, PRIORITY_SECONDS, Batcher, Shape
from worker.engine.engine import Work
from worker.engine.run import Run
from worker.engine.target import Phase
from worker.held import HeldJob
from worker.warm import Keeper, Place

WEIGHT: Final = 0.2  # of what was seen last
SIZES: Final = 8  # that are told of a model
WATCHED_SECONDS: Final = 0.5  # of work without a pause, before its drag says something


@dataclass(slots=True)
class _Known:
    """What was learned of a model here."""

    base: tuple[Shape, int] | None = None  # the denoiser's shape at the default size, and that size in pixels
    rows: int = 1  # of one call at the default guidance
    guided_rows: int = 0  # a step of a picture; 0: none was made yet
    plain_rows: int = 0
    around: float | None = None  # seconds of a picture outside of the denoiser
    not_fitting: set[int] = field(default_factory=set)  # pixels


class Pacer:
    """The loop's thread calls `busy`, `idle` and `ended`; the heart's thread asks."""

    def __init__(
        self, batcher: Batcher, keeper: Keeper, *, max_images: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._batcher, self._keeper, self._max_images, self._clock = batcher, keeper, max_images, clock
        self._known: defaultdict[str, _Known] = defaultdict(_Known)
        self._drag: float | None = None
        self._full_drag: float | None = None
        self._since: tuple[float, Work] | None = None  # when work without a pause began, and what was done then
        self._was_full = False

    def busy(self, done: Work, *, is_full: bool) -> None:
        """The loop has made a step, and there may be more to do; `is_full`: jobs may wait because there is no room."""
        now = self._clock()
        if self._since is None:
            self._since, self._was_full = (now, replace(done)), False
        began, before = self._since
        self._was_full = self._was_full or is_full
        if now - began < WATCHED_SECONDS or done.ideal == before.ideal:
            return
        self._drag = _moved(self._drag, (now - began) / (done.seconds - before.seconds))
        if self._was_full:
            self._full_drag = _moved(self._full_drag, (now - began) / (done.ideal - before.ideal))
        self._since, self._was_full = (now, replace(done)), False

    def idle(self) -> None:
        """There is nothing to do."""
        self._since = None

    def ended(self, held: HeldJob) -> None:
        """A job was made: learn from it."""
        params, known = held.job.params, self._known[held.model]
        # The rows of ControlNets count among a run's.
        made = [run for run in held.runs if run.step and not params.controls]
        if made:
            rows = max(round(sum(run.rows / run.step for run in made) / len(made)), 1)
            if params.guidance_scale > 1:
                known.guided_rows = rows
            else:
                known.plain_rows = rows
        timings = held.timings
        around = timings.encode_seconds + timings.decode_seconds + timings.store_seconds
        known.around = _moved(known.around, around)

    def ran_out(self, held: HeldJob) -> None:
        """A job did not fit into memory."""
        params = held.job.params
        self._known[held.model].not_fitting.add(params.width * params.height)

    def paces(self) -> dict[str, Mapping[str, Any]]:
        """Of each model that is warm, as a process' record has it."""
        found = {name: self.pace(name) for name in self._keeper.warm}
        return {name: asdict(pace) for name, pace in found.items() if pace}

    def pace(self, model: str) -> Pace | None:
        """How fast it is; None before its denoiser was measured."""
        place, known = self._keeper.places[model], self._known[model]
        curves = self._curves(place)
        if not curves:
            return None
        if known.base is None:
            shape, curve = next(iter(curves.items()))
            defaults = place.spec.defaults
            known.base, known.rows = (shape, defaults.width * defaults.height), min(curve)
        (_, base), pixels = known.base
        measured = [
            Measured(round(pixels * prod(shape) / max(prod(base), 1)), dict(curve))
            for (_, shape), curve in list(curves.items())[:SIZES]
        ]
        guided, plain = _rows(known, place)
        return Pace(
            measured=measured,
            guided_rows=guided,
            plain_rows=plain,
            around_seconds=known.around or 0.0,
            drag=self._drag or 1.0,
            full_drag=self._full_drag or self._drag or 1.0,
            max_images=self._max_images,
            not_fitting=sorted(known.not_fitting),
        )

    def _curves(self, place: Place) -> dict[Shape, dict[int, float]]:
        """Those of the model's denoiser, the first measured first."""
        names = [name for name, target in place.targets.items() if target.is_denoiser]
        # dict() of a dict is one step for other threads.
        found = dict(self._batcher.curves)
        return {shape: dict(curve) for shape, curve in found.items() if names and shape[0] == names[0] and curve}

    def eta(self, held: HeldJob, others: Iterable[HeldJob]) -> float | None:
        """Seconds until a job has ended, or None where nobody knows."""
        pace = self.pace(held.model)
        if pace is None or not held.runs:
            return None
        company = [run for other in others if other is not held for run in other.runs if not run.is_finished]
        own = [run for run in held.runs if not run.is_finished]
        size = held.job.params.width * held.job.params.height
        measured = pace.near(size)
        rows = {id(run): self._rows_of(run, pace, held) for run in (*own, *company)}

        def due(run: Run) -> tuple[float, float]:
            work = run.remaining * rows[id(run)] * measured.row_seconds
            return run.arrived + PATIENCE * work - PRIORITY_SECONDS * run.priority, work

        together = min(sum(rows.values()), measured.most_rows)
        in_step = max((run.remaining for run in own), default=0) * forward_seconds(measured.curve, max(together, 1))
        in_turn = remaining_seconds(map(due, own), map(due, company))
        left = max(in_turn * pace.full_drag, in_step * pace.drag)
        after = pace.around_seconds if any(run.phase is not Phase.DECODING for run in own) else pace.around_seconds / 2
        return left + after

    @staticmethod
    def _rows_of(run: Run, pace: Pace, held: HeldJob) -> int:
        if run.step and run.rows:
            return max(round(run.rows / run.step), 1)
        return pace.guided_rows if held.job.params.guidance_scale > 1 else pace.plain_rows


def _moved(known: float | None, seen: float) -> float:
    return seen if known is None else known + WEIGHT * (seen - known)


def _rows(known: _Known, place: Place) -> tuple[int, int]:
    """Rows a step with guidance and without: as in pictures that were made, else as the first call had them."""
    defaults = place.spec.defaults
    if defaults.guidance_scale > 1:
        guided, plain = known.rows, max(known.rows // 2, 1)
    else:
        guided, plain = known.rows * (2 if "negative_prompt" in place.spec.accepts else 1), known.rows
    return known.guided_rows or guided, known.plain_rows or plain
