"""The catalog: what each model is called, where its weights lie, what it accepts and what it defaults to."""

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from app.core.errors import ConfigError, ModelNotFound

ModelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Revision = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
MAX_STEPS = 250
OptionalParam = Literal["negative_prompt", "guidance_scale"]  # what some pipelines have no use for


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


class LoraSpec(BaseModel):
    """A low-rank adapter of the model: `source` is a safetensors file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    title: str = ""


class ModelSpec(BaseModel):
    """One entry of models.toml; `source` is a diffusers folder, or `hub` a repository at a pinned `revision`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ModelName
    title: str = ""
    owned_by: str = "safelight"
    created: int = 0  # Unix seconds, as OpenAI's model list has it
    source: Path | None = None
    hub: str | None = None
    revision: Revision | None = None
    dtype: str = Field("auto", pattern="^(auto|float32|float16|bfloat16)$")
    default: bool = False
    defaults: Defaults
    limits: Limits = Limits()
    schedulers: tuple[str, ...] = Field(min_length=1)
    accepts: tuple[OptionalParam, ...] = ("negative_prompt", "guidance_scale")
    loras: dict[ModelName, LoraSpec] = {}
    examples: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if (self.source is None) == (self.hub is None):
            raise ValueError("name either source (a folder) or hub (a repository), not both")
        if self.hub and not self.revision:
            raise ValueError("hub needs a revision: the 40 hex digits of a commit")
        if self.defaults.scheduler not in self.schedulers:
            raise ValueError(f"defaults.scheduler {self.defaults.scheduler!r} is not among schedulers")
        return self


class Catalog:
    """All models the operator offers, in the file's order."""

    def __init__(self, models: list[ModelSpec]) -> None:
        if not models:
            raise ConfigError("the catalog holds no model; add a [models.NAME] table to models.toml")
        self.models = {m.name: m for m in models}

    @property
    def default(self) -> ModelSpec:
        """The model of requests that name none: the entry marked default, else the first."""
        return next((m for m in self.models.values() if m.default), next(iter(self.models.values())))

    def get(self, name: str | None) -> ModelSpec:
        """The model called `name` (None: the default). Raises ModelNotFound."""
        if name is None:
            return self.default
        if name not in self.models:
            raise ModelNotFound(f"there is no model {name[:64]!r}; GET /v1/models lists those there are")
        return self.models[name]


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
    source = _absolute(spec.source, file) if spec.source else None
    return spec.model_copy(update={"source": source, "loras": loras})


def _absolute(source: Path, file: Path) -> Path:
    return source if source.is_absolute() else (file.parent / source).resolve()
