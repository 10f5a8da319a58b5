import pytest

from app.core.catalog import load_catalog
from app.core.errors import ConfigError, InvalidParams, ModelNotFound
from app.core.params import GenerationRequest, complete
from tests.conftest import CATALOG

DIGEST = "a" * 64


@pytest.fixture
def read(tmp_path):
    """The catalog of `tiny`, with more lines in its table, and `other`."""

    def read(more="", after=""):
        text = CATALOG.format(name="tiny", default="true").replace("examples", f"{more}\nexamples", 1)
        (tmp_path / "models.toml").write_text(text + CATALOG.format(name="other", default="false") + after)
        return load_catalog(tmp_path / "models.toml")

    return read


def refused(read, more, match):
    with pytest.raises(ConfigError, match=match):
        read(more)


def test_an_alias_means_the_model_and_params_have_its_own_name(read):
    catalog = read('aliases = ["stabilityai/SDXL-turbo", "dall-e-3"]')
    params = complete(GenerationRequest(model="stabilityai/SDXL-turbo", prompt="a lamp"), catalog)

    assert params.model == "tiny"
    assert catalog.get("dall-e-3") is catalog.get("tiny")
    with pytest.raises(ModelNotFound):
        catalog.get("dall-e-2")


def test_an_alias_that_is_another_models_name_is_refused(read):
    refused(read, 'aliases = ["other"]', "name of another model")


@pytest.mark.parametrize("template", ["no place", "{prompt} and {prompt}"])
def test_a_template_without_one_place_for_the_prompt_is_refused(read, template):
    refused(read, f'prompt_template = "{template}"', "prompt")


def test_a_template_is_text_and_nothing_in_a_prompt_is_read_as_one(read):
    spec = read('prompt_template = "photo of {prompt}, {0}"').get("tiny")

    assert spec.worded("{prompt} {x}") == "photo of {prompt} {x}, {0}"


def test_a_single_file_needs_a_configuration_and_a_folder_has_none(read, tmp_path):
    text = CATALOG.format(name="tiny", default="true").replace('"tiny"', '"tiny.safetensors"', 2)
    file = tmp_path / "models.toml"
    for more, match in (("", "needs config"), ('config = "c"\nsha256 = { a = "' + DIGEST + '" }', "sha256 is a text")):
        file.write_text(text.replace("examples", f"{more}\nexamples"))
        with pytest.raises(ConfigError, match=match):
            load_catalog(file)
    file.write_text(text.replace("examples", f'config = "c"\nsha256 = "{DIGEST}"\nexamples'))
    spec = load_catalog(file).default
    assert (spec.source, spec.config) == (tmp_path / "tiny.safetensors", tmp_path / "c")
    refused(read, 'config = "c"', "no other has one")


@pytest.mark.parametrize("path", ["../elsewhere.safetensors", "/etc/passwd"])
def test_a_hash_is_of_a_file_within_the_folder(read, path):
    refused(read, f'sha256 = {{ "{path}" = "{DIGEST}" }}', "no path within")


def test_an_adapter_of_another_model_is_refused_when_a_job_asks_for_it(read):
    catalog = read(after='[models.tiny.loras.ink]\nsource = "ink.safetensors"\n')
    request = GenerationRequest(prompt="a lamp", loras=[{"name": "ink"}])
    assert complete(request, catalog).loras
    catalog.unfit["tiny"] = {"ink": "its to_q is for another layer"}

    with pytest.raises(InvalidParams, match="another layer"):
        complete(request, catalog)
