"""Turns: which queues a worker asks for a job, and in which order; a job is best made where its model is warm."""

import time
from collections.abc import Callable, Collection
from typing import Final, Protocol

from redis import Redis

from app.core import processes
from app.core import redis_keys as keys

PATIENCE_SECONDS: Final = 2.0  # for which a job is left to a worker that has its model warm
NEIGHBOURS_SECONDS: Final = 1.0  # for which it is remembered what other workers have warm


class Models(Protocol):
    """What a Keeper says of its models, by name."""

    @property
    def warm(self) -> list[str]: ...
    @property
    def cold(self) -> list[str]: ...
    @property
    def is_loading(self) -> bool: ...


class Turns:
    """Warm models' queues first; then those of cold ones with jobs that no worker is about to take.

    That is at once where no live worker has the model warm, and after PATIENCE_SECONDS where one has and does not take
    them. `redis` decodes replies; one thread asks.
    """

    def __init__(self, redis: Redis, worker: str, models: Models, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._worker = worker
        self._models = models
        self._clock = clock
        self._since: dict[str, float] = {}  # cold model -> when jobs of it were first seen to wait
        self._elsewhere: set[str] = set()
        self._asked_at = float("-inf")

    @property
    def has_patience(self) -> bool:
        """Whether jobs wait that will be ours unless another worker takes them."""
        return bool(self._since)

    def next(self) -> list[str]:
        """The queues to ask now."""
        now = self._clock()
        cold = self._models.cold
        waiting = self._waiting(cold) if cold else set()
        self._since = {name: self._since.get(name, now) for name in cold if name in waiting}
        ripe = [name for name, since in self._since.items() if now - since >= self._patience(name, now)]
        return [keys.queue_name(name) for name in (*self._models.warm, *ripe)]

    def _patience(self, name: str, now: float) -> float:
        if self._models.is_loading:
            return PATIENCE_SECONDS  # another worker may have its hands free
        return PATIENCE_SECONDS if name in self._neighbours(now) else 0.0

    def _waiting(self, names: Collection[str]) -> set[str]:
        """Those of the models that seem to have jobs."""
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            queue = keys.queue_name(name)
            pipeline.exists(keys.SHARES + queue, keys.ALONE + queue)
        return {name for name, found in zip(names, pipeline.execute(), strict=True) if found}

    def _neighbours(self, now: float) -> set[str]:
        """The models that other live workers have warm."""
        if now - self._asked_at >= NEIGHBOURS_SECONDS:
            others = [p for p in processes.live_now(self._redis) if p.kind == "worker" and p.name != self._worker]
            self._elsewhere, self._asked_at = {name for process in others for name in process.warm}, now
        return self._elsewhere
