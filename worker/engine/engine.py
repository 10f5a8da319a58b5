"""Engine: choose, compute, settle. Many runs, one warm model: a step is one forward for all that can share it."""

import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet

from app.core.errors import GenerationFailed, OutOfMemory, SafelightError
from worker.engine.batcher import Batcher
from worker.engine.calibrate import Curve, knee, measure
from worker.engine.call import Call, merge, park, split
from worker.engine.intercept import intercept
from worker.engine.run import Aborted, Run
from worker.engine.target import Target

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

    @property
    def is_out_of_memory(self) -> bool:
        # The CPU's allocator raises a plain RuntimeError.
        return isinstance(self.error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(self.error)


class Silent:
    """The observer of those who do not look."""

    def forward(self, module_name: str, rows: int, runs: int, seconds: float) -> None: ...


class Engine:
    """Runs in flight over the intercepted `targets` of one warm model.

    One thread owns it: `add`, `abort` and `step` are called from that thread, and not from within a run.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        observer: Observer | None = None,
        *,
        max_batch: int | None = None,
        bucket: int = BUCKET_ROWS,
    ) -> None:
        self.runs: dict[str, Run] = {}
        self.curves: dict[tuple[str, tuple[int, ...]], Curve] = {}
        self.batcher = Batcher(bucket=bucket, max_batch=max_batch)
        self._observer = observer or Silent()
        self._new: deque[Run] = deque()
        self._parked: list[Call] = []
        self._current: Run | None = None  # the run whose code is being executed
        self._added = 0
        self._undo = [intercept(t, self._is_run, partial(self._park, name, t)) for name, t in targets.items()]

    @property
    def is_idle(self) -> bool:
        return not self.runs

    def add(self, run: Run) -> None:
        """Take `run` in; the next steps start it."""
        if run.id in self.runs:
            raise ValueError(f"run {run.id!r} is in flight already")
        run.order, self._added = self._added, self._added + 1
        self.runs[run.id] = run
        self._new.append(run)

    def abort(self, run_id: str) -> bool:
        """End a run between two steps, with Aborted as its error; False if it is not in flight (any more)."""
        run = self.runs.pop(run_id, None)
        if run is None:
            return False
        if run.greenlet is None:
            self._new.remove(run)
            run.error, run.is_finished = Aborted(), True
            return True
        with torch.inference_mode():
            while not run.is_finished:  # a `finally` of its own may call the model once more
                self._parked = [call for call in self._parked if call.run is not run]
                self._resume(run, partial(run.greenlet.throw, Aborted))
        return True

    def step(self) -> list[Run]:
        """Start what is new, do one forward, and let the runs it was for go on. Returns the runs that finished."""
        # Around everything, because grad mode is a matter of the thread and not of the greenlet: a pipeline's own
        # no_grad, entered in one run and left in another, would switch it on for a third.
        with torch.inference_mode():
            finished = self._start()
            if self._parked:
                batch = self.batcher.choose(self._parked)
                taken = set(batch)
                self._parked = [call for call in self._parked if call not in taken]
                finished += self._settle(batch, self._compute(batch))
        for run in finished:
            del self.runs[run.id]
        return finished

    def calibrate(self, most: int = CALIBRATED_ROWS) -> None:
        """Measure each parked call whose module and shape was not measured yet, up to `most` rows; set its cap."""
        for call in self._parked:
            if (call.name, call.shape) not in self.curves:
                with torch.inference_mode():
                    curve = measure(partial(self._seconds, call), call.rows, most)
                self.curves[call.name, call.shape] = curve
                if curve:
                    self.batcher.caps[call.name, call.shape] = knee(curve)

    def close(self) -> None:
        """Abort all runs and give the modules their methods back."""
        for run_id in list(self.runs):
            self.abort(run_id)
        while self._undo:
            self._undo.pop()()

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
        return run.greenlet.parent.switch(park(run, name, target, kwargs))

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

    def _compute(self, batch: Sequence[Call]) -> list[Any]:
        """The result of each call, or Failed: a fault stays with the call that caused it."""
        padding = self.batcher.padding(batch)
        try:
            results, seconds = _execute(batch, padding)
        except Exception as error:  # noqa: BLE001  # it becomes the error of the run that caused it
            traceback.clear_frames(error.__traceback__)  # its frames hold the tensors that did not fit
            failed = Failed(error)
        else:
            self._account(batch, seconds)
            return results
        if len(batch) == 1:
            return [failed]
        if not failed.is_out_of_memory:
            return self._each_alone(batch)
        self._shrink(batch)
        half = len(batch) // 2
        return self._compute(batch[:half]) + self._compute(batch[half:])

    def _account(self, batch: Sequence[Call], seconds: float) -> None:
        """Say what a forward took, and charge its runs for it."""
        first, rows = batch[0], sum(call.rows for call in batch)
        for call in batch if first.is_denoiser else ():
            call.run.seconds += seconds * call.rows / rows
        self.batcher.spent(seconds, is_denoiser=first.is_denoiser)
        self._observer.forward(first.name, rows, len(batch), seconds)

    def _each_alone(self, batch: Sequence[Call]) -> list[Any]:
        outcomes = [self._compute([call])[0] for call in batch]
        if not any(isinstance(outcome, Failed) for outcome in outcomes):
            self.batcher.solitary.add(batch[0].key)  # the merge was at fault: not again for this key
        return outcomes

    def _shrink(self, batch: Sequence[Call]) -> None:
        """Remember that this many rows do not fit."""
        rows = sum(call.rows for call in batch)
        self.batcher.caps[batch[0].name, batch[0].shape] = max(rows // 2, 1)
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def _seconds(self, call: Call, copies: int) -> float | None:
        """The time of a forward of `copies` times this call, None if it does not fit."""
        try:
            return _execute([call] * copies, 0)[1]
        except Exception as error:
            if not Failed(error).is_out_of_memory:
                raise
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
    try:
        run.result = run.body(run)
    except Aborted as error:
        run.error = error
    except Exception as error:  # noqa: BLE001  # whatever it is, it ends this run alone
        traceback.clear_frames(error.__traceback__)  # a kept error must not keep a picture's tensors
        run.error = _explained(error)
    run.is_finished = True


def _explained(error: Exception) -> SafelightError:
    """What a caller may read, with the original as its cause."""
    if isinstance(error, SafelightError):
        return error
    explained: SafelightError = GenerationFailed(
        f"the pipeline failed ({type(error).__name__}); the worker's log says more"
    )
    if Failed(error).is_out_of_memory:
        explained = OutOfMemory("the device's memory does not hold this request; ask for a smaller picture")
    explained.__cause__ = error
    return explained


def _execute(batch: Sequence[Call], padding: int) -> tuple[list[Any], float]:
    """One forward: the result of each call, and the seconds until the device was done with all."""
    target = batch[0].target
    start = time.perf_counter()
    output = target.original(**merge(batch, padding))
    if target.device.type != "cpu":
        torch.accelerator.synchronize(target.device)
    seconds = time.perf_counter() - start
    sizes = [call.rows for call in batch] + [padding] * (padding > 0)
    return split(output, sizes, listed=batch[0].layout.listed)[: len(batch)], seconds
