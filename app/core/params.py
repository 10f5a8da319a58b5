"""GenerationParams: everything that decides a picture, complete, checked against the model's limits, and frozen."""

import secrets
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from app.core import aspect, prompt_weights
from app.core.catalog import MAX_STEPS, Catalog, ModelAlias, ModelName, ModelSpec
from app.core.errors import InvalidParams
from app.core.tasks import Size, check_margins, check_strength, check_task, default_size, default_strength, unique

MAX_SEED = 2**32 - 1
MAX_LORAS = 4
LCM_STEPS = 50  # LCMScheduler skips along this many steps of the training, and has no more
OutputFormat = Literal["png", "jpeg", "webp"]
MAX_CONTROLS = 3
Variation = Literal["subtle", "strong"]
UpscaleMethod = Literal["model", "resample"]
MaskChannel = Literal["luminance", "alpha"]
# A data URL, an https URL, "upload_..." or "job_.../N"; in a job's params it is always "upload_...".
ImageInput = Annotated[str, StringConstraints(min_length=1, max_length=8 * 2**20)]
Prompt = Annotated[str, StringConstraints(max_length=10_000)]


class Lora(BaseModel):
    """An adapter of the model, and how much of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: ModelName
    weight: float = Field(1.0, ge=-4, le=4)


class Margins(BaseModel):
    """Pixels to add at each side of an image, in the image's own pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    left: int = Field(0, ge=0, le=8192)
    top: int = Field(0, ge=0, le=8192)
    right: int = Field(0, ge=0, le=8192)
    bottom: int = Field(0, ge=0, le=8192)

    @model_validator(mode="after")
    def _is_something(self) -> Self:
        if not (self.left or self.top or self.right or self.bottom):
            raise ValueError("at least one side must grow")
        return self


class Control(BaseModel):
    """A picture that steers the making by a ControlNet of the model, and how much: edges, depth, a pose, ready-made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    type: ModelName
    image: ImageInput
    scale: float = Field(1.0, ge=0, le=2)


class GenerationRequest(BaseModel):
    """What a caller asks for, in diffusers' keyword names; only `prompt` is required."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: ModelAlias | None = Field(None, description="A name from GET /v1/models; the default model if absent.")
    prompt: Prompt
    negative_prompt: Prompt | None = None
    prompt_weighting: bool | None = Field(None, description="(word:1.3) and [word] weigh words; else they are text.")
    width: int | None = Field(None, ge=1, le=16384, description="Pixels.")
    height: int | None = Field(None, ge=1, le=16384, description="Pixels.")
    aspect_ratio: str | None = Field(
        None, pattern=aspect.FORM, description="Instead of width and height: the model's size nearest to that shape."
    )
    num_inference_steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Image i of a job has seed (seed + i) mod 2^32.")
    num_images: int | None = Field(None, ge=1, le=64)
    scheduler: str | None = Field(None, max_length=64, description="A noise scheduler of the model.")
    output_format: OutputFormat | None = None
    loras: list[Lora] | None = Field(None, max_length=MAX_LORAS, description="Adapters of the model, one upon another.")
    image: ImageInput | None = Field(
        None, description="What to start from: an upload's id, `job_.../N` (output N of a job), a data or https URL."
    )
    strength: float | None = Field(None, ge=0, le=1, description="How much of the image is painted anew.")
    mask: ImageInput | None = Field(None, description="Of the image's size: white is painted anew, black is kept.")
    mask_channel: MaskChannel | None = Field(None, description="alpha: what is transparent is painted anew.")
    outpaint: Margins | None = Field(None, description="Go on painting beyond the image's edges.")
    variation: Variation | None = Field(None, description="Other pictures like the image.")
    upscale: Literal[2, 4] | None = Field(None, description="Make the image so many times as wide and high.")
    upscale_method: UpscaleMethod | None = Field(
        None, description="An upscaling model, where the catalog has one, else resampling with a light repaint."
    )
    controls: list[Control] | None = Field(None, max_length=MAX_CONTROLS)
    tiling: bool | None = Field(None, description="A picture that repeats without a seam.")
    grid: bool | None = Field(None, description="One more output, of role grid: all images on one sheet.")
    output_quality: int | None = Field(None, ge=1, le=100, description="Of jpeg and webp; 92 if absent.")
    embed_metadata: bool | None = Field(None, description="Write the parameters into the file, as A1111 does.")
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
    prompt_weighting: bool = False
    image: str | None = None  # an upload's id
    strength: float | None = None
    mask: str | None = None  # an upload's id
    mask_channel: MaskChannel = "luminance"
    outpaint: Margins | None = None
    variation: Variation | None = None
    upscale: Literal[2, 4] | None = None
    upscale_method: UpscaleMethod | None = None
    controls: tuple[Control, ...] = ()
    tiling: bool = False
    grid: bool = False
    output_quality: int | None = None
    embed_metadata: bool = False
    reproducible: bool = False

    @property
    def uploads(self) -> tuple[str, ...]:
        """The ids of all uploads it is made from."""
        return unique((self.image, self.mask, *(control.image for control in self.controls)))

    def seed_of(self, image: int) -> int:
        """The seed of image `image` (0-based) of the job."""
        return (self.seed + image) % (MAX_SEED + 1)


def complete(request: GenerationRequest, catalog: Catalog, sizes: Mapping[str, Size] | None = None) -> GenerationParams:
    """Fill in the model's defaults, draw the seed, check the limits. Raises ModelNotFound, InvalidParams.

    Images are uploads' ids by now (image_inputs.py sees to that), and `sizes` are those of their pictures.
    """
    request, spec = settled(request, catalog)
    given = {k: v for k, v in request.model_dump(exclude={"model"}).items() if v is not None}
    drawn = {"seed": secrets.randbelow(MAX_SEED + 1), "num_images": 1, "output_format": "png"}
    drawn |= {"strength": default_strength(request)}
    if request.image is not None:
        image = (sizes or {})[request.image]
        check_margins(request.outpaint, image)
        size = default_size(request, image, spec)
        drawn |= {"width": size.width, "height": size.height}
    params = GenerationParams.model_validate({"model": spec.name, **spec.defaults.model_dump(), **drawn, **given})
    _check_unused(request, spec)
    _check(params, spec)
    _check_loras(params, spec, catalog.unfit.get(spec.name, {}))
    check_strength(params)
    return params


def settled(request: GenerationRequest, catalog: Catalog) -> tuple[GenerationRequest, ModelSpec]:
    """The request and the model that will do it: of an upscale the model's own upscaler, where there is one.

    What it asks for was checked as far as that can be without its images. Raises ModelNotFound, InvalidParams.
    """
    spec = catalog.get(request.model)
    if request.upscale is not None and request.upscale_method is None:
        has_one = str(request.upscale) in spec.upscalers or "upscaling" in spec.tasks
        request = request.model_copy(update={"upscale_method": "model" if has_one else "resample"})
    if request.upscale_method == "model" and str(request.upscale) in spec.upscalers:
        spec = catalog.get(spec.upscalers["4" if request.upscale == 4 else "2"])
    check_task(request, spec)
    if request.output_quality is not None and (request.output_format or "png") == "png":
        raise InvalidParams("output_quality must be left out: a png loses nothing; ask for jpeg or webp")
    return _shaped(request, spec), spec


def _shaped(request: GenerationRequest, spec: ModelSpec) -> GenerationRequest:
    """With width and height in the place of an aspect ratio."""
    if request.aspect_ratio is None:
        return request
    for name in ("width", "height", "outpaint", "upscale"):
        if getattr(request, name) is not None:
            raise InvalidParams(f"aspect_ratio must be left out: {name} says how large the picture is")
    size = aspect.snap(request.aspect_ratio, spec)
    return request.model_copy(update={"aspect_ratio": None, "width": size.width, "height": size.height})


def _check_unused(request: GenerationRequest, spec: ModelSpec) -> None:
    """What the model has no use for is refused: a picture must not lie about what it was made from."""
    if request.negative_prompt not in {None, "", spec.defaults.negative_prompt} and (
        "negative_prompt" not in spec.accepts
    ):
        raise InvalidParams(f"negative_prompt must be empty: model {spec.name!r} has no use for it")
    # Its default stands in every job's params, which may be sent again.
    if request.guidance_scale not in {None, spec.defaults.guidance_scale} and "guidance_scale" not in spec.accepts:
        raise InvalidParams(f"guidance_scale must be left out: model {spec.name!r} has no use for it")
    if request.prompt_weighting:
        if "prompt_weighting" not in spec.accepts:
            raise InvalidParams(f"prompt_weighting must be left out: model {spec.name!r} cannot weigh words")
        prompt_weights.check(request.prompt, "prompt")
        prompt_weights.check(request.negative_prompt or "", "negative_prompt")


def _check_loras(params: GenerationParams, spec: ModelSpec, unfit: Mapping[str, str]) -> None:
    names = [lora.name for lora in params.loras]
    for name in names:
        if name not in spec.loras:
            there = f"it has {', '.join(spec.loras)}" if spec.loras else "it has none"
            raise InvalidParams(f"loras: model {spec.name!r} has no adapter {name!r}; {there}")
        if name in unfit:
            raise InvalidParams(f"loras: adapter {name!r} is not of model {spec.name!r}: {unfit[name]}")
    if len(set(names)) < len(names):
        raise InvalidParams("loras: an adapter may be named once; add its weights up")


def _check(params: GenerationParams, spec: ModelSpec) -> None:
    limits = spec.limits
    _check_size(params, spec)
    if params.scheduler not in spec.schedulers:
        raise InvalidParams(f"scheduler must be one of {', '.join(spec.schedulers)} for model {spec.name!r}")
    for name, most in (
        ("num_inference_steps", limits.max_steps),
        ("num_images", limits.max_images),
        ("guidance_scale", limits.max_guidance),
    ):
        if getattr(params, name) > most:
            raise InvalidParams(f"{name} must be at most {most} for model {spec.name!r}, got {getattr(params, name)}")
    if params.scheduler == "lcm" and params.num_inference_steps > LCM_STEPS:
        raise InvalidParams(f"num_inference_steps must be at most {LCM_STEPS} with scheduler lcm: it was distilled so")
    for name in ("prompt", "negative_prompt"):
        if len(getattr(params, name)) > limits.max_prompt:
            raise InvalidParams(f"{name} must have at most {limits.max_prompt} characters for model {spec.name!r}")


def _check_size(params: GenerationParams, spec: ModelSpec) -> None:
    """The model's limits; of an upscale they hold for the picture before it grows."""
    limits, factor = spec.limits, params.upscale or 1
    pixels = params.width * params.height
    if pixels > limits.max_pixels * factor**2:
        raise InvalidParams(f"width x height must be at most {limits.max_pixels} pixels for model {spec.name!r}")
    if params.upscale and pixels > limits.max_upscaled_pixels:
        raise InvalidParams(f"width x height must be at most {limits.max_upscaled_pixels} pixels after upscaling")
    for name in ("width", "height"):
        side = getattr(params, name)
        if side % factor:
            raise InvalidParams(f"{name} must be a multiple of {factor}, as upscale asks, got {side}")
        _check_side(name if factor == 1 else f"{name} before upscaling", side // factor, spec)


def _check_side(name: str, value: int, spec: ModelSpec) -> None:
    limits = spec.limits
    if value % limits.multiple_of:
        raise InvalidParams(f"{name} must be a multiple of {limits.multiple_of} for model {spec.name!r}, got {value}")
    if not limits.min_side <= value <= limits.max_side:
        raise InvalidParams(
            f"{name} must be {limits.min_side} to {limits.max_side} for model {spec.name!r}, got {value}"
        )
