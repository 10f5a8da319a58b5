"""Every task over HTTP with the bundled model, every part a process of its own."""

import io
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tests.house import house
from tests.servers import redis_server

SEED = 20261124
PATIENCE = 150  # seconds: fifty jobs wait for one another, and other tests may use the machine


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
    return running.wait(running.submit(**({"num_inference_steps": 10} | request))["id"], PATIENCE)


def painted(running, **request):
    return running.picture(make(running, **request)).astype(int)


@pytest.fixture(scope="module")
def heart(running):
    """A finished job, and its picture."""
    job = make(running, prompt="a red heart", seed=SEED, num_inference_steps=20)
    return job["id"], running.picture(job)


@pytest.fixture(scope="module")
def mask(running):
    """An upload, and its pixels; not on the grid of the latents."""
    pixels = np.zeros((64, 64), np.uint8)
    pixels[29:51, 13:42] = 255
    return upload(running, pixels), pixels


def test_inpainting_leaves_what_is_outside_the_mask_as_it_was(running, heart, mask):
    (job, source), (name, pixels) = heart, mask
    found = painted(running, prompt="a panda", image=job, mask=name, seed=3)
    apart = np.abs(found - source).max(axis=2)
    print(f"outside {apart[pixels == 0].max()}/255, inside {apart[pixels > 0].mean():.1f}/255")
    assert apart[pixels == 0].max() <= 2
    assert apart[pixels > 0].mean() > 8


def test_outpainting_keeps_the_image_and_paints_around_it(running, heart):
    _, source = heart
    small = upload(running, np.asarray(Image.fromarray(source).resize((48, 40))))
    done = make(running, image=small, outpaint={"left": 8, "right": 8, "top": 8, "bottom": 16}, prompt="a red heart")
    found = running.picture(done).astype(int)
    assert found.shape == (64, 64, 3)
    kept = np.asarray(Image.fromarray(source).resize((48, 40))).astype(int)
    assert np.abs(found[8:48, 8:56] - kept).max() <= 2
    assert done["params"]["outpaint"] == {"left": 8, "top": 8, "right": 8, "bottom": 16}


STRENGTHS = (0.2, 0.5, 0.8)


def test_more_strength_is_further_from_the_image(running):
    """The distance in mean over images and sources; the table is printed for those who ask with -s."""
    means = dict.fromkeys((*STRENGTHS, "subtle", "strong"), 0.0)
    for prompt in ("a red heart", "a sunflower", "a butterfly", "a koala"):
        job = make(running, prompt=prompt, seed=SEED, num_inference_steps=20)
        source = np.rot90(running.picture(job))  # not what the model would paint: it has somewhere to go
        image = upload(running, np.ascontiguousarray(source))
        asked = {s: {"strength": s, "prompt": "a panda"} for s in STRENGTHS}
        asked |= {v: {"variation": v, "prompt": prompt} for v in ("subtle", "strong")}
        for name, fields in asked.items():
            done = make(running, image=image, num_images=4, seed=SEED + 9, **fields)
            apart = [np.abs(running.picture(done, i).astype(int) - source.astype(int)).mean() for i in range(4)]
            means[name] += float(np.mean(apart)) / 4
    print(*(f"{name}: {mean:.1f}/255" for name, mean in means.items()), sep="\n")
    assert means[0.2] < means[0.5] < means[0.8]
    assert 1 < means["subtle"] < means["strong"]


def test_a_tiled_picture_has_no_seam(running):
    seams, inside = [], []
    for prompt in ("a red heart", "a sunflower"):
        done = make(running, prompt=prompt, tiling=True, num_images=3, seed=SEED)
        for i in range(3):
            tile = running.picture(done, i).astype(int)
            for sides in (tile, tile.swapaxes(0, 1)):
                seams.append(np.abs(sides[0] - sides[-1]).mean())
                inside.append(np.abs(np.diff(sides, axis=0)).mean())
    print(f"{len(seams)} seams: {np.mean(seams):.2f}/255, gradient inside {np.mean(inside):.2f}/255")
    assert np.mean(seams) <= np.mean(inside)


def test_an_upscale_is_twice_as_large_and_the_same_picture_and_says_how_it_was_made(running, heart):
    job, source = heart
    done = make(running, image=job, upscale=2, prompt="a red heart")
    found = running.picture(done)
    assert (found.shape, done["params"]["upscale_method"]) == ((128, 128, 3), "resample")
    small = np.asarray(Image.fromarray(found).resize((64, 64), Image.Resampling.BOX)).astype(int)
    assert np.abs(small - source).mean() < 30


def test_a_grid_is_one_output_more(running):
    done = make(running, num_images=3, grid=True, output_format="webp", output_quality=80, num_inference_steps=4)
    assert [output["role"] for output in done["outputs"]] == ["image", "image", "image", "grid"]
    assert running.picture(done, 3).shape == (128, 128, 3)
    assert running.client.get("/v1/usage").json()["images"] > 0


def all_tasks(job, mask, rng, count):
    """`count` requests, of each task in turn, each of other words, steps, guidance, scheduler and seed."""
    kinds = [
        {},
        {"image": job, "strength": 0.6},
        {"image": job, "mask": mask},
        {"image": job, "outpaint": {"left": 16, "top": 16, "right": 16, "bottom": 16}},
        {"image": job, "variation": "subtle"},
        {"image": job, "variation": "strong"},
        {"image": job, "upscale": 2},
        {"tiling": True},
        {"image": job, "strength": 0.7, "tiling": True, "loras": [{"name": "flat", "weight": 0.8}]},
        {"loras": [{"name": "night"}]},
    ]
    for i in range(count):
        yield {
            **kinds[i % len(kinds)],
            "prompt": rng.choice(["a red heart", "a sunflower", "a panda", "a crab", ""]),
            "num_inference_steps": rng.randint(4, 6),
            "guidance_scale": rng.choice([3.0, 5.0, 7.5]),
            "scheduler": rng.choice(["ddim", "euler", "dpmpp_2m", "euler_a"]),
            "seed": i,
            "reproducible": i < len(kinds),
        }


@pytest.fixture(scope="module")
def crowd(running, heart, mask):
    """Fifty jobs of all tasks made at once; the same from their params, one after the other; runs a forward."""
    asked = list(all_tasks(heart[0], mask[0], random.Random(SEED), 50))
    before = running.worker_metrics()
    with ThreadPoolExecutor(16) as pool:
        jobs = list(pool.map(lambda request: running.submit(**request), asked))
    together = [running.wait(job["id"], PATIENCE) for job in jobs]
    after = running.worker_metrics()
    runs, forwards = (
        after[f"safelight_batch_runs_{part}"] - before.get(f"safelight_batch_runs_{part}", 0)
        for part in ("sum", "count")
    )
    alone = [running.wait(running.submit(**job["params"])["id"], PATIENCE) for job in together]
    return together, alone, runs / forwards


def test_fifty_jobs_params_sent_again_paint_their_pictures_again(crowd):
    together, alone, _ = crowd
    for first, again in zip(together, alone, strict=True):
        assert first["params"] == again["params"]
        if first["params"]["reproducible"]:
            assert first["outputs"][0]["sha256"] == again["outputs"][0]["sha256"], first["params"]


def test_all_tasks_at_once_share_forwards_and_each_is_what_it_is_alone(running, crowd):
    together, alone, shared = crowd
    apart = [
        int(np.abs(running.picture(first).astype(int) - running.picture(again)).max())
        for first, again in zip(together, alone, strict=True)
    ]
    print(f"seed {SEED}: {shared:.1f} runs a forward, worst difference {max(apart)}/255 of {len(apart)}")
    assert max(apart) <= 1
    assert shared > 2
