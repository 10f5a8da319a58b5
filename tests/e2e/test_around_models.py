"""What models.toml puts around a model, in a running service: a safety checker, a ControlNet, an upscaler."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.checkers import write_classifier
from tests.checkpoints import controlnet, four_times
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
STEERED = """
[models.steered]
source = "tiny"
default = true
schedulers = ["ddim"]
tasks = ["text_to_image", "image_to_image"]
[models.steered.defaults]
width = 64
height = 64
num_inference_steps = 4
scheduler = "ddim"
[models.steered.limits]
max_side = 64
[models.steered.controlnets.edges]
source = "edges"
[models.steered.upscalers]
4 = "x4"

[models.x4]
source = "x4"
schedulers = ["ddim"]
tasks = ["upscaling"]
upscale_factor = 4
[models.x4.defaults]
width = 256
height = 256
num_inference_steps = 4
scheduler = "ddim"
[models.x4.limits]
max_side = 256
"""


SMALL = np.random.RandomState(5).randint(0, 255, (64, 64, 3), dtype="uint8")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """Three models of the same weights whose checker flags everything, one that can be steered, and its upscaler."""
    folder = tmp_path_factory.mktemp("house")
    write_tiny(folder / "tiny")
    (folder / "checker").mkdir()
    write_classifier(folder / "checker")
    controlnet(1).save_pretrained(folder / "edges")
    four_times().save_pretrained(folder / "x4")
    checked = "".join(MODEL.format(policy=p) for p in ("flag", "blur", "refuse"))
    (folder / "models.toml").write_text(checked + STEERED)
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


@pytest.fixture(scope="module")
def small(running):
    """An upload of 64x64 pixels."""
    body = io.BytesIO()
    Image.fromarray(SMALL).save(body, "PNG")
    return running.client.post("/v1/uploads", files={"file": ("a.png", body.getvalue(), "image/png")}).json()["id"]


def test_a_controlnet_steers_by_its_scale(running, small):
    def painted(**request):
        done = running.wait(running.submit(model="steered", prompt="a cat", seed=1, **request)["id"])
        return running.picture(done).astype(int)

    plain = painted()
    apart = [
        np.abs(painted(controls=[{"type": "edges", "image": small, "scale": scale}]) - plain).mean()
        for scale in (0, 0.5, 1.5)
    ]
    assert apart[0] < 0.01 < apart[1] < apart[2]
    refused = running.client.post(
        "/v1/jobs", json={"model": "steered", "prompt": "a", "controls": [{"type": "pose", "image": small}]}
    )
    assert refused.status_code == 422
    assert "no ControlNet 'pose'; it has edges" in refused.json()["detail"]


def test_an_upscale_is_by_the_upscaler_that_the_catalog_names_and_the_job_says_so(running, small):
    shapes = {}
    for factor, method in ((4, "model"), (2, "resample")):
        done = running.wait(running.submit(model="steered", prompt="", image=small, upscale=factor, seed=1)["id"])
        assert done["params"]["upscale_method"] == method
        shapes[factor] = running.picture(done).shape
        again = running.wait(running.submit(**done["params"])["id"])
        assert np.abs(running.picture(again).astype(int) - running.picture(done)).max() <= 1
    assert shapes == {4: (256, 256, 3), 2: (128, 128, 3)}
