"""Consumer: the RQ worker's loop, many jobs in one process: admit, step, settle. It alone knows RQ and the engine."""

import signal
import threading
import time
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Final

import structlog
from redis.exceptions import RedisError
from rq.timeouts import BaseDeathPenalty
from rq.worker.base import BaseWorker, WorkerStatus

from app.core import failpoints
from app.core.errors import GenerationFailed, ModelUnavailable, OutOfMemory, SafelightError
from app.core.job import JobStatus, Priority
from app.core.metrics import WorkerMetrics
from worker.engine.calibrate import slowest
from worker.engine.engine import Engine
from worker.engine.run import Run
from worker.finisher import Finisher
from worker.heart import Heart, Pulse
from worker.held import HeldJob
from worker.intake import Intake, Room
from worker.leases import Claim
from worker.pace import Pacer
from worker.pipelines.load import WarmModel
from worker.pipelines.pictures import NOTHING
from worker.pipelines.tasks import runs_for
from worker.reaper import Reaper
from worker.sources import Sources
from worker.viewers import Viewers
from worker.warm import Keeper
from worker.witness import Witness

log = structlog.get_logger()
IDLE_SECONDS: Final = 0.5  # the longest sleep of an idle loop
PRIORITIES: Final[dict[Priority, int]] = {"high": 1, "normal": 0, "low": -1}  # as a Run has them
UNREADABLE: Final = GenerationFailed("No worker's version can read the job's record; submit it again.")
UNLOADABLE: Final = ModelUnavailable("The model could not be loaded; the service's log says why.")
UNKNOWN: Final = GenerationFailed("The picture could not be made; the service's log says why.")


class NoDeathPenalty(BaseDeathPenalty):
    """RQ's timeouts raise in the main thread and cannot break a device call: ours are looked at between steps."""

    def setup_death_penalty(self) -> None: ...

    def cancel_death_penalty(self) -> None: ...


class Consumer(BaseWorker):
    """One process, one engine, many jobs. `connection` must not decode replies: RQ reads bytes."""

    death_penalty_class = NoDeathPenalty

    def __init__(
        self,
        *args: Any,
        engine: Engine,
        keeper: Keeper,
        metrics: WorkerMetrics,
        room: Room,
        pacer: Pacer,
        grace_seconds: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.engine = engine
        self.keeper = keeper
        self.metrics = metrics
        self.room = room
        self.pacer = pacer
        for model in keeper.served:
            metrics.runs_in_flight.labels(model).set(0)
        self.bell = keeper.bell
        self.held: dict[str, HeldJob] = {}
        self._grace_seconds = grace_seconds
        self._made: SimpleQueue[HeldJob] = SimpleQueue()
        self._refused: SimpleQueue[tuple[HeldJob, SafelightError]] = SimpleQueue()
        self._ended: SimpleQueue[tuple[HeldJob, JobStatus | None]] = SimpleQueue()
        self._stop_at: float | None = None  # monotonic: when the grace period ends
        self._is_final = False

    def use(
        self,
        intake: Intake,
        heart: Heart,
        pulse: Pulse,
        finisher: Finisher,
        reaper: Reaper,
        *,
        sources: Sources,
        viewers: Viewers,
        witness: Witness,
    ) -> None:
        """What is around the loop; most of it needs the consumer, so it comes after it."""
        self.intake, self.heart, self.pulse, self.finisher, self.reaper = intake, heart, pulse, finisher, reaper
        self.sources, self.viewers, self.witness = sources, viewers, witness

    def request_stop(self, signum: int | None, frame: FrameType | None) -> None:
        """The first signal drains, the second is final. Nothing is raised from here: RQ's own handler loses jobs so."""
        self._is_final = self._stop_at is not None
        self._stop_at = self._stop_at or time.monotonic() + self._grace_seconds
        self.bell.set()

    def make_room(self, held: HeldJob) -> None:
        """Called by the finisher's threads: all of a job's pictures are made, and others may take its place."""
        self._made.put(held)
        self.bell.set()

    def refuse(self, held: HeldJob, error: SafelightError) -> None:
        """Called by the finisher's threads: a picture of the job must not be seen."""
        self._refused.put((held, error))
        self.bell.set()

    def end(self, held: HeldJob, status: JobStatus | None) -> None:
        """Called by the finisher's threads: a job is out of our hands."""
        self._ended.put((held, status))
        self.bell.set()

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """Take jobs and make them until told to stop; whether any was made."""
        self.register_birth()
        self.set_state(WorkerStatus.STARTED)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.request_stop)
            signal.signal(signal.SIGTERM, self.request_stop)
        for thread in (self.intake, self.heart, self.reaper):
            thread.start()
        try:
            while not self._is_done:
                self._turn()
            self._drain()  # a second signal leaves something to hand back
        except BaseException:
            self._is_final = True  # nobody will turn the loop any more: let go of everything at once
            raise
        finally:
            self._leave()
        return bool(self.successful_job_count)

    @property
    def _is_done(self) -> bool:
        return self._stop_at is not None and not self.intake.is_open and (not self.held or self._is_final)

    def _turn(self) -> None:
        if self._stop_at is not None:
            self._drain()
        self._admit()
        self._obey()
        self._take_in()
        if self.engine.is_idle:
            self.bell.wait(IDLE_SECONDS)
            self.bell.clear()
            self.pulse.rested()
            self.pacer.idle()
        else:
            self.witness.look(self.held.values())
            failpoints.reach("before_step")
            finished = self.engine.step()
            failpoints.reach("after_step")
            self._settle(finished)
            self.pulse.moved()
            self.pacer.busy(self.engine.work, is_full=self.room.is_full)

    def _drain(self) -> None:
        if self.intake.is_open:
            log.info("worker.draining", jobs=len(self.held))
            self.intake.stop_claiming()
        for held in self._unstarted():
            self._hand_back(held)  # its model is not warm, and others may have it
        assert self._stop_at is not None
        if self._is_final or time.monotonic() > self._stop_at:
            for held in list(self.held.values()):
                self._hand_back(held)

    def _hand_back(self, held: HeldJob) -> None:
        if self._take_back(held, "handed_back"):
            self.finisher.release(held)

    def _unstarted(self, model: str | None = None) -> list[HeldJob]:
        """The jobs that wait for their model, or for this one."""
        waiting = [held for held in self.held.values() if not (held.is_started or held.is_dropped)]
        return [held for held in waiting if model is None or held.model == model]

    def _take_in(self) -> None:
        """What was loaded is there, and its jobs begin; what could not be fails them, or is left to other workers."""
        for loaded in self.keeper.turn():
            self.pulse.expect(slowest(loaded.curves.values()))
            for held in self._unstarted(loaded.name):
                if loaded.model:
                    self._begin(held, loaded.model)
                elif loaded.name in self.keeper.served:
                    self._fail(held, UNLOADABLE)
                else:
                    self._hand_back(held)
            self.intake.look()

    def _admit(self) -> None:
        for claim in _drained(self.intake.claims):
            self._take(claim)

    def _take(self, claim: Claim) -> None:
        log.info("job.claimed", job_id=claim.id, request_id=claim.job.request_id if claim.job else None)
        if old := self.held.get(claim.id):  # our own lease had passed, or we had passed it on, and it came back to us
            self._drop(old, "lost")
            self._forget(old, None)
        held = self.held[claim.id] = HeldJob(claim, is_dropped=claim.job is None)
        if claim.job is None:
            self.finisher.pass_on(held, UNREADABLE)
            return
        if held.model not in self.keeper.served:  # the intake asked before that was known
            self._hand_back(held)
            return
        self.keeper.enter(held.model)
        self.sources.fetch(held)
        if model := self.keeper.model(held.model):
            self._begin(held, model)

    def _begin(self, held: HeldJob, model: WarmModel) -> None:
        """Its model is warm: its runs go into the engine, if what it starts from is there too."""
        if held.source is None or held.is_started:
            return
        held.is_started = True
        self.witness.look([held])
        params = held.job.params
        worded = params.model_copy(update={"prompt": model.spec.worded(params.prompt)})
        try:
            failpoints.reach("before_start", held.id)
            held.checker = model.checker
            held.runs = runs_for(model, worded, held.id, held.source)
        except SafelightError as error:
            self._fail(held, error)
            return
        except Exception:
            log.exception("job.not_started", job_id=held.id)
            self._fail(held, UNKNOWN)
            return
        self.metrics.queue_wait_seconds.labels(params.model).observe(held.queue_seconds)
        for run in held.runs:
            run.priority, run.tenant = PRIORITIES[held.job.priority], held.job.tenant
            self.engine.add(run)
        self.metrics.runs_in_flight.labels(params.model).inc(len(held.runs))

    def _obey(self) -> None:
        """Let go of what was cancelled, taken away by the reaper, or has ended."""
        for job_id in _drained(self.intake.canceled):
            if held := self.held.get(job_id):
                self._drop(held, "expired" if held.is_overdue else "canceled")
        for held in _drained(self.heart.lost):
            self._drop(held, "lost")
        self._keep_deadlines()
        for held, refusal in _drained(self._refused):
            self._fail(held, refusal)
        for held, error in _drained(self.sources.ready):
            self._go_on(held, error)
        for held in _drained(self._made):
            self._leave_room(held)
        for held, status in _drained(self._ended):
            if status is None:
                self._take_back(held, "failed")  # no run of it may outlive it
            self._forget(held, status)

    def _keep_deadlines(self) -> None:
        """Have Redis end what is past its deadline; it is let go of when that comes back as a cancellation does."""
        now = time.monotonic()
        for held in self.held.values():
            if held.must_end <= now and not held.is_overdue:
                held.is_overdue = True
                self.reaper.look()

    def _go_on(self, held: HeldJob, error: SafelightError | None) -> None:
        """What the job starts from was read, or could not be."""
        if error:
            self._fail(held, error)
        elif not held.is_dropped and (model := self.keeper.model(held.model)):
            self._begin(held, model)

    def _drop(self, held: HeldJob, reason: str) -> None:
        if not self._take_back(held, reason):
            return
        log.info("job.dropped", job_id=held.id, reason=reason)
        self.finisher.discard(held)
        self._forget(held, None)

    def _take_back(self, held: HeldJob, reason: str) -> bool:
        """Stop the runs of a job; False where that was done before."""
        if held.is_dropped:
            return False
        held.is_dropped = True
        for run in held.runs:
            self.engine.abort(run.id)
        self.metrics.wasted_seconds_total.labels(reason).inc(held.denoiser_seconds)
        return True

    def _settle(self, finished: list[Run]) -> None:
        now = time.monotonic()
        for held in self.held.values():
            held.observe(now)
            if held.is_watched:
                self.viewers.show(held)
        for run in finished:
            job_id, _, index = run.id.partition("/")
            held = self.held[job_id]
            if held.is_dropped:
                continue
            if isinstance(run.error, OutOfMemory) and not run.reproducible:  # whose batches are padded
                self.pacer.ran_out(held)
            if run.error is None:
                self.finisher.store(held, int(index), run.result)
                run.result = run.sketch = None  # it may wait for the store for long, and only its bytes are needed
            else:
                self._fail(held, _told(run, held))

    def _fail(self, held: HeldJob, error: SafelightError) -> None:
        if self._take_back(held, "failed"):
            self.finisher.fail(held, error)

    def _forget(self, held: HeldJob, status: JobStatus | None) -> None:
        """The one way a job leaves our hands."""
        if self.held.get(held.id) is not held:
            return
        del self.held[held.id]
        self.viewers.forget(held)
        self._leave_room(held)
        self.intake.look()
        model = held.model
        self.metrics.runs_in_flight.labels(model).dec(len(held.runs))
        if status is None:
            return
        self.metrics.jobs_total.labels(model, status).inc()
        log.info("job.ended", job_id=held.id, fence=held.claim.fence, status=status, request_id=held.request_id)
        if status is JobStatus.SUCCEEDED:
            self.successful_job_count += 1
            seconds = held.queue_seconds + time.monotonic() - held.claimed_at
            self.metrics.job_duration_seconds.labels(model).observe(seconds)
            self._compare(held, seconds)
            for name, value in held.timings.model_dump(exclude={"queue_seconds"}).items():
                self.metrics.phase_seconds.labels(model, name.removesuffix("_seconds")).observe(value)

    def _compare(self, held: HeldJob, seconds: float) -> None:
        """Look back at what was expected of a job that took `seconds` from its submission to its end."""
        self.pacer.ended(held)
        error = self.metrics.estimate_error_ratio
        if (expected := held.job.expected_seconds) is not None and held.job.tries <= 1:
            error.labels(held.model, "finish").observe(abs(expected - seconds) / seconds)
        if held.half:
            at, left = held.half
            now = time.monotonic()
            error.labels(held.model, "eta").observe(abs(at + left - now) / (now - held.claimed_at))

    def _leave_room(self, held: HeldJob) -> None:
        if held.has_room:
            held.has_room = False
            if held.is_started:
                held.source = NOTHING  # its pictures: it may wait for the store for long
            self.keeper.leave(held.model)
            self.room.leave(held.images, held.claim.tenant)
            self.intake.look()

    def _leave(self) -> None:
        self.intake.close()
        self.viewers.close()
        self.sources.close()
        self.finisher.close(at_once=self._is_final)
        self.reaper.close()
        self.heart.close()
        self.keeper.close()
        self.engine.close()
        try:
            self.register_death()
        except (RedisError, OSError) as error:  # best effort: RQ forgets us when our key expires
            log.warning("redis.unavailable", error=type(error).__name__)


def _drained(queue: "SimpleQueue[Any]") -> list[Any]:
    found = []
    while True:
        try:
            found.append(queue.get_nowait())
        except Empty:
            return found


def _told(run: Run, held: HeldJob) -> SafelightError:
    """What the caller hears of a run that failed; the whole story goes to the log."""
    log.error("run.failed", job_id=held.id, run=run.id, exc_info=run.error)
    return run.error if isinstance(run.error, SafelightError) else UNKNOWN
