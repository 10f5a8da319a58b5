"""Sources: threads that read what jobs start from out of the object store, so that the step loop never does."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Final

import structlog
from PIL import Image

from app.core.errors import GenerationFailed, NotFound, SafelightError, StorageUnavailable
from app.core.storage import Storage
from worker.held import HeldJob
from worker.pipelines.pictures import NOTHING, Source, prepare

log = structlog.get_logger()
THREADS: Final = 4
FIRST_WAIT, LONGEST_WAIT = 0.25, 5.0  # seconds between tries while the store is away
GONE: Final = GenerationFailed("A picture that the job starts from is no longer there; upload it again.")
UNREADABLE: Final = GenerationFailed("A picture that the job starts from cannot be read; upload it again.")


class Sources:
    """`fetch` sets `held.source`, at once where there is nothing to read; else `ready` gets the job, or why not."""

    def __init__(self, storage: Storage, bell: threading.Event) -> None:
        self.ready: SimpleQueue[tuple[HeldJob, SafelightError | None]] = SimpleQueue()
        self._storage = storage
        self._bell = bell  # wakes the step loop
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(THREADS, "source")

    def fetch(self, held: HeldJob) -> None:
        if held.job.uploads:
            self._pool.submit(self._fetch, held)
        else:
            held.source = NOTHING

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, held: HeldJob) -> None:
        error: SafelightError | None = None
        try:
            held.source = self._read(held)
        except NotFound:
            error = GONE
        except Exception:
            log.exception("source.failed", job_id=held.id)
            error = UNREADABLE
        if held.source or error:
            self.ready.put((held, error))
            self._bell.set()

    def _read(self, held: HeldJob) -> Source | None:
        """None where the job was dropped meanwhile."""
        pictures = {}
        for upload, key in held.job.uploads.items():
            body = self._get(held, key)
            if body is None:
                return None
            with Image.open(io.BytesIO(body), formats=("PNG",)) as picture:  # our own bytes, see core/images.py
                picture.load()
            pictures[upload] = picture
        return prepare(held.job.params, pictures)

    def _get(self, held: HeldJob, key: str) -> bytes | None:
        wait = FIRST_WAIT
        while not (held.is_dropped or self._closed.is_set()):
            try:
                return self._storage.get(key)
            except StorageUnavailable as error:
                log.warning("store.unavailable", job_id=held.id, error=error.message, retry_in=wait)
                self._closed.wait(wait)
                wait = min(wait * 2, LONGEST_WAIT)
        return None
