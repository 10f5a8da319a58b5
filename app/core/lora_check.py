"""LoRA check: whether an adapter's file is of this base model, by the names and shapes that both files state.

What decides is the worker, which reads the adapter into the model. This is the early word: an adapter of another kind
of model is found when the catalog is read, without torch, and refused when a job asks for it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from app.core import model_check
from app.core.catalog import Catalog, ModelSpec
from app.core.errors import ConfigError, ModelRefused
from app.core.weights import TensorInfo, read_header

DENOISERS: Final = ("unet", "transformer", "transformer_2", "prior")
# Before the layer's name: diffusers', peft's, kohya's, ComfyUI's.
PREFIXES: Final = re.compile(
    r"^(?:base_model\.model\.)?(?:(?:unet|transformer|transformer_2|diffusion_model)\.|lora_(?:unet|transformer)_)"
)
CHECKPOINT: Final = "model.diffusion_model."  # before a denoiser's names in a single file
TEXT_ENCODERS: Final = re.compile(r"^(?:text_encoder|lora_te)")
SIDES: Final = {
    **dict.fromkeys((".lora_A.", ".lora_down.", ".lora.down.", "_lora.down."), "down"),
    **dict.fromkeys((".lora_B.", ".lora_up.", ".lora.up.", "_lora.up."), "up"),
}
# One layer of other dialects is several of diffusers': queries, keys and values in one.
FUSED: Final = ("qkv", "linear1", "in_proj", "kv")


class Shape(NamedTuple):
    """Of a layer's weight: what it takes and what it gives."""

    inputs: int
    outputs: int


def problem_of(file: Path, spec: ModelSpec, source: Path) -> str:
    """Why the adapter in `file` is none of the model at `source`; empty for one that may be. Raises ModelRefused."""
    pairs = _pairs(read_header(file))
    if not pairs:
        return "it holds no low-rank layer"
    if text := next((layer for layer in pairs if TEXT_ENCODERS.match(layer)), None):
        return f"it changes the text encoder ({text}), which is not supported"
    base = _base(spec, source)
    known, fitting = {_plain(name): shape for name, shape in base.items()}, frozenset(base.values())
    named = {layer: _plain(PREFIXES.sub("", layer)) for layer in pairs}
    is_same_dialect = not spec.config and any(name in known for name in named.values())
    for layer, shape in pairs.items():
        own = known.get(named[layer])
        if own is not None and shape != own:
            return f"its {layer} is for a layer of {tuple(shape)}, and the model's is of {tuple(own)}"
        if own is None and is_same_dialect:
            return f"the model has no layer {layer}"
        if own is None and shape not in fitting and not any(part in layer for part in FUSED):
            return f"its {layer} is for a layer of {tuple(shape)}, and the model has none of that size"
    return ""


def check_adapters(catalog: Catalog) -> None:
    """Find the adapters that are not of their model; of models whose files are not on this machine nothing is known."""
    for spec in catalog.models.values():
        found = {name: reason for name in spec.loras if (reason := _problem(spec, name))}
        if found:
            catalog.unfit[spec.name] = found


def _problem(spec: ModelSpec, name: str) -> str:
    file = spec.loras[name].source
    if spec.source is None or not spec.source.exists() or not file.is_file():
        return ""
    try:
        return problem_of(file, spec, spec.source)
    except ModelRefused as error:
        return error.message
    except ConfigError:
        return ""


def _pairs(header: Mapping[str, TensorInfo]) -> dict[str, Shape]:
    """Each adapted layer's inputs and outputs, from its down and up projections."""
    sides: dict[str, dict[str, TensorInfo]] = {}
    for key, info in header.items():
        for mark, side in SIDES.items():
            layer, found, _ = key.partition(mark)
            if found and len(info.shape) >= 2:
                sides.setdefault(layer.removesuffix(".processor"), {})[side] = info
                break
    return {
        layer: Shape(pair["down"].shape[1], pair["up"].shape[0])
        for layer, pair in sides.items()
        if pair.keys() == {"down", "up"}
    }


def _base(spec: ModelSpec, source: Path) -> dict[str, Shape]:
    """The weights of the model's denoisers, by layer."""
    if spec.config:
        files = [source]
    else:
        folders = [source / name for name in DENOISERS if (source / name).is_dir()]
        files = [file for folder in folders for file in model_check.component_files(folder)]
    found = {}
    for file in files:
        for key, info in read_header(file).items():
            if key.endswith(".weight") and len(info.shape) in (2, 4):
                found[key.removesuffix(".weight").removeprefix(CHECKPOINT)] = Shape(info.shape[1], info.shape[0])
    return found


def _plain(layer: str) -> str:
    """The name as kohya's trainer spells it, which tells no dots from underscores."""
    return layer.replace(".", "_")
