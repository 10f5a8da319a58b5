"""Load: a ModelSpec -> a warm diffusers pipeline, from safetensors and JSON alone; no code of a folder is ever run."""

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import structlog
import torch
import transformers
from torch.overrides import TorchFunctionMode

from app.core import hub, model_check
from app.core.catalog import ModelSpec
from app.core.errors import ConfigError, ModelRefused
from worker.engine.lora import Adapters, Layers
from worker.engine.target import Phase, Target
from worker.pipelines import lora, previews, schedulers
from worker.pipelines.arguments import unused
from worker.pipelines.previews import Previewer
from worker.pipelines.prompts import can_weigh
from worker.pipelines.variants import Variants
from worker.safety import Checker, open_checker

log = structlog.get_logger()
FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.linspace})
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
    variants: Variants  # the pipelines of its tasks, of the same modules
    previewer: Previewer | None = None
    checker: Checker | None = None


def load(spec: ModelSpec, device: str = "auto", dtype: str = "auto") -> WarmModel:
    """Load `spec` and put it on `device`. Raises ModelRefused before anything of its files is imported, ConfigError.

    Loading in one thread leaves what other threads compute as it is.
    """
    place = pick_device(device)
    precision = pick_dtype(spec.dtype if dtype == "auto" else dtype, place)
    source = locate(spec)
    pipeline_class = _pipeline_class(model_check.check(spec, source), source)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    try:
        with own_defaults():
            pipe = _read(spec, source, pipeline_class, precision)
            controlnets = {kind: _controlnet(net.source, precision) for kind, net in spec.controlnets.items()}
        return warm(spec, pipe.to(place), place, precision, {k: net.to(place) for k, net in controlnets.items()})
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ConfigError(f"model {spec.name!r} cannot be loaded from {source}: {error}") from error


def locate(spec: ModelSpec, *, only_local: bool = False) -> Path:
    """Where the model's files lie: its source, or the hub's snapshot, which is downloaded unless `only_local`."""
    if spec.source:
        return spec.source
    assert spec.hub, "the catalog has seen to it"
    assert spec.revision, "the catalog has seen to it"
    return hub.fetch(spec.hub, spec.revision, only_local=only_local)


def size(spec: ModelSpec, device: str = "auto", dtype: str = "auto") -> int:
    """Bytes of memory that the model will take. Raises ConfigError where its files are not here."""
    precision = pick_dtype(spec.dtype if dtype == "auto" else dtype, pick_device(device))
    return model_check.size_of(spec, locate(spec, only_local=True), precision.itemsize)


def _read(spec: ModelSpec, source: Path, pipeline_class: Any, dtype: torch.dtype) -> Any:
    options = {"local_files_only": True, **_unchecked(spec, spec.config or source, pipeline_class)}
    if not spec.config:
        return pipeline_class.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
    if not hasattr(pipeline_class, "from_single_file"):
        raise ConfigError(f"model {spec.name!r}: {pipeline_class.__name__} cannot be read from a single file")
    pipe = pipeline_class.from_single_file(str(source), config=str(spec.config), torch_dtype=dtype, **options)
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module) and any(p.is_meta for p in module.parameters()):
            raise ConfigError(f"model {spec.name!r}: {source} lacks weights of its {name}")
    return pipe


def _unchecked(spec: ModelSpec, folder: Path, pipeline_class: Any) -> dict[str, Any]:
    """The options by which the pipeline does without its own safety checker, if it has one (ADR 62)."""
    if not any(pipeline_class.load_config(folder, local_files_only=True).get(model_check.LEFT_OUT) or ()):
        return {}
    log.warning("model.safety_checker_left_out", model=spec.name, remedy="set safety in models.toml")
    options = {model_check.LEFT_OUT: None, "requires_safety_checker": False}
    known = inspect.signature(pipeline_class.__init__).parameters
    return {name: value for name, value in options.items() if name in known}


def _controlnet(folder: Path, dtype: torch.dtype) -> Any:
    model_check.check_files(folder)
    return diffusers.ControlNetModel.from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
    )


class _OwnDtype(TorchFunctionMode):
    """In this thread, what makes numbers of torch's default dtype makes them of `dtype`."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.get_default_dtype()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in FACTORIES and given.get("dtype") is None:
            given = {**given, "dtype": self.dtype}
        return func(*args, **given)


@contextmanager
def own_defaults() -> Iterator[None]:
    """Within, torch's default dtype is one of this thread, and stays as it is for the others.

    diffusers and transformers set it while they build a model, and torch has one for the whole process: a run of
    another model would be given numbers of the wrong type.
    """
    original, loader, own = torch.set_default_dtype, threading.get_ident(), _OwnDtype()

    def set_own(dtype: torch.dtype) -> None:
        if threading.get_ident() == loader:
            own.dtype = dtype
        else:
            original(dtype)

    torch.set_default_dtype = set_own
    try:
        with own:
            yield
    finally:
        torch.set_default_dtype = original


def warm(
    spec: ModelSpec,
    pipe: Any,
    device: torch.device,
    dtype: torch.dtype,
    controlnets: Mapping[str, Any] | None = None,
) -> WarmModel:
    """A WarmModel of a pipeline that is built and in its place, as are its ControlNets. Raises ConfigError."""
    schedulers.check(spec.schedulers, pipe.scheduler, spec.name)
    if dtype is torch.float16 and hasattr(pipe, "upcast_vae") and pipe.vae.config.force_upcast:
        # The pipeline would turn the VAE to float32 and back in place, under the runs of others.
        raise ConfigError(f"model {spec.name!r}: its VAE overflows in float16; set dtype to bfloat16 or float32")
    vae = getattr(pipe, "vae", None)
    if dtype is torch.bfloat16 and vae is not None and getattr(vae.config, "force_upcast", False):
        # As SDXL's pipelines do with it for each image they start from. It is there for float16; bfloat16 does not
        # overflow.
        vae.register_to_config(force_upcast=False)
    if vain := (unused(pipe) | (set() if can_weigh(pipe) else {"prompt_weighting"})) & set(spec.accepts):
        left = sorted(set(spec.accepts) - vain)
        raise ConfigError(f"model {spec.name!r} has no use for {', '.join(sorted(vain))}; set accepts = {left}")
    pipe.set_progress_bar_config(disable=True)
    variants = Variants(spec, pipe, controlnets)
    side = max(spec.defaults.width, spec.defaults.height)
    adapters = _adapters(spec, pipe)
    spec = spec.model_copy(update={"loras": {name: spec.loras[name] for name in adapters}})
    modules = _adapted(targets(pipe, controlnets), adapters)
    # What a policy hides shall not be seen while it is made.
    previewer = None if spec.hides else previews.fit(pipe, side)
    checker = open_checker(spec.safety) if spec.safety else None
    return WarmModel(spec, pipe, modules, device, dtype, variants, previewer, checker)


def _adapters(spec: ModelSpec, pipe: Any) -> dict[str, dict[str, Layers]]:
    """The catalog's adapters that are of this model; the others are no reason to be without the model."""
    found = {}
    for name, entry in spec.loras.items():
        try:
            model_check.check_hashes(entry.source, entry.sha256 or {})
            found[name] = lora.read(entry.source, pipe, spec.name)
        except ConfigError as error:
            log.error("adapter.refused", model=spec.name, adapter=name, reason=error.message)  # noqa: TRY400
    return found


def _adapted(found: dict[str, Target], read: dict[str, dict[str, Layers]]) -> dict[str, Target]:
    """The targets, with all adapters at the denoisers they are for."""
    for part in {part for parts in read.values() for part in parts}:
        own = {name: parts[part] for name, parts in read.items() if part in parts}
        found[part] = replace(found[part], adapters=Adapters(found[part].module, own))
    return found


def targets(pipe: Any, controlnets: Mapping[str, Any] | None = None) -> dict[str, Target]:
    """The modules whose calls runs share: denoisers, encoders, and the VAE from both sides."""
    found = {name: Target(module, Phase.DENOISING, **_exceptions(module)) for name, module in _modules(pipe, DENOISERS)}
    found |= {name: Target(module, Phase.ENCODING) for name, module in _modules(pipe, ENCODERS)}
    for name, vae in _modules(pipe, ("vae",)):
        found[f"{name}.encode"] = Target(vae, Phase.ENCODING, "encode")
        found[f"{name}.decode"] = Target(vae, Phase.DECODING, "decode", **_exceptions(vae))
    for kind, net in (controlnets or {}).items():
        found[f"controlnet.{kind}"] = Target(net, Phase.DENOISING)
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
    """The pipeline class that the folder's model_index.json names. Raises ModelRefused for whatever could run code."""
    return _pipeline_class(model_check.check_folder(folder), folder)


def _pipeline_class(name: str, source: Path) -> Any:
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise ModelRefused(f"{source}: {name!r} is not a pipeline class of diffusers")
    return found
