"""Viewers: those who watch a job get small pictures of its images; drawn off the step loop, and none for nobody."""

import base64
import io
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import structlog
from PIL import Image
from redis.exceptions import RedisError

from worker.engine.run import Run
from worker.held import HeldJob
from worker.leases import Leases

log = structlog.get_logger()
INTERVAL_SECONDS: Final = 0.25  # between two previews of an image, at the least
WAITING: Final = 8  # previews not drawn yet; with more than that whoever watches sees every second step, or fewer


class Viewers:
    """One thread draws and publishes. A preview that cannot be drawn or sent is left out: the next one is near."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._shown: dict[str, tuple[int, float]] = {}  # by run: the step last shown, and when that was
        self._drawing: set[str] = set()
        self._thread = ThreadPoolExecutor(1, "previews")

    def show(self, held: HeldJob) -> None:
        """Called by the step loop between two steps, for a job that is watched."""
        now = time.monotonic()
        for run in held.runs:
            if run.sketch is None or run.is_finished or not self._is_due(run, now):
                continue
            if draw := run.sketch():
                self._shown[run.id] = run.step, now
                self._drawing.add(run.id)
                self._thread.submit(self._publish, held, run.id, run.step, run.steps, draw)

    def forget(self, held: HeldJob) -> None:
        """The job has ended."""
        for run in held.runs:
            self._shown.pop(run.id, None)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _is_due(self, run: Run, now: float) -> bool:
        step, shown = self._shown.get(run.id, (0, 0.0))
        is_free = run.id not in self._drawing and len(self._drawing) < WAITING
        return is_free and run.step > step and now - shown >= INTERVAL_SECONDS

    def _publish(self, held: HeldJob, run_id: str, step: int, steps: int, draw: Callable[[], Any]) -> None:
        try:
            if held.is_watched and not held.is_dropped:
                preview = {
                    "index": int(run_id.rpartition("/")[2]),
                    "step": step,
                    "steps": steps,
                    "image": _data_url(draw()),
                }
                self._leases.show(held.claim, json.dumps(preview), kept=len(held.runs))
        except (RedisError, OSError) as error:
            log.warning("redis.unavailable", error=type(error).__name__)
        except Exception:
            log.exception("preview.failed", job_id=held.id)
            held.is_watched = False  # until the next beat: a log shall not fill with it
        finally:
            self._drawing.discard(run_id)


def _data_url(picture: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=80, method=0)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
