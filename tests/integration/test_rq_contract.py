"""What we take from RQ 3.0 and what its own tools read of us: a new RQ that changes either fails here."""

import inspect

import pytest
import redis as redis_py
from rq import Queue
from rq.job import Job
from rq.registry import CanceledJobRegistry, FinishedJobRegistry, StartedJobRegistry, clean_registries
from rq.serializers import JSONSerializer
from rq.timeouts import BaseDeathPenalty
from rq.worker.base import BaseWorker

from app.core.job import JobStatus
from tests.integration.test_leases import QUEUE, Callers, Leases


@pytest.fixture
def rq_redis(redis_url):
    client = redis_py.Redis.from_url(redis_url)
    yield client
    client.close()


@pytest.fixture
def leases(redis_url):
    from app.core.connections import connect

    client = connect(redis_url)
    yield Leases(client, "worker-1", lease_ms=60_000, retention_ms=60_000)
    client.close()


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("register_birth", ["self"]),
        ("register_death", ["self"]),
        ("set_state", ["self", "state", "pipeline"]),
        ("heartbeat", ["self", "timeout", "pipeline"]),
        ("request_stop", ["self", "signum", "frame"]),
    ],
)
def test_the_methods_we_use_or_replace_have_their_signatures(method, arguments):
    assert list(inspect.signature(getattr(BaseWorker, method)).parameters) == arguments


def test_the_death_penalty_can_be_switched_off():
    assert {"setup_death_penalty", "cancel_death_penalty"} <= set(dir(BaseDeathPenalty))


def test_rq_reads_a_job_of_ours_at_every_stage(redis_url, rq_redis, leases):
    callers = Callers(redis_url)
    job_id = callers.submit()
    queue = Queue(QUEUE, connection=rq_redis, serializer=JSONSerializer)

    def seen():
        return Job.fetch(job_id, connection=rq_redis, serializer=JSONSerializer).get_status().value

    assert (queue.get_job_ids(), seen()) == ([job_id], "queued")
    claim = leases.claim(QUEUE, is_idle=False)
    started = StartedJobRegistry(queue=queue)
    assert (started.get_job_count(cleanup=False), seen()) == (1, "started")
    leases.commit(claim, JobStatus.SUCCEEDED, {"outputs": []})
    assert (started.get_job_count(cleanup=False), seen()) == (0, "finished")
    assert FinishedJobRegistry(queue=queue).get_job_count(cleanup=False) == 1


def test_a_cancelled_job_is_among_rqs_cancelled(redis_url, rq_redis):
    callers = Callers(redis_url)
    callers.cancel(callers.submit())
    queue = Queue(QUEUE, connection=rq_redis, serializer=JSONSerializer)
    assert CanceledJobRegistry(queue=queue).get_job_count(cleanup=False) == 1


def test_rqs_clean_up_leaves_a_running_job_alone(redis_url, rq_redis, leases):
    callers = Callers(redis_url)
    job_id = callers.submit()
    claim = leases.claim(QUEUE, is_idle=False)
    clean_registries(Queue(QUEUE, connection=rq_redis, serializer=JSONSerializer))
    assert callers.get(job_id).status is JobStatus.PROCESSING
    assert leases.commit(claim, JobStatus.SUCCEEDED, {"outputs": []})
