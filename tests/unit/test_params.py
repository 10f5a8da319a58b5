import pytest
from pydantic import ValidationError

from app.core.catalog import Catalog, Defaults, LoraSpec, ModelSpec, load_catalog
from app.core.errors import InvalidParams
from app.core.params import GenerationParams, GenerationRequest, complete


def catalog(**options):
    defaults = Defaults(width=64, height=64, scheduler="ddim")
    return Catalog([ModelSpec(name="tiny", source="tiny", defaults=defaults, schedulers=("ddim",), **options)])


def ask(spec=None, **options):
    return complete(GenerationRequest.model_validate({"prompt": "a cat"} | options), spec or catalog())


LORAS = {"ink": LoraSpec(source="ink.safetensors"), "oil": LoraSpec(source="oil.safetensors")}


def test_a_request_that_names_no_adapter_has_none_and_is_not_reproducible():
    params = ask()

    assert params.loras == ()
    assert params.reproducible is False


def test_adapters_keep_their_order_and_a_weight_is_one_unless_given():
    params = ask(catalog(loras=LORAS), loras=[{"name": "oil", "weight": 0.5}, {"name": "ink"}], reproducible=True)

    assert [(lora.name, lora.weight) for lora in params.loras] == [("oil", 0.5), ("ink", 1.0)]
    assert params.reproducible
    assert GenerationParams.model_validate_json(params.model_dump_json()) == params


def test_an_adapter_that_the_model_does_not_have_is_refused_with_those_it_has():
    with pytest.raises(InvalidParams, match="no adapter 'pen'; it has ink, oil"):
        ask(catalog(loras=LORAS), loras=[{"name": "pen"}])
    with pytest.raises(InvalidParams, match="it has none"):
        ask(loras=[{"name": "pen"}])


def test_an_adapter_is_named_once():
    with pytest.raises(InvalidParams, match="once"):
        ask(catalog(loras=LORAS), loras=[{"name": "ink"}, {"name": "ink"}])


@pytest.mark.parametrize(
    "loras",
    [
        [{"name": "../ink"}],
        [{"name": "ink", "weight": 4.5}],
        [{"name": "ink", "weight": float("nan")}],
        [{"name": "ink", "file": "x"}],
        ["ink"],
        [{"name": "ink"}] * 5,
    ],
)
def test_an_adapter_is_a_name_of_the_catalog_and_a_weight(loras):
    with pytest.raises(ValidationError):
        ask(catalog(loras=LORAS), loras=loras)


def test_a_negative_prompt_that_a_model_has_no_use_for_is_refused():
    distilled = catalog(accepts=("guidance_scale",))

    with pytest.raises(InvalidParams, match="negative_prompt must be empty"):
        ask(distilled, negative_prompt="dog")
    assert ask(distilled, negative_prompt="").negative_prompt == ""
    assert ask(negative_prompt="dog").negative_prompt == "dog"


def test_guidance_that_a_model_has_no_use_for_is_refused():
    with pytest.raises(InvalidParams, match="guidance_scale must be left out"):
        ask(catalog(accepts=()), guidance_scale=3.0)
    assert ask(catalog(accepts=())).guidance_scale == 5.0


def test_lcm_takes_no_more_steps_than_it_was_distilled_for():
    own = {"schedulers": ("ddim", "lcm")}
    spec = Catalog([catalog().get("tiny").model_copy(update=own)])
    assert ask(spec, scheduler="lcm", num_inference_steps=50).num_inference_steps == 50
    assert ask(spec, num_inference_steps=51).num_inference_steps == 51
    with pytest.raises(InvalidParams, match="at most 50 with scheduler lcm"):
        ask(spec, scheduler="lcm", num_inference_steps=51)


def test_a_record_from_before_there_were_adapters_is_read():
    old = ask().model_dump(exclude={"loras", "reproducible"})

    assert GenerationParams.model_validate(old).loras == ()


def test_a_catalog_file_names_adapters_relative_to_itself(tmp_path):
    (tmp_path / "models.toml").write_text("""
[models.tiny]
source = "tiny"
schedulers = ["ddim"]
accepts = []
defaults = { width = 64, height = 64, scheduler = "ddim" }
loras.ink = { source = "loras/ink.safetensors", title = "Ink" }
""")
    spec = load_catalog(tmp_path / "models.toml").get("tiny")

    assert spec.loras["ink"].source == tmp_path / "loras" / "ink.safetensors"
    assert spec.accepts == ()
