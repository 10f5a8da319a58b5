"""Every task over HTTP with the bundled model, every part a process of its own."""

import io

import httpx2
import numpy as np
import pytest
from PIL import Image

from tests.house import house
from tests.servers import redis_server

SEED = 20261124


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    with (
        redis_server(tmp_path_factory.mktemp("redis")) as server,
        house(folder, server.url, SAFELIGHT_MAX_BATCH="64") as built,
    ):
        built.start_all()
        yield built


def png(pixels):
    body = io.BytesIO()
    Image.fromarray(pixels).save(body, "PNG")
    return body.getvalue()


def upload(running, pixels):
    reply = running.client.post("/v1/uploads", files={"file": ("a.png", png(pixels), "image/png")})
    assert reply.status_code == 201, reply.text
    return reply.json()["id"]


def make(running, **request):
    return running.wait(running.submit(**({"num_inference_steps": 10} | request))["id"])


def painted(running, **request):
    return running.picture(make(running, **request)).astype(int)


@pytest.fixture(scope="module")
def heart(running):
    """A finished job, and its picture."""
    job = make(running, prompt="a red heart", seed=SEED, num_inference_steps=20)
    return job["id"], running.picture(job)


def test_inpainting_leaves_what_is_outside_the_mask_as_it_was(running, heart):
    job, source = heart
    mask = np.zeros((64, 64), np.uint8)
    mask[29:51, 13:42] = 255
    found = painted(running, prompt="a panda", image=job, mask=upload(running, mask), seed=3)
    apart = np.abs(found - source).max(axis=2)
    print(f"outside {apart[mask == 0].max()}/255, inside {apart[mask > 0].mean():.1f}/255")
    assert apart[mask == 0].max() <= 2
    assert apart[mask > 0].mean() > 8
