"""A safety checker in a running service: what its policies do to jobs."""

import numpy as np
import pytest

from tests.checkers import write_classifier
from tests.house import house
from tests.servers import redis_server
from worker.pipelines.tiny_model import write_tiny

MODEL = """
[models.{policy}]
source = "tiny"
schedulers = ["ddim"]
[models.{policy}.defaults]
width = 64
height = 64
num_inference_steps = 4
scheduler = "ddim"
[models.{policy}.limits]
max_side = 64
[models.{policy}.safety]
source = "checker"
labels = ["red", "calm"]
threshold = 0.4
policy = "{policy}"
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """Three models of the same weights, whose checker flags everything."""
    folder = tmp_path_factory.mktemp("house")
    write_tiny(folder / "tiny")
    (folder / "checker").mkdir()
    write_classifier(folder / "checker")
    (folder / "models.toml").write_text("".join(MODEL.format(policy=p) for p in ("flag", "blur", "refuse")))
    models = {"SAFELIGHT_MODELS": str(folder / "models.toml")}
    with redis_server(tmp_path_factory.mktemp("redis")) as server, house(folder, server.url, **models) as built:
        built.start("api")
        built.start("worker")
        built.wait_until(built.is_ready, 150)
        yield built


def test_policies_flag_blur_and_refuse_whole_jobs(running):
    jobs = {policy: running.submit(model=policy, seed=1, num_images=3, grid=True) for policy in ("flag", "blur")}
    refused = running.submit(model="refuse", seed=1, num_images=3)
    pictures = {}
    for policy, job in jobs.items():
        done = running.wait(job["id"])
        assert len(done["outputs"]) == 4
        for output in done["outputs"]:
            assert output["safety"]["flagged"]
            assert output["safety"]["blurred"] == (policy == "blur")
            assert set(output["safety"]["scores"]) == {"red", "calm"}
        pictures[policy] = running.picture(done).astype(int)
    assert np.abs(np.diff(pictures["blur"], axis=0)).mean() < np.abs(np.diff(pictures["flag"], axis=0)).mean() / 5
    failed = running.wait(refused["id"], status="failed")
    assert (failed["error"]["code"], failed["outputs"]) == ("content_refused", [])
    objects = running.folder / "data" / "objects" / "jobs" / refused["id"]
    running.wait_until(lambda: not list(objects.rglob("*.png")), 10)


def test_in_openais_dialect_a_refused_picture_is_blocked_by_moderation(running):
    asked = {"model": "refuse", "prompt": "a lamp"}
    reply = running.client.post("/v1/images/generations", json=asked)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "moderation_blocked")
    reply = running.client.post("/v1/images/generations", json=asked | {"moderation": "low"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "moderation")
