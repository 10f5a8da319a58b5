"""Tasks by diffusers' own pipelines around one model's warm modules, together and alone; tiny random weights."""

import copy

import diffusers as D  # noqa: N812  # as tests/tiny.py has it
import numpy as np
import pytest
import torch
from PIL import Image

from app.core.catalog import ControlnetSpec
from app.core.errors import ConfigError
from app.core.params import Control, Margins
from tests.checkpoints import controlnet, four_times, two_times
from tests.tiny import UNET, Log, build_family
from tests.unit.pipelines.conftest import params_of, spec_of
from worker.engine.engine import Engine
from worker.engine.tiling import tiled
from worker.pipelines.load import warm
from worker.pipelines.pictures import prepare
from worker.pipelines.tasks import runs_for, warm_up
from worker.pipelines.tiny_model import build
from worker.pipelines.variants import Variants

TASKS = ("text_to_image", "image_to_image", "inpainting", "tiling")
CPU = (torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def model():
    nets = {"edges": controlnet(1), "depth": controlnet(2)}
    entries = {kind: ControlnetSpec(source=kind) for kind in nets}
    return warm(spec_of("x", tasks=TASKS, controlnets=entries), build(), *CPU, nets)


def picture(seed, side=64):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (side, side, 3), dtype="uint8"))


def mask():
    pixels = np.zeros((64, 64), np.uint8)
    pixels[20:44, 8:40] = 255
    return Image.fromarray(pixels)


PICTURES = {"a": picture(1), "b": picture(2), "mask": mask()}
ASKED = {
    "text to image": {},
    "image to image": {"image": "a", "strength": 0.6},
    "inpainting": {"image": "a", "mask": "mask", "strength": 1.0},
    "outpainting": {"image": "b", "outpaint": Margins(left=16, right=16, top=16, bottom=16), "strength": 1.0},
    "subtle": {"image": "b", "variation": "subtle"},
    "strong": {"image": "b", "variation": "strong"},
}
OTHERS = {
    "upscale": {
        "image": "a", "upscale": 2, "upscale_method": "resample", "strength": 0.5, "width": 128, "height": 128
    },
    "tiling": {"tiling": True},
    "edges": {"controls": (Control(type="edges", image="b"),)},
    "edges of an image": {"controls": (Control(type="edges", image="b"),), "image": "a", "strength": 0.7},
    "edges in a mask": {
        "controls": (Control(type="edges", image="b"),), "image": "a", "mask": "mask", "strength": 1.0
    },
    "edges and depth": {
        "controls": (Control(type="edges", image="b"), Control(type="depth", image="a", scale=0.5))
    },
}  # fmt: skip


def runs_of(model, asked, name="job"):
    params = params_of(**({"guidance_scale": 4.0, "num_inference_steps": 6} | asked))
    return runs_for(model, params, name, prepare(params, PICTURES))


def alone(model, **asked):
    [run] = runs_of(model, asked)
    convolutions = [c for target in model.modules.values() for c in target.convolutions] if run.tiling else []
    with torch.inference_mode(), tiled(convolutions):
        return run.body(run).astype(int)


def together(model, many):
    log = Log()
    engine = Engine(model.modules, log, max_batch=64)
    runs = [run for i, asked in enumerate(many) for run in runs_of(model, asked, f"job-{i}")]
    for run in runs:
        engine.add(run)
    while not engine.is_idle:
        engine.step()
    engine.close()
    for run in runs:
        assert run.error is None, run.error.__cause__
    return runs, log


def test_all_tasks_at_once_share_forwards_and_each_is_what_it_is_alone(model):
    asked = [fields | {"seed": i} for i, fields in enumerate({**ASKED, **OTHERS}.values())]
    runs, log = together(model, asked)

    for fields, run in zip(asked, runs, strict=True):
        assert np.abs(run.result.astype(int) - alone(model, **fields)).max() <= 1, fields
    denoised = log.of("unet")
    print(f"{sum(entry[2] for entry in denoised) / len(denoised):.1f} runs a forward")
    assert max(entry[2] for entry in denoised) >= 5  # tasks of one size that need no company of their own
    assert max(entry[2] for entry in log.of("controlnet.edges")) >= 3


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "heun", "pndm", "dpmpp_2m"])
@pytest.mark.parametrize("name", ["image to image", "inpainting", "subtle"])
def test_steps_are_counted_as_a_pipeline_that_starts_from_an_image_takes_them(model, name, scheduler):
    runs, log = together(model, [ASKED[name] | {"scheduler": scheduler}])

    assert runs[0].step == runs[0].steps == len(log.of("unet"))


def test_progress_is_promised_as_it_is_kept(model):
    for name, fields in {**ASKED, "edges": OTHERS["edges"]}.items():
        [run] = runs_of(model, fields)
        promised = run.steps
        with torch.inference_mode():
            run.body(run)
        assert (run.step, run.steps) == (promised, promised), name


def test_outside_the_mask_nothing_changes_and_inside_it_does(model):
    apart = np.abs(alone(model, **ASKED["inpainting"]) - np.asarray(PICTURES["a"])).max(axis=2)
    is_new = np.asarray(PICTURES["mask"]) > 0

    assert apart[~is_new].max() == 0
    assert apart[is_new].mean() > 8


def test_a_tiled_picture_has_no_seam_and_its_company_does_not_tile(model):
    many = [{"tiling": tiling, "seed": seed} for seed in range(4) for tiling in (True, False)]
    runs, _ = together(model, many)

    def seam(pictures):
        edges = [np.abs(p[0] - p[-1]).mean() + np.abs(p[:, 0] - p[:, -1]).mean() for p in pictures]
        inside = [np.abs(np.diff(p, axis=0)).mean() + np.abs(np.diff(p, axis=1)).mean() for p in pictures]
        return np.mean(edges) / np.mean(inside)

    tiled, plain = ([run.result.astype(int) for run in runs[start::2]] for start in (0, 1))
    print(f"seam of the gradient inside: tiled {seam(tiled):.2f}, plain {seam(plain):.2f}")
    assert seam(tiled) <= 1.1 < seam(plain)
    for i, found in enumerate(plain):
        assert np.abs(found - alone(model, seed=i)).max() <= 1
    assert all(conv.padding_mode == "zeros" for conv in model.modules["unet"].convolutions)


def test_a_control_steers_and_none_of_it_does_not(model):
    plain = alone(model)

    def steered(scale):
        return np.abs(alone(model, controls=(Control(type="edges", image="b", scale=scale),)) - plain).mean()

    assert steered(0.0) < 0.01 < steered(0.5) < steered(1.5)


def test_a_variant_shares_the_models_modules(model):
    for ability in ("image_to_image", "inpainting"):
        assert model.variants.get(ability).vae is model.pipe.vae
    assert model.variants.get("image_to_image", ("edges",)).unet is model.pipe.unet


@pytest.mark.parametrize("family", ["SD", "SDXL", "SD3", "Flux", "QwenImage", "Z-Image"])
def test_families_that_have_the_pipelines_start_from_images(family):
    pipe = build_family(family).pipe
    variants = Variants(spec_of("x", tasks=TASKS[:3]), pipe)

    assert "Img2Img" in type(variants.get("image_to_image")).__name__
    assert "Inpaint" in type(variants.get("inpainting")).__name__


@pytest.mark.parametrize(
    ("family", "ability"),
    [("PixArt", "image_to_image"), ("Wan", "inpainting"), ("Flux2", "image_to_image"), ("SD3", "tiling")],
)
def test_a_task_that_a_models_kind_has_no_pipeline_for_is_refused_with_the_remedy(family, ability):
    with pytest.raises(ConfigError, match=rf"no pipeline for {ability}; set tasks = \['text_to_image'\]"):
        Variants(spec_of("x", tasks=("text_to_image", ability)), build_family(family).pipe)


@pytest.mark.parametrize("ability", ["image_to_image", "inpainting"])
def test_a_model_that_only_starts_from_pictures_is_warmed_up_with_one(ability):
    model = warm(spec_of("x", tasks=(ability,)), build(), *CPU)
    engine = Engine(model.modules)
    warm_up(model, engine, rows=2)
    engine.close()

    assert {name for name, _ in engine.batcher.curves} == set(model.modules)


@pytest.mark.parametrize(("made", "factor"), [(four_times, 4), (two_times, 2)])
def test_upscaling_models_upscale_several_pictures_in_one_forward(made, factor):
    pipe = made()
    side = 32 * factor
    defaults = {"width": side, "height": side, "scheduler": "euler"}
    spec = spec_of("x", tasks=("upscaling",), upscale_factor=factor, defaults=defaults)
    model = warm(spec, pipe, *CPU)
    engine = Engine(model.modules)
    warm_up(model, engine, rows=2)
    engine.close()
    given = {"upscale": factor, "upscale_method": "model", "width": side, "height": side, "scheduler": "euler"}
    asked = [given | {"image": name, "seed": i} for i, name in enumerate("ab")]
    runs, log = together(model, asked)

    for fields, run in zip(asked, runs, strict=True):
        assert run.result.shape == (side, side, 3)
        assert np.abs(run.result.astype(int) - alone(model, **fields)).max() <= 1
    assert np.abs(runs[0].result.astype(int) - runs[1].result).mean() > 1
    assert max(entry[2] for entry in log.of("unet")) == 2


def test_a_unet_of_sixteen_channels_inpaints():
    pipe = copy.copy(build())
    torch.manual_seed(0)
    pipe.unet = D.UNet2DConditionModel(
        **UNET, in_channels=16, out_channels=16, cross_attention_dim=32, attention_head_dim=4
    ).eval()
    pipe.vae = D.AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=4,
    ).eval()
    model = warm(spec_of("x", tasks=TASKS), pipe, *CPU)
    runs, _ = together(model, [ASKED["inpainting"], {}])

    apart = np.abs(runs[0].result.astype(int) - np.asarray(PICTURES["a"])).max(axis=2)
    assert apart[np.asarray(PICTURES["mask"]) == 0].max() == 0
    assert apart[np.asarray(PICTURES["mask"]) > 0].mean() > 8
