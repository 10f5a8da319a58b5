import numpy as np
import pytest
from PIL import Image

from app.core.params import Margins
from tests.unit.pipelines.conftest import params_of
from worker.pipelines.pictures import Source, cover, flat, prepare


def noise(width, height, seed=0, channels=3):
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, channels), dtype="uint8")
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0])


def source_of(image, mask=None, **options):
    pictures = {"image": image, "mask": mask}
    named = {"image": "image"} | ({"mask": "mask"} if mask else {})
    return prepare(params_of(**named, **options), pictures)


def test_a_picture_of_the_asked_size_is_not_touched():
    image = noise(64, 64)
    assert np.array_equal(np.asarray(source_of(image).image), np.asarray(image))


def test_a_picture_of_another_shape_covers_the_size_and_is_cropped_at_its_centre():
    wide = noise(128, 64)
    assert np.array_equal(np.asarray(cover(wide, 64, 64)), np.asarray(wide)[:, 32:96])
    assert cover(wide, 32, 32).size == (32, 32)


def test_what_is_transparent_lies_on_white():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert flat(clear).getpixel((0, 0)) == (255, 255, 255)


def test_outside_the_mask_the_result_is_the_source_and_greys_blend():
    image, mask = noise(64, 64), np.zeros((64, 64), np.uint8)
    mask[:, 32:], mask[:, 48:] = 128, 255
    source = source_of(image, Image.fromarray(mask))
    new = np.full((64, 64, 3), 200, np.uint8)
    found, old = source.kept_in(new).astype(int), np.asarray(image).astype(int)
    assert np.array_equal(found[:, :32], old[:, :32])
    assert np.array_equal(found[:, 48:], new[:, 48:])
    assert np.abs(found[:, 32:48] - (old[:, 32:48] + 200) / 2).max() <= 1


def test_a_masks_nearly_black_and_white_are_black_and_white():
    mask = np.full((64, 64), 5, np.uint8)
    mask[:8] = 250
    source = source_of(noise(64, 64), Image.fromarray(mask))
    assert set(np.unique(source.mask)) == {0.0, 1.0}


def test_a_mask_of_the_alpha_channel_paints_what_is_transparent():
    image = noise(64, 64, channels=4)
    image.putalpha(Image.fromarray(np.pad(np.zeros((64, 32), np.uint8), ((0, 0), (0, 32)), constant_values=255)))
    source = prepare(params_of(image="image", mask="image", mask_channel="alpha"), {"image": image})
    assert (source.mask[:, :32] == 1).all()
    assert (source.mask[:, 32:] == 0).all()


def test_a_cell_of_the_latents_is_painted_if_one_pixel_of_it_is():
    mask = np.zeros((64, 64), np.uint8)
    mask[10, 21] = 255
    cells = np.asarray(source_of(noise(64, 64), Image.fromarray(mask)).cells(8))
    assert cells.sum() == 64 * 255
    assert (cells[8:16, 16:24] == 255).all()


def test_a_canvas_has_the_image_at_its_place_and_the_mask_around_it():
    image = noise(48, 40)
    source = prepare(params_of(image="image", outpaint=Margins(left=16, bottom=24)), {"image": image})
    assert np.array_equal(np.asarray(source.image)[:40, 16:], np.asarray(image))
    assert source.mask[:40, 16:].max() == 0
    assert source.mask[40:].min() == source.mask[:, :16].min() == 1


@pytest.mark.parametrize(("method", "size"), [("resample", (128, 128)), ("model", (64, 64))])
def test_an_upscale_starts_large_by_resampling_and_small_by_a_model(method, size):
    source = source_of(noise(64, 64), upscale=2, upscale_method=method, width=128, height=128)
    assert source.image.size == size


def test_without_a_picture_there_is_nothing_to_keep():
    painted = np.zeros((8, 8, 3), np.uint8)
    assert Source().kept_in(painted) is painted
