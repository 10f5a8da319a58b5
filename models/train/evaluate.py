"""Evaluate: what the exported folder paints, measured; rows 1 to 5 of the model's acceptance."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
import transformers
from diffusers import StableDiffusionPipeline

from models.train import autoencoder, card, judge, prompts
from models.train.judge import Judge, places
from models.train.lora import ADAPTERS
from models.train.pictures import Picture
from models.train.sheet import contact_sheet, side_by_side
from models.train.sources import Emoji
from models.train.words import name

STEPS, GUIDANCE = 20, 5.0
ROWS = 24  # pictures a call of the pipeline
Figures = dict[str, Any]


@dataclass(eq=False)
class Studio:
    """The exported folder's pipeline, the concepts it knows, and where its sheets are written."""

    target: Path
    pipe: StableDiffusionPipeline
    kept: Sequence[Emoji]
    judge: Judge
    folder: Path

    def paint(self, asked: Sequence[str], seeds: Sequence[int], **options: Any) -> Picture:
        """One picture a prompt, (n, 64, 64, 3); each from its own seed, whatever is painted beside it."""
        parts = []
        negative = options.pop("negative_prompt", None)
        for i in range(0, len(asked), ROWS):
            generators = [torch.Generator("cpu").manual_seed(s) for s in seeds[i : i + ROWS]]
            given = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE} | options
            if negative:
                given["negative_prompt"] = list(negative[i : i + ROWS])
            images = self.pipe(list(asked[i : i + ROWS]), generator=generators, output_type="np", **given).images
            parts.append((images * 255).round().astype(np.uint8))
        return np.concatenate(parts)

    def places(self, pictures: Picture, right: Sequence[set[int]]) -> npt.NDArray[np.intp]:
        """At which place the right concept is, 0 the nearest."""
        return places(self.judge.order(pictures), list(right))


def open_studio(target: Path, kept: Sequence[Emoji], folder: Path) -> Studio:
    """Load the exported folder as anybody would."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(target, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return Studio(target, pipe, kept, Judge(judge.references(judge.originals(kept))), folder)


def evaluate(target: Path, kept: list[Emoji], folder: Path) -> Figures:
    """Measure everything but speed, write evaluation.json, the card and the sheets; the figures."""
    studio = open_studio(target, kept, folder)
    figures: Figures = {}
    for part in (names, reconstruction, words, sheet, unseen_colours, negative_prompt, guidance, steps, adapters):
        began = time.monotonic()
        figures |= part(studio)
        print(f"{part.__name__}: {time.monotonic() - began:.0f} s")
    write(target, figures)
    return figures


def write(target: Path, figures: Figures) -> None:
    """Add the figures to the folder's evaluation.json and fill in its card."""
    file = target / "evaluation.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | figures, indent=1) + "\n")
    card.write(target)


def names(studio: Studio) -> Figures:
    """Row 1: the names of 200 concepts."""
    chosen = prompts.names(studio.kept)
    pictures = studio.paint([name(studio.kept[i]) for i in chosen], chosen)
    found = studio.places(pictures, [{i} for i in chosen])
    contact_sheet(studio.folder / "names.png", pictures, 20, [name(studio.kept[i]) for i in chosen])
    missed = [name(studio.kept[i]) for i, place in zip(chosen, found, strict=True) if place > 4]
    return {"names": rates(found) | {"not_among_five": missed}}


def rates(found: npt.NDArray[np.intp]) -> Figures:
    """Of places the share of firsts and of those among the first five."""
    return {"count": len(found), "first": share(found < 1), "among_five": share(found < 5)}


def share(right: npt.NDArray[np.bool_] | Sequence[bool]) -> float:
    return round(float(np.mean(right)), 4)


def reconstruction(studio: Studio) -> Figures:
    """Row 1: the autoencoder over one picture of each kept concept."""
    references = judge.references(judge.originals(studio.kept))[-1]
    error = ((autoencoder.reconstruct(studio.pipe.vae, references).astype(np.float32) - references) / 127.5) ** 2
    each = [autoencoder.psnr(e) for e in error.mean((1, 2, 3))]
    return {"autoencoder": {"psnr": round(autoencoder.psnr(error.mean()), 2), "psnr_mean": round(np.mean(each), 2)}}


def words(studio: Studio) -> Figures:
    """Row 2: keywords and sentences."""
    asked = prompts.keywords(studio.kept)
    right = [prompts.holders(k, studio.kept) for k in asked]
    pictures = studio.paint(asked, range(len(asked)))
    keywords = studio.places(pictures, right)
    contact_sheet(studio.folder / "keywords.png", pictures, 20, asked)
    sentences = list(prompts.SENTENCES)
    meant = [{prompts.index_of(n, studio.kept) for n in prompts.SENTENCES[s]} for s in sentences]
    pictures = studio.paint(sentences, range(len(sentences)))
    found = studio.places(pictures, meant)
    contact_sheet(studio.folder / "sentences.png", pictures, 8, sentences)
    missed = [s for s, place in zip(sentences, found, strict=True) if place > 4]
    return {
        "keywords": rates(keywords)
        | {"not_among_five": [k for k, place in zip(asked, keywords, strict=True) if place > 4]},
        "sentences": rates(found) | {"not_among_five": missed},
    }


def sheet(studio: Studio) -> Figures:
    """Row 3: 48 prompts from three seeds, and how much the seeds differ; the README's picture."""
    each = [studio.paint(prompts.SHEET, [seed] * len(prompts.SHEET)) for seed in (1, 2, 3)]
    contact_sheet(studio.folder / "sheet.png", side_by_side(*each), 8, prompts.SHEET)
    values = np.stack(each).astype(np.float32)
    apart = np.mean([np.abs(values[a] - values[b]).mean((1, 2, 3)) for a, b in ((0, 1), (0, 2), (1, 2))], axis=0)
    judge.write_tiles(studio.folder / "references.webp", studio.kept)
    contact_sheet(studio.folder / "gallery.png", studio.paint(prompts.GALLERY, range(len(prompts.GALLERY))), 10)
    return {"seeds": {"mean_difference": round(float(apart.mean()), 2), "least": round(float(apart.min()), 2)}}


def unseen_colours(studio: Studio) -> Figures:
    """Row 3: a colour word before an object it never stood before."""
    pairs = prompts.unseen_colours(studio.kept)
    asked = [f"{colour} {name(studio.kept[i])}" for i, colour in pairs]
    pictures = studio.paint(asked, range(len(asked)))
    found = places(studio.judge.order_by_shade(pictures), [{i} for i, _ in pairs])
    painted = [judge.colour_of(p, studio.kept[i]) for p, (i, _) in zip(pictures, pairs, strict=True)]
    right = [got == colour for got, (_, colour) in zip(painted, pairs, strict=True)]
    contact_sheet(studio.folder / "unseen_colours.png", pictures, 10, asked)
    both = share((found < 5) & np.array(right))
    wrong = [f"{a} ({got})" for a, got, ok in zip(asked, painted, right, strict=True) if not ok]
    return {"unseen_colours": rates(found) | {"colour": share(right), "both": both, "wrong_colour": wrong}}


def negative_prompt(studio: Studio) -> Figures:
    """Row 4: a broad word, and again without what it showed first."""
    asked = [word for word in prompts.BROAD for _ in range(4)]
    seeds = list(range(len(asked)))
    before = studio.paint(asked, seeds)
    shown = studio.judge.order(before)[:, 0]
    after = studio.paint(asked, seeds, negative_prompt=[name(studio.kept[i]) for i in shown])
    order = studio.judge.order(after)
    kinds = [prompts.holders(word, studio.kept) for word in asked]
    contact_sheet(studio.folder / "negative_prompt.png", side_by_side(before, after), 8, asked)
    return {
        "negative_prompt": {
            "count": len(asked),
            "still_shown": share(order[:, 0] == shown),
            "of_the_kind_before": share([int(i) in kind for i, kind in zip(shown, kinds, strict=True)]),
            "of_the_kind_after": share([int(i) in kind for i, kind in zip(order[:, 0], kinds, strict=True)]),
            "mean_difference": round(difference(before, after), 2),
        }
    }


def difference(a: Picture, b: Picture) -> float:
    """The mean absolute difference, of 255."""
    return float(np.abs(a.astype(np.int16) - b).mean())


def guidance(studio: Studio) -> Figures:
    """Row 4: guidance 1 to 8, on every sixth name."""
    return {"guidance": _sweep(studio, "guidance_scale", (1.0, 3.0, 5.0, 8.0))}


def steps(studio: Studio) -> Figures:
    """Row 4: 4 to 50 steps, on every sixth name."""
    return {"steps": _sweep(studio, "num_inference_steps", (4, 8, 20, 50))}


def _sweep(studio: Studio, option: str, values: Sequence[float]) -> Figures:
    chosen = prompts.names(studio.kept)[1::2]
    asked = [name(studio.kept[i]) for i in chosen]
    each = [studio.paint(asked, chosen, **{option: value}) for value in values]
    contact_sheet(studio.folder / f"{option}.png", side_by_side(*(p[:24] for p in each)), 4, asked[:24])
    return {
        str(value): rates(studio.places(pictures, [{i} for i in chosen]))
        | {"difference_from_last": round(difference(pictures, each[-1]), 2), "saturation": saturation(pictures)}
        for value, pictures in zip(values, each, strict=True)
    }


def saturation(pictures: Picture) -> float:
    """The mean saturation (of HSV, 0 to 1) of the objects' pixels."""
    objects = np.concatenate([p[judge.object_mask(p)] for p in pictures]).astype(np.float32)
    return round(float(((objects.max(1) - objects.min(1)) / np.maximum(objects.max(1), 1)).mean()), 3)


def brightness(pictures: Picture) -> float:
    """The mean brightness of whole pictures, 0 to 255."""
    return round(float(pictures.mean()), 1)


def shading(pictures: Picture) -> float:
    """The share of the object's neighbouring pixels, at half the size, that differ by 5 to 24 of 255: shades."""
    count, side = len(pictures), pictures.shape[1] // 2
    halved = pictures.reshape(count, side, 2, side, 2, 3).mean((2, 4))
    inside = np.stack([judge.object_mask(p.astype(np.uint8)) for p in halved])
    step = np.abs(halved[:, :, 1:] - halved[:, :, :-1]).max(-1)
    return share(((step >= 5) & (step <= 24))[inside[:, :, 1:] & inside[:, :, :-1]])


STATISTICS: dict[str, Callable[[Picture], float]] = {
    "brightness": brightness,
    "saturation": saturation,
    "shading": shading,
}


def adapters(studio: Studio) -> Figures:
    """Row 5: each adapter at weight 0, 0.5 and 1."""
    chosen = prompts.names(studio.kept)[:96:2]
    asked = [name(studio.kept[i]) for i in chosen]
    figures: Figures = {}
    for style in ADAPTERS:
        file = f"{style}.safetensors"
        studio.pipe.load_lora_weights(studio.target / "loras", weight_name=file, adapter_name=style)
        each = []
        for weight in (0.0, 0.5, 1.0):
            studio.pipe.set_adapters(style, weight)
            each.append(studio.paint(asked, chosen))
        studio.pipe.unload_lora_weights()
        contact_sheet(studio.folder / f"lora_{style}.png", side_by_side(*each), 8, asked)
        figures[style] = {
            str(weight): {key: measure(p) for key, measure in STATISTICS.items()}
            | {"among_five_by_shade": share(places(studio.judge.order_by_shade(p), [{i} for i in chosen]) < 5)}
            for weight, p in zip((0.0, 0.5, 1.0), each, strict=True)
        }
    return {"adapters": figures}
