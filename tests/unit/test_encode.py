import io

import numpy as np
import pytest
from PIL import Image
from sd_parsers import ParserManager

from app.core.params import GenerationParams, Lora
from worker.encode import encode, grid, infotext

FORMATS = ["png", "jpeg", "webp"]


def params(**options):
    asked = {
        "model": "tiny",
        "prompt": "a cat, smiling",
        "negative_prompt": "dog",
        "width": 64,
        "height": 48,
        "num_inference_steps": 20,
        "guidance_scale": 5.5,
        "seed": 7,
        "num_images": 1,
        "scheduler": "euler_a",
        "output_format": "png",
    }
    return GenerationParams(**(asked | options))


def picture(seed=0, height=48, width=64):
    smooth = np.random.RandomState(seed).randint(0, 255, (height // 8, width // 8, 3), dtype="uint8")
    return np.kron(smooth, np.ones((8, 8, 1), "uint8"))


def test_the_text_is_as_a1111_writes_it():
    told = infotext(params(loras=(Lora(name="ink", weight=0.5),), image="upload_x", strength=0.6), 9)
    prompt, negative, settings = told.split("\n")
    assert prompt == "a cat, smiling <lora:ink:0.5>"
    assert negative == "Negative prompt: dog"
    assert settings.startswith(
        "Steps: 20, Sampler: Euler a, CFG scale: 5.5, Seed: 9, Size: 64x48, Model: tiny, Denoising strength: 0.6, "
    )


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("prompt", ["a cat, smiling", "ein Kätzchen\nzwei: drei", "猫"])
def test_a_reader_of_a1111s_pictures_finds_the_parameters(output_format, prompt):
    asked = params(output_format=output_format, embed_metadata=True, prompt=prompt)
    found = ParserManager().parse(io.BytesIO(encode(picture(), asked, 9)))
    assert found.full_prompt == prompt
    assert found.full_negative_prompt == "dog"
    [sampler] = found.samplers
    assert (sampler.name, sampler.parameters["seed"], sampler.parameters["steps"]) == ("Euler a", "9", "20")
    assert {model.name for model in found.models} == {"tiny"}
    assert found.metadata["Size"] == "64x48"


@pytest.mark.parametrize("output_format", FORMATS)
def test_nothing_is_embedded_unless_asked_for(output_format):
    with Image.open(io.BytesIO(encode(picture(), params(output_format=output_format), 9))) as opened:
        opened.load()
        assert not opened.getexif()
        assert "parameters" not in opened.info
        assert "exif" not in opened.info


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_less_quality_is_fewer_bytes(output_format):
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype="uint8")
    sizes = [len(encode(noise, params(output_format=output_format, output_quality=q), 0)) for q in (5, 50, None, 100)]
    assert sizes == sorted(set(sizes))


def test_a_png_loses_nothing():
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(picture(), params(), 0)))), picture())


@pytest.mark.parametrize(("count", "shape"), [(1, (48, 64)), (2, (48, 128)), (3, (96, 128)), (5, (96, 192))])
def test_a_grid_holds_all_pictures_row_by_row(count, shape):
    pictures = [picture(seed) for seed in range(count)]
    sheet = grid(pictures)
    assert sheet.shape == (*shape, 3)
    columns = shape[1] // 64
    for i, one in enumerate(pictures):
        top, left = i // columns * 48, i % columns * 64
        assert np.array_equal(sheet[top : top + 48, left : left + 64], one)
