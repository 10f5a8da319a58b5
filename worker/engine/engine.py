"""Engine: choose, compute, settle. Many runs, one warm model: a step is one forward for all that can share it."""

import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet

from app.core.errors import GenerationFailed, OutOfMemory, SafelightError
from worker.engine.batcher import Batcher, Shape
from worker.engine.calibrate import Curve, measure
from worker.engine.call import Call, join, merge, park, part, split
from worker.engine.encodings import Encodings, copied, key_of
from worker.engine.faults import DeviceLost, is_device_lost, is_out_of_memory
from worker.engine.intercept import intercept
from worker.engine.run import Aborted, Run
from worker.engine.target import Target
from worker.engine.tiling import tiled

STARTING_SECONDS = 0.05  # of one step may go into starting new runs; one is always started
BUCKET_ROWS = 8  # a constant, not a measurement: a reproducible picture has to come out the same in another process
CALIBRATED_ROWS = 64  # the largest batch that calibration tries


class Observer(Protocol):
    def forward(self, module_name: str, rows: int, runs: int, seconds: float) -> None:
        """A forward of `rows` rows for `runs` runs ended; `seconds` until the device was done."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The outcome of a call whose forward raised `error`."""

    error: Exception


@dataclass(slots=True)
class Work:
    """What the denoisers have done: seconds, and those that it takes in full batches."""

    seconds: float = 0.0
    ideal: float = 0.0


class Silent:
    """The observer of those who do not look."""

    def forward(self, module_name: str, rows: int, runs: int, seconds: float) -> None: ...


class Engine:
    """Runs in flight over the intercepted `targets` of warm models, which may come and go.

    One thread owns it: `add`, `abort` and `step` are called from that thread, and not from within a run.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        observer: Observer | None = None,
        *,
        max_batch: int | None = None,
        bucket: int = BUCKET_ROWS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runs: dict[str, Run] = {}
        self.batcher = Batcher(bucket=bucket, max_batch=max_batch)
        self.encodings = Encodings()
        self.work = Work()
        self._observer = observer or Silent()
        self._clock = clock
        self._new: deque[Run] = deque()
        self._parked: list[Call] = []
        self._current: Run | None = None  # the run whose code is being executed
        self._added = 0
        self._calibrated: set[Shape] = set()
        self._is_lost = False
        self._undo: dict[str, Callable[[], None]] = {}
        self.attach(targets)

    def attach(self, targets: Mapping[str, Target], curves: Mapping[Shape, Curve] | None = None) -> None:
        """Take more modules in; `curves` are what was measured of them elsewhere, or before they were detached."""
        for name, target in targets.items():
            assert name not in self._undo, f"{name} is attached already"
            self._undo[name] = intercept(target, self._is_run, partial(self._park, name, target))
        for shape, curve in (curves or {}).items():
            if shape not in self._calibrated:
                self.batcher.learn(shape, curve)
                self._calibrated.add(shape)

    def detach(self, names: Collection[str]) -> None:
        """Give these modules their methods back; no run may be using them. What was measured of them stays known."""
        for name in names:
            self._undo.pop(name)()
        self.encodings.forget(names)

    @property
    def is_idle(self) -> bool:
        return not self.runs

    def add(self, run: Run) -> None:
        """Take `run` in; the next steps start it."""
        if run.id in self.runs:
            raise ValueError(f"run {run.id!r} is in flight already")
        run.order, self._added = self._added, self._added + 1
        run.arrived = self._clock()
        self.runs[run.id] = run
        self._new.append(run)

    def abort(self, run_id: str) -> bool:
        """End a run between two steps, with Aborted as its error; False if it is not in flight (any more)."""
        run = self.runs.pop(run_id, None)
        if run is None:
            return False
        if run.greenlet is None or self._is_lost:
            self._new = deque(new for new in self._new if new is not run)
            self._parked = [call for call in self._parked if call.run is not run]
            run.error, run.is_finished = Aborted(), True
            return True
        with torch.inference_mode():
            while not run.is_finished:  # a `finally` of its own may call the model once more
                self._parked = [call for call in self._parked if call.run is not run]
                self._resume(run, partial(run.greenlet.throw, Aborted))
        return True

    def step(self) -> list[Run]:
        """Start what is new, do one forward, and let the runs it was for go on. Returns the runs that finished.

        Raises DeviceLost, after which only `abort` and `close` are of use.
        """
        # Around everything, because grad mode is a matter of the thread and not of the greenlet: a pipeline's own
        # no_grad, entered in one run and left in another, would switch it on for a third.
        try:
            with torch.inference_mode():
                finished = self._start()
                if self._parked:
                    finished += self._forward()
        except DeviceLost:
            self._is_lost = True
            raise
        for run in finished:
            del self.runs[run.id]
        return finished

    def _forward(self) -> list[Run]:
        batch = self.batcher.choose(self._parked)
        taken = set(batch)
        self._parked = [call for call in self._parked if call not in taken]
        return self._settle(batch, self._encode(batch) if batch[0].target.is_encoder else self._compute(batch))

    def calibrate(self, most: int = CALIBRATED_ROWS) -> None:
        """Measure each parked call whose module and shape was not measured yet, up to `most` rows; set its cap."""
        for call in self._parked:
            shape = (call.name, call.shape)
            if shape not in self._calibrated:
                with torch.inference_mode():
                    self.batcher.learn(shape, measure(partial(self._seconds, call), call.rows, most))
                self._calibrated.add(shape)

    def close(self) -> None:
        """Abort all runs and give the modules their methods back."""
        for run_id in list(self.runs):
            self.abort(run_id)
        while self._undo:
            self._undo.popitem()[1]()

    # Choose: starting runs, and parking their calls.

    def _start(self) -> list[Run]:
        finished: list[Run] = []
        until = time.perf_counter() + STARTING_SECONDS
        while self._new:
            run = self._new.popleft()
            run.greenlet = greenlet(_walk)
            if self._resume(run, partial(run.greenlet.switch, run)):
                finished.append(run)
            if time.perf_counter() > until:
                break
        return finished

    def _is_run(self) -> bool:
        return self._current is not None and getcurrent() is self._current.greenlet

    def _park(self, name: str, target: Target, kwargs: dict[str, Any]) -> Any:
        """Called in a run's greenlet: hand the call to the loop, and come back with its result."""
        run = self._current
        assert run is not None
        call = park(run, name, target, kwargs)
        known = self.encodings.get(key_of(call))
        if known is not None:
            run.phase = target.phase
            return known
        return run.greenlet.parent.switch(call)

    def _resume(self, run: Run, resume: Callable[[], Any]) -> bool:
        """Let a run go on, to its next call or to its end; whether it ended."""
        self._current = run
        run.greenlet.parent = getcurrent()
        try:
            call = resume()
        finally:
            self._current = None
        if not run.greenlet.dead:
            run.phase = call.target.phase
            self._parked.append(call)
        return run.is_finished

    # Compute: one forward, and what to do when it fails.

    def _encode(self, batch: Sequence[Call]) -> list[Any]:
        """As `_compute`, where calls of equal content are computed once, and kept."""
        keys = [key_of(call) or id(call) for call in batch]
        outcomes = {key: self.encodings.get(key) for key in keys}
        missing = {key: call for key, call in zip(keys, batch, strict=True) if outcomes[key] is None}
        if missing:
            outcomes |= zip(missing, self._compute(list(missing.values())), strict=True)
        for key, call in missing.items():
            if not isinstance(outcomes[key], Failed):
                self.encodings.put(key_of(call), outcomes[key])
        return [o if isinstance(o, Failed) else copied(o) for o in (outcomes[key] for key in keys)]

    def _compute(self, batch: Sequence[Call]) -> list[Any]:
        """The result of each call, or Failed: a fault stays with the call that caused it."""
        padding = self.batcher.padding(batch)
        if len(batch) == 1 and not padding and batch[0].rows > self._most_rows(batch[0]):
            return [self._in_parts(batch[0])]
        try:
            results, seconds = _execute(batch, padding)
        except Exception as error:
            if is_device_lost(error):
                raise DeviceLost(str(error)) from error
            traceback.clear_frames(error.__traceback__)  # its frames hold the tensors that did not fit
            failed = Failed(error)
        else:
            self._account(batch, padding, seconds)
            return results
        fits_in_parts = is_out_of_memory(failed.error) and batch[0].rows > 1 and not batch[0].run.reproducible
        if len(batch) == 1 and not fits_in_parts:
            return [failed]
        if not is_out_of_memory(failed.error):
            return self._each_alone(batch)
        self._shrink(batch, padding)
        if len(batch) == 1:
            return [self._in_parts(batch[0])]
        half = len(batch) // 2
        return self._compute(batch[:half]) + self._compute(batch[half:])

    def _account(self, batch: Sequence[Call], padding: int, seconds: float) -> None:
        """Say what a forward took, and charge its runs for it."""
        first, rows = batch[0], sum(call.rows for call in batch)
        for call in batch if first.is_denoiser else ():
            call.run.seconds += seconds * call.rows / rows
            call.run.rows += call.rows
        if first.is_denoiser:
            self.work.seconds += seconds
            self.work.ideal += rows * self.batcher.row_seconds(first)
        self.batcher.spent(batch, rows + padding, seconds)
        self._observer.forward(first.name, rows, len(batch), seconds)

    def _each_alone(self, batch: Sequence[Call]) -> list[Any]:
        outcomes = [self._compute([call])[0] for call in batch]
        if not any(isinstance(outcome, Failed) for outcome in outcomes):
            self.batcher.solitary.add(batch[0].key)  # the merge was at fault: not again for this key
        return outcomes

    def _most_rows(self, call: Call) -> int:
        """Rows that memory is known to hold; what is one computation to a reproducible run stays one."""
        return call.rows if call.run.reproducible else self.batcher.limits.get((call.name, call.shape), call.rows)

    def _in_parts(self, call: Call) -> Any:
        """The result of a call whose rows do not fit at once, from two forwards, or Failed."""
        half = (call.rows + 1) // 2
        parts = [part(call, 0, half), part(call, half, call.rows)]
        outcomes = [self._compute([p])[0] for p in parts]
        failed = next((o for o in outcomes if isinstance(o, Failed)), None)
        return failed or join(outcomes, [p.rows for p in parts])

    def _shrink(self, batch: Sequence[Call], padding: int = 0) -> None:
        """Remember that this many rows do not fit."""
        rows = sum(call.rows for call in batch) + padding
        self.batcher.limit((batch[0].name, batch[0].shape), max(rows // 2, 1))
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def _seconds(self, call: Call, copies: int) -> float | None:
        """The time of a forward of `copies` times this call, None if it does not fit."""
        try:
            return _execute([call] * copies, 0)[1]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._shrink([call] * copies)
            return None

    # Settle: results into the runs.

    def _settle(self, batch: Sequence[Call], outcomes: Sequence[Any]) -> list[Run]:
        finished = []
        for call, outcome in zip(batch, outcomes, strict=True):
            own = call.run.greenlet
            is_failed = isinstance(outcome, Failed)
            if self._resume(call.run, partial(own.throw, outcome.error) if is_failed else partial(own.switch, outcome)):
                finished.append(call.run)
        return finished


def _walk(run: Run) -> None:
    """What a run's greenlet executes: the whole of its body."""
    body, run.body = run.body, _made  # what it holds may go with it: a model, and what the picture starts from
    try:
        run.result = body(run)
    except Aborted as error:
        run.error = error
    except Exception as error:
        if is_device_lost(error):
            raise DeviceLost(str(error)) from error
        traceback.clear_frames(error.__traceback__)  # a kept error must not keep a picture's tensors
        run.error = _explained(error)
    run.is_finished = True


def _made(run: Run) -> None:
    """The body of a run that has begun."""
    raise AssertionError(f"run {run.id} is walked once")


def _explained(error: Exception) -> SafelightError:
    """What a caller may read, with the original as its cause."""
    if isinstance(error, SafelightError):
        return error
    explained: SafelightError = GenerationFailed(
        f"the pipeline failed ({type(error).__name__}); the worker's log says more"
    )
    if is_out_of_memory(error):
        explained = OutOfMemory("the device's memory does not hold this request; ask for a smaller picture")
    explained.__cause__ = error
    return explained


def _execute(batch: Sequence[Call], padding: int) -> tuple[list[Any], float]:
    """One forward: the result of each call, and the seconds until the device was done with all."""
    target = batch[0].target
    start = time.perf_counter()
    with _adapted(batch, padding), tiled(target.convolutions if batch[0].run.tiling else ()):
        output = target.original(**merge(batch, padding))
    if target.device.type != "cpu":
        torch.accelerator.synchronize(target.device)
    seconds = time.perf_counter() - start
    sizes = [call.rows for call in batch] + [padding] * (padding > 0)
    return split(output, sizes, listed=batch[0].layout.listed)[: len(batch)], seconds


def _adapted(batch: Sequence[Call], padding: int) -> AbstractContextManager[None]:
    """Each row with the adapters of its run; those that only pad the batch have none."""
    adapters = batch[0].target.adapters
    if adapters is None:
        return nullcontext()
    return adapters.using([call.run.adapters for call in batch for _ in range(call.rows)] + [()] * padding)
