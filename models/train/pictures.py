"""What the model learns from: the concepts kept, and their pictures in many poses, colours and styles."""

import colorsys
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.train.sources import FLAT, Emoji, emojis, fetch

SIZE = 64
KEPT = 600
FACES = 24
SEED = 20261124
ANIMALS, FOOD, TRAVEL, ACTIVITIES, OBJECTS, SMILEYS = 3, 4, 5, 6, 7, 0

# Hue (0 to 1), saturation and the value of the middle tone: what a colour word paints a picture with.
COLOURS = {
    "red": (0.99, 0.85, 0.85),
    "orange": (0.08, 0.95, 0.95),
    "yellow": (0.145, 0.9, 0.95),
    "green": (0.34, 0.75, 0.65),
    "blue": (0.6, 0.85, 0.85),
    "purple": (0.77, 0.7, 0.75),
    "pink": (0.92, 0.5, 0.97),
    "brown": (0.06, 0.65, 0.5),
    "grey": (0.6, 0.03, 0.6),
}
COLOURS_EACH = 5  # of nine: the pairs left out are those a colour test may ask for

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Pool:
    """Every training picture: `images` (n, 64, 64, 3) uint8; for each its concept, its colour word and its style."""

    images: Picture
    concept: npt.NDArray[np.int16]
    colour: npt.NDArray[np.int8]  # index into COLOURS, -1: as it is
    style: npt.NDArray[np.int8]  # index into STYLES


STYLES = ("3d", "flat", "night")


def keep(found: list[Emoji]) -> list[Emoji]:
    """The concepts the model is taught: animals, foods, hearts, some faces, and the most distinct of the rest."""
    hearts = [e for e in found if e.group == SMILEYS and "heart" in e.name.split() and " " in e.name]
    faces = [e for e in found if e.group == SMILEYS and e not in hearts]
    faces = _most_distinct(faces, FACES)
    always = [e for e in found if e.group in (ANIMALS, FOOD)] + hearts + faces
    rest = [e for e in found if e.group in (TRAVEL, ACTIVITIES, OBJECTS) and not _is_clock(e)]
    chosen = _most_distinct(always, KEPT - KEPT // 3)
    chosen += _most_distinct(rest, KEPT - len(chosen))
    return [e for e in found if e in chosen]


def _is_clock(emoji: Emoji) -> bool:
    return "o\u2019clock" in emoji.name or "-thirty" in emoji.name


def _most_distinct(candidates: list[Emoji], count: int) -> list[Emoji]:
    """Drop one of the closest pair again and again: what is left differs most."""
    small = np.stack([render(e, 32) for e in candidates]).astype(np.float32).reshape(len(candidates), -1)
    distance = ((small[:, None] - small[None]) ** 2).mean(-1)
    np.fill_diagonal(distance, np.inf)
    alive = list(range(len(candidates)))
    while len(alive) > count:
        among = distance[np.ix_(alive, alive)]
        alive.pop(int(np.unravel_index(among.argmin(), among.shape)[0]))
    return [candidates[i] for i in alive]


def render(emoji: Emoji, size: int = SIZE) -> Picture:
    """The emoji upright and centred on white, (size, size, 3)."""
    return place(Image.open(emoji.picture).convert("RGBA"), 1.0, size=size)


def place(image: Image.Image, scale: float, dx: int = 0, dy: int = 0, size: int = SIZE) -> Picture:
    """The picture on white, `scale` of the side wide, `dx` and `dy` pixels off the middle."""
    side = round(size * scale)
    small = image.resize((side, side), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    canvas.alpha_composite(_inside(small, size, dx, dy))
    return np.asarray(canvas.convert("RGB"))


def _inside(small: Image.Image, size: int, dx: int, dy: int) -> Image.Image:
    layer = Image.new("RGBA", (size, size))
    layer.paste(small, ((size - small.width) // 2 + dx, (size - small.height) // 2 + dy))
    return layer


def colourise(image: Image.Image, colour: str) -> Image.Image:
    """The picture in shades of one colour; its lights and shadows, and its transparency, stay."""
    hue, saturation, value = COLOURS[colour]
    tone = np.asarray(image.convert("L"), np.float32) / 255
    alpha = np.asarray(image.getchannel("A"))
    seen = tone[alpha > 128] if (alpha > 128).any() else tone.ravel()
    low, high = np.quantile(seen, [0.03, 0.97])
    tone = np.clip((tone - low) / max(high - low, 0.05), 0, 1)[..., None]
    middle = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    dark, light = middle * 0.35, middle * 0.45 + 0.55
    shade = np.where(tone < 0.6, dark + (middle - dark) * tone / 0.6, middle + (light - middle) * (tone - 0.6) / 0.4)
    return Image.fromarray(np.dstack([(shade * 255).astype(np.uint8), alpha]), "RGBA")


def night(image: Image.Image) -> Image.Image:
    """The picture in neon on a dark ground: the palette of the second adapter."""
    tone = np.asarray(image.convert("L"), np.float32) / 255
    alpha = np.asarray(image.getchannel("A"), np.float32)[..., None] / 255
    stops = np.array([[24, 16, 64], [120, 30, 160], [240, 60, 170], [90, 220, 250], [240, 255, 255]], np.float32)
    at = [0.0, 0.3, 0.55, 0.8, 1.0]
    shade = np.dstack([np.interp(tone, at, stops[:, c]) for c in range(3)])
    ground = np.array([14, 12, 44], np.float32)
    return Image.fromarray((shade * alpha + ground * (1 - alpha)).astype(np.uint8)).convert("RGBA")


def flat(emoji: Emoji, icons: dict[str, str], chars: dict[str, str]) -> Image.Image | None:
    """The same emoji in the flat style, 256 pixels wide, or None where that package has none."""
    import resvg_py

    name = chars.get(emoji.code.replace("-fe0f", "")) or chars.get(emoji.code)
    body = icons.get(name or "")
    if not body:
        return None
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="256" height="256" viewBox="0 0 32 32">{body}</svg>'
    from io import BytesIO

    return Image.open(BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def colours_of(index: int) -> list[str]:
    """The colour words concept `index` is shown in while training; no caption holds the others."""
    return random.Random(SEED * 1000 + index).sample(list(COLOURS), COLOURS_EACH)


def pool(folder: Path) -> tuple[list[Emoji], Pool]:
    """Render every training picture once, or read what an earlier call rendered. 24 + 10 + 4 + 4 pictures a concept."""
    kept = keep(emojis(folder / "npm"))
    file = folder / "pool.npz"
    if not file.exists():
        np.savez(file, **_render_all(kept, fetch(FLAT, folder / "npm")))
    with np.load(file) as saved:
        return kept, Pool(**{name: saved[name] for name in ("images", "concept", "colour", "style")})


def _render_all(kept: list[Emoji], flat_package: Path) -> dict[str, npt.NDArray[np.generic]]:
    rng = random.Random(SEED)
    icons = {k: v["body"] for k, v in json.loads((flat_package / "icons.json").read_text())["icons"].items()}
    chars = json.loads((flat_package / "chars.json").read_text())
    names = list(COLOURS)
    rows: list[tuple[Picture, int, int, int]] = []
    for index, emoji in enumerate(kept):
        image = Image.open(emoji.picture).convert("RGBA")
        rows += [(_pose(image, rng), index, -1, 0) for _ in range(24)]
        for colour in colours_of(index):
            painted = colourise(image, colour)
            rows += [(_pose(painted, rng), index, names.index(colour), 0) for _ in range(2)]
        if plain := flat(emoji, icons, chars):
            rows += [(_pose(plain, rng), index, -1, 1) for _ in range(4)]
        rows += [(_night_pose(image, rng), index, -1, 2) for _ in range(4)]
    images, concept, colour, style = zip(*rows, strict=True)
    return {
        "images": np.stack(images),
        "concept": np.array(concept, np.int16),
        "colour": np.array(colour, np.int8),
        "style": np.array(style, np.int8),
    }


def _pose(image: Image.Image, rng: random.Random) -> Picture:
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return place(image, rng.uniform(0.84, 1.0), rng.randint(-4, 4), rng.randint(-4, 4))


def _night_pose(image: Image.Image, rng: random.Random) -> Picture:
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = round(SIZE * rng.uniform(0.84, 1.0))
    small = image.resize((side, side), Image.Resampling.LANCZOS)
    layer = _inside(small, SIZE, rng.randint(-4, 4), rng.randint(-4, 4))
    return np.asarray(night(layer).convert("RGB"))
