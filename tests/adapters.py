"""Adapter files as peft and diffusers write them, and the pictures that peft makes with them."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict

from tests.tiny import Family

ATTENTION = ("to_q", "to_k", "to_v")


def write_adapter(
    family: Family, folder: Path, name: str, *, rank: int = 4, alpha: float = 8, layers: tuple[str, ...] = ATTENTION
) -> Path:
    """A file of random weights for the family's denoiser, made by peft and saved by diffusers."""
    part = "unet" if hasattr(family.pipe, "unet") else "transformer"
    module = copy.deepcopy(getattr(family.pipe, part))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers), init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(sum(name.encode()))
        module.add_adapter(config, adapter_name=name)
    state = get_peft_model_state_dict(module, adapter_name=name)
    told = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": module.peft_config[name].to_dict()}
    type(family.pipe).save_lora_weights(folder, **told, weight_name=f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@contextmanager
def in_peft(family: Family, files: dict[str, Path]) -> Iterator[Family]:
    """The family with the adapters loaded by diffusers, none of them switched on."""
    pipe = copy.copy(family.pipe)
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, part, copy.deepcopy(getattr(pipe, part)))
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # peft warns of a second adapter
        for name, file in files.items():
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name, local_files_only=True)
    yield replace(family, pipe=pipe)


def by_peft(family: Family, i: int, stack: tuple[tuple[str, float], ...]) -> torch.Tensor:
    """Request i with the adapters of `stack`, of a family that `in_peft` gave."""
    family.pipe.enable_lora()
    if stack:
        family.pipe.set_adapters([name for name, _ in stack], [weight for _, weight in stack])
    else:
        family.pipe.disable_lora()
    return family.alone(i)
