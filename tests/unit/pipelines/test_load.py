import hashlib
import json
import shutil
import sys
import threading
import time

import pytest
import torch
from structlog.testing import capture_logs
from transformers import CLIPConfig, CLIPImageProcessor

from app.core.catalog import LoraSpec
from app.core.errors import ConfigError
from tests.checkpoints import write_single
from tests.tiny import build_family
from tests.unit.pipelines.conftest import spec_of
from worker.pipelines.load import check_folder, load, pick_device, pick_dtype, warm


@pytest.fixture
def folder(tiny_folder, tmp_path, monkeypatch):
    """A copy of the tiny model to be spoilt, beside a module that leaves a mark when it is imported."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "canary.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Thing: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "model"
    assert not (tmp_path / "imported").exists(), "code was run"
    assert "canary" not in sys.modules


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def write_checker(folder):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    vision = {"image_size": 32, "patch_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(vision_config={**vision, "intermediate_size": 8, "projection_dim": 8}, projection_dim=8)
    StableDiffusionSafetyChecker(config).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder.parent / "feature_extractor")
    change(folder.parent / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])


def refused(folder, match):
    with pytest.raises(ConfigError, match=match):
        load(spec_of(folder), "cpu")


@pytest.mark.parametrize(
    "name", ["model.bin", "a/b/model.ckpt", "unet/weights.PT", "data.pkl", "unet/modeling_unet.py", "x.pth"]
)
def test_a_folder_with_a_file_that_could_run_code_is_refused(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("open('imported', 'w')")

    refused(folder, "could run code")


@pytest.mark.parametrize("library", ["canary", "os", "diffusers_modules.local", 5])
def test_a_component_from_an_unknown_library_is_refused(folder, library):
    change(folder / "model_index.json", unet=[library, "Thing"])

    refused(folder, "only diffusers and transformers")


@pytest.mark.parametrize("name", [["canary", "Thing"], "Thing", "UNet2DConditionModel", "logging", None])
def test_a_class_that_is_no_pipeline_of_diffusers_is_refused(folder, name):
    change(folder / "model_index.json", _class_name=name)

    refused(folder, "not a pipeline class")


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize("key", ["auto_map", "custom_pipeline", "trust_remote_code"])
def test_a_config_that_asks_for_code_is_refused(folder, file, key):
    change(folder / file, deep={"er": [{key: "canary.Thing"}]})

    refused(folder, key)


def test_weights_that_are_not_safetensors_are_refused(folder):
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".weights"))

    refused(folder, "cannot be loaded")


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_without_a_readable_index_is_refused(folder, text):
    (folder / "model_index.json").unlink()
    if text:
        (folder / "model_index.json").write_text(text)

    refused(folder, "cannot read")


@pytest.mark.parametrize(
    ("names", "match"), [(("ddim", "magic"), "no scheduler 'magic'"), (("ddim", "flow_euler"), "noise prediction")]
)
def test_a_scheduler_that_cannot_step_the_model_is_refused(tiny_folder, names, match):
    with pytest.raises(ConfigError, match=match):
        load(spec_of(tiny_folder, schedulers=names), "cpu")


def test_a_vae_that_a_pipeline_would_turn_to_float32_in_place_is_refused(tiny_folder):
    pipe = build_family("SDXL").pipe

    with pytest.raises(ConfigError, match="bfloat16"):
        warm(spec_of(tiny_folder), pipe, torch.device("cpu"), torch.float16)


def test_in_bfloat16_no_pipeline_turns_the_vae_to_float32(tiny_folder):
    pipe = build_family("SDXL").pipe
    assert pipe.vae.config.force_upcast
    loaded = warm(
        spec_of(tiny_folder, tasks=("text_to_image", "image_to_image")), pipe, torch.device("cpu"), torch.bfloat16
    )

    assert not loaded.pipe.vae.config.force_upcast
    assert not loaded.variants.get("image_to_image").vae.config.force_upcast


def test_the_tiny_model_loads_complete_and_ready(model):
    assert type(model.pipe).__name__ == "StableDiffusionPipeline"
    assert set(model.modules) == {"unet", "text_encoder", "vae.encode", "vae.decode"}
    assert model.dtype is torch.float32
    assert model.device == torch.device("cpu")
    assert not model.pipe.unet.training


def test_the_tiny_model_is_the_same_bytes_every_time(tiny_folder, tmp_path):
    from worker.pipelines.tiny_model import write_tiny

    write_tiny(tmp_path)

    def digests(folder):
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        return {f.relative_to(folder): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    assert digests(tmp_path) == digests(tiny_folder)


def test_its_tokenizer_knows_every_byte(model):
    tokens = model.pipe.tokenizer("Ein Käse für 3 €, 猫 🐈").input_ids

    assert len(tokens) > 20
    assert model.pipe.tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == "einkäsefür3€,猫🐈"


def test_its_folder_passes_the_check(tiny_folder):
    assert check_folder(tiny_folder).__name__ == "StableDiffusionPipeline"


def test_a_device_or_dtype_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="cannot be used"):
        pick_device("xpu:7")
    with pytest.raises(ConfigError, match="int8"):
        pick_dtype("int8", torch.device("cpu"))


def test_a_cpu_computes_in_float32_unless_told_and_cuda_in_bfloat16():
    assert pick_dtype("auto", torch.device("cpu")) is torch.float32
    assert pick_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    assert pick_dtype("auto", torch.device("cuda")) is torch.bfloat16


def test_a_load_in_another_precision_leaves_torchs_default_as_it_is_for_other_threads(tiny_folder):
    seen, is_loaded = set(), threading.Event()

    def look():
        while not is_loaded.is_set():
            seen.add(torch.get_default_dtype())
            time.sleep(0.0001)

    looking = threading.Thread(target=look)
    looking.start()
    loaded = load(spec_of(tiny_folder), "cpu", "bfloat16").pipe
    is_loaded.set()
    looking.join()
    plain = type(loaded).from_pretrained(tiny_folder, dtype=torch.bfloat16, local_files_only=True)

    assert seen == {torch.float32}
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(loaded, name).state_dict(), getattr(plain, name).state_dict()
        assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_checkpoints_own_safety_checker_is_neither_loaded_nor_run(folder, tmp_path):
    write_checker(folder / "safety_checker")
    change(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    change(folder / "model_index.json", requires_safety_checker=True)
    whole = spec_of(folder, tasks=("text_to_image", "image_to_image"))
    file, config = write_single(folder, tmp_path / "one.safetensors", tmp_path / "config")
    with capture_logs() as logs:
        loaded = load(whole, "cpu")
        single = load(spec_of(file, config=config), "cpu")

    assert [pipe.safety_checker for pipe in (loaded.pipe, loaded.variants.get("image_to_image"), single.pipe)] == [
        None,
        None,
        None,
    ]
    assert [entry["event"] for entry in logs] == ["model.safety_checker_left_out"] * 2


def test_an_adapter_that_is_not_of_the_model_is_no_reason_to_be_without_it(tiny_folder, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"not one")
    loaded = load(spec_of(tiny_folder, loras={"bad": LoraSpec(source=tmp_path / "bad.safetensors")}), "cpu")

    assert loaded.spec.loras == {}
