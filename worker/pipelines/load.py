"""Load: a ModelSpec -> a warm diffusers pipeline, from safetensors and JSON alone; no code of a folder is ever run."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from app.core.catalog import ModelSpec
from app.core.errors import ConfigError
from worker.engine.lora import Adapters
from worker.engine.target import Phase, Target
from worker.pipelines import lora, schedulers
from worker.pipelines.arguments import unused

EXECUTABLE = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".py", ".pyc", ".so", ".npy", ".npz"})
REMOTE_CODE = ("auto_map", "custom_pipeline", "trust_remote_code")
LIBRARIES = frozenset({"diffusers", "transformers"})
DENOISERS = ("unet", "transformer", "transformer_2", "controlnet", "prior")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
# Where the engine's merge rule is wrong or wasteful for a class (diffusers 0.42.1).
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # diffusers hands every decode the run's generator; these accept and never read it.
    "AutoencoderKL": {"ignored": frozenset({"generator"})},
    "AutoencoderTiny": {"ignored": frozenset({"generator"})},
    # Its pipeline cuts texts at their own length; texts of two lengths would never share a forward.
    "QwenImageTransformer2DModel": {"padded": ("encoder_hidden_states", "encoder_hidden_states_mask")},
    # It takes lists, and pads what is in them itself.
    "ZImageTransformer2DModel": {"ragged": frozenset({"cap_feats"})},
}


@dataclass(slots=True, eq=False)
class WarmModel:
    """A pipeline in memory. `modules` are what an Engine intercepts; `pipe` itself is copied for every run."""

    spec: ModelSpec
    pipe: Any
    modules: dict[str, Target]
    device: torch.device
    dtype: torch.dtype


def load(spec: ModelSpec, device: str = "auto", dtype: str = "auto") -> WarmModel:
    """Load `spec` and put it on `device`. Raises ConfigError, before anything of the folder is imported or read in."""
    place = pick_device(device)
    precision = pick_dtype(spec.dtype if dtype == "auto" else dtype, place)
    folder = spec.source or _download(spec)
    pipeline_class = check_folder(folder)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    try:
        pipe = pipeline_class.from_pretrained(folder, dtype=precision, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"model {spec.name!r} cannot be loaded from {folder}: {error}") from error
    return warm(spec, pipe.to(place), place, precision)


def warm(spec: ModelSpec, pipe: Any, device: torch.device, dtype: torch.dtype) -> WarmModel:
    """A WarmModel of a pipeline that is built and in its place. Raises ConfigError."""
    schedulers.check(spec.schedulers, pipe.scheduler, spec.name)
    if dtype is torch.float16 and hasattr(pipe, "upcast_vae") and pipe.vae.config.force_upcast:
        # The pipeline would turn the VAE to float32 and back in place, under the runs of others.
        raise ConfigError(f"model {spec.name!r}: its VAE overflows in float16; set dtype to bfloat16 or float32")
    if vain := unused(pipe) & set(spec.accepts):
        left = sorted(set(spec.accepts) - vain)
        raise ConfigError(f"model {spec.name!r} has no use for {', '.join(sorted(vain))}; set accepts = {left}")
    pipe.set_progress_bar_config(disable=True)
    return WarmModel(spec, pipe, _adapted(targets(pipe), spec, pipe), device, dtype)


def _adapted(found: dict[str, Target], spec: ModelSpec, pipe: Any) -> dict[str, Target]:
    """The targets, with all adapters of the catalog at the denoisers they are for."""
    read = {name: lora.read(entry.source, pipe, spec.name) for name, entry in spec.loras.items()}
    for part in {part for parts in read.values() for part in parts}:
        own = {name: parts[part] for name, parts in read.items() if part in parts}
        found[part] = replace(found[part], adapters=Adapters(found[part].module, own))
    return found


def targets(pipe: Any) -> dict[str, Target]:
    """The modules whose calls runs share: denoisers, encoders, and the VAE from both sides."""
    found = {name: Target(module, Phase.DENOISING, **_exceptions(module)) for name, module in _modules(pipe, DENOISERS)}
    found |= {name: Target(module, Phase.ENCODING) for name, module in _modules(pipe, ENCODERS)}
    for name, vae in _modules(pipe, ("vae",)):
        found[f"{name}.encode"] = Target(vae, Phase.ENCODING, "encode")
        found[f"{name}.decode"] = Target(vae, Phase.DECODING, "decode", **_exceptions(vae))
    return found


def _exceptions(module: torch.nn.Module) -> dict[str, Any]:
    return EXCEPTIONS.get(type(module).__name__, {})


def _modules(pipe: Any, names: tuple[str, ...]) -> Iterator[tuple[str, torch.nn.Module]]:
    for name in names:
        module = getattr(pipe, name, None)
        if isinstance(module, torch.nn.Module):
            yield name, module


def pick_device(device: str) -> torch.device:
    """`auto`: a CUDA device, else Apple's, else the CPU. Raises ConfigError for one that is not there."""
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {error}") from error
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on CUDA, float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    named = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in named:
        raise ConfigError(f"dtype {dtype!r} is none of auto, {', '.join(named)}")
    return named[dtype]


def check_folder(folder: Path) -> Any:
    """The pipeline class that the folder's model_index.json names. Raises ConfigError for whatever could run code."""
    index = _read_json(folder / "model_index.json")
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in EXECUTABLE:
            raise ConfigError(f"{file} could run code when loaded; keep only safetensors and JSON in {folder}")
        if file.suffix == ".json" and file.name.endswith(("config.json", "index.json")):
            _check_keys(_read_json(file), file)
    if not isinstance(index, dict):
        raise ConfigError(f"cannot read {folder}/model_index.json: it holds no table of components")
    for name, entry in index.items():
        if isinstance(entry, list):
            _check_component(name, entry, folder)
    return _pipeline_class(index.get("_class_name"), folder)


def _check_keys(config: Any, file: Path) -> None:
    """No key, however deep, asks for code from elsewhere."""
    if isinstance(config, Mapping):
        for key in REMOTE_CODE:
            if key in config:
                raise ConfigError(f"{file} asks for code of its own ({key}); only classes of diffusers are loaded")
    for value in config.values() if isinstance(config, Mapping) else config if isinstance(config, list) else ():
        _check_keys(value, file)


def _check_component(name: str, entry: list[Any], folder: Path) -> None:
    """A component's library is a known one: diffusers would import whatever is named here."""
    if name.startswith("_"):
        return  # _class_name has a check of its own
    library = entry[0] if entry else None
    if library is None or library in LIBRARIES or (isinstance(library, str) and _is_pipeline_module(library)):
        return
    raise ConfigError(
        f"{folder}/model_index.json takes {name} from {library!r}; only diffusers and transformers may be"
    )


def _is_pipeline_module(library: str) -> bool:
    """A safety checker comes from a module of a pipeline, as "stable_diffusion"."""
    return library.isidentifier() and hasattr(diffusers.pipelines, library)


def _pipeline_class(name: Any, folder: Path) -> Any:
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise ConfigError(f"{folder}/model_index.json: {name!r} is not a pipeline class of diffusers")
    return found


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error


def _download(spec: ModelSpec) -> Path:
    """The folder of a hub repository at its pinned revision; nothing of it is imported here."""
    try:
        folder = diffusers.DiffusionPipeline.download(spec.hub, revision=spec.revision, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {spec.name!r}: cannot get {spec.hub} at {spec.revision}: {error}") from error
    return Path(folder)
