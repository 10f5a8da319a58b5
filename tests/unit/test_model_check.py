"""What a model's files may not hold; none of these tests has torch, so nothing can be imported or unpickled."""

import hashlib
import importlib.util
import json
import os
import pickle
import struct
import sys
from pathlib import Path

import pytest

from app.core.catalog import ControlnetSpec, Defaults, ModelSpec
from app.core.errors import ModelRefused
from app.core.lora_check import problem_of
from app.core.model_check import PIPELINE_MODULES, check, check_folder, check_hashes, size_of
from app.core.weights import read_header

WEIGHTS = "diffusion_pytorch_model.safetensors"


def safetensors(file, **tensors):
    """A file of zeros: names and shapes."""
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    return file


def write(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that passes, beside a module that leaves a mark when it is imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "canary.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Thing: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = tmp_path / "model"
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "safety_checker": [None, None],
        "feature_extractor": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    write(model / "model_index.json", index)
    write(model / "unet" / "config.json", {"_class_name": "UNet2DConditionModel"})
    safetensors(model / "unet" / WEIGHTS, **{"down.to_q.weight": (8, 8), "down.to_k.weight": (8, 32)})
    safetensors(model / "transformer" / WEIGHTS, **{"transformer_blocks.0.to_q.weight": (8, 8)})
    write(model / "tokenizer" / "tokenizer_config.json", {"vocab_file": "vocab.json", "name_or_path": "/a/b"})
    yield model
    assert not (tmp_path / "imported").exists(), "code was run"
    assert not (tmp_path / "unpickled").exists(), "a pickle was loaded"
    assert "canary" not in sys.modules


def spec_of(source, **options):
    defaults = Defaults(width=64, height=64, scheduler="ddim")
    return ModelSpec(name="m", source=source, defaults=defaults, schedulers=("ddim",), **options)


def refused(folder, match):
    with pytest.raises(ModelRefused, match=match):
        check_folder(folder)


def test_a_folder_of_safetensors_and_json_passes(folder):
    assert check_folder(folder) == "StableDiffusionPipeline"


@pytest.mark.parametrize("name", ["a.bin", "b/c.ckpt", "unet/w.PT", "d.pth", "e.pkl", "f.npy", "unet/g.py", "h.so"])
def test_a_file_whose_name_says_that_it_could_run_code_is_refused(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(Bomb()))

    refused(folder, "could run code")


@pytest.mark.parametrize("start", [pickle.dumps(Bomb()), b"PK\x03\x04archive", b"\x7fELF"])
def test_a_pickle_under_another_name_is_refused(folder, start):
    (folder / "unet" / "notes.txt").write_bytes(start)

    refused(folder, "whatever its name")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (pickle.dumps(Bomb()), "no safetensors"),
        (b"PK\x03\x04" + bytes(40), "no safetensors"),
        (struct.pack("<Q", 2**40) + b"{}", "no safetensors"),
        (struct.pack("<Q", 4) + b"[[]]", "no table"),
        (struct.pack("<Q", 40000) + b"[" * 40000, "no safetensors"),
        (
            struct.pack("<Q", 63) + b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 400]}}',
            "outside the file",
        ),
        (struct.pack("<Q", 61) + b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}abcd', "another size"),
    ],
)
def test_weights_that_are_not_what_their_header_says_are_refused(folder, content, match):
    (folder / "unet" / WEIGHTS).write_bytes(content)

    refused(folder, match)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"auto_map": {"AutoModel": "canary.Thing"}}, "code of its own"),
        ({"custom_pipeline": "canary"}, "code of its own"),
        ({"trust_remote_code": True}, "code of its own"),
        ({"_attn_implementation": "owner/kernel"}, "code from elsewhere"),
        ({"attn_implementation": {"text": "owner/kernel:forward"}}, "code from elsewhere"),
        ({"vocab_file": "../../../etc/passwd"}, "leads out"),
        ({"tokenizer_file": "/etc/passwd"}, "leads out"),
    ],
)
def test_a_configuration_that_asks_for_code_or_files_from_elsewhere_is_refused(folder, file, entry, match):
    write(folder / file, json.loads((folder / file).read_text()) | {"deep": [{"er": entry}]})

    refused(folder, match)


@pytest.mark.parametrize(
    ("component", "match"),
    [
        (["canary", "Thing"], "only diffusers and transformers"),
        (["os", "system"], "only diffusers and transformers"),
        (["diffusers.utils", "Thing"], "only diffusers and transformers"),
        (["diffusers", "utils.logging"], "no class"),
        (["diffusers", "__class__"], "no class"),
        (["diffusers"], "only diffusers and transformers"),
        ([5, None], "only diffusers and transformers"),
    ],
)
def test_a_component_of_an_unknown_library_or_of_no_class_is_refused(folder, component, match):
    index = json.loads((folder / "model_index.json").read_text())
    write(folder / "model_index.json", index | {"unet": component})

    refused(folder, match)


@pytest.mark.parametrize("name", [["canary", "Thing"], "Thing", "canary.ThingPipeline", "__Pipeline", None])
def test_a_pipeline_class_that_cannot_be_diffusers_own_is_refused(folder, name):
    index = json.loads((folder / "model_index.json").read_text())
    write(folder / "model_index.json", index | {"_class_name": name})

    refused(folder, "not a pipeline class")


@pytest.mark.parametrize(
    "name", ["StableDiffusionXLPAGPipeline", "StableDiffusionSAGPipeline", "StableDiffusionAttendAndExcitePipeline"]
)
def test_a_pipeline_that_changes_the_denoiser_under_other_runs_is_refused(folder, name):
    index = json.loads((folder / "model_index.json").read_text())
    write(folder / "model_index.json", index | {"_class_name": name})

    refused(folder, "changes its denoiser's attention")


@pytest.mark.parametrize("name", ["../../other.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", 5])
def test_an_index_file_that_leads_out_of_its_folder_is_refused(folder, name):
    write(folder / "unet" / f"{WEIGHTS}.index.json", {"weight_map": {"a": name}})

    refused(folder, "only safetensors files beside it")


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_link_that_leaves_the_folder_is_refused_and_one_within_it_is_not(folder, tmp_path, is_folder):
    outside = tmp_path / "outside"
    outside.mkdir()
    safetensors(outside / "a.safetensors", a=(1,))
    (folder / "unet" / "inside.json").symlink_to(folder / "unet" / "config.json")
    assert check_folder(folder)
    (folder / "vae").symlink_to(outside) if is_folder else (folder / "x.safetensors").symlink_to(
        outside / "a.safetensors"
    )

    refused(folder, "leaves the folder")


def test_the_hubs_own_cache_may_be_linked_to(folder, tmp_path):
    blob = safetensors(tmp_path / "blobs" / "abc", a=(1,))
    (folder / "unet" / "x.safetensors").symlink_to(blob)

    refused(folder, "leaves the folder")
    assert check_folder(folder, tmp_path / "blobs")


def test_a_pipe_in_the_folder_is_refused_and_not_read(folder):
    os.mkfifo(folder / "weights.safetensors")

    refused(folder, "no plain file")


def test_an_adapter_config_that_names_a_base_model_elsewhere_is_refused(folder):
    write(folder / "unet" / "adapter_config.json", {"base_model_name_or_path": "owner/model"})

    refused(folder, "adapter")


@pytest.mark.parametrize("text", [None, "{", "[]", "[" * 100_000])
def test_a_folder_without_a_readable_index_is_refused(folder, text):
    (folder / "model_index.json").unlink()
    if text:
        (folder / "model_index.json").write_text(text)

    refused(folder, "cannot read")


def test_a_wrong_hash_is_refused_and_the_right_one_is_not(folder):
    digest = hashlib.sha256((folder / "unet" / WEIGHTS).read_bytes()).hexdigest()
    check(spec_of(folder, sha256={f"unet/{WEIGHTS}": digest}), folder)
    with (folder / "unet" / WEIGHTS).open("r+b") as opened:  # one bit of one weight
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\x01")

    with pytest.raises(ModelRefused, match="SHA-256"):
        check(spec_of(folder, sha256={f"unet/{WEIGHTS}": digest}), folder)
    with pytest.raises(ModelRefused, match="cannot read"):
        check_hashes(folder, {"unet/absent.safetensors": digest})


def test_a_single_file_is_checked_with_its_configuration(folder, tmp_path):
    file = safetensors(tmp_path / "one.safetensors", a=(2, 2))
    single = spec_of(file, config=folder, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    assert check(single, file) == "StableDiffusionPipeline"
    file.write_bytes(pickle.dumps(Bomb()))

    with pytest.raises(ModelRefused, match="no safetensors"):
        check(single, file)


def test_the_size_in_memory_counts_what_is_loaded_and_no_variants(folder):
    safetensors(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", a=(1000, 1000))
    safetensors(folder / "unused" / "model.safetensors", a=(1000, 1000))

    assert size_of(spec_of(folder), folder, itemsize=2) == 2 * (8 * 8 + 8 * 32)


def test_the_size_in_memory_counts_controlnets_and_no_safety_checker(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    write(folder / "model_index.json", index)
    safetensors(folder / "safety_checker" / "model.safetensors", a=(1000, 1000))
    safetensors(tmp_path / "edges" / WEIGHTS, a=(16, 16))
    plain, steered = spec_of(folder), spec_of(folder, controlnets={"edges": ControlnetSpec(source=tmp_path / "edges")})

    assert size_of(plain, folder, itemsize=2) == 2 * (8 * 8 + 8 * 32)
    assert size_of(steered, folder, itemsize=2) == 2 * (8 * 8 + 8 * 32 + 16 * 16)


def test_a_header_says_names_types_and_shapes(folder):
    info = read_header(folder / "unet" / WEIGHTS)["down.to_k.weight"]

    assert (info.dtype, info.shape, info.count) == ("F32", (8, 32), 256)


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ({"unet.down.to_q": (8, 8)}, ""),
        ({"lora_unet_down_to_q": (8, 8), "lora_unet_down_to_k": (32, 8)}, ""),
        ({"transformer.transformer_blocks.0.to_q": (8, 8)}, ""),
        ({"lora_transformer_transformer_blocks_0_to_q": (8, 16)}, "is for a layer of (8, 16)"),
        ({"unet.down.to_k": (64, 8)}, "is for a layer of (64, 8), and the model's is of (32, 8)"),
        ({"unet.down.to_q": (8, 8), "unet.up.to_q": (8, 8)}, "has no layer unet.up.to_q"),
        ({"diffusion_model.double_blocks.0.img_attn": (99, 7)}, "has none of that size"),
        ({"diffusion_model.double_blocks.0.img_attn_qkv": (99, 7)}, ""),  # the worker will see
        ({"lora_te_text_model_q_proj": (8, 8)}, "text encoder"),
        ({}, "no low-rank layer"),
    ],
)
def test_an_adapter_is_told_from_one_of_another_base_model(folder, tmp_path, layers, problem):
    spelled = ("lora_down", "lora_up") if any("lora_" in layer for layer in layers) else ("lora_A", "lora_B")
    pairs = {}
    for layer, (inputs, outputs) in layers.items():
        pairs |= {f"{layer}.{spelled[0]}.weight": (4, inputs), f"{layer}.{spelled[1]}.weight": (outputs, 4)}
    file = safetensors(tmp_path / "adapter.safetensors", **pairs)

    found = problem_of(file, spec_of(folder), folder)
    assert problem in found
    assert bool(problem) == bool(found)


def test_the_pipeline_modules_that_may_be_named_exist():
    [root] = importlib.util.find_spec("diffusers").submodule_search_locations

    assert [name for name in sorted(PIPELINE_MODULES) if not Path(root, "pipelines", name).is_dir()] == []
