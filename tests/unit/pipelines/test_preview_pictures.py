"""Previews: latents of an unfinished run -> a small picture."""

import copy
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from app.core.catalog import load_catalog
from app.core.params import GenerationParams
from tests import tiny
from worker.engine.engine import Engine
from worker.engine.run import Run
from worker.pipelines import previews, schedulers
from worker.pipelines.load import load
from worker.pipelines.tasks import runs_for

# The last step of these ends at what the denoiser takes for the clean latents; the others' formulas mix more into it.
ENDS_CLEAN = ["ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "heun"]
ENDS_CLEAN_BY_FLOW = ["flow_euler", "flow_heun", "flow_unipc", "flow_dpmpp_2m"]
PICTURES = [name for name in tiny.FAMILIES if name not in ("Flux2", "Wan", "Wan 2.2", "LTX", "CogVideoX")]


def correlation(a, b):
    return float(np.corrcoef(np.ravel(a).astype(float), np.ravel(b).astype(float))[0, 1])


class Pipe:
    """Holds a scheduler, as a pipeline does."""

    def __init__(self, scheduler):
        self.scheduler = scheduler


class Keeping:
    """A previewer that keeps the latents it is given."""

    def __init__(self):
        self.seen = []

    def picture(self, latents):
        self.seen.append(latents)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_the_estimate_of_the_last_step_is_what_the_scheduler_ends_at(prediction):
    for name in ENDS_CLEAN_BY_FLOW if prediction == "flow" else ENDS_CLEAN:
        base = {} if prediction == "flow" else {"prediction_type": prediction, "clip_sample": False}
        scheduler = schedulers.make(name, {"set_alpha_to_one": True} | base)
        scheduler.set_timesteps(6)
        pipe, run, keeping = Pipe(scheduler), Run("run", print, steps=6), Keeping()
        previews.follow(run, pipe, keeping, 64, 64)
        assert "sample" in inspect.signature(scheduler.step).parameters
        sample = tiny.noise(1, 4, 8, 8, seed=1) * getattr(scheduler, "init_noise_sigma", 1.0)
        assert run.sketch() is None
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            output = torch.tanh(given.roll(1, -1) + 0.1 * given)
            sample = scheduler.step(output, t, sample, return_dict=False)[0]
        run.sketch()()
        error = (keeping.seen[0] - sample[0]).abs().max() / sample.std()
        assert error < 1e-2, (name, error)


@pytest.mark.parametrize("name", PICTURES)
def test_a_familys_run_hands_over_its_latents_and_a_map_that_follows_its_vae(name):
    family = tiny.build_family(name)
    pipe, run, keeping = copy.copy(family.pipe), Run("run", print, steps=3), Keeping()
    name_of = "euler" if "euler" in family.schedulers else family.schedulers[0]  # both end at the clean latents
    pipe.scheduler = schedulers.make(name_of, pipe.scheduler.config)
    previews.follow(run, pipe, keeping, 32, 32)
    options = family.request(0) | {"generator": torch.Generator().manual_seed(0), "return_dict": False}
    options.pop("denoising_end", None)  # the last step shall be the last
    with torch.inference_mode():
        latents = pipe(**options, output_type="latent")[0]
    run.sketch()()
    if latents.ndim == 3:
        latents = pipe._unpack_latents(latents, 32, 32, pipe.vae_scale_factor)
    difference = (keeping.seen[0].flatten() - latents.flatten()).abs().max() / latents.std()
    assert difference < 0.03  # inpainting puts what is known back after the step

    previewer = previews.fit(family.pipe, 32)
    other = tiny.noise(1, *keeping.seen[0].shape, seed=9)
    with torch.inference_mode():
        made = previews._decoded(pipe.vae, other)[0].clamp(-1, 1).permute(1, 2, 0).numpy()
    drawn = previewer.picture(other[0])
    drawn, made = (each - each.mean((0, 1)) for each in (drawn, made))  # what is where, not which colour all has
    likeness, turned = correlation(drawn, made), correlation(drawn[::-1, ::-1], made)
    print(f"{name}: likeness {likeness:.2f}, turned round {turned:.2f}")  # a random VAE is no linear one
    assert likeness > 0.15
    assert likeness > 2 * abs(turned)


@pytest.mark.parametrize("name", ["Flux2", "Wan", "LTX", "CogVideoX"])
def test_latents_that_are_no_picture_have_no_previews(name):
    assert previews.fit(tiny.build_family(name).pipe, 64) is None


def test_large_pictures_have_small_previews():
    previewer = previews.fit(tiny.build_family("SDXL").pipe, 1024)
    assert previewer.picture(torch.zeros(4, 300, 200)).shape == (256, 171, 3)


def test_previews_of_the_bundled_model_come_closer_to_the_picture():
    model = load(load_catalog(Path("models/models.toml")).models["emoji"], "cpu")
    given = model.spec.defaults.model_dump() | {"num_inference_steps": 12}
    asked = GenerationParams(model="emoji", prompt="a sunflower", seed=3, num_images=1, output_format="png", **given)
    [run] = runs_for(model, asked, "job")
    engine, drawn = Engine(model.modules), {}
    engine.add(run)
    while not run.is_finished:
        engine.step()
        draw = run.sketch and run.sketch()
        if draw and run.step not in drawn:
            drawn[run.step] = draw()
    engine.close()
    likeness = [correlation(each, run.result) for each in drawn.values()]
    print("likeness of a preview to the picture, step by step:", [round(value, 2) for value in likeness])
    assert list(drawn) == list(range(1, 13))
    assert likeness[-1] > 0.8
    assert likeness[len(likeness) // 2] > 0.6
    assert likeness[-1] > likeness[0]
