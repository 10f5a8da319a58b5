"""Tasks: what a request's fields ask for besides a picture from words, which models can do it, and at which size."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from app.core.catalog import Ability, Limits, ModelSpec
from app.core.errors import InvalidParams
from app.core.images import MAX_PIXELS

if TYPE_CHECKING:
    from app.core.params import GenerationParams, GenerationRequest, Margins

# How much of the picture is painted anew: strength 0 leaves it, 1 starts from noise alone.
VARIATION_STRENGTH: Final = {"subtle": 0.4, "strong": 0.8}


class Task(StrEnum):
    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_TO_IMAGE = "image_to_image"
    INPAINTING = "inpainting"
    OUTPAINTING = "outpainting"
    VARIATION = "variation"
    UPSCALE = "upscale"


# What a model must be able to do; an upscale may be done by a model of its own instead.
_NEEDS: Final[dict[Task, Ability]] = {
    Task.TEXT_TO_IMAGE: "text_to_image",
    Task.IMAGE_TO_IMAGE: "image_to_image",
    Task.VARIATION: "image_to_image",
    Task.UPSCALE: "image_to_image",
    Task.INPAINTING: "inpainting",
    Task.OUTPAINTING: "inpainting",
}
_STRENGTH: Final = {
    Task.IMAGE_TO_IMAGE: 0.8,
    Task.INPAINTING: 1.0,
    Task.OUTPAINTING: 1.0,
    Task.UPSCALE: 0.3,  # of the pass after resampling: enough for detail, too little for another picture
}
_ONE_OF: Final = ("mask", "outpaint", "variation", "upscale")


@dataclass(frozen=True, slots=True)
class Size:
    """Pixels."""

    width: int
    height: int


def task_of(asked: "GenerationRequest | GenerationParams") -> Task:
    """The task that the fields ask for."""
    if asked.image is None:
        return Task.TEXT_TO_IMAGE
    named = {
        "mask": Task.INPAINTING,
        "outpaint": Task.OUTPAINTING,
        "variation": Task.VARIATION,
        "upscale": Task.UPSCALE,
    }
    return next((task for name, task in named.items() if getattr(asked, name) is not None), Task.IMAGE_TO_IMAGE)


def ability_of(params: "GenerationParams") -> Ability:
    """What the model that makes it has to be able to do."""
    return "upscaling" if params.upscale_method == "model" else _NEEDS[task_of(params)]


def tasks_of(spec: ModelSpec) -> list[str]:
    """Everything the model can be asked for, as GET /v1/models shows it."""
    found: list[str] = [task for task, ability in _NEEDS.items() if ability in spec.tasks]
    if "upscaling" in spec.tasks or spec.upscalers:
        found = [*found, *([] if Task.UPSCALE in found else [Task.UPSCALE])]
    return found + ["tiling"] * ("tiling" in spec.tasks) + ["controlnet"] * bool(spec.controlnets)


def check_task(request: "GenerationRequest", spec: ModelSpec) -> None:
    """Return if the fields go together and the model can do what they ask for. Raises InvalidParams."""
    _check_together(request)
    task = task_of(request)
    if request.upscale_method != "model" or task is not Task.UPSCALE:
        _check_ability(_NEEDS[task], task, spec)
    elif "upscaling" not in spec.tasks:
        raise InvalidParams(f"upscale_method: no upscaler of factor {request.upscale} is known for this model")
    elif spec.upscale_factor != request.upscale:
        raise InvalidParams(f"upscale must be {spec.upscale_factor} for model {spec.name!r}")
    if request.tiling:
        _check_ability("tiling", "tiling", spec)
    for control in request.controls or ():
        if control.type not in spec.controlnets:
            there = f"it has {', '.join(spec.controlnets)}" if spec.controlnets else "it has none"
            raise InvalidParams(f"controls: model {spec.name!r} has no ControlNet {control.type!r}; {there}")


def _check_ability(ability: Ability, task: str, spec: ModelSpec) -> None:
    if ability not in spec.tasks:
        raise InvalidParams(f"model {spec.name!r} cannot do {task}; it can do {', '.join(tasks_of(spec))}")


def _check_together(request: "GenerationRequest") -> None:
    given = [name for name in _ONE_OF if getattr(request, name) is not None]
    for name in [*given, *(["strength"] if request.strength is not None else [])]:
        if request.image is None:
            raise InvalidParams(f"{name} needs an image")
    if len(given) > 1:
        raise InvalidParams(f"{' and '.join(given)} cannot be asked for together; send one after the other")
    is_by_model = request.upscale is not None and request.upscale_method == "model"
    for name, is_wrong, why in (
        ("mask_channel", request.mask_channel == "alpha" and request.mask is None, "it needs a mask"),
        ("strength", request.strength is not None and request.variation is not None, "variation says how much"),
        ("strength", request.strength is not None and is_by_model, "an upscaler keeps the whole picture"),
        ("tiling", request.tiling and is_by_model, "an upscaler keeps the picture's edges as they are"),
        ("upscale_method", request.upscale_method is not None and request.upscale is None, "it needs upscale"),
        ("controls", request.controls and given and given != ["mask"], f"they do not go with {', '.join(given)}"),
    ):
        if is_wrong:
            raise InvalidParams(f"{name} must be left out: {why}")


def strength_of(params: "GenerationParams") -> float | None:
    """How much is painted anew; None where the task knows no such thing."""
    return VARIATION_STRENGTH[params.variation] if params.variation else params.strength


def default_strength(request: "GenerationRequest") -> float | None:
    """The strength of a request that names none."""
    task = task_of(request)
    return None if request.upscale_method == "model" else _STRENGTH.get(task)


def check_strength(params: "GenerationParams") -> None:
    """Return if at least one step is left. Raises InvalidParams."""
    strength = strength_of(params)
    if strength is not None and int(params.num_inference_steps * strength) < 1:
        least = "more num_inference_steps" if params.variation else "more strength or num_inference_steps"
        raise InvalidParams(
            f"strength {strength:g} of {params.num_inference_steps} steps leaves no step to do; ask for {least}"
        )


def check_margins(outpaint: "Margins | None", image: Size) -> None:
    """Raises InvalidParams for a canvas that no worker should hold."""
    if outpaint is None:
        return
    canvas = (image.width + outpaint.left + outpaint.right) * (image.height + outpaint.top + outpaint.bottom)
    if canvas > MAX_PIXELS:
        raise InvalidParams(f"outpaint: the image and its margins have {canvas} pixels; at most {MAX_PIXELS} are taken")


def default_size(request: "GenerationRequest", image: Size, spec: ModelSpec) -> Size:
    """The size of what is made of an image, where the request names none or one side only.

    The image's own (with the margins of an outpainting), moved into the model's limits in its shape, each side to the
    nearest multiple; then times the factor of an upscale. One side alone: the other follows the image's shape.
    """
    width, height, factor = image.width, image.height, request.upscale or 1
    if request.outpaint:
        width += request.outpaint.left + request.outpaint.right
        height += request.outpaint.top + request.outpaint.bottom
    if request.width:
        scale = request.width / factor / width
    elif request.height:
        scale = request.height / factor / height
    else:
        scale = _scale(width, height, spec.limits, spec.limits.max_upscaled_pixels / factor**2)
    most = min(spec.limits.max_pixels, spec.limits.max_upscaled_pixels / factor**2)
    sides = [_snapped(side * scale, spec.limits) for side in (width, height)]
    if not (request.width or request.height) and sides[0] * sides[1] > most:  # both were rounded up
        half = spec.limits.multiple_of / 2
        sides = [_snapped(side * scale - half, spec.limits) for side in (width, height)]
    return Size(request.width or sides[0] * factor, request.height or sides[1] * factor)


def _scale(width: float, height: float, limits: Limits, most_pixels: float) -> float:
    """The factor nearest to 1 that brings a shape into the limits, as far as there is one."""
    most = min(float(limits.max_pixels), most_pixels)
    down: float = min(1.0, limits.max_side / max(width, height), (most / (width * height)) ** 0.5)
    return max(down, limits.min_side / min(width, height)) if down == 1.0 else down


def _snapped(side: float, limits: Limits) -> int:
    step = limits.multiple_of
    least, most = -(-limits.min_side // step) * step, limits.max_side // step * step
    return min(max(round(side / step) * step, least), most)


def check_masks(image: Size, mask: Size) -> None:
    """Raises InvalidParams for a mask of another size than the image's."""
    if image != mask:
        raise InvalidParams(
            f"mask has {mask.width} x {mask.height} pixels; it must have the image's {image.width} x {image.height}"
        )


def unique(names: Iterable[str | None]) -> tuple[str, ...]:
    """The names that are there, each once, in their order."""
    return tuple(dict.fromkeys(name for name in names if name))
