"""Aspect ratios: "16:9" -> the size nearest to it that a model paints, of about as many pixels as its default."""

import math
import re
from functools import lru_cache
from typing import Final

from app.core.catalog import Limits, ModelSpec
from app.core.errors import InvalidParams
from app.core.tasks import Size

FORM: Final = r"^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}$"
MOST_OFF: Final = 0.15  # a shape further from what was asked than this is another shape
_RATIO: Final = re.compile(FORM)


def snap(aspect_ratio: str, spec: ModelSpec) -> Size:
    """The size for `aspect_ratio` (width:height). Raises InvalidParams where the model paints nothing like it."""
    if not _RATIO.fullmatch(aspect_ratio):
        raise InvalidParams(f"aspect_ratio must be WIDTH:HEIGHT, as 16:9, got {aspect_ratio!r}")
    width, height = map(int, aspect_ratio.split(":"))
    size = _nearest(width / height, spec.defaults.width * spec.defaults.height, spec.limits)
    if size is None or abs(size.width / size.height / (width / height) - 1) > MOST_OFF:
        near = f"; the nearest is {size.width}x{size.height}" if size else ""
        raise InvalidParams(f"aspect_ratio {aspect_ratio} is no shape that model {spec.name!r} paints{near}")
    return size


@lru_cache(maxsize=256)
def _nearest(ratio: float, pixels: int, limits: Limits) -> Size | None:
    """The size whose shape and number of pixels are least off, both by their logarithms; None where there is none."""

    def off(size: Size) -> float:
        shape = abs(math.log(size.width / size.height / ratio))
        return shape + abs(math.log(size.width * size.height / pixels))

    return min(_sizes(ratio, limits), key=off, default=None)


def _sizes(ratio: float, limits: Limits) -> list[Size]:
    """For each width the two heights around the one that would have the shape."""
    step = limits.multiple_of
    least, most = -(-limits.min_side // step), limits.max_side // step
    found = []
    for width in range(least, most + 1):
        for height in {math.floor(width / ratio), math.ceil(width / ratio)}:
            size = Size(width * step, min(max(height, least), most) * step)
            if size.width * size.height <= limits.max_pixels:
                found.append(size)
    return found
