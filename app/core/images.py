"""Intake: is this upload a picture we may decode, and if so, the same picture written anew.

What comes out was encoded by us: no metadata, no colour profile, nothing after the picture's end, one frame, upright.
Decoding is where a hostile file strikes: `clean_image` runs in image_child.py, a process with bounded memory and
time, never in one that serves or paints. Pillow comes with the `api` and `worker` extras.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.core.errors import ImageRefused

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 16_000_000
MAX_SIDE = 8192  # pixels
# What Pillow's three decoders raise on bad files.
_BAD_FILE = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, zlib.error, MemoryError, Warning)


@dataclass(frozen=True, slots=True)
class CleanImage:
    body: bytes  # a PNG, RGB or RGBA, 8 bits a channel
    width: int  # pixels
    height: int


def load_decoders() -> None:
    """Import the decoders that `clean_image` uses, so that processes forked from this one have them."""
    from PIL import ImageOps, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401, PLC0415


def clean_image(upload: bytes) -> CleanImage:
    """Decode a PNG, JPEG or WebP of one frame and encode it anew. Raises ImageRefused."""
    from PIL import Image, ImageOps  # noqa: PLC0415  # the API imports this module, and its process decodes nothing

    if len(upload) > MAX_BYTES:
        raise ImageRefused(f"The image has {len(upload)} bytes; at most {MAX_BYTES} are accepted.")
    kind = _format_of(upload)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow only warns of some bombs and broken files
            with Image.open(io.BytesIO(upload), formats=(kind,)) as image:
                _check_shape(image)
                image.load()
                upright = ImageOps.exif_transpose(image)
                if upright.mode.startswith("I"):  # 16 bits a pixel, as depth maps have: Pillow would cut, not scale
                    upright = upright.point(lambda value: value * (1 / 256)).convert("L")
                return _encoded(upright.convert("RGBA" if upright.has_transparency_data else "RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageRefused(f"The image has too many pixels; at most {MAX_PIXELS} are accepted.") from error
    except _BAD_FILE as error:
        raise ImageRefused(f"The image cannot be decoded as {kind}; it is damaged or not an ordinary one.") from error


def _format_of(upload: bytes) -> str:
    """Pillow's name of the format that the first bytes show. Its other forty formats are never tried."""
    if upload.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if upload.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if upload[:4] == b"RIFF" and upload[8:12] == b"WEBP":
        return "WEBP"
    raise ImageRefused("The image is neither PNG, JPEG nor WebP; convert it to one of these.")


def _check_shape(image: "Image") -> None:
    """Look at what the header says, before a pixel is decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageRefused(
            f"The image has {width} x {height} pixels; at most {MAX_PIXELS} are accepted, and {MAX_SIDE} to a side."
        )
    # A JPEG of several pictures (MPO, as phones write) is taken for its first; the others are never decoded.
    if image.format != "MPO" and getattr(image, "n_frames", 1) != 1:
        raise ImageRefused("The image is animated; send a single frame.")


def _encoded(image: "Image") -> CleanImage:
    image.info.clear()  # a colour profile would be written along
    body = io.BytesIO()
    image.save(body, "PNG", compress_level=1)
    return CleanImage(body.getvalue(), image.width, image.height)
