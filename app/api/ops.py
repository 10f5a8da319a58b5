"""For operators and their tools: is it alive, is it ready, what do its metrics say."""

import time
from collections import defaultdict

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.api.auth import needs
from app.api.deps import Deps, Services
from app.api.problems import responses
from app.api.schemas import Health, TargetGroup
from app.core import processes
from app.core.api_keys import Scope
from app.core.errors import QueueUnavailable, Unavailable
from app.core.redis_keys import queue_name

public = APIRouter(tags=["operation"])
router = APIRouter(tags=["operation"])


@public.get("/livez")
async def is_alive() -> Health:
    """Whether this process answers; asks nobody else."""
    return Health(status="ok")


@public.get("/readyz", responses=responses(503))
async def is_ready(deps: Deps) -> Health:
    """Whether a job submitted now can be done: Redis is reachable, a worker lives, the API is not about to stop."""
    if deps.is_draining:
        raise Unavailable("not ready: the API is stopping")
    await deps.queue.ping()
    if not any(process.kind == "worker" for process in await processes.live(deps.redis)):
        raise Unavailable("not ready: no worker lives")
    return Health(status="ready")


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
@needs(Scope.READ)
async def get_metrics(deps: Deps) -> Response:
    """The API's metrics and the queues', for Prometheus."""
    await _read_queues(deps)
    return Response(generate_latest(deps.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _read_queues(deps: Services) -> None:
    depth, age = deps.metrics.queue_depth, deps.metrics.queue_oldest_job_age_seconds
    for queue in map(queue_name, deps.catalog.models):
        try:
            count, since = await deps.queue.depth(queue)
        except QueueUnavailable:
            # Absent, not stale: alerts watch for it.
            depth.clear()
            age.clear()
            return
        depth.labels(queue).set(count)
        age.labels(queue).set(max(0.0, time.time() - since) if since else 0.0)


@router.get("/metrics/targets")
@needs(Scope.READ)
async def get_targets(deps: Deps) -> list[TargetGroup]:
    """Where workers and senders serve their metrics, for Prometheus' http_sd."""
    targets: defaultdict[str, list[str]] = defaultdict(list)
    for process in await processes.live(deps.redis):
        targets[process.kind].append(process.metrics)
    return [TargetGroup(targets=sorted(found), labels={"process": kind}) for kind, found in sorted(targets.items())]
