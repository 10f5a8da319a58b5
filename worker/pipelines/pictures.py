"""Pictures: what a job starts from, in the size of its result, and what is put back into the result.

A picture is scaled until it covers the asked size and cropped at its centre. What is transparent lies on white. A mask
is scaled and cropped as its picture is; its greys blend, and what is nearly black or white counts as that, since a
JPEG's is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from app.core.params import GenerationParams, Margins
from app.core.tasks import Task, task_of

Picture = npt.NDArray[np.uint8]
NEARLY = 8  # of 255


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """`image` is RGB; `mask` (height, width) of 0..1 says how much of each pixel is the new picture's."""

    image: Image.Image | None = None
    mask: npt.NDArray[np.float32] | None = None
    controls: tuple[Image.Image, ...] = field(default=())

    def cells(self, side: int) -> Image.Image:
        """The mask for a pipeline whose latents have a cell for `side` x `side` pixels: a touched cell is painted."""
        assert self.mask is not None
        height, width = self.mask.shape
        touched = self.mask.reshape(height // side, side, width // side, side).max(axis=(1, 3)) > 0
        return Image.fromarray(np.kron(touched, np.ones((side, side), bool)).astype(np.uint8) * 255)

    def kept_in(self, painted: Picture) -> Picture:
        """The new picture, with the source's own pixels where the mask keeps them."""
        if self.mask is None or self.image is None:
            return painted
        new = self.mask[..., None]
        mixed = painted * new + np.asarray(self.image, np.float32) * (1 - new)
        return mixed.round().astype(np.uint8)


NOTHING = Source()


def prepare(params: GenerationParams, pictures: Mapping[str, Image.Image]) -> Source:
    """What the job starts from. `pictures` are its uploads, by their ids."""
    width, height = params.width, params.height
    controls = tuple(cover(flat(pictures[control.image]), width, height) for control in params.controls)
    if params.image is None:
        return Source(controls=controls)
    task, image = task_of(params), flat(pictures[params.image])
    if task is Task.UPSCALE and params.upscale_method == "model":
        assert params.upscale is not None
        return Source(cover(image, width // params.upscale, height // params.upscale))
    mask = None
    if params.outpaint:
        image, mask = _canvas(image, params.outpaint)
    elif params.mask is not None:
        mask = _mask(pictures[params.mask], params.mask_channel)
    if mask is not None:
        mask = cover(mask, width, height, Image.Resampling.BILINEAR)
    return Source(cover(image, width, height), None if mask is None else _levels(mask), controls)


def cover(
    image: Image.Image, width: int, height: int, method: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """The picture scaled until it covers the size, and cropped at its centre."""
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), method)


def flat(image: Image.Image) -> Image.Image:
    """The picture without transparency, on white."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _mask(image: Image.Image, channel: str) -> Image.Image:
    if channel == "luminance":
        return image.convert("RGB").convert("L")
    return ImageOps.invert(image.convert("RGBA").getchannel("A"))


def _canvas(image: Image.Image, margins: Margins) -> tuple[Image.Image, Image.Image]:
    """The picture with its edge drawn out over the margins, and the mask of the margins."""
    sides = ((margins.top, margins.bottom), (margins.left, margins.right))
    pixels = np.pad(np.asarray(image), (*sides, (0, 0)), mode="edge")
    mask = np.pad(np.zeros((image.height, image.width), np.uint8), sides, constant_values=255)
    return Image.fromarray(pixels), Image.fromarray(mask)


def _levels(mask: Image.Image) -> npt.NDArray[np.float32]:
    values = (np.asarray(mask, np.float32) - NEARLY) / (255 - 2 * NEARLY)
    return values.clip(0.0, 1.0).astype(np.float32)
