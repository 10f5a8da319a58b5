"""Heart: the thread that keeps the leases of what this worker holds, writes its progress, and says that it lives."""

import threading
import time
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Final

import structlog
from redis.exceptions import RedisError

from worker.held import MADE, HeldJob
from worker.leases import Beat, Leases

log = structlog.get_logger()
TICK_SECONDS: Final = 0.25  # how often progress is written, at most
FORWARDS: Final = 10  # a step loop that ended none in this many of its longest forwards counts as hung
LONGEST: Final = 0.25  # of a lease: no forward counts as longer, or once frozen, a process would be waited for too long


class Pulse:
    """When the step loop last moved. A hung device call stops the beats, and another worker takes the jobs."""

    def __init__(self, lease_seconds: float, longest: float) -> None:
        """`longest`: seconds of the longest forward seen in calibration."""
        self._lease_seconds = lease_seconds
        self._longest = longest
        self._last = time.monotonic()

    def moved(self) -> None:
        """A forward ended."""
        now = time.monotonic()
        self._longest = max(self._longest, min(now - self._last, LONGEST * self._lease_seconds))
        self._last = now

    def expect(self, seconds: float) -> None:
        """A forward may take as long as one that was measured."""
        self._longest = max(self._longest, seconds)

    def rested(self) -> None:
        """The loop came round with nothing to do."""
        self._last = time.monotonic()

    @property
    def is_beating(self) -> bool:
        return time.monotonic() - self._last < max(self._lease_seconds, FORWARDS * self._longest)


class Heart:
    """Beats for `held()` every lease/5 seconds, and whenever progress moved; lost jobs go into `lost`."""

    def __init__(
        self,
        leases: Leases,
        held: Callable[[], list[HeldJob]],
        pulse: Pulse,
        announce: Callable[[], None],
        *,
        lease_seconds: float,
        bell: threading.Event,
        on_hung: Callable[[], None],
        eta: Callable[[HeldJob], float | None] = lambda _: None,
    ) -> None:
        """`on_hung` is called once the step loop has hung for a lease longer than the beats went on.

        `eta` says how many seconds are left of a job.
        """
        self._eta = eta
        self.lost: SimpleQueue[HeldJob] = SimpleQueue()
        self._leases = leases
        self._held = held
        self._pulse = pulse
        self._announce = announce
        self._interval = lease_seconds / 5
        self._patience = lease_seconds / TICK_SECONDS  # ticks
        self._hung_ticks = 0
        self._on_hung = on_hung
        self._bell = bell
        self._closed = threading.Event()
        self._due = 0.0
        self._thread = threading.Thread(target=self._beat_forever, name="beat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _beat_forever(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            try:
                self._beat()
            except (RedisError, OSError) as error:
                log.warning("redis.unavailable", error=type(error).__name__)

    def _beat(self) -> None:
        now = time.monotonic()
        is_due = now >= self._due
        self._look(is_beating := self._pulse.is_beating)
        if is_beating:
            held = {job.id: job for job in self._held() if not job.is_dropped}
            beats = [beat for job in held.values() if (beat := job.beat(is_due=is_due, eta=self._eta))]
            if beats:
                self._hear(held, beats)
            self._acquit(held.values())
        if is_due:
            self._announce()
            self._due = now + self._interval

    def _acquit(self, held: Iterable[HeldJob]) -> None:
        """Say which jobs only wait for the store: the worker's death would not be their doing."""
        made = [job for job in held if job.is_made and job.marked != MADE]
        if made:
            self._leases.mark([(job.claim, MADE) for job in made])
            for job in made:
                job.marked = MADE

    def _hear(self, held: dict[str, HeldJob], beats: list[Beat]) -> None:
        heard = self._leases.beat(beats)
        for beat in beats:
            held[beat.id].is_watched = beat.id in heard.watched
        for job_id in heard.lost:
            self.lost.put(held[job_id])
            self._bell.set()

    def _look(self, is_beating: bool) -> None:
        # Counted, not timed: a process that was frozen finds much time gone and has lived through none of it.
        self._hung_ticks = 0 if is_beating else self._hung_ticks + 1
        if self._hung_ticks > self._patience:
            self._on_hung()
