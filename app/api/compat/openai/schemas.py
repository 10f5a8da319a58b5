"""OpenAI's Images API as this service honours it: what is taken and what is given. docs/openai.md goes field by field.

What is not named here is refused, also where OpenAI takes it: nothing is accepted and ignored.
"""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.core.catalog import MAX_STEPS, ModelAlias
from app.core.params import MAX_SEED, OutputFormat

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
ShownQuality = Literal["low", "medium", "high", "xhigh", "max"]
ResponseFormat = Literal["b64_json", "url"]
Size = Annotated[str, StringConstraints(pattern=r"^(auto|[1-9][0-9]{0,3}x[1-9][0-9]{0,3})$")]
Text = Annotated[str, StringConstraints(max_length=10_000)]
EndUser = Annotated[str, StringConstraints(max_length=256)]

# What OpenAI knows and we do not honour, and what to do instead.
UNSUPPORTED: Final = {
    "complexity": "quality says how many steps are taken",
    "frame_count": "no moving pictures are made",
    "frame_duration_ms": "no moving pictures are made",
    "markup": "say in the prompt what to change, and where with a mask",
    "style": "describe the style in the prompt",
    "svg": "pictures are png, jpeg or webp",
}


class Asked(BaseModel):
    """What every request may say."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: ModelAlias | None = Field(None, description="A name from GET /v1/models; the default model if absent.")
    n: int | None = Field(None, ge=1, le=10, description="How many images; the model's own limit may be lower.")
    size: Size | None = Field(None, description="WIDTHxHEIGHT that the model paints, or auto.", examples=["auto"])
    response_format: ResponseFormat | None = Field(None, description="b64_json unless it says url.")
    user: EndUser | None = Field(None, description="Kept in the job's metadata.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Ours: image i has seed (seed + i) mod 2^32.")


class Described(Asked):
    """What requests with a prompt may say besides."""

    prompt: Text
    quality: Quality | None = Field(None, description="How many steps are taken; GET /v1/models has the numbers.")
    output_format: OutputFormat | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="The quality of a jpeg or webp; 100: best.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are always opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description="low: only of models without a checker.")
    safety_identifier: EndUser | None = Field(None, description="Kept in the job's metadata.")
    stream: bool | None = Field(None, description="Server-sent events instead of one reply.")
    partial_images: int | None = Field(None, ge=0, le=3, description="How many small pictures come before the last.")
    negative_prompt: Text | None = Field(None, description="Ours.")
    num_inference_steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="Ours, instead of quality.")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="Ours.")
    scheduler: str | None = Field(None, max_length=64, description="Ours.")


class ImageGeneration(Described):
    """A picture to make from words."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "a red heart", "size": "auto", "n": 1}]})


class ImageEdit(Described):
    """A picture to make from another; its fields beside the files."""

    input_fidelity: Literal["low", "high"] | None = Field(None, description="Without a mask: how much is kept.")
    strength: float | None = Field(None, ge=0, le=1, description="Ours, instead of input_fidelity.")


class ImageVariation(Asked):
    """Pictures like another; its fields beside the file."""


class Image(BaseModel):
    """One picture, in one of two forms."""

    b64_json: str | None = None
    url: str | None = None


class ImagesResponse(BaseModel):
    """The pictures of a request."""

    created: int = Field(description="Unix seconds.")
    background: Literal["opaque"] = "opaque"
    data: list[Image]
    output_format: OutputFormat
    quality: ShownQuality
    size: str
    safety_identifier: str | None = None
