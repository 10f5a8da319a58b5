"""Intake: the threads that ask Redis for work and hear of cancellations, so that the step loop never does."""

import threading
from collections import Counter
from collections.abc import Callable, Collection
from queue import SimpleQueue
from typing import Final

import structlog
from redis import Redis
from redis.exceptions import RedisError

from app.core import redis_keys as keys
from worker.leases import Claim, Leases, Turn
from worker.turns import Turns

log = structlog.get_logger()
PATIENT_SECONDS: Final = 0.25  # between looks at jobs that are left to another worker for a while
LOOK_SECONDS: Final = 1.0  # between looks when no wake-up came: pub/sub may lose one
AWAY_SECONDS: Final = 0.5  # between tries while Redis is away


class Room:
    """How many images this worker has in hand, and whether there is room for more.

    The last quarter is for tenants who hold less than a quarter: who comes while another's flood is being made finds a
    place, and the batcher does the rest.
    """

    def __init__(self, size: int, has_space: Callable[[], bool] = lambda: True) -> None:
        """`has_space`: whether more finished pictures may wait for the store."""
        self._has_space = has_space
        self._size, self._reserve, self._alone = size, size // 4, False
        self._held: Counter[str] = Counter()  # images by tenant
        self._lock = threading.Lock()

    @property
    def is_empty(self) -> bool:
        return self.images == 0

    @property
    def has_room(self) -> bool:
        return self.images < self._size and not self._alone and self._has_space()

    @property
    def images(self) -> int:
        with self._lock:
            return self._held.total()

    @property
    def is_full(self) -> bool:
        """Whether jobs may wait for room."""
        return self.images >= self.common

    @property
    def common(self) -> int:
        """Images that one tenant may have in hand while no other has any."""
        return self._size - self._reserve

    @property
    def passing(self) -> list[str]:
        """The tenants for whom there is no room now."""
        with self._lock:
            if self._held.total() < self.common:
                return []
            return [tenant for tenant, images in self._held.items() if images >= max(self._reserve, 1)]

    def enter(self, images: int, tenant: str, *, is_alone: bool) -> None:
        with self._lock:
            self._held[tenant] += images
            self._alone = self._alone or is_alone

    def leave(self, images: int, tenant: str) -> None:
        with self._lock:
            self._held[tenant] -= images
            self._held += Counter()  # forgets who holds nothing
            self._alone = self._alone and self._held.total() > 0


class Intake:
    """Claims jobs while there is room and puts them into `claims`; `is_open` False: takes nothing new."""

    def __init__(
        self,
        leases: Leases,
        listener: Redis,
        turns: Turns,
        room: Room,
        *,
        queues: Collection[str],
        bell: threading.Event,
    ) -> None:
        """`queues`: all that it may ever ask; `turns` says which now."""
        self.claims: SimpleQueue[Claim] = SimpleQueue()
        self.canceled: SimpleQueue[str] = SimpleQueue()
        self.is_open = True
        self._leases = leases
        self._listener = listener
        self._queues = frozenset(queues)
        self._turns = turns
        self._room = room
        self._bell = bell  # wakes the step loop
        self._last = ""  # the queue that gave a job last
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._claimer = threading.Thread(target=self._claim_forever, name="claim", daemon=True)
        self._hearer = threading.Thread(target=self._listen_forever, name="listen", daemon=True)

    def start(self) -> None:
        self._claimer.start()
        self._hearer.start()

    def look(self) -> None:
        """There is room again: look at once."""
        self._wake.set()

    def stop_claiming(self) -> None:
        """Take nothing new; whatever a claim under way still brings is in `claims` when this returns."""
        self.is_open = False
        self._wake.set()
        self._claimer.join()

    def close(self) -> None:
        self.stop_claiming()
        self._closed.set()

    def _claim_forever(self) -> None:
        while self.is_open:
            self._wake.clear()
            try:
                if not self._claim_some():
                    self._wake.wait(PATIENT_SECONDS if self._turns.has_patience else LOOK_SECONDS)
            except (RedisError, OSError) as error:
                log.warning("redis.unavailable", error=type(error).__name__)
                self._wake.wait(AWAY_SECONDS)

    def _claim_some(self) -> bool:
        """One job of each queue that has one, in turn, so that no model starves another; whether there was any.

        Where places come free one by one, each round begins after the queue that gave the last job.
        """
        found, queues = False, self._turns.next()
        first = queues.index(self._last) + 1 if self._last in queues else 0
        for queue in (*queues[first:], *queues[:first]):
            if not (self.is_open and self._room.has_room):
                return False
            turn = self._leases.claim(queue, is_idle=self._room.is_empty, passing=self._room.passing)
            if isinstance(turn, Claim):
                images = turn.job.params.num_images if turn.job else 1
                self._last = queue
                self._room.enter(images, turn.tenant, is_alone=turn.is_alone)
                self.claims.put(turn)
                self._bell.set()
                found = True
                if turn.job is None:  # it goes on to others: be slow to meet it again
                    self._closed.wait(LOOK_SECONDS)
            elif turn is Turn.DRAIN:
                return False
            else:
                found = found or turn is Turn.AGAIN
        return found

    def _listen_forever(self) -> None:
        while not self._closed.is_set():
            try:
                self._listen()
            except (RedisError, OSError) as error:
                log.warning("redis.unavailable", error=type(error).__name__)
                self._closed.wait(AWAY_SECONDS)

    def _listen(self) -> None:
        handlers: dict[str, Callable[[str], None]] = {keys.WAKE: self._on_wake, keys.CONTROL: self._on_control}
        with self._listener.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
            pubsub.subscribe(*handlers)
            self._wake.set()  # what was said while we did not listen
            while not self._closed.is_set():
                if message := pubsub.get_message(timeout=1.0):
                    handlers[message["channel"]](message["data"])

    def _on_wake(self, queue: str) -> None:
        if queue in self._queues:
            self._wake.set()

    def _on_control(self, job_id: str) -> None:
        self.canceled.put(job_id)
        self._bell.set()
