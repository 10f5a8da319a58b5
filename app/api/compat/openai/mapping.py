"""OpenAI's words into ours and back: what is asked becomes a JobRequest, a job's pictures become an ImagesResponse."""

import base64
from collections.abc import Mapping
from typing import Any, Final

from app.api.compat.openai.errors import Refused
from app.api.compat.openai.schemas import (
    Asked,
    Described,
    Image,
    ImageEdit,
    ImagesResponse,
    ImageVariation,
    Quality,
    ShownQuality,
)
from app.api.schemas import JobRequest
from app.core.catalog import ModelSpec
from app.core.job import Job

WAIT_SECONDS: Final = 600  # for a picture, queue and all; what OpenAI's clients wait
NAMES: Final[Mapping[Quality, ShownQuality]] = {"auto": "medium", "standard": "medium", "hd": "high"}
STRENGTH: Final = {"low": 0.8, "high": 0.5}  # by input_fidelity
OURS: Final = ("seed", "negative_prompt", "guidance_scale", "scheduler", "strength")  # the same on both sides


def shown_quality(asked: Asked) -> ShownQuality:
    """The quality as OpenAI's replies name it."""
    quality: Quality = getattr(asked, "quality", None) or "auto"
    return NAMES.get(quality) or quality  # type: ignore[return-value]  # those that are not among NAMES


def to_request(asked: Asked, spec: ModelSpec, images: Mapping[str, str] | None = None) -> JobRequest:
    """The job that is asked for; `images` are the ids of what was uploaded, by field. Raises Refused."""
    given = {name: getattr(asked, name, None) for name in OURS}
    given |= {"model": spec.name, "num_images": asked.n, "metadata": _metadata(asked), "deadline_seconds": WAIT_SECONDS}
    given |= _size(asked.size) | dict(images or {})
    if isinstance(asked, Described):
        given |= {"prompt": asked.prompt, "num_inference_steps": _steps(asked, spec)} | _file(asked)
        _check(asked, spec)
    if isinstance(asked, ImageEdit):
        given |= _kept(asked, images or {})
    if isinstance(asked, ImageVariation):
        given |= {"prompt": "", "variation": "strong"}
    return JobRequest.model_validate({name: value for name, value in given.items() if value is not None})


def _size(size: str | None) -> dict[str, Any]:
    if size in (None, "auto"):
        return {}
    width, _, height = size.partition("x")
    return {"width": int(width), "height": int(height)}


def _steps(asked: Described, spec: ModelSpec) -> int | None:
    if asked.quality is None or asked.quality == "auto":
        return asked.num_inference_steps
    if asked.num_inference_steps is not None:
        raise Refused("quality and num_inference_steps say the same thing; send one of them", param="quality")
    return spec.steps_of(shown_quality(asked))


def _file(asked: Described) -> dict[str, Any]:
    kind, compression = asked.output_format or "png", asked.output_compression
    if kind == "png":
        if compression not in (None, 100):
            raise Refused("output_compression below 100 needs output_format jpeg or webp", param="output_compression")
        return {"output_format": kind}
    return {"output_format": kind, "output_quality": 100 if compression is None else max(compression, 1)}


def _check(asked: Described, spec: ModelSpec) -> None:
    if asked.moderation == "low" and spec.safety is not None:
        raise Refused(f"moderation must be auto: the checker of model {spec.name!r} has one level", param="moderation")
    if asked.partial_images and not asked.stream:
        raise Refused("partial_images needs stream", param="partial_images")
    if asked.partial_images and (asked.n or 1) > 1:
        raise Refused("partial_images needs n = 1: a partial image does not say of which it is one", param="n")
    if asked.stream and asked.response_format == "url":
        raise Refused("response_format must be b64_json in a stream", param="response_format")


def _kept(asked: ImageEdit, images: Mapping[str, str]) -> dict[str, Any]:
    """How much of the source is kept, and that what is transparent in a mask is what to paint."""
    found: dict[str, Any] = {"mask_channel": "alpha"} if "mask" in images else {}
    if asked.input_fidelity is None:
        return found
    if "mask" in images or asked.strength is not None:
        raise Refused("input_fidelity does not go with a mask or strength", param="input_fidelity")
    return found | {"strength": STRENGTH[asked.input_fidelity]}


def _metadata(asked: Asked) -> dict[str, Any] | None:
    found = {name: getattr(asked, name, None) for name in ("user", "safety_identifier")}
    return {name: value for name, value in found.items() if value} or None


def end_user(asked: Asked) -> str | None:
    """The identifier that replies repeat."""
    return getattr(asked, "safety_identifier", None) or asked.user or None


def to_reply(job: Job, images: list[Image], asked: Asked) -> ImagesResponse:
    """The reply for a job that succeeded; `images` are its pictures in the form that was asked for."""
    return ImagesResponse(
        created=int(job.created_at),
        data=images,
        output_format=job.params.output_format,
        quality=shown_quality(asked),
        size=f"{job.params.width}x{job.params.height}",
        safety_identifier=end_user(asked),
    )


def encoded(body: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(body).decode()
