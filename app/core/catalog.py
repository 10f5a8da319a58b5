"""The catalog: what each model is called, where its weights lie, what it accepts and what it defaults to."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from app.core.errors import ConfigError, ModelNotFound

ModelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
# As other services name models: "dall-e-3", "stabilityai/sdxl-turbo", "v1-5-pruned.safetensors".
ModelAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Revision = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
MAX_STEPS = 250
# What some pipelines have no use for, and what some text encoders cannot do.
OptionalParam = Literal["negative_prompt", "guidance_scale", "prompt_weighting"]


Ability = Literal["text_to_image", "image_to_image", "inpainting", "tiling", "upscaling"]


Policy = Literal["flag", "blur", "refuse"]  # of pictures that a safety checker flags
Quality = Literal["low", "medium", "high", "xhigh", "max"]
STEPS_OF_QUALITY: Final[Mapping[Quality, float]] = {"low": 0.5, "medium": 1, "high": 1.5, "xhigh": 2, "max": 3}


class Defaults(BaseModel):
    """What a request gets that does not say; sizes in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(gt=0)
    height: int = Field(gt=0)
    num_inference_steps: int = Field(20, ge=1, le=MAX_STEPS)
    guidance_scale: float = Field(5.0, ge=0, le=30)
    scheduler: str
    negative_prompt: str = ""


class Limits(BaseModel):
    """What a request may ask for; sizes in pixels, prompts in characters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_side: int = Field(64, gt=0)
    max_side: int = Field(1024, gt=0)
    multiple_of: int = Field(8, gt=0)
    max_pixels: int = Field(1024 * 1024, gt=0)
    max_steps: int = Field(MAX_STEPS, ge=1, le=MAX_STEPS)
    max_images: int = Field(8, ge=1, le=64)
    max_prompt: int = Field(2000, ge=1, le=10_000)
    max_guidance: float = Field(30, ge=0)
    max_upscaled_pixels: int = Field(2048 * 2048, gt=0, description="Of a picture that was upscaled.")


class LoraSpec(BaseModel):
    """A low-rank adapter of the model: `source` is a safetensors file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    sha256: Sha256 | None = None
    title: str = ""


class ControlnetSpec(BaseModel):
    """A ControlNet of the model: `source` is the diffusers folder of one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    title: str = ""


class SafetySpec(BaseModel):
    """What looks at every picture of the model: `source` is the folder of a classifier.

    A picture is flagged when one of `labels` reaches `threshold`; diffusers' StableDiffusionSafetyChecker has its own
    thresholds, and takes neither.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    policy: Policy = "flag"
    labels: tuple[str, ...] = ()
    threshold: float = Field(0.5, gt=0, le=1)


class ModelSpec(BaseModel):
    """One entry of models.toml.

    `source` is a diffusers folder or, beside a `config` folder that says what is in it, one safetensors file; else
    `hub` is a repository at a pinned `revision`. `sha256` pins the single file, or files by their path in the folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ModelName
    title: str = ""
    owned_by: str = "safelight"
    created: int = 0  # Unix seconds, as OpenAI's model list has it
    aliases: tuple[ModelAlias, ...] = ()
    source: Path | None = None
    config: Path | None = None
    hub: str | None = None
    revision: Revision | None = None
    sha256: Sha256 | dict[str, Sha256] = {}
    pinned: bool = False  # stays in memory
    prompt_template: str = "{prompt}"  # what the pipeline is given; a job's params keep the caller's own words
    dtype: str = Field("auto", pattern="^(auto|float32|float16|bfloat16)$")
    default: bool = False
    defaults: Defaults
    limits: Limits = Limits()
    schedulers: tuple[str, ...] = Field(min_length=1)
    accepts: tuple[OptionalParam, ...] = ("negative_prompt", "guidance_scale")
    loras: dict[ModelName, LoraSpec] = {}
    tasks: tuple[Ability, ...] = Field(("text_to_image",), min_length=1)
    controlnets: dict[ModelName, ControlnetSpec] = {}  # by the type of control
    upscale_factor: Literal[2, 4] | None = None  # of a model that upscales
    upscalers: dict[Literal["2", "4"], ModelName] = {}  # other models, by the factor they are for
    examples: tuple[str, ...] = ()
    long_prompts: bool = True  # where its text encoders can read in pieces what is longer than they are
    quality: dict[Quality, Annotated[int, Field(ge=1, le=MAX_STEPS)]] = {}  # steps, where not the usual
    safety: SafetySpec | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if (self.source is None) == (self.hub is None):
            raise ValueError("name either source (a folder) or hub (a repository), not both")
        if self.hub and not self.revision:
            raise ValueError("hub needs a revision: the 40 hex digits of a commit")
        self._check_files()
        if self.prompt_template.count("{prompt}") != 1:
            raise ValueError("prompt_template must hold {prompt} once")
        if self.defaults.scheduler not in self.schedulers:
            raise ValueError(f"defaults.scheduler {self.defaults.scheduler!r} is not among schedulers")
        if ("upscaling" in self.tasks) != (self.upscale_factor is not None):
            raise ValueError("a model has an upscale_factor if upscaling is among its tasks, and only then")
        return self

    def _check_files(self) -> None:
        is_single = self.source is not None and self.source.suffix.lower() == ".safetensors"
        if is_single != (self.config is not None):
            raise ValueError(
                "a source that is one .safetensors file needs config, a diffusers folder; no other has one"
            )
        if isinstance(self.sha256, str) != is_single and self.sha256:
            raise ValueError("sha256 is a text for a single file, and a table of files for a folder")
        for name in () if isinstance(self.sha256, str) else self.sha256:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"sha256: {name!r} is no path within the folder")

    def worded(self, prompt: str) -> str:
        """What the pipeline is given for a caller's prompt."""
        return self.prompt_template.replace("{prompt}", prompt)

    @property
    def hides(self) -> bool:
        """Whether pictures may be withheld or blurred for what is on them."""
        return self.safety is not None and self.safety.policy != "flag"

    def steps_of(self, quality: Quality) -> int:
        """The steps that a quality of OpenAI's Images API stands for: the model's own, else a share of its default."""
        usual = math.ceil(STEPS_OF_QUALITY[quality] * self.defaults.num_inference_steps)
        return self.quality.get(quality, min(usual, self.limits.max_steps))


class Catalog:
    """All models the operator offers, in the file's order."""

    def __init__(self, models: list[ModelSpec]) -> None:
        if not models:
            raise ConfigError("the catalog holds no model; add a [models.NAME] table to models.toml")
        self.models = {m.name: m for m in models}
        self.aliases = _aliases(models)
        self.unfit: dict[str, dict[str, str]] = {}  # model -> adapter -> why it is none of that model
        for model in models:
            for factor, name in model.upscalers.items():
                if str(self.models[name].upscale_factor if name in self.models else None) != factor:
                    raise ConfigError(
                        f"[models.{model.name}] upscalers.{factor}: {name!r} is no model with upscale_factor = {factor}"
                    )

    @property
    def default(self) -> ModelSpec:
        """The model of requests that name none: the entry marked default, else the first."""
        return next((m for m in self.models.values() if m.default), next(iter(self.models.values())))

    def get(self, name: str | None) -> ModelSpec:
        """The model called `name` (None: the default). Raises ModelNotFound."""
        if name is None:
            return self.default
        name = self.aliases.get(name, name)
        if name not in self.models:
            raise ModelNotFound(f"there is no model {name[:64]!r}; GET /v1/models lists those there are")
        return self.models[name]


def _aliases(models: Sequence[ModelSpec]) -> dict[str, str]:
    found: dict[str, str] = {}
    names = {model.name for model in models}
    for model in models:
        for alias in model.aliases:
            if alias in names or alias in found:
                raise ConfigError(f"[models.{model.name}] aliases: {alias!r} is the name of another model")
            found[alias] = model.name
    return found


def load_catalog(file: Path) -> Catalog:
    """Read models.toml; relative sources are taken from the file's folder. Raises ConfigError naming file and field."""
    try:
        tables = tomllib.loads(file.read_text())["models"]
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise ConfigError(f"cannot read a [models.NAME] table from {file}: {error}") from error
    return Catalog([_spec(name, table, file) for name, table in tables.items()])


def _spec(name: str, table: dict[str, object], file: Path) -> ModelSpec:
    try:
        spec = ModelSpec.model_validate({"name": name, **table})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{file}: [models.{name}] {field}: {first['msg']}") from error
    loras = {n: lora.model_copy(update={"source": _absolute(lora.source, file)}) for n, lora in spec.loras.items()}
    controlnets = {
        n: net.model_copy(update={"source": _absolute(net.source, file)}) for n, net in spec.controlnets.items()
    }
    source = _absolute(spec.source, file) if spec.source else None
    config = _absolute(spec.config, file) if spec.config else None
    safety = spec.safety and spec.safety.model_copy(update={"source": _absolute(spec.safety.source, file)})
    update = {"source": source, "config": config, "loras": loras, "controlnets": controlnets, "safety": safety}
    return spec.model_copy(update=update)


def _absolute(source: Path, file: Path) -> Path:
    return source if source.is_absolute() else (file.parent / source).resolve()
