"""OpenAI's own Python package, unmodified, against a whole service: what it asks for and what it gets."""

import base64
import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from tests.house import house
from tests.servers import redis_server

PROMPT = "a red heart"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    with redis_server(tmp_path_factory.mktemp("redis")) as server, house(folder, server.url) as built:
        built.start("api")
        built.start("worker")
        built.wait_until(built.is_ready, 150)
        yield built


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", http_client=httpx2.Client(trust_env=False)) as made:
        yield made


def opened(image):
    return Image.open(io.BytesIO(base64.b64decode(image.b64_json)))


def pixels(image):
    return np.asarray(opened(image).convert("RGB")).astype(int)


def test_models_are_listed_and_retrieved(client):
    listed = client.models.list()
    assert "emoji" in [model.id for model in listed]
    found = client.models.retrieve("emoji")
    assert (found.object, found.owned_by, found.quality["medium"]) == ("model", "safelight", 20)
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


def test_a_picture_comes_as_base64_and_is_that_of_the_job(client, running):
    reply = client.images.with_raw_response.generate(prompt=PROMPT, model="emoji", extra_body={"seed": 7})
    made = reply.parse()
    assert (made.size, made.quality, made.output_format, made.background) == ("64x64", "medium", "png", "opaque")
    assert made.data[0].url is None
    job = running.job(reply.headers["safelight-job"])
    assert (job["status"], job["params"]["seed"], job["params"]["num_inference_steps"]) == ("succeeded", 7, 20)
    assert (pixels(made.data[0]) == running.picture(job)).all()


def test_pictures_come_by_url(client):
    made = client.images.generate(prompt=PROMPT, n=2, size="64x64", response_format="url", quality="low")
    for image in made.data:
        assert image.b64_json is None
        assert Image.open(io.BytesIO(httpx2.get(image.url, trust_env=False).content)).size == (64, 64)
    assert made.quality == "low"


def test_formats_qualities_and_end_users_are_honoured(client, running):
    sizes = {}
    for compression in (20, 100):
        reply = client.images.with_raw_response.generate(
            prompt=PROMPT,
            output_format="webp",
            output_compression=compression,
            quality="high",
            background="opaque",
            moderation="auto",
            user="one",
            safety_identifier="two",
            extra_body={"seed": 1, "guidance_scale": 3.0, "negative_prompt": "blue"},
        )
        made = reply.parse()
        assert (opened(made.data[0]).format, made.output_format, made.safety_identifier) == ("WEBP", "webp", "two")
        sizes[compression] = len(made.data[0].b64_json)
        job = running.job(reply.headers["safelight-job"])
        assert job["metadata"] == {"user": "one", "safety_identifier": "two"}
        assert job["params"]["num_inference_steps"] == 30
    assert sizes[20] < sizes[100]


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        ({"size": "1024x1024"}, "size", "invalid_params"),
        ({"size": "wide"}, "size", "invalid_value"),
        ({"n": 11}, "n", "invalid_value"),
        ({"style": "vivid"}, "style", "unsupported_parameter"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"output_compression": 50}, "output_compression", "invalid_value"),
        ({"partial_images": 2}, "partial_images", "invalid_value"),
        ({"quality": "low", "extra_body": {"num_inference_steps": 3}}, "quality", "invalid_value"),
        ({"extra_body": {"steps": 3}}, "steps", "unknown_parameter"),
        ({"prompt": "x" * 2001}, "prompt", "invalid_params"),
        ({"extra_body": {"scheduler": "best"}}, "scheduler", "invalid_params"),
    ],
)
def test_what_cannot_be_honoured_is_a_bad_request_that_names_the_parameter(client, asked, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": PROMPT} | asked)
    error = caught.value
    assert (error.type, error.param, error.code) == ("invalid_request_error", param, code), error.message


def test_other_errors_have_openais_shape_too(client, running):
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    assert caught.value.code == "model_not_found"
    for body in (b"{", b"[]", b'{"model": "emoji"}'):
        reply = running.client.post(
            "/v1/images/generations", content=body, headers={"Content-Type": "application/json"}
        )
        assert reply.status_code == 400
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_cancelled_job_is_a_conflict_and_is_not_tried_again(client, running):
    def cancel():
        running.wait_until(lambda: running_jobs(running), 20)
        for job in running_jobs(running):
            running.client.post(f"/v1/jobs/{job['id']}/cancel")

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(openai.ConflictError) as caught:
        client.images.generate(prompt=PROMPT, n=8, quality="max", extra_body={"guidance_scale": 7.0})
    thread.join()
    assert caught.value.code == "canceled"
    assert running_jobs(running) == []


def running_jobs(running):
    return [j for s in ("queued", "processing") for j in running.client.get(f"/v1/jobs?status={s}").json()["data"]]


@pytest.mark.parametrize("is_kept", [False, True])
def test_hanging_up_cancels_the_job_unless_its_caller_may_come_back(client, running, is_kept):
    headers = {"Idempotency-Key": "again"} if is_kept else {}
    asked = {"prompt": PROMPT, "n": 4, "extra_body": {"num_inference_steps": 100}, "extra_headers": headers}
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5, max_retries=0).images.generate(**asked)
    [job] = running.client.get("/v1/jobs?limit=1").json()["data"]
    if not is_kept:
        running.wait_until(lambda: running.job(job["id"])["status"] == "canceled", 5)
        return
    reply = client.images.with_raw_response.generate(**asked)
    assert reply.headers["safelight-job"] == job["id"]
    assert len(reply.parse().data) == 4


def test_a_stream_without_partial_images_gives_each_picture(client):
    events = list(client.images.generate(prompt=PROMPT, n=2, stream=True, quality="low"))
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert opened(events[0]).size == (64, 64)
    assert events[0].usage.total_tokens == 0


def test_a_stream_shows_three_partial_images_before_the_last(client):
    start = time.monotonic()
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=3, extra_body={"num_inference_steps": 150, "seed": 3}
    )
    events = list(stream)
    print(f"{[e.type for e in events]} in {time.monotonic() - start:.1f} s")
    *partial, last = events
    assert [event.partial_image_index for event in partial] == [0, 1, 2]
    assert {event.type for event in partial} == {"image_generation.partial_image"}
    assert last.type == "image_generation.completed"
    assert all(opened(event).format == event.output_format.upper() for event in events)


def test_a_stream_that_fails_says_so_in_its_last_event(client, running):
    stream = client.images.generate(prompt=PROMPT, n=8, stream=True, quality="max")
    running.wait_until(lambda: running_jobs(running), 20)
    for job in running_jobs(running):
        running.client.post(f"/v1/jobs/{job['id']}/cancel")
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "canceled"


def test_a_stream_that_is_closed_cancels_its_job(client, running):
    stream = client.images.generate(prompt=PROMPT, n=8, stream=True, extra_body={"num_inference_steps": 250})
    stream.close()
    running.wait_until(lambda: not running_jobs(running), 5)
    assert running.client.get("/v1/jobs?limit=1").json()["data"][0]["status"] == "canceled"


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def source():
    """A picture with a pattern, and a mask in OpenAI's way: transparent where to paint, which is its right half."""
    y, x = np.mgrid[:64, :64]
    picture = np.stack([x * 4, y * 4, (x + y) % 16 * 8], -1).astype(np.uint8)
    mask = np.full((64, 64, 4), 255, np.uint8)
    mask[:, 32:, 3] = 0
    return picture, png(picture), png(mask)


def test_an_edit_paints_where_the_mask_is_transparent_and_nowhere_else(client, source):
    picture, image, mask = source
    made = client.images.edit(image=("a.png", image), mask=("m.png", mask), prompt=PROMPT, extra_body={"seed": 5})
    found = pixels(made.data[0])
    difference = np.abs(found - picture)
    assert difference[:, :31].max() <= 2
    assert difference[:, 34:].mean() > 20
    assert made.size == "64x64"


def test_an_edit_without_a_mask_keeps_more_the_more_fidelity_is_asked_for(client, source):
    picture, image, _ = source
    distances = {}
    for fidelity in ("low", "high"):
        asked = {"image": [("a.png", image)], "prompt": PROMPT, "quality": "medium", "input_fidelity": fidelity}
        made = client.images.edit(**asked, n=2, output_format="jpeg", user="me", extra_body={"seed": 5})
        assert [opened(image).format for image in made.data] == ["JPEG"] * 2
        distances[fidelity] = np.mean([np.abs(pixels(image) - picture).mean() for image in made.data])
    assert distances["high"] < distances["low"]


def test_an_edit_streams_too(client, source):
    stream = client.images.edit(
        image=("a.png", source[1]),
        prompt=PROMPT,
        stream=True,
        partial_images=1,
        extra_body={"num_inference_steps": 250},
    )
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_variations_are_like_the_picture_and_unlike_each_other(client, source, running):
    _, image, _ = source
    with pytest.warns(DeprecationWarning, match="deprecated"):  # by OpenAI's package, of OpenAI's own route
        reply = client.images.with_raw_response.create_variation(image=image, n=2, size="64x64")
    one, two = (pixels(image) for image in reply.parse().data)
    assert np.abs(one - two).mean() > 1
    params = running.job(reply.headers["safelight-job"])["params"]
    assert (params["variation"], params["prompt"]) == ("strong", "")
    assert params["image"].startswith("upload_")


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        ({"image": b"no picture"}, "image", "invalid_image_file"),
        ({"mask": b"\x89PNG\r\n\x1a\n"}, "mask", "invalid_image_file"),
        ({"input_fidelity": "most"}, "input_fidelity", "invalid_value"),
        ({"extra_body": {"svg": {"model": "x"}}}, "svg", "unsupported_parameter"),
        ({"n": 0}, "n", "invalid_value"),
    ],
)
def test_edits_that_cannot_be_honoured_name_the_parameter(client, source, asked, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(**{"image": source[1], "prompt": PROMPT} | asked)
    assert (caught.value.param, caught.value.code) == (param, code), caught.value.message


def test_only_one_image_of_the_masks_size_is_taken(client, source):
    with pytest.raises(openai.BadRequestError, match="only one image"):
        client.images.edit(image=[source[1], source[1]], prompt=PROMPT)
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=source[1], mask=png(np.zeros((32, 32, 4), np.uint8)), prompt=PROMPT)
    assert caught.value.param == "mask"


def test_a_body_that_is_too_large_or_no_form_is_refused_in_openais_shape(client, running):
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.edit(image=b"\0" * (44 * 2**20), prompt=PROMPT)
    assert (caught.value.status_code, caught.value.code) == (413, "too_large")
    reply = running.client.post("/v1/images/edits", json={"prompt": PROMPT})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported_content_type")


def test_a_prompt_that_the_model_cannot_read_to_its_end_is_a_bad_request(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a red heart and " * 20)
    assert (caught.value.param, caught.value.code) == ("prompt", "prompt_too_long")


def test_openais_package_for_javascript_does_the_same(running, source, tmp_path):
    (tmp_path / "source.png").write_bytes(source[1])
    (tmp_path / "mask.png").write_bytes(source[2])
    node = str(Path(sys.executable).with_name("node"))
    script = Path(__file__).parents[1] / "node" / "images.mjs"
    command = [node, str(script), f"{running.url}/v1", str(tmp_path / "source.png"), str(tmp_path / "mask.png")]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert told.returncode == 0, told.stderr
    calls = json.loads(told.stdout)
    print(calls)
    assert "emoji" in calls.pop("models.list")
    assert calls == {
        "models.retrieve": "emoji",
        "images.generate": [True, True],
        "images.generate stream": ["image_generation.partial_image", "image_generation.completed"],
        "images.edit": [True],
        "images.createVariation": 200,
        "images.generate refused": ["BadRequestError", 400, "size"],
    }


LITELLM = Path(__file__).parents[1] / "litellm"


@pytest.mark.skipif(
    not (LITELLM / ".venv" / "ready").exists(), reason="litellm has a venv of its own; make test makes it"
)
def test_litellm_gets_its_pictures(running):
    command = [str(LITELLM / ".venv" / "bin" / "python"), str(LITELLM / "ask.py"), f"{running.url}/v1"]
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # it would ask the internet for prices
    told = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=150, env=running.environment | offline
    )
    assert told.returncode == 0, told.stderr
    calls = json.loads(told.stdout.splitlines()[-1])
    print(calls)
    assert calls == {
        "image_generation": ["PNG", "PNG"],
        "image_edit": ["PNG"],
        "image_generation refused": ["BadRequestError", 400],
    }
