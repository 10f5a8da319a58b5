"""Uploads over HTTP: what is kept of a picture, for whom, how long, and what a job may name."""

import base64
import io
import json
import os
import random
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx2
import numpy as np
import pytest
from PIL import Image

from app.core import redis_keys as keys
from app.core.retention import sweep
from app.core.storage import open_storage
from tests.integration.test_api_auth import BOOTSTRAP, bearer
from tests.unit.test_image_process import FUZZ_SECONDS, SEED, seeds, spoiled


def png(width=64, height=48, seed=1, mode="RGB"):
    noise = np.random.RandomState(seed).randint(0, 255, (height, width, len(mode)), dtype="uint8")
    body = io.BytesIO()
    Image.fromarray(noise, mode=None).save(body, "PNG")
    return body.getvalue()


def upload(client, body=None):
    reply = client.post("/v1/uploads", files={"file": ("a.png", body or png(), "image/png")})
    assert reply.status_code == 201, reply.text
    return reply.json()


def submit(client, **request):
    return client.post("/v1/jobs", json={"prompt": "a cat"} | request)


def objects(api):
    return list((api.settings.data / "objects" / "uploads").rglob("*.png"))


@contextmanager
def web(body, status=200, seconds=0.0):
    """A web server with one picture."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(seconds)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/a.png"
    finally:
        server.shutdown()
        server.server_close()


def test_an_upload_is_the_same_picture_as_a_png_of_ours_and_its_url_opens_it(client):
    made = upload(client)
    assert (made["width"], made["height"], made["content_type"]) == (64, 48, "image/png")
    body = httpx2.get(made["url"], trust_env=False).content
    assert len(body) == made["bytes"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(body))), np.asarray(Image.open(io.BytesIO(png()))))
    assert client.get(f"/v1/uploads/{made['id']}").json()["sha256"] == made["sha256"]


def test_the_same_picture_has_the_same_id_and_is_stored_once(client, api):
    before = len(objects(api))
    first, again = upload(client, png(seed=77)), upload(client, png(seed=77))
    assert first["id"] == again["id"]
    assert upload(client, png(seed=78))["id"] != first["id"]
    assert len(objects(api)) == before + 2


def test_uploads_are_listed_newest_first_page_by_page(client):
    made = [upload(client, png(seed=i))["id"] for i in range(3)]
    page = client.get("/v1/uploads?limit=2").json()
    rest = client.get(f"/v1/uploads?limit=2&cursor={page['next_cursor']}").json()
    assert [entry["id"] for entry in page["data"] + rest["data"]] == made[::-1]
    assert rest["next_cursor"] is None


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"files": {"file": ("a.png", b"no picture", "image/png")}}, 422),
        ({"files": {"other": ("a.png", png(), "image/png")}}, 422),
        ({"files": [("file", ("a.png", png())), ("file", ("b.png", png()))]}, 422),
        ({"data": {"file": "text"}, "files": {"x": ("a", b"")}}, 422),
        ({"content": b"\x00" * 100, "headers": {"content-type": "multipart/form-data; boundary=x"}}, 422),
        ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, 422),
        ({"json": {"file": "x"}}, 422),
        ({"content": b"\x00" * (22 * 2**20), "headers": {"content-type": "image/png"}}, 413),
    ],
)
def test_what_is_no_upload_is_refused(client, sent, status):
    reply = client.post("/v1/uploads", **sent)
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"


def test_another_tenants_upload_is_like_none(start_api, redis):
    from app.core import api_keys

    api = start_api(api_key=BOOTSTRAP)
    a, b = (
        api.client(headers=bearer(api_keys.create(redis, name, name, api_keys.EVERYDAY)[1])) for name in ("ada", "bob")
    )
    with a, b:
        made = upload(a)
        for reply in (
            b.get(f"/v1/uploads/{made['id']}"),
            b.delete(f"/v1/uploads/{made['id']}"),
            b.get("/v1/uploads/upload_" + "0" * 26),
        ):
            assert (reply.status_code, reply.json()["detail"]) == (404, "there is no such upload")
        assert b.get("/v1/uploads").json()["data"] == []
        assert submit(b, image=made["id"]).json()["detail"] == "image: there is no such upload"
        job = submit(a, image=made["id"]).json()
        assert submit(b, image=job["id"]).json()["detail"] == "image: there is no such job"
        assert upload(b)["id"] != made["id"]


def test_a_jobs_params_name_uploads_and_sizes_whatever_way_the_pictures_came(start_api, client):
    body = png(96, 64, seed=5)
    made = upload(client, body)
    text = "data:image/png;base64," + base64.b64encode(body).decode()
    for name in (made["id"], text):
        params = submit(client, image=name, strength=0.5).json()["params"]
        assert (params["image"], params["width"], params["height"]) == (made["id"], 96, 64)
    with web(body) as url:
        api = start_api(image_allow="127.0.0.0/8")
        with api.client() as caller:
            assert submit(caller, image=url).json()["params"]["image"] == made["id"]


def test_a_picture_of_an_earlier_job_is_an_input(client, worker, redis):
    job = submit(client).json()
    claimed = worker.claim()
    worker.succeed(claimed)
    key = json.loads(redis.hget(keys.JOB + job["id"], "outputs"))[0]["key"]
    (worker.data / "objects" / key).write_bytes(png(64, 64, seed=9))
    found = [submit(client, image=name).json()["params"]["image"] for name in (job["id"], job["id"] + "/0")]
    assert found == [upload(client, png(64, 64, seed=9))["id"]] * 2
    assert "no" in submit(client, image=job["id"] + "/1").json()["detail"]


def test_a_url_that_is_not_public_gives_no_picture_or_too_much_is_refused(client, start_api):
    with web(png()) as url:
        assert submit(client, image=url).json()["code"] == "address_refused"
    with start_api(image_allow="127.0.0.0/8").client() as caller:
        for options, code in (
            ({"body": b"<html>"}, "image_refused"),
            ({"body": b"", "status": 302}, "image_refused"),
            ({"body": b"\x89PNG" * (6 * 2**20)}, "image_refused"),
        ):
            with web(**options) as url:
                reply = submit(caller, image=url)
                assert (reply.status_code, reply.json()["code"]) == (422, code), reply.text


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"image": "data:image/png;base64,!"}, "image: the data URL's base64 is damaged"),
        ({"image": "data:text/plain,x"}, "image: a data URL begins with"),
        ({"image": "ftp://x/y"}, "image: write an upload's id"),
        ({"mask": "x"}, "mask needs an image"),
        ({"strength": 0.5}, "strength needs an image"),
        ({"image": "x", "variation": "subtle", "strength": 0.5}, "variation says how much"),
        ({"image": "x", "variation": "subtle", "upscale": 2}, "variation and upscale cannot"),
        ({"image": "x", "outpaint": {"left": 8}, "mask": "x"}, "mask and outpaint cannot"),
        ({"image": "x", "controls": [{"type": "canny", "image": "x"}]}, "no ControlNet 'canny'; it has none"),
        ({"output_quality": 50}, "output_quality must be left out"),
        ({"mask_channel": "alpha"}, "it needs a mask"),
        ({"upscale_method": "model"}, "it needs upscale"),
    ],
)
def test_fields_that_do_not_go_together_are_refused_by_name(client, request_, words):
    reply = submit(client, **request_)
    assert reply.status_code == 422
    assert words in reply.json()["detail"]


def test_strength_that_leaves_no_step_is_refused(client):
    reply = submit(client, image=upload(client)["id"], strength=0.04)
    assert "leaves no step" in reply.json()["detail"]


def test_a_mask_has_the_images_size(client):
    image, mask = upload(client), upload(client, png(32, 32))
    assert "must have the image's 64 x 48" in submit(client, image=image["id"], mask=mask["id"]).json()["detail"]


def test_an_upload_lives_as_long_as_a_job_that_uses_it_has_a_record(client, api, worker, redis):
    storage = open_storage(api.settings.storage, public_url="http://x", secret=b"x")
    kept, left = upload(client, png(seed=11)), upload(client, png(seed=12))
    job = submit(client, image=kept["id"]).json()
    assert client.delete(f"/v1/uploads/{kept['id']}").status_code == 409

    def expire():
        for made in (kept, left):
            if redis.exists(keys.UPLOAD + made["id"]):
                redis.hset(keys.UPLOAD + made["id"], "expires_at", 1)
                redis.zadd(keys.UPLOAD_EXPIRY, {made["id"]: 1})
        sweep(redis, storage)
        return [client.get(f"/v1/uploads/{made['id']}").status_code for made in (kept, left)]

    assert expire() == [200, 404]
    assert httpx2.get(left["url"], trust_env=False).status_code == 404
    worker.succeed(worker.claim())
    assert expire() == [200, 404]
    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert expire() == [404, 404]
    assert httpx2.get(kept["url"], trust_env=False).status_code == 404
    assert not redis.keys("safelight:upload*")


def test_an_upload_of_a_finished_job_may_be_deleted_and_then_its_params_are_refused(client, worker):
    made = upload(client, png(seed=13))
    job = submit(client, image=made["id"]).json()
    worker.succeed(worker.claim())
    assert client.delete(f"/v1/uploads/{made['id']}").status_code == 204
    assert submit(client, **job["params"]).json()["detail"] == "image: there is no such upload"


def test_what_was_stored_and_never_named_is_swept(client, api, redis):
    storage = open_storage(api.settings.storage, public_url="http://x", secret=b"x")
    key = "uploads/upload_00000000000000000000000000/0123456789abcdef.png"
    assert keys.BEGIN_UPLOAD.run(redis, "upload_" + "0" * 26, "default", 1000, key, 10) is None
    storage.put(key, png(), "image/png")
    sweep(redis, storage)
    assert storage.head(key)
    redis.zadd(keys.STRAY_OBJECTS, {key: 1})
    sweep(redis, storage)
    assert key not in [found.key for found in storage.list("uploads")]


def test_params_sent_again_are_the_same_params(client):
    first = submit(client, image=upload(client)["id"], outpaint={"left": 16}, num_inference_steps=5).json()["params"]
    assert submit(client, **first).json()["params"] == first


def test_base64_that_is_not_even_ascii_is_refused(client):
    reply = submit(client, image="data:image/png;base64,\u00e9")
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid_params")


def test_a_key_finds_its_job_when_what_that_was_made_from_is_gone(client):
    made = upload(client)["id"]
    request = {"image": made, "strength": 0.5}
    headers = {"Idempotency-Key": "again"}
    job = client.post("/v1/jobs", json={"prompt": "a cat"} | request, headers=headers).json()
    client.post(f"/v1/jobs/{job['id']}/cancel")
    assert client.delete(f"/v1/uploads/{made}").status_code == 204
    reply = client.post("/v1/jobs", json={"prompt": "a cat"} | request, headers=headers)
    assert (reply.json()["id"], reply.headers["idempotent-replayed"]) == (job["id"], "true")
    other = client.post("/v1/jobs", json={"prompt": "a dog"} | request, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")


def test_sixteen_bits_of_grey_are_scaled_and_not_cut(client):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    body = io.BytesIO()
    Image.fromarray(ramp).save(body, "PNG")
    kept = Image.open(io.BytesIO(httpx2.get(upload(client, body.getvalue())["url"], trust_env=False).content))
    assert np.abs(np.asarray(kept.convert("L")).astype(int) - ramp // 256).max() <= 1


@pytest.mark.parametrize("path", ["/v1/uploads", "/v1/images/edits", "/v1/images/variations"])
@pytest.mark.parametrize(("charset", "name"), [("undefined", "image"), ("unicode_escape", r"\ud800")])
def test_a_form_in_a_charset_of_no_use_is_refused(client, path, charset, name):
    part = f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="a"\r\n\r\na\r\n--x--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
    assert client.post(path, content=part.encode(), headers=headers).status_code in {400, 422}


@pytest.mark.timeout(120 + 2 * FUZZ_SECONDS)
def test_whatever_is_uploaded_gets_an_answer_and_the_api_does_not_grow(client):
    """`FUZZ_SECONDS=300` is the long form."""
    print(f"FUZZ_SEED={SEED}")
    rng, files, seen = random.Random(SEED), seeds(), Counter()

    def send(body):
        reply = client.post("/v1/uploads", files={"file": ("a.png", body, "image/png")})
        seen[reply.status_code] += 1
        assert reply.status_code in {201, 422, 429}, reply.text

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

    for body in files:
        send(body)
    before, until = resident(), time.monotonic() + FUZZ_SECONDS
    while time.monotonic() < until:
        send(spoiled(rng, rng.choice(files), files))
    print(f"{seen} in {FUZZ_SECONDS:.0f} s; the API's process held {before:.0f} MiB and then {resident():.0f}")
    assert seen[201] >= 8
    assert seen[422] >= 50
    assert resident() < before + 60
