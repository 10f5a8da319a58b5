"""Encode: pictures -> the bytes of PNG, JPEG or WebP, with the parameters in them where that was asked for; a grid.

The parameters are written as A1111's web UI writes them, for the tools that read its pictures: its text (infotext) in a
PNG's tEXt chunk "parameters", and in the EXIF UserComment of a JPEG or a WebP.
"""

import io
import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from app.core.params import GenerationParams, OutputFormat
from app.core.tasks import strength_of

Picture = npt.NDArray[np.uint8]
EXTENSIONS: Final[dict[OutputFormat, str]] = {"png": "png", "jpeg": "jpg", "webp": "webp"}
QUALITY: Final = 92  # of jpeg and webp where none was asked for
# A1111's names of the samplers; readers know no others.
SAMPLERS: Final = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "heun": "Heun",
    "pndm": "PLMS",
    "lcm": "LCM",
}


def encode(image: Picture, params: GenerationParams, seed: int) -> bytes:
    """The bytes of a picture (height, width, 3); no metadata in them unless the params ask for it."""
    options = _text_in(params, infotext(params, seed)) if params.embed_metadata else {}
    buffer = io.BytesIO()
    if params.output_format == "png":
        Image.fromarray(image).save(buffer, "PNG", compress_level=4, **options)
    else:
        quality = QUALITY if params.output_quality is None else params.output_quality
        Image.fromarray(image).save(buffer, params.output_format.upper(), quality=quality, **options)
    return buffer.getvalue()


def grid(pictures: Sequence[Picture]) -> Picture:
    """One sheet of pictures of one size, as nearly square as they allow, row by row; the places left over are black."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    height, width, channels = pictures[0].shape
    sheet = np.zeros((rows * height, columns * width, channels), np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = picture
    return sheet


def infotext(params: GenerationParams, seed: int) -> str:
    """A picture's parameters as A1111 writes them (its modules/processing.py, create_infotext)."""
    prompt = " ".join([params.prompt, *(f"<lora:{lora.name}:{lora.weight:g}>" for lora in params.loras)])
    strength = strength_of(params)
    named: dict[str, object] = {
        "Steps": params.num_inference_steps,
        "Sampler": SAMPLERS.get(params.scheduler, params.scheduler),
        "CFG scale": f"{params.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{params.width}x{params.height}",
        "Model": params.model,
        "Denoising strength": None if strength is None else f"{strength:g}",
        "Tiling": True if params.tiling else None,
        "Version": f"Safelight {version('safelight')}",
    }
    settings = ", ".join(f"{name}: {_quoted(value)}" for name, value in named.items() if value is not None)
    negative = f"\nNegative prompt: {params.negative_prompt}" if params.negative_prompt else ""
    return f"{prompt}{negative}\n{settings}".strip()


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def _text_in(params: GenerationParams, text: str) -> dict[str, Any]:
    """What Pillow's save takes to write `text` into a file of the asked format."""
    if params.output_format == "png":
        info = PngInfo()
        info.add_text("parameters", text)  # iTXt where Latin-1 does not suffice
        return {"pnginfo": info}
    exif = Image.Exif()
    # EXIF 2.32, 4.6.5: eight bytes name the character code; A1111 (by piexif) writes UTF-16, the high byte first.
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode("utf-16-be")
    return {"exif": exif.tobytes()}
