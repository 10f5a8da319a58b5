"""Contact sheets: many small pictures in one PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from models.train.pictures import Picture

LABEL = 11  # pixels of a line of text


def contact_sheet(file: Path, pictures: Picture, columns: int, labels: Sequence[str] = ()) -> None:
    """Write pictures (n, h, w, 3) row by row, each over its label if there are labels."""
    count, height, width, _ = pictures.shape
    line = LABEL if labels else 0
    canvas = Image.new("RGB", (columns * width, -(-count // columns) * (height + line)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, picture in enumerate(pictures):
        x, y = i % columns * width, i // columns * (height + line)
        canvas.paste(Image.fromarray(picture), (x, y))
        if labels:
            draw.text((x + 1, y + height), labels[i][: width // 6], fill="black", font_size=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(file, optimize=True)


def side_by_side(*parts: Picture) -> Picture:
    """Several pictures each of the same things, (n, h, w, 3) each, as one broad picture a thing."""
    return np.concatenate(parts, axis=2)
