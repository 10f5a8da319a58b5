"""Previews by way of the whole service: real processes, the bundled model."""

import base64
import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

from app.core import redis_keys as keys
from app.core.connections import connect
from tests.house import house


@pytest.fixture(scope="module")
def built(tmp_path_factory, redis_server):
    with house(tmp_path_factory.mktemp("previews"), redis_server.url, SAFELIGHT_THREADS="1") as built:
        built.redis = connect(redis_server.url)
        built.redis.flushall()
        built.start("api")
        built.start("worker")
        built.wait_until(built.is_ready, 90)
        yield built


def stream(built, job_id, query="", leave_after=None):
    """The events of a job's stream as (type, data, has an id); until the first `leave_after`, if that is given."""
    found, kind, data, has_id = [], None, None, False
    with built.client.stream("GET", f"/v1/jobs/{job_id}/events{query}") as reply:
        for line in reply.iter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                kind = value
            elif name == "data":
                data = json.loads(value)
            elif name == "id":
                has_id = True
            elif not line and kind:
                found.append((kind, data, has_id))
                if kind == leave_after:
                    break
                kind, data, has_id = None, None, False
    return found


def picture(preview):
    head, _, body = preview["image"].partition(",")
    assert head == "data:image/webp;base64"
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    return np.asarray(image.convert("RGB"))


def test_who_asks_for_previews_sees_each_picture_come_about(built):
    job_id = built.submit(prompt="a sunflower", seed=3, num_images=2, num_inference_steps=60)["id"]
    events = stream(built, job_id, "?previews=1")
    shown = [(data, has_id) for kind, data, has_id in events if kind == "preview"]
    assert not any(has_id for _, has_id in shown)
    assert all(has_id for kind, _, has_id in events if kind != "preview")
    assert {data["index"] for data, _ in shown} == {0, 1}
    for index in (0, 1):
        own = [data for data, _ in shown if data["index"] == index]
        steps = [data["step"] for data in own]
        assert len(own) >= 2
        assert steps == sorted(set(steps))
        assert all(0 < data["step"] <= data["steps"] == 60 for data in own)
        final = built.picture(built.job(job_id), index)
        assert picture(own[-1]).shape == final.shape
        likeness = np.corrcoef(picture(own[-1]).ravel().astype(float), final.ravel().astype(float))[0, 1]
        print(f"image {index}: previews of steps {steps}, the last is like the picture to {likeness:.2f}")
        assert likeness > 0.7
    assert events[-1][0] == "succeeded"
    assert not built.redis.exists(keys.PREVIEWS + job_id, keys.WATCHERS + job_id)


def test_without_a_viewer_none_are_made_and_others_are_not_sent_any(built):
    job_id = built.submit(seed=4, num_inference_steps=60)["id"]
    plain = []
    other = threading.Thread(target=lambda: plain.extend(stream(built, job_id)))
    other.start()
    built.wait_until(lambda: (built.job(job_id)["progress"] or {}).get("step", 0) >= 20, 60)
    assert not built.redis.exists(keys.PREVIEWS + job_id)
    assert not built.job(job_id)["completed_at"]
    seen = stream(built, job_id, "?previews=1", leave_after="preview")
    assert seen[-1][0] == "preview"
    other.join(60)
    assert {kind for kind, *_ in plain} == {"status", "progress", "succeeded"}


def test_previews_end_when_the_last_viewer_goes(built):
    job_id = built.submit(seed=5, num_images=4, num_inference_steps=250)["id"]
    stream(built, job_id, "?previews=1", leave_after="preview")
    built.wait_until(lambda: not built.redis.exists(keys.WATCHERS + job_id), 30)

    def seen():
        shown = built.redis.zrange(keys.PREVIEWS + job_id, -1, -1, withscores=True)
        job = built.job(job_id)
        assert not job["completed_at"], "previews were made for as long as there were steps"
        return shown, job["progress"]["step"]

    last, since = seen()
    now = last, since
    while now[1] < since + 300:  # of 1,000: while somebody looks there is one every 0.25 s
        time.sleep(0.05)
        now = seen()
        if now[0] != last:
            last, since = now
    print(f"the last preview was shown by step {since} of 1,000")
    assert len(last) == 1
    assert built.redis.zcard(keys.PREVIEWS + job_id) <= 4
    built.client.post(f"/v1/jobs/{job_id}/cancel")


def test_a_preview_of_a_lost_attempt_is_not_shown(built):
    job_id = built.submit(seed=6, num_inference_steps=60)["id"]
    built.wait_until(lambda: (built.job(job_id)["progress"] or {}).get("step", 0) >= 1, 60)
    assert keys.PREVIEW.run(built.redis, job_id, 99, 1, "{}") == 0
    assert not built.redis.exists(keys.PREVIEWS + job_id)
