"""What a request's fields ask for, by which model, and at which size; without a picture being looked at."""

import random

import pytest

from app.core.catalog import Catalog, ControlnetSpec, Defaults, Limits, ModelSpec
from app.core.errors import ConfigError, InvalidParams
from app.core.params import GenerationRequest, complete
from app.core.tasks import Size, tasks_of

SEED = 20261124
ALL = ("text_to_image", "image_to_image", "inpainting", "tiling")


def spec(name="tiny", **options):
    limits = Limits(min_side=64, max_side=512, multiple_of=8, max_pixels=512 * 384, max_upscaled_pixels=1024 * 768)
    defaults = Defaults(width=256, height=256, scheduler="ddim")
    given = {"source": "x", "defaults": defaults, "schedulers": ("ddim",), "limits": limits, "tasks": ALL}
    return ModelSpec(name=name, **(given | options))


def upscaler(name="x4", factor=4):
    return spec(name, tasks=("upscaling",), upscale_factor=factor)


def ask(models=None, size=(256, 192), **options):
    request = GenerationRequest.model_validate({"prompt": "a cat"} | options)
    return complete(request, Catalog(models or [spec()]), {"a": Size(*size)})


def size_of(params):
    return params.width, params.height


@pytest.mark.parametrize(
    ("picture", "wanted"),
    [
        ((256, 192), (256, 192)),
        ((250, 190), (248, 192)),  # to the nearest multiple
        ((1024, 512), (512, 256)),  # into the longest side
        ((2000, 2000), (440, 440)),  # into the pixels
        ((32, 48), (64, 96)),  # up to the shortest side
        ((4000, 10), (512, 64)),  # no size has that shape: the nearest that is allowed
    ],
)
def test_the_size_of_a_result_is_its_images_moved_into_the_limits(picture, wanted):
    assert size_of(ask(image="a", size=picture)) == wanted


def test_a_side_that_is_named_takes_the_other_along():
    assert size_of(ask(image="a", width=128)) == (128, 96)
    assert size_of(ask(image="a", height=96)) == (128, 96)
    assert size_of(ask(image="a", width=128, height=128)) == (128, 128)


def test_margins_and_factors_count():
    assert size_of(ask(image="a", outpaint={"left": 64, "top": 32})) == (320, 224)
    assert size_of(ask(image="a", upscale=2)) == (512, 384)
    assert size_of(ask(image="a", upscale=4)) == (1024, 768)
    assert size_of(ask(image="a", upscale=4, size=(512, 384))) == (1024, 768)  # as much as may come out


def test_without_an_image_the_size_is_the_models_default():
    assert size_of(ask()) == (256, 256)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"upscale": 4, "width": 2048, "height": 1536}, "at most 786432 pixels after upscaling"),
        ({"upscale": 2, "width": 129, "height": 128}, "width must be a multiple of 2"),
        ({"upscale": 2, "width": 136, "height": 128}, "width before upscaling must be a multiple of 8"),
        ({"upscale": 2, "upscale_method": "model"}, "no upscaler of factor 2"),
    ],
)
def test_limits_hold_before_an_upscale_and_others_after_it(fields, words):
    with pytest.raises(InvalidParams, match=words):
        ask(image="a", **fields)


@pytest.mark.parametrize(
    ("fields", "strength"),
    [
        ({}, None),
        ({"image": "a"}, 0.8),
        ({"image": "a", "strength": 0.3}, 0.3),
        ({"image": "a", "mask": "a"}, 1.0),
        ({"image": "a", "outpaint": {"left": 8}}, 1.0),
        ({"image": "a", "variation": "subtle"}, None),
        ({"image": "a", "upscale": 2}, 0.3),
    ],
)
def test_a_task_that_names_no_strength_has_its_own(fields, strength):
    assert ask(**fields).strength == strength


def test_an_upscale_is_a_job_of_the_models_upscaler_where_it_has_one():
    models = [spec(upscalers={"4": "x4"}), upscaler()]
    params = ask(models, image="a", upscale=4, size=(64, 64))
    assert (params.model, params.upscale_method, params.strength) == ("x4", "model", None)
    assert ask(models, **params.model_dump(mode="json", exclude={"image"}), image="a", size=(64, 64)) == params

    assert ask(models, image="a", upscale=2).upscale_method == "resample"
    params = ask(models, image="a", upscale=4, upscale_method="resample", size=(64, 64))
    assert (params.model, params.strength) == ("tiny", 0.3)


def test_an_upscaler_does_nothing_else_and_keeps_its_factor():
    for fields, words in (({}, "cannot do text_to_image; it can do upscale"), ({"upscale": 2}, "upscale must be 4")):
        with pytest.raises(InvalidParams, match=words):
            ask([upscaler()], **({"image": "a"} if fields else {}), **fields)


def test_what_a_model_cannot_do_is_refused_with_what_it_can():
    for fields in ({"image": "a"}, {"image": "a", "mask": "a"}, {"tiling": True}):
        with pytest.raises(InvalidParams, match=r"it can do text_to_image$"):
            ask([spec(tasks=("text_to_image",))], **fields)


def test_a_models_tasks_are_told_with_those_that_follow_from_them():
    able = spec(controlnets={"edges": ControlnetSpec(source="x")})
    plain = ["text_to_image", "image_to_image", "variation", "upscale", "inpainting", "outpainting"]
    assert tasks_of(able) == [*plain[:2], *plain[2:], "tiling", "controlnet"]
    assert tasks_of(spec(tasks=("text_to_image",))) == ["text_to_image"]
    assert tasks_of(upscaler()) == ["upscale"]


@pytest.mark.parametrize("named", [{"4": "none"}, {"2": "x4"}, {"4": "tiny"}])
def test_a_catalog_names_upscalers_that_are_there_and_of_that_factor(named):
    with pytest.raises(ConfigError, match="is no model with upscale_factor"):
        Catalog([spec(upscalers=named), upscaler()])


def test_a_factor_belongs_to_a_model_that_upscales():
    for options in ({"upscale_factor": 2}, {"tasks": ("upscaling",)}):
        with pytest.raises(ValueError, match="upscale_factor if upscaling"):
            spec(**options)


def test_whatever_its_shape_an_image_alone_has_a_size_that_is_allowed():
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    for _ in range(500):
        picture = (rng.randint(1, 8192), rng.randint(1, 2000))
        for options in ({}, {"upscale": 2}):
            width, height = size_of(ask(image="a", size=picture, **options))
            assert width * height <= 512 * 384 * options.get("upscale", 1) ** 2


def test_a_canvas_that_no_worker_should_hold_is_refused():
    margins = {"left": 8192, "right": 8192, "top": 8192, "bottom": 8192}
    with pytest.raises(InvalidParams, match="at most 16000000"):
        ask(image="a", size=(64, 64), outpaint=margins)


def test_the_default_of_what_a_model_has_no_use_for_may_be_sent_again():
    schnell = spec(accepts=())
    params = ask([schnell])
    again = params.model_dump(exclude_defaults=True)
    assert ask([schnell], **again) == params
    with pytest.raises(InvalidParams, match="guidance_scale"):
        ask([schnell], guidance_scale=params.guidance_scale + 1)
