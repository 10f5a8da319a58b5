"""Spool: finished pictures that wait for the object store, in memory up to a bound and in files beyond it."""

import errno
import fcntl
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from app.core.errors import ConfigError
from app.core.metrics import WorkerMetrics

log = structlog.get_logger()
MOST: Final = 1024  # pictures that wait before no new jobs are taken, however small they are
LOCK: Final = "lock"


@dataclass(slots=True, eq=False)
class Kept:
    """The bytes of a picture; `file` says where, if not in memory."""

    size: int
    body: bytes | None
    file: Path | None = None

    def read(self) -> bytes:
        if self.body is not None:
            return self.body
        assert self.file is not None, "it was dropped"
        return self.file.read_bytes()


class Spool:
    """`keep` and `drop` from any thread. It never refuses: `has_room` says when to take no new jobs.

    What the runs in flight still bring then is kept beyond the bound of the disk, or in memory where that is full. The
    files are no backup: a worker that ends lets go of its leases, and of its files when the next one starts.
    """

    def __init__(self, folder: Path, *, memory_bytes: int, disk_bytes: int, metrics: WorkerMetrics) -> None:
        """`folder` may be shared with other workers; files of those that died are removed. Raises ConfigError."""
        self._most = {"memory": memory_bytes, "disk": disk_bytes}
        self._used = {"memory": 0, "disk": 0}
        self._count = 0
        self._numbers = 0
        self._lock = threading.Lock()
        self._metrics = metrics
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise ConfigError(
                f"SAFELIGHT_DATA: cannot write {folder}: {error.strerror}; name a writable folder"
            ) from error
        _sweep(folder)
        self._folder, self._held = _own(folder)  # locked until this process ends, however it does

    @property
    def has_room(self) -> bool:
        return self._count < MOST and sum(self._used.values()) < sum(self._most.values())

    def keep(self, body: bytes) -> Kept:
        kept = Kept(len(body), body)
        with self._lock:
            self._count += 1
            is_small = self._used["memory"] + kept.size <= self._most["memory"]
            self._account(kept, 1, "memory" if is_small else "disk")
            self._numbers += 1
            file = self._folder / str(self._numbers)
        if not is_small:
            self._spill(kept, file)
        return kept

    def drop(self, kept: Kept) -> None:
        """Forget a picture; one that was dropped before is what was wanted."""
        with self._lock:
            if kept.body is None and kept.file is None:
                return
            self._count -= 1
            self._account(kept, -1, "disk" if kept.file else "memory")
            file, kept.body, kept.file = kept.file, None, None
        if file:
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove what is left; nobody may use it any more."""
        os.close(self._held)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _spill(self, kept: Kept, file: Path) -> None:
        try:
            file.write_bytes(kept.body or b"")
        except OSError as error:
            log.warning("spool.full", error=error.strerror, remedy="make room under SAFELIGHT_DATA")
            file.unlink(missing_ok=True)
            with self._lock:
                self._account(kept, -1, "disk")
                self._account(kept, 1, "memory")
        else:
            kept.file, kept.body = file, None

    def _account(self, kept: Kept, sign: int, place: str) -> None:
        self._used[place] += sign * kept.size
        self._metrics.unstored_bytes.labels(place).set(self._used[place])


def _sweep(folder: Path) -> None:
    """Remove what workers left behind that live no more: their locks are free."""
    for left in folder.iterdir():
        try:
            lock = _locked(left)
        except OSError:  # its worker lives, or another is sweeping it
            continue
        shutil.rmtree(left, ignore_errors=True)
        os.close(lock)


def _own(folder: Path) -> tuple[Path, int]:
    while True:
        made = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=folder))
        try:
            return made, _locked(made)
        except OSError:  # another worker swept it before we had locked it
            continue


def _locked(folder: Path) -> int:
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock
