import pytest
import torch

from app.core.errors import ConfigError
from tests.tiny import build_family
from tests.unit.pipelines.conftest import params_of, spec_of
from worker.engine.run import Run
from worker.pipelines.arguments import arguments, unused
from worker.pipelines.load import warm


def asked(family, **options):
    return arguments(build_family(family).pipe, params_of(**options), 7, Run("r", print, 1))


def test_a_pipeline_gets_diffusers_own_names():
    given = asked("SD", negative_prompt="dog", guidance_scale=4.0, width=96)

    assert (given["negative_prompt"], given["guidance_scale"], given["width"]) == ("dog", 4.0, 96)
    assert given["generator"].initial_seed() == 7


@pytest.mark.parametrize("family", ["QwenImage", "Flux schnell"])
def test_guidance_of_a_model_that_has_no_input_for_it_is_a_second_forward(family):
    given = asked(family, guidance_scale=4.0, negative_prompt="dog")

    assert given["true_cfg_scale"] == 4.0
    assert "guidance_scale" not in given
    assert given["negative_prompt"] == "dog"


def test_guidance_of_flux_dev_is_an_input_of_the_model():
    given = asked("Flux", guidance_scale=4.0)

    assert given["guidance_scale"] == 4.0
    assert "true_cfg_scale" not in given


@pytest.mark.parametrize(
    ("family", "vain"),
    [
        ("SD", set()),
        ("SDXL", set()),
        ("QwenImage", set()),
        ("Flux schnell", set()),
        ("Wan", set()),
        ("Flux", {"negative_prompt"}),
        ("Flux2", {"negative_prompt"}),
    ],
)
def test_what_changes_nothing_in_a_pipelines_pictures_is_known(family, vain):
    assert unused(build_family(family).pipe) == vain


def test_a_catalog_that_accepts_what_a_pipeline_has_no_use_for_is_refused(tmp_path):
    pipe = build_family("Flux").pipe
    said = {"schedulers": ("flow_euler",), "defaults": {"width": 64, "height": 64, "scheduler": "flow_euler"}}

    with pytest.raises(ConfigError, match=r"no use for negative_prompt; set accepts = \['guidance_scale'\]"):
        warm(spec_of(tmp_path, **said), pipe, torch.device("cpu"), torch.float32)
    warm(spec_of(tmp_path, **said, accepts=("guidance_scale",)), pipe, torch.device("cpu"), torch.float32)
