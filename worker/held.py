"""HeldJob: a job in this worker's hands, from its claim to its commit."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from app.core.job import Job, Output, Progress, Timings
from worker.engine.run import Run
from worker.engine.target import Phase
from worker.leases import Beat, Claim
from worker.pipelines.pictures import Picture, Source
from worker.safety import Checker

LOADING, STORING = "loading", "storing"
BEGUN, ENDED, MADE = "begun", "ended", "made"  # in a walk, besides "phase:step"


@dataclass(slots=True, eq=False)
class HeldJob:
    """The loop thread owns it; threads that store, commit and beat only read it, or set what is theirs."""

    claim: Claim
    runs: list[Run] = field(default_factory=list)
    claimed_at: float = field(default_factory=time.monotonic)
    outputs: dict[int, Output] = field(default_factory=dict)  # by image, as they are stored
    source: Source | None = None  # what it starts from; None while that is read
    pictures: dict[int, Picture] = field(default_factory=dict)  # of a grid, until the last is there
    is_started: bool = False  # its model is warm, and its runs are made
    checker: Checker | None = None  # its model's, that looks at each picture
    made: int = 0  # images that are bytes
    has_room: bool = True  # it takes up room in the engine
    marked: str = ""  # the walk that Redis knows
    is_dropped: bool = False  # cancelled, taken away or handed back: nothing of it counts any more
    is_overdue: bool = False  # past its deadline
    is_watched: bool = False  # somebody wants previews of it
    store_seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    phase_seconds: dict[str, dict[Phase, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )
    _last_seen: dict[str, tuple[Phase, float]] = field(default_factory=dict)
    half: tuple[float, float] | None = None  # when half of its steps were done (monotonic), and its ETA then
    _last_beat: str = ""

    @property
    def id(self) -> str:
        return self.claim.id

    @property
    def job(self) -> Job:
        assert self.claim.job is not None, "a job whose record cannot be read has no runs"
        return self.claim.job

    @property
    def images(self) -> int:
        return self.claim.job.params.num_images if self.claim.job else 1

    @property
    def model(self) -> str:
        return self.claim.job.params.model if self.claim.job else "unknown"

    @property
    def request_id(self) -> str | None:
        return self.claim.job.request_id if self.claim.job else None

    @property
    def queue_seconds(self) -> float:
        """How long it waited, by Redis' clock."""
        return max((self.job.started_at or self.job.created_at) - self.job.created_at, 0.0)

    @property
    def must_end(self) -> float:
        """When its deadline is, in monotonic seconds; from the distance on Redis' clock, so ours may be wrong."""
        job = self.claim.job
        if job is None or job.deadline_at is None or job.started_at is None:
            return inf
        return self.claimed_at + job.deadline_at - job.started_at

    @property
    def is_stored(self) -> bool:
        return len(self.outputs) == self.parts

    @property
    def parts(self) -> int:
        """How many outputs it has in the end: its images, and their grid."""
        return len(self.runs) + bool(self.claim.job and self.claim.job.params.grid)

    def gather(self, index: int, picture: Picture) -> list[Picture]:
        """Keep a picture for the grid; all of them, in order, for the one that was still missing, else none."""
        with self.lock:
            self.pictures[index] = picture
            if len(self.pictures) < len(self.runs):
                return []
            found, self.pictures = self.pictures, {}
        return [found[i] for i in sorted(found)]

    @property
    def is_made(self) -> bool:
        """Whether all that is left to do is to store bytes: whatever ends the worker now, it is not this job."""
        return bool(self.runs) and self.made == self.parts

    @property
    def is_suspect(self) -> bool:
        """Whether it has been in a worker that died: then Redis hears where it is before it goes on."""
        return bool(self.claim.job and self.claim.job.deaths)

    @property
    def walk(self) -> str:
        """Where each of its images is: the same for every attempt at the same place, whatever the company."""
        if self.is_made:
            return MADE
        return ",".join(ENDED if run.is_finished else f"{run.phase}:{run.step}" for run in self.runs) or BEGUN

    @property
    def denoiser_seconds(self) -> float:
        return sum(run.seconds for run in self.runs)

    @property
    def progress(self) -> Progress:
        """Steps done of all images together; the phase is that of the image furthest behind."""
        steps, done = sum(r.steps for r in self.runs), sum(min(r.step, r.steps) for r in self.runs)
        behind = next((r for r in self.runs if not r.is_finished), None)
        left = STORING if self.runs else LOADING  # without runs it waits for its model
        return Progress(phase=str(behind.phase) if behind else left, step=done, steps=steps)

    def observe(self, now: float) -> None:
        """Charge the time since the last look to the phase each image is in. `now` is monotonic seconds."""
        for run in self.runs:
            phase, since = self._last_seen.get(run.id, (run.phase, now))
            self.phase_seconds[run.id][phase] += now - since
            self._last_seen[run.id] = (run.phase, now) if not run.is_finished else (Phase.QUEUED, now)

    @property
    def timings(self) -> Timings:
        """Seconds of each phase, of the image that took longest in it: images of a job are made side by side."""

        def longest(phase: Phase) -> float:
            return round(max((seconds[phase] for seconds in self.phase_seconds.values()), default=0.0), 4)

        return Timings(
            queue_seconds=round(self.queue_seconds, 4),
            encode_seconds=longest(Phase.ENCODING),
            denoise_seconds=longest(Phase.DENOISING),
            decode_seconds=longest(Phase.DECODING),
            store_seconds=round(self.store_seconds, 4),
        )

    def beat(self, *, is_due: bool, eta: Callable[["HeldJob"], float | None] = lambda _: None) -> Beat | None:
        """What to tell Redis: the progress if it moved, the bare lease if that is due, else nothing."""
        progress = self.progress
        known = progress.model_dump_json()
        if known == self._last_beat:
            return Beat(self.claim.id, self.claim.fence) if is_due else None
        self._last_beat = known
        left = eta(self)
        if left is None:
            return Beat(self.claim.id, self.claim.fence, known)
        if self.half is None and 2 * progress.step >= progress.steps:
            self.half = (time.monotonic(), left)
        told = progress.model_copy(update={"eta_seconds": round(left, 2)})
        return Beat(self.claim.id, self.claim.fence, told.model_dump_json())
