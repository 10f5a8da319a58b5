"""Finisher: threads that turn images into bytes in the object store, and a finished job into a commit."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import structlog
from redis.exceptions import RedisError

from app.core import failpoints
from app.core.errors import ContentRefused, GenerationFailed, SafelightError, StorageUnavailable
from app.core.job import JobFailure, JobStatus, Output, Role
from app.core.storage import Storage, digest, object_key
from worker.encode import EXTENSIONS, Picture, encode, grid
from worker.held import HeldJob
from worker.leases import Leases
from worker.safety import judged
from worker.spool import Kept, Spool

log = structlog.get_logger()
ENCODE_THREADS: Final = 4
STORE_THREADS: Final = 8
COMMIT_THREADS: Final = 4
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0  # seconds between tries while the store or Redis is away

NOT_ENCODED: Final = GenerationFailed(
    "The picture could not be written as it was asked for; the service's log says why."
)


class Finisher:
    """Stores and commits off the step loop. While the store or Redis is away the work waits; it is never given up."""

    def __init__(
        self,
        storage: Storage,
        spool: Spool,
        leases: Leases,
        *,
        on_made: Callable[[HeldJob], None],
        on_refused: Callable[[HeldJob, SafelightError], None],
        on_end: Callable[[HeldJob, JobStatus | None], None],
    ) -> None:
        self._storage = storage
        self._spool = spool  # what is bytes and not in the store yet
        self._on_made = on_made  # all pictures of the job are bytes
        self._on_refused = on_refused  # one of them must not be seen
        self._leases = leases
        self._on_end = on_end  # the job is out of our hands: its status, or None where it was no longer ours
        self._gave_up = threading.Event()
        self._is_redis_lost = False  # when we gave up it did not answer, and nobody waits for it any more
        self._encoders = ThreadPoolExecutor(ENCODE_THREADS, "encode")
        self._stores = ThreadPoolExecutor(STORE_THREADS, "store")
        self._commits = ThreadPoolExecutor(COMMIT_THREADS, "commit")

    def store(self, held: HeldJob, index: int, image: Picture) -> None:
        """Encode and store image `index`; the one that completes the job commits it."""
        self._encoders.submit(self._guarded, self._finish, held, index, image)

    def fail(self, held: HeldJob, error: SafelightError) -> None:
        """Commit the job as failed."""
        failure = JobFailure(code=error.code, message=error.message)
        self._commits.submit(self._guarded, self._commit, held, JobStatus.FAILED, {"error": failure.model_dump()})

    def release(self, held: HeldJob) -> None:
        """Hand the job back to the queue."""
        self._commits.submit(self._guarded, self._release, held)

    def pass_on(self, held: HeldJob, error: SafelightError) -> None:
        """Leave a job to workers of another version, or fail it with `error` if there are none."""
        self._commits.submit(self._guarded, self._pass_on, held, error)

    def discard(self, held: HeldJob) -> None:
        """Remove what this attempt stored of a job that is no longer ours."""
        self._stores.submit(self._guarded, self._discard, held)

    def close(self, *, at_once: bool) -> None:
        """Wait for what was begun; `at_once`: each commit and hand-back is tried once more, pictures are let go of.

        Of what is let go of the leases end, and other workers take it.
        """
        if at_once:
            self._gave_up.set()
        self._encoders.shutdown(wait=True, cancel_futures=at_once)
        self._stores.shutdown(wait=True, cancel_futures=at_once)
        self._commits.shutdown(wait=True)
        self._spool.close()

    def _guarded(self, work: Callable[..., None], held: HeldJob, *args: Any) -> None:
        try:
            work(held, *args)
        except Exception:
            # A bug of ours: the job is not lost, its lease ends and another worker takes it.
            log.exception("finisher.failed", job_id=held.id)
            self._on_end(held, None)

    def _finish(self, held: HeldJob, index: int, image: Picture) -> None:
        try:
            shown = self._encode(held, index, image)
            if held.job.params.grid and (pictures := held.gather(index, shown)):
                self._encode(held, len(pictures), grid(pictures), role="grid")
        except ContentRefused as error:
            self._on_refused(held, error)
        except Exception:
            log.exception("picture.not_encoded", job_id=held.id)
            self._on_refused(held, NOT_ENCODED)

    def _encode(self, held: HeldJob, index: int, image: Picture, *, role: Role = "image") -> Picture:
        """The picture as it is stored: the safety checker may have it blurred. Raises ContentRefused."""
        if held.is_dropped:
            return image
        start = time.monotonic()
        params = held.job.params
        image, safety = judged(held.checker, image)
        seed = params.seed_of(index if role == "image" else 0)
        body = encode(image, params, seed)
        output = Output(
            role=role,
            key=object_key(held.id, held.claim.fence, index, EXTENSIONS[params.output_format]),
            seed=seed,
            width=image.shape[1],
            height=image.shape[0],
            content_type=f"image/{params.output_format}",
            bytes=len(body),
            sha256=digest(body),
            safety=safety,
        )
        kept = self._spool.keep(body)
        with held.lock:
            held.made += 1
            is_last = held.is_made
        self._stores.submit(self._guarded, self._store, held, index, output, kept, start)
        if is_last:
            self._on_made(held)
        return image

    def _store(self, held: HeldJob, index: int, output: Output, kept: Kept, start: float) -> None:
        """`start`: when the image came, in monotonic seconds."""
        try:
            is_stored = self._put(held, output, kept)
        finally:
            self._spool.drop(kept)
        if not is_stored:
            return
        with held.lock:
            held.outputs[index] = output
            held.store_seconds = max(held.store_seconds, time.monotonic() - start)
            is_last = held.is_stored
        if held.is_dropped:  # while we were storing: whoever dropped it did not see this one
            self._discard(held)
        elif is_last:
            self._commits.submit(self._guarded, self._commit, held, JobStatus.SUCCEEDED, self._result(held))

    def _put(self, held: HeldJob, output: Output, kept: Kept) -> bool:
        """Put until it is there; False where the job was dropped meanwhile."""
        wait = FIRST_WAIT
        while not (held.is_dropped or self._gave_up.is_set()):
            try:
                failpoints.reach("before_upload", held.id)
                self._storage.put(output.key, kept.read(), output.content_type)
                failpoints.reach("after_upload", held.id)
            except StorageUnavailable as error:
                log.warning("store.unavailable", job_id=held.id, error=error.message, retry_in=wait)
                self._gave_up.wait(wait)
                wait = min(wait * 2, LONGEST_WAIT)
            else:
                return True
        return False

    def _result(self, held: HeldJob) -> dict[str, Any]:
        outputs = [held.outputs[i].model_dump() for i in range(held.parts)]
        return {"outputs": outputs, "timings": held.timings.model_dump(), "progress": held.progress.model_dump()}

    def _commit(self, held: HeldJob, status: JobStatus, fields: dict[str, Any]) -> None:
        fields = {**fields, "denoiser_seconds": round(held.denoiser_seconds, 4)}  # for the tenant's usage
        committed = self._persist(held, lambda: self._leases.commit(held.claim, status, fields))
        if committed and status is not JobStatus.SUCCEEDED:
            self._delete(held)
        elif not committed:
            self._discard(held)
        self._on_end(held, status if committed else None)

    def _release(self, held: HeldJob) -> None:
        self._persist(held, lambda: self._leases.release(held.claim))
        self._discard(held)
        self._on_end(held, None)

    def _pass_on(self, held: HeldJob, error: SafelightError) -> None:
        if self._persist(held, lambda: self._leases.pass_on(held.claim)):
            self._on_end(held, None)
        else:
            self.fail(held, error)

    def _persist(self, held: HeldJob, write: Callable[[], bool]) -> bool:
        """Write until Redis answers: every write is fenced, so one whose reply was lost may be repeated."""
        wait = FIRST_WAIT
        while not self._is_redis_lost:
            try:
                return write()
            except (RedisError, OSError) as error:
                log.warning("redis.unavailable", job_id=held.id, error=type(error).__name__, retry_in=wait)
                self._is_redis_lost = self._gave_up.wait(wait)
                wait = min(wait * 2, 2.0)
        return False

    def _discard(self, held: HeldJob) -> None:
        """Remove what was stored for a job that is not ours, having asked whether that is so."""
        failpoints.reach("before_discard", held.id)
        try:
            is_committed = self._leases.is_committed(held.claim)
        except (RedisError, OSError) as error:
            log.warning("discard.failed", job_id=held.id, error=type(error).__name__)
        else:
            if not is_committed:
                self._delete(held)

    def _delete(self, held: HeldJob) -> None:
        # Best effort: what is left over goes with the job's whole folder when its retention ends.
        try:
            for output in list(held.outputs.values()):
                self._storage.delete(output.key)
        except StorageUnavailable as error:
            log.warning("discard.failed", job_id=held.id, error=error.message)
