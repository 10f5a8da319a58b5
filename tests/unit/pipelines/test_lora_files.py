import hashlib
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from app.core.catalog import LoraSpec
from app.core.errors import ConfigError, GenerationFailed
from tests.adapters import by_peft, in_peft, write_adapter
from tests.tiny import Family, build_family, together
from tests.unit.pipelines.conftest import params_of, spec_of
from worker.pipelines.load import load
from worker.pipelines.lora import read
from worker.pipelines.tasks import runs_for

LAYERS = ("to_q", "to_v", "conv1")


@pytest.fixture(scope="module")
def family():
    return build_family("SD img2img")


@pytest.fixture
def file(family, tmp_path):
    return write_adapter(family, tmp_path, "a", rank=4, alpha=6, layers=LAYERS)


def change(file, change, metadata=None):
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(change(tensors), file, metadata)


def refused(file, family, match):
    with pytest.raises(ConfigError, match=match):
        read(file, family.pipe, "tiny")


def deltas(layers):
    return {name: torch.einsum("or,r...->o...", low.up, low.down) for name, low in layers.items()}


def to_kohya(tensors):
    """The same adapter as kohya's trainer writes it: layers spelled with underscores, an alpha for each."""
    spelled = {}
    for key, tensor in tensors.items():
        name = key.replace("lora_A", "lora_down").replace("lora_B", "lora_up").removeprefix("unet.")
        layer, _, rest = name.partition(".lora_")
        spelled[f"lora_unet_{layer.replace('.', '_')}.lora_{rest}"] = tensor
        spelled[f"lora_unet_{layer.replace('.', '_')}.alpha"] = torch.tensor(6.0)
    return spelled


def to_old_diffusers(tensors):
    return {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in tensors.items()}


def test_an_adapter_of_peft_and_one_of_kohya_are_read_alike(family, file):
    peft = deltas(read(file, family.pipe, "tiny")["unet"])
    change(file, to_kohya)
    kohya = deltas(read(file, family.pipe, "tiny")["unet"])

    attention = [name for name in peft if ".attn" in name]  # conv1's underscores are spelled otherwise by kohya
    assert len(attention) > 4
    assert all(torch.allclose(peft[name], kohya[name], atol=1e-6) for name in attention)


def test_an_adapter_without_an_alpha_has_a_scale_of_one(family, file):
    with_alpha = deltas(read(file, family.pipe, "tiny")["unet"])
    change(file, to_old_diffusers)
    without = deltas(read(file, family.pipe, "tiny")["unet"])

    assert with_alpha.keys() == without.keys()
    assert all(torch.allclose(with_alpha[name], without[name] * 6 / 4, atol=1e-6) for name in without)


@pytest.mark.parametrize("spelled", [to_kohya, to_old_diffusers])
def test_each_dialect_makes_the_picture_that_peft_makes(family, file, spelled):
    change(file, lambda tensors: spelled({k: v for k, v in tensors.items() if ".attn" in k}))
    with in_peft(family, {"a": file}) as peft:
        expected = by_peft(peft, 0, (("a", 0.8),))
    from worker.engine.lora import Adapters
    from worker.pipelines.load import targets

    found = targets(family.pipe)
    adapters = Adapters(family.pipe.unet, {"a": read(file, family.pipe, "tiny")["unet"]})
    run = replace(family.run(0), adapters=(("a", 0.8),))
    together(family, [run], [0], targets=found | {"unet": replace(found["unet"], adapters=adapters)})
    adapters.close()

    assert (run.result - expected).abs().max() < 1e-5 * expected.std()


def test_a_file_that_is_not_safetensors_is_never_opened(family, tmp_path):
    torch.save({"unet.x": torch.zeros(1)}, tmp_path / "a.bin")

    refused(tmp_path / "a.bin", family, "only safetensors")


def test_a_file_that_is_only_called_safetensors_is_refused(family, tmp_path):
    torch.save({"unet.x": torch.zeros(1)}, tmp_path / "a.safetensors")

    refused(tmp_path / "a.safetensors", family, "cannot be used")


def test_a_file_that_is_not_there_is_named(family, tmp_path):
    refused(tmp_path / "none.safetensors", family, r"none\.safetensors")


def rename(old, new):
    return lambda tensors: {k.replace(old, new, 1): v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (rename("unet.", "text_encoder."), "text encoder are not supported"),
        (rename("unet.", "transformer."), "has no 'transformer'"),
        (rename("down_blocks", "cellar_blocks"), "has no layer"),
        (rename("lora_A.weight", "lora_A.bias"), "only weights"),
        (rename("lora_B", "lora_magnitude_vector"), "only plain low-rank"),
        (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, "one of its two"),
        (lambda t: {k: v[:, :-1].contiguous() for k, v in t.items()}, "do not fit"),
        (lambda t: {k: v * torch.inf for k, v in t.items()}, "not numbers"),
        (lambda t: {k.replace("attn1.to_q", "norm1"): v for k, v in t.items()}, "LayerNorm takes no adapter"),
        (lambda _: {}, "cannot be used"),
    ],
)
def test_an_adapter_that_could_not_be_honoured_is_refused(family, file, spoil, match):
    change(file, spoil)

    refused(file, family, match)


def test_settings_of_peft_that_are_not_known_are_refused(family, file):
    change(file, lambda tensors: tensors, {"lora_adapter_metadata": '{"unet.use_dora": true}'})

    refused(file, family, "use_dora")


def test_an_adapter_of_another_model_is_refused(file):
    refused(file, build_family("SDXL"), "cannot be used")


def test_layers_that_see_all_rows_in_one_line_are_refused(tmp_path):
    family = build_family("Z-Image")
    tensors = {"transformer.all_x_embedder.2-1.lora_A.weight": torch.zeros(2, 16)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")

    with pytest.raises(ConfigError):
        read(tmp_path / "a.safetensors", family.pipe, "z")


@pytest.fixture
def model(tiny_folder, tmp_path):
    made = load(spec_of(tiny_folder), "cpu")
    files = {n: write_adapter(Family(made.pipe, dict), tmp_path, n, layers=LAYERS) for n in ("ink", "oil")}
    return load(spec_of(tiny_folder, loras={n: LoraSpec(source=file) for n, file in files.items()}), "cpu")


def test_a_models_adapters_are_loaded_with_it_and_change_the_pictures_that_ask_for_them(model):
    from worker.engine.engine import Engine

    engine = Engine(model.modules)
    asked = [[], [{"name": "ink"}], [{"name": "oil", "weight": 0.5}], [{"name": "ink", "weight": 0.0}]]
    runs = [run for i, loras in enumerate(asked) for run in runs_for(model, params_of(loras=loras), f"job-{i}")]
    for run in runs:
        engine.add(run)
    while not engine.is_idle:
        engine.step()
    engine.close()

    assert [run.error for run in runs] == [None] * 4
    pictures = [hashlib.sha256(run.result.tobytes()).hexdigest() for run in runs]
    assert len(set(pictures)) == 3
    assert pictures[0] == pictures[3]


def test_a_job_for_an_adapter_that_this_worker_does_not_have_fails(model):
    with pytest.raises(GenerationFailed, match="no adapter 'pen'"):
        runs_for(model, params_of(loras=[{"name": "pen"}]), "job")
