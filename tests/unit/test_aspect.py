"""Aspect ratios: the size they become."""

import pytest

from app.core.aspect import snap
from app.core.catalog import ModelSpec
from app.core.errors import InvalidParams
from app.core.params import GenerationRequest, complete
from tests.unit.test_params import Catalog

SIDES = {"sdxl": (1024, 512, 2048, 64, 1024 * 1024), "sd": (512, 256, 1024, 8, 768 * 768), "one": (64, 64, 64, 8, 4096)}


def spec(name="sdxl"):
    side, least, most, step, pixels = SIDES[name]
    return ModelSpec(
        name=name,
        source="x",
        schedulers=("ddim",),
        defaults={"width": side, "height": side, "scheduler": "ddim"},
        limits={"min_side": least, "max_side": most, "multiple_of": step, "max_pixels": pixels},
    )


@pytest.mark.parametrize(
    ("model", "ratio", "size"),
    [
        ("sdxl", "1:1", (1024, 1024)),
        ("sdxl", "16:9", (1344, 768)),
        ("sdxl", "9:16", (768, 1344)),
        ("sdxl", "3:2", (1216, 832)),
        ("sdxl", "21:9", (1536, 640)),
        ("sd", "4:3", (592, 440)),
        ("sd", "16:9", (680, 384)),
        ("one", "1:1", (64, 64)),
    ],
)
def test_a_ratio_becomes_the_models_nearest_size(model, ratio, size):
    found = snap(ratio, spec(model))
    assert (found.width, found.height) == size


@pytest.mark.parametrize("name", SIDES)
def test_every_ratio_becomes_a_size_within_the_limits_and_near_the_shape_or_is_refused(name):
    model = spec(name)
    limits = model.limits
    for width in range(1, 22):
        for height in range(1, 22):
            try:
                size = snap(f"{width}:{height}", model)
            except InvalidParams:
                continue
            assert abs(size.width / size.height / (width / height) - 1) <= 0.15
            assert size.width * size.height <= limits.max_pixels
            for side in (size.width, size.height):
                assert side % limits.multiple_of == 0
                assert limits.min_side <= side <= limits.max_side


@pytest.mark.parametrize(("model", "ratio"), [("one", "16:9"), ("sdxl", "9:1"), ("sdxl", "0:1"), ("sdxl", "wide")])
def test_a_shape_that_the_model_does_not_paint_is_refused(model, ratio):
    with pytest.raises(InvalidParams, match="aspect_ratio"):
        snap(ratio, spec(model))


def test_params_hold_width_and_height_and_not_both_may_be_asked_for():
    catalog = Catalog([spec()])
    params = complete(GenerationRequest(prompt="a", aspect_ratio="16:9"), catalog)
    assert (params.width, params.height) == (1344, 768)
    assert "aspect_ratio" not in params.model_dump()
    with pytest.raises(InvalidParams, match="aspect_ratio must be left out: width"):
        complete(GenerationRequest(prompt="a", aspect_ratio="16:9", width=512), catalog)
