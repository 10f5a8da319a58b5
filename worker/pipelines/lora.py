"""Lora: a file of adapter weights -> low-rank layers, checked against the model they are for.

Reads what diffusers' `load_lora_weights` reads (its own keys, peft's, and the dialects it converts), from safetensors
only. What could not be honoured is refused: text encoder layers, DoRA, biases, whole layers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

from app.core.errors import ConfigError
from worker.engine.lora import Layers, LowRank

OTHER_METHODS = ("dora_scale", "lora_magnitude_vector", ".lokr_", ".hada_", ".oft_", ".diff", ".glora_")
# Layers that see the tokens of all rows in a line, so that no row can be told from another (diffusers 0.42.1).
ROWLESS = {"ZImageTransformer2DModel": ("all_x_embedder.", "cap_embedder.")}


class Refused(ValueError):  # noqa: N818  # becomes a ConfigError that names model, adapter and file
    """The file is no adapter of this model that can be honoured."""


def read(file: Path, pipe: Any, model: str) -> dict[str, Layers]:
    """The layers of the adapter in `file`, by denoiser of `pipe`. Raises ConfigError."""
    try:
        return _by_denoiser(*_converted(file, pipe), pipe)
    except (Refused, OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise ConfigError(f"model {model!r}: adapter {file} cannot be used: {error}") from error


def _converted(file: Path, pipe: Any) -> tuple[dict[str, torch.Tensor], dict[str, float], dict[str, Any]]:
    """The file's weights under diffusers' names, alphas by their keys, and the settings that peft left in the file."""
    if file.suffix != ".safetensors":
        raise Refused("only safetensors files are read")
    weights = safetensors.torch.load_file(file)
    for key in weights:
        if any(method in key for method in OTHER_METHODS):
            raise Refused(f"{key}: only plain low-rank adapters are known")
    if not hasattr(pipe, "lora_state_dict"):
        raise Refused(f"{type(pipe).__name__} takes no adapters")
    options = {"unet_config": pipe.unet.config} if hasattr(pipe, "unet") else {}
    found = pipe.lora_state_dict(weights, return_alphas=True, **options)
    state, alphas = found if isinstance(found, tuple) else (found, None)
    with safetensors.safe_open(file, "pt") as opened:
        settings = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return state, alphas or {}, settings


def _by_denoiser(
    state: Mapping[str, torch.Tensor], alphas: Mapping[str, float], settings: Mapping[str, Any], pipe: Any
) -> dict[str, Layers]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        part, _, name = key.partition(".")
        if part.startswith("text_encoder"):
            raise Refused(f"{key}: layers of the text encoder are not supported; train or export it without them")
        if not isinstance(getattr(pipe, part, None), torch.nn.Module):
            raise Refused(f"{key}: {type(pipe).__name__} has no {part!r}")
        parts.setdefault(part, {})[name] = tensor
    if not parts:
        raise Refused("it holds no layer")
    return {
        part: _layers(getattr(pipe, part), tensors, _Alphas(part, alphas, settings)) for part, tensors in parts.items()
    }


class _Alphas:
    """The scale of a layer's product is alpha / rank; a file that says nothing means a scale of 1."""

    def __init__(self, part: str, alphas: Mapping[str, float], settings: Mapping[str, Any]) -> None:
        # diffusers calls some of them after the layer, some after the layer's down projection.
        named = {key.removeprefix(f"{part}.").removesuffix(".alpha"): float(v) for key, v in alphas.items()}
        self._own = {key.partition(".lora_A")[0]: v for key, v in convert_unet_state_dict_to_peft(named).items()}
        given = {key.removeprefix(f"{part}."): v for key, v in settings.items() if key.startswith(f"{part}.")}
        for name in ("use_dora", "lora_bias", "modules_to_save"):
            if given.get(name):
                raise Refused(f"{name} is set: only plain low-rank adapters are known")
        self._alpha, self._pattern = given.get("lora_alpha"), given.get("alpha_pattern") or {}
        self._is_rooted = bool(given.get("use_rslora"))

    def scale(self, layer: str, rank: int) -> float:
        settled = next((v for name, v in self._pattern.items() if layer.endswith(name.lstrip("^"))), self._alpha)
        alpha = self._own.get(layer, settled)
        if alpha is None:
            return 1.0
        return float(alpha) / (rank**0.5 if self._is_rooted else rank)


def _layers(module: torch.nn.Module, tensors: dict[str, torch.Tensor], alphas: _Alphas) -> Layers:
    if not any("lora_A" in key for key in tensors):
        tensors = convert_unet_state_dict_to_peft(tensors)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        layer, side, rest = _cut(key)
        if rest != "weight":
            raise Refused(f"{key}: only weights are known")
        pairs.setdefault(layer, {})[side] = tensor
    return {layer: _low_rank(module, layer, pair, alphas) for layer, pair in pairs.items()}


def _cut(key: str) -> tuple[str, str, str]:
    for side in ("lora_A", "lora_B"):
        layer, found, rest = key.partition(f".{side}.")
        if found:
            return layer, side, rest
    raise Refused(f"{key}: neither of a down nor of an up projection")


def _low_rank(module: torch.nn.Module, layer: str, pair: dict[str, torch.Tensor], alphas: _Alphas) -> LowRank:
    if pair.keys() != {"lora_A", "lora_B"}:
        raise Refused(f"{layer}: one of its two matrices is missing")
    base, down, up = _base(module, layer), pair["lora_A"], pair["lora_B"]
    rank = down.shape[0]
    wanted_up = (base.weight.shape[0], rank) + ((1, 1) if base.weight.ndim == 4 else ())
    if down.shape != (rank, *base.weight.shape[1:]) or up.shape != wanted_up:
        raise Refused(f"{layer}: {tuple(down.shape)} and {tuple(up.shape)} do not fit {tuple(base.weight.shape)}")
    if not (down.isfinite().all() and up.isfinite().all()):
        raise Refused(f"{layer}: some of its weights are not numbers")
    return LowRank(down, up.reshape(up.shape[:2]) * alphas.scale(layer, rank))


def _base(module: torch.nn.Module, layer: str) -> torch.nn.Linear | torch.nn.Conv2d:
    try:
        base = module.get_submodule(layer)
    except AttributeError:
        raise Refused(f"{type(module).__name__} has no layer {layer}") from None
    if layer.startswith(ROWLESS.get(type(module).__name__, ("\0",))):
        raise Refused(f"{layer}: computes all rows in one line, so no row can have an adapter there")
    if not isinstance(base, torch.nn.Linear | torch.nn.Conv2d) or not base.weight.is_floating_point():
        raise Refused(f"{layer}: {type(base).__name__} takes no adapter")
    if isinstance(base, torch.nn.Conv2d) and (base.groups != 1 or base.padding_mode != "zeros"):
        raise Refused(f"{layer}: only plain convolutions take an adapter")
    return base
