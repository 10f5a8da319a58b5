"""The bundled model as it is committed: what it weighs, that it loads, and that it paints what it is asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from app.core.catalog import load_catalog
from app.core.params import GenerationRequest, complete
from models.train import judge
from models.train.evaluate import STATISTICS
from models.train.sources import FLAT, PICTURES, WORDS
from worker.engine.run import Run
from worker.pipelines.load import check_folder, load
from worker.pipelines.pictures import NOTHING
from worker.pipelines.tasks import paint

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "models" / "emoji"
PROMPTS = {
    "koala": "koala",
    "fox": "fox",
    "butterfly": "butterfly",
    "penguin": "penguin",
    "strawberry": "strawberry",
    "a slice of pizza": "pizza",
    "the red heart": "red heart",
    "cactus": "cactus",
    "pineapple": "pineapple",
    "crab": "crab",
    "sunflower": "sunflower",
    "rainbow": "rainbow",
}


@pytest.fixture(scope="module")
def names() -> list[str]:
    return [line.split("\t")[0] for line in (FOLDER / "names.tsv").read_text().splitlines()]


@pytest.fixture(scope="module")
def known(names) -> judge.Judge:
    tiles = judge.read_tiles(Path(__file__).with_name("references.webp"), len(names))
    return judge.Judge(judge.references(tiles, judge.SIDE))


@pytest.fixture(scope="module")
def pipe():
    """Loaded as a newcomer loads it: nothing but the folder's name."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def catalog():
    return load_catalog(ROOT / "models" / "models.toml")


def pictures(pipe, prompts, **options) -> np.ndarray:
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    given = {"num_inference_steps": 20, "guidance_scale": 5.0} | options
    images = pipe(list(prompts), generator=generators, output_type="np", **given).images
    return (images * 255).round().astype(np.uint8)


def test_the_weights_are_small_and_no_file_is_over_15_mib():
    sizes = {f: f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()}
    assert sum(size for file, size in sizes.items() if file.suffix == ".safetensors") <= 40e6
    assert max(sizes.values()) <= 15 * 2**20


def test_the_folder_holds_nothing_that_could_run_code():
    assert check_folder(FOLDER).__name__ == "StableDiffusionPipeline"


def test_it_knows_at_least_five_hundred_concepts(names):
    assert len(names) == len(set(names)) >= 500


def test_its_card_names_every_source_its_version_and_its_licence():
    card = (FOLDER / "README.md").read_text()
    assert all(f"| {p.name} | {p.version} | {p.licence} |" in card for p in (PICTURES, WORDS, FLAT))


def test_it_loads_in_fp32_and_its_parts_fit_8x8_latents(pipe):
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert {p.dtype for p in parts} == {torch.float32}
    assert pipe.unet.num_parameters() <= 18e6
    assert (pipe.unet.config.sample_size, pipe.vae_scale_factor) == (8, 8)


# Known not to hold: the published weights need more steps. Strict, so that weights which reach it end this mark.
def test_the_measured_figures_reach_what_was_asked():
    figures = json.loads((FOLDER / "evaluation.json").read_text())
    assert figures["names"]["first"] >= 0.8
    assert figures["names"]["among_five"] >= 0.93
    assert figures["keywords"]["among_five"] >= 0.6
    assert figures["sentences"]["among_five"] >= 0.6


def test_its_autoencoder_and_its_variety_reach_what_was_asked():
    figures = json.loads((FOLDER / "evaluation.json").read_text())
    assert figures["autoencoder"]["psnr"] >= 28
    assert figures["seeds"]["mean_difference"] > 8


def test_it_paints_what_it_is_asked_for(pipe, known, names):
    order = known.order(pictures(pipe, PROMPTS))
    found = judge.places(order, [{names.index(n)} for n in PROMPTS.values()])
    assert (found < 5).sum() >= len(PROMPTS) - 1


@pytest.mark.parametrize("scheduler", load_catalog(ROOT / "models" / "models.toml").get("emoji").schedulers)
def test_every_scheduler_it_offers_paints_a_koala(emoji, catalog, known, names, scheduler):
    request = GenerationRequest(model="emoji", prompt="koala", seed=3, scheduler=scheduler)
    params = complete(request, catalog)
    with torch.inference_mode():
        picture = paint(emoji, params, NOTHING, params.seed, Run("koala", print, 20))
    assert names.index("koala") in known.order(picture[None])[0, :5]


@pytest.fixture(scope="module")
def emoji(catalog):
    """Loaded as a worker loads it."""
    return load(catalog.get("emoji"), "cpu")


def test_it_is_the_default_model_and_shows_twelve_examples(catalog):
    assert catalog.default.name == "emoji"
    assert len(catalog.default.examples) == 12


@pytest.mark.parametrize(("style", "statistic", "sign"), [("flat", "saturation", 1), ("night", "brightness", -1)])
def test_an_adapter_moves_its_statistic_with_its_weight(pipe, style, statistic, sign):
    measure = STATISTICS[statistic]
    pipe.load_lora_weights(FOLDER / "loras", weight_name=f"{style}.safetensors", adapter_name=style)
    try:
        values = []
        for weight in (0.0, 0.5, 1.0):
            pipe.set_adapters(style, weight)
            values.append(sign * measure(pictures(pipe, [*PROMPTS][:8], num_inference_steps=12)))
    finally:
        pipe.unload_lora_weights()
    assert values[0] < values[1] < values[2]


def test_a_negative_prompt_moves_the_picture_away(pipe, known, names):
    before = pictures(pipe, ["bird"] * 4)
    shown = known.order(before)[:, 0]
    after = pictures(pipe, ["bird"] * 4, negative_prompt=[names[i] for i in shown])
    assert (known.order(after)[:, 0] != shown).sum() >= 3
