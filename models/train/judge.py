"""Judge: which of the kept concepts a picture shows, by pixels alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.train.pictures import COLOURS, Picture, colourise, place
from models.train.sources import Emoji

SIZES = (0.84, 0.88, 0.92, 0.96, 1.0)  # the sizes that training pictures have
ACROSS = 25  # tiles a row
SIDE = 32  # pixels at which pictures are compared
CONTRAST = 24  # of 255: what differs more from the border's colour belongs to the object


class Judge:
    """Compares with training pictures of each concept: every size of SIZES, as it is and mirrored.

    `references` has the shape (sizes, concepts, side, side, 3).
    """

    def __init__(self, references: Picture) -> None:
        sides = [side for size in references for side in (size, size[:, :, ::-1])]
        self.coloured = np.stack([_flatten(centre(s)) for s in sides])
        self.grey = np.stack([_flatten(grey(centre(s))) for s in sides])

    def order(self, pictures: Picture) -> npt.NDArray[np.intp]:
        """Of each picture every concept's number, the nearest first, (n, concepts)."""
        return _distances(_flatten(centre(pictures)), self.coloured).argsort(1, kind="stable")

    def order_by_shade(self, pictures: Picture) -> npt.NDArray[np.intp]:
        """The same, blind to colour: in grey, from the darkest to the lightest of the object."""
        return _distances(_flatten(grey(centre(pictures))), self.grey).argsort(1, kind="stable")


def references(images: Sequence[Image.Image], side: int = 64) -> Picture:
    """One centred picture of each concept at each size, (sizes, concepts, side, side, 3)."""
    images = [image.convert("RGBA") for image in images]
    return np.stack([np.stack([place(image, size, size=side) for image in images]) for size in SIZES])


def originals(kept: Sequence[Emoji]) -> list[Image.Image]:
    """The packages' pictures of the concepts."""
    return [Image.open(e.picture) for e in kept]


def write_tiles(file: Path, kept: Sequence[Emoji]) -> None:
    """Write one picture of 32x32 pixels of each concept, 25 a row: references for whoever has no packages at hand."""
    tiles = [Image.fromarray(place(image.convert("RGBA"), 1.0, size=SIDE)) for image in originals(kept)]
    canvas = Image.new("RGB", (ACROSS * SIDE, -(-len(tiles) // ACROSS) * SIDE), "white")
    for i, tile in enumerate(tiles):
        canvas.paste(tile, (i % ACROSS * SIDE, i // ACROSS * SIDE))
    canvas.save(file, quality=90, method=6)


def read_tiles(file: Path, count: int) -> list[Image.Image]:
    """The pictures of such a file, in the order of names.tsv."""
    with Image.open(file) as canvas:
        corners = [(i % ACROSS * SIDE, i // ACROSS * SIDE) for i in range(count)]
        return [canvas.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]


def places(order: npt.NDArray[np.intp], right: list[set[int]]) -> npt.NDArray[np.intp]:
    """Where in each row of `order` the first right concept stands; 0 is the nearest."""
    return np.array(
        [next(i for i, c in enumerate(row) if int(c) in wanted) for row, wanted in zip(order, right, strict=True)]
    )


def centre(pictures: Picture) -> npt.NDArray[np.float32]:
    """Pictures with their object's box in the middle, (n, 32, 32, 3), 0 to 1."""
    return np.stack([_centre(p) for p in pictures])


def _centre(picture: Picture) -> npt.NDArray[np.float32]:
    side = len(picture)
    rows, columns = np.nonzero(object_mask(picture))
    moved = picture
    if len(rows):
        down, right = ((side - 1 - int(a.min()) - int(a.max())) // 2 for a in (rows, columns))
        moved = np.empty_like(picture)
        moved[:] = ground(picture)
        target, source = zip(_overlap(down, side), _overlap(right, side), strict=True)
        moved[target] = picture[source]
    small = Image.fromarray(moved).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def _overlap(shift: int, side: int) -> tuple[slice, slice]:
    return slice(max(shift, 0), side + min(shift, 0)), slice(max(-shift, 0), side + min(-shift, 0))


def ground(picture: Picture) -> npt.NDArray[np.uint8]:
    """The colour of the picture's border."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    return np.median(border, axis=0).astype(np.uint8)


def object_mask(picture: Picture) -> npt.NDArray[np.bool_]:
    """Which pixels show the object: those unlike the ground."""
    return np.abs(picture.astype(np.int16) - ground(picture)).max(-1) > CONTRAST


def grey(pictures: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Centred pictures without colour: the object's darkest is 0, its lightest 1, the ground 1.5."""
    tone = pictures @ np.array([0.299, 0.587, 0.114], np.float32)
    seen = np.stack([object_mask((p * 255).astype(np.uint8)) for p in pictures])
    for i, mask in enumerate(seen):
        if mask.any():
            low, high = np.quantile(tone[i][mask], [0.03, 0.97])
            tone[i] = np.clip((tone[i] - low) / max(high - low, 0.05), 0, 1)
    return np.where(seen, tone, np.float32(1.5))


def colour_of(picture: Picture, emoji: Emoji) -> str:
    """The colour word whose recolouring of `emoji` has the mean colour nearest to that of the picture's object."""
    image = Image.open(emoji.picture).convert("RGBA")
    wanted = _mean_colour(picture)
    distance = {c: np.abs(wanted - _mean_colour(place(colourise(image, c), 0.92))).sum() for c in COLOURS}
    return min(distance, key=lambda c: distance[c])


def _mean_colour(picture: Picture) -> npt.NDArray[np.float64]:
    mask = object_mask(picture)
    return picture[mask].mean(0) if mask.any() else ground(picture).astype(np.float64)


def _flatten(pictures: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return pictures.reshape(len(pictures), -1)


def _distances(pictures: npt.NDArray[np.float32], references: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    squares = (pictures**2).sum(1)[:, None]
    return np.min([squares - 2 * pictures @ r.T + (r**2).sum(1)[None] for r in references], axis=0)
