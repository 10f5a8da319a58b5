"""GenerationParams: everything that decides a picture, complete, checked against the model's limits, and frozen."""

import secrets
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.core.catalog import MAX_STEPS, Catalog, ModelName, ModelSpec
from app.core.errors import InvalidParams

MAX_SEED = 2**32 - 1
MAX_LORAS = 4
OutputFormat = Literal["png", "jpeg", "webp"]
Prompt = Annotated[str, StringConstraints(max_length=10_000)]


class Lora(BaseModel):
    """An adapter of the model, and how much of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: ModelName
    weight: float = Field(1.0, ge=-4, le=4)


class GenerationRequest(BaseModel):
    """What a caller asks for, in diffusers' keyword names; only `prompt` is required."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: ModelName | None = Field(None, description="A name from GET /v1/models; the default model if absent.")
    prompt: Prompt
    negative_prompt: Prompt | None = None
    width: int | None = Field(None, ge=1, le=16384, description="Pixels.")
    height: int | None = Field(None, ge=1, le=16384, description="Pixels.")
    num_inference_steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Image i of a job has seed (seed + i) mod 2^32.")
    num_images: int | None = Field(None, ge=1, le=64)
    scheduler: str | None = Field(None, max_length=64, description="A noise scheduler of the model.")
    output_format: OutputFormat | None = None
    loras: list[Lora] | None = Field(None, max_length=MAX_LORAS, description="Adapters of the model, one upon another.")
    reproducible: bool | None = Field(None, description="Bit for bit the same picture whatever else is being made.")


class GenerationParams(BaseModel):
    """A complete request: sent again, it paints the same picture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    num_images: int
    scheduler: str
    output_format: OutputFormat
    loras: tuple[Lora, ...] = ()
    reproducible: bool = False

    def seed_of(self, image: int) -> int:
        """The seed of image `image` (0-based) of the job."""
        return (self.seed + image) % (MAX_SEED + 1)


def complete(request: GenerationRequest, catalog: Catalog) -> GenerationParams:
    """Fill in the model's defaults, draw the seed, check the limits. Raises ModelNotFound, InvalidParams."""
    spec = catalog.get(request.model)
    given = {k: v for k, v in request.model_dump(exclude={"model"}).items() if v is not None}
    drawn = {"seed": secrets.randbelow(MAX_SEED + 1), "num_images": 1, "output_format": "png"}
    params = GenerationParams.model_validate({"model": spec.name, **spec.defaults.model_dump(), **drawn, **given})
    _check_unused(request, spec)
    _check(params, spec)
    _check_loras(params, spec)
    return params


def _check_unused(request: GenerationRequest, spec: ModelSpec) -> None:
    """What the model has no use for is refused: a picture must not lie about what it was made from."""
    if request.negative_prompt and "negative_prompt" not in spec.accepts:
        raise InvalidParams(f"negative_prompt must be empty: model {spec.name!r} has no use for it")
    if request.guidance_scale is not None and "guidance_scale" not in spec.accepts:
        raise InvalidParams(f"guidance_scale must be left out: model {spec.name!r} has no use for it")


def _check_loras(params: GenerationParams, spec: ModelSpec) -> None:
    names = [lora.name for lora in params.loras]
    for name in names:
        if name not in spec.loras:
            there = f"it has {', '.join(spec.loras)}" if spec.loras else "it has none"
            raise InvalidParams(f"loras: model {spec.name!r} has no adapter {name!r}; {there}")
    if len(set(names)) < len(names):
        raise InvalidParams("loras: an adapter may be named once; add its weights up")


def _check(params: GenerationParams, spec: ModelSpec) -> None:
    limits = spec.limits
    for name in ("width", "height"):
        _check_side(name, getattr(params, name), spec)
    if params.width * params.height > limits.max_pixels:
        raise InvalidParams(f"width x height must be at most {limits.max_pixels} pixels for model {spec.name!r}")
    if params.scheduler not in spec.schedulers:
        raise InvalidParams(f"scheduler must be one of {', '.join(spec.schedulers)} for model {spec.name!r}")
    for name, most in (
        ("num_inference_steps", limits.max_steps),
        ("num_images", limits.max_images),
        ("guidance_scale", limits.max_guidance),
    ):
        if getattr(params, name) > most:
            raise InvalidParams(f"{name} must be at most {most} for model {spec.name!r}, got {getattr(params, name)}")
    for name in ("prompt", "negative_prompt"):
        if len(getattr(params, name)) > limits.max_prompt:
            raise InvalidParams(f"{name} must have at most {limits.max_prompt} characters for model {spec.name!r}")


def _check_side(name: str, value: int, spec: ModelSpec) -> None:
    limits = spec.limits
    if value % limits.multiple_of:
        raise InvalidParams(f"{name} must be a multiple of {limits.multiple_of} for model {spec.name!r}, got {value}")
    if not limits.min_side <= value <= limits.max_side:
        raise InvalidParams(
            f"{name} must be {limits.min_side} to {limits.max_side} for model {spec.name!r}, got {value}"
        )
